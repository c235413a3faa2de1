"""The command `pretrain export`: a run's weights and tokenizer as a Hugging Face folder."""

import logging
from pathlib import Path

import torch

from pretrain.config import ExportConfig
from pretrain.data.manifest import Manifest
from pretrain.data.store import open_manifest, train_order
from pretrain.data.tokenizer import Tokenizer
from pretrain.engine.checkpoint import load_weights, read_optimizer_steps
from pretrain.errors import ConfigError, PretrainError
from pretrain.loop.state import check_same_data, check_same_tokenizer
from pretrain.loop.trained import Trained, check_is_here, load_trained
from pretrain.model.depth import Depth
from pretrain.model.huggingface.moments import save_moments
from pretrain.model.huggingface.save import save_pretrained
from pretrain.model_card import model_card

log = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")


def main(config: ExportConfig) -> None:
    """Write the folder, whole or not at all, and say how to load it."""
    folder, options = Path(config.export.to), config.export
    trained = load_trained(
        config.run.dir, torch.device("cpu"), step=options.step, dtype=torch.float32
    )
    check_is_here(config.run.dir, "tokenizer.path", trained.config.tokenizer.path)
    tokenizer = Tokenizer.load(trained.config.tokenizer.path)
    check_same_tokenizer(trained.state, tokenizer.sha256, trained.config.tokenizer.path)
    depth = trained.config.depth
    backprop = min(depth.backprop, depth.mean)
    trained.model.usual_depth = Depth(no_grad=depth.mean - backprop, with_grad=backprop)
    moments = _read_moments(trained) if options.moments else None
    save_pretrained(
        trained.model,
        folder,
        tokenizer=tokenizer,
        dtype=getattr(torch, options.dtype.value),
        card=_card(trained, tokenizer),
    )
    if moments is not None:
        save_moments(folder, moments, read_optimizer_steps(trained.folder))
    print(
        f"exported step {trained.step} of {config.run.dir} to {folder} ({options.dtype.value})\n"
        f"next: AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        f"      pretrain adopt hf={folder} run.dir=..."
    )


def _read_moments(trained: Trained) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    try:
        mean, square = (load_weights(trained.folder, section) for section in MOMENTS)
    except PretrainError as error:
        raise ConfigError(f"export.moments=true: {error} Export without moments.") from error
    return {name: (mean[name], square[name]) for name in mean}


def _card(trained: Trained, tokenizer: Tokenizer) -> str:
    manifest = _manifest(trained)
    return model_card(
        trained.config,
        trained.state,
        tokenizer,
        parameters=sum(parameter.numel() for parameter in trained.model.parameters()),
        manifest=manifest,
        shares={} if manifest is None else _shares(trained, manifest),
    )


def _manifest(trained: Trained) -> Manifest | None:
    """Of the shards that the run has read, if they are still there."""
    data = trained.config.data
    if "data_fingerprint" not in trained.state:
        return None
    try:
        manifest = open_manifest(data)
        check_same_data(trained.state, manifest.fingerprint, data.shards)
    except PretrainError as error:
        log.warning("the model card tells nothing of the sources: %s", error)
        return None
    return manifest


def _shares(trained: Trained, manifest: Manifest) -> dict[str, float]:
    """Of the rows that the run has read so far."""
    order = train_order(trained.config.data, manifest, trained.config.run.seed)
    rows = trained.state["train"]["rows"]
    counts = order.mixture.counts(rows).tolist()
    return {
        source.name: count / max(rows, 1)
        for source, count in zip(manifest.sources, counts, strict=True)
    }
