"""The published format: folders that Hugging Face transformers reads.

The modeling file beside this one is never imported here; it is copied into every folder written.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.model.huggingface.save import save_pretrained
    from pretrain.model.huggingface.weights import load_pretrained

__all__ = ["load_pretrained", "save_pretrained"]


def __getattr__(name: str) -> Any:
    """Both on first use, so that reading a config.json does not import torch."""
    if name == "load_pretrained":
        from pretrain.model.huggingface.weights import load_pretrained

        return load_pretrained
    if name == "save_pretrained":
        from pretrain.model.huggingface.save import save_pretrained

        return save_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
