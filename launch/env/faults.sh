# shellcheck shell=bash
# Sourced by the launchers.

# A rank that dies inside a library (SIGSEGV, SIGABRT, SIGBUS) leaves its Python stack in its log.
export PYTHONFAULTHANDLER=${PYTHONFAULTHANDLER:-1}

# The last collectives of each rank, kept for the watchdog's verdict; the second name is older.
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
export TORCH_NCCL_TRACE_BUFFER_SIZE=${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}

# NCCL says nothing by default, not even why a connection failed.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
