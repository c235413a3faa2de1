"""Where the configuration tree lives: beside the package in a checkout, inside it in a wheel."""

from pathlib import Path


def config_source() -> str:
    """Hydra's address of conf/: a path in a checkout, pkg://pretrain.conf once installed."""
    beside = Path(__file__).resolve().parent.parent / "conf"
    return str(beside) if (beside / "train.yaml").is_file() else "pkg://pretrain.conf"
