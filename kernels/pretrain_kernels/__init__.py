"""Fused kernels of the recurrent core: torch and triton only, importable without a GPU."""
