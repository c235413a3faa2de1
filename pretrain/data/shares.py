"""How much of training comes from each source."""

from pretrain.data.config import DataConfig


def source_shares(config: DataConfig, sizes: dict[str, int]) -> dict[str, float]:
    """Each source's share, adding up to 1: by the weights, or without any by the sizes."""
    weights = {name: config.sources[name].weight for name in sizes if name in config.sources}
    given = {name: weight for name, weight in weights.items() if weight is not None}
    amounts: dict[str, float] = {name: given.get(name, 0.0) for name in sizes}
    if not given:
        amounts = {name: float(size) for name, size in sizes.items()}
    total = sum(amounts.values())
    return {name: amount / total if total else 0.0 for name, amount in amounts.items()}
