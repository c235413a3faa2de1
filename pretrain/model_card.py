"""The README.md of an exported model: what it is, what it read, how to use it."""

import json
from typing import Any

from pretrain import __version__
from pretrain.config import TrainConfig
from pretrain.data.manifest import Manifest
from pretrain.data.tokenizer import Tokenizer
from pretrain.model.config import Law


def model_card(
    config: TrainConfig,
    state: dict[str, Any],
    tokenizer: Tokenizer,
    *,
    parameters: int,
    manifest: Manifest | None,
    shares: dict[str, float],
) -> str:
    """Markdown with a YAML header; `state` is the checkpoint's, `shares` the mixture trained on.

    Without the manifest the card says that the data are known by their fingerprint alone.
    """
    sections = [
        _header(manifest),
        f"# {config.run.name}\n\n{_what(config, parameters)}",
        f"## Training\n\n{_training(config, state)}",
        f"## Data\n\n{_data(state, manifest, shares)}",
        f"## Tokenizer\n\n{_tokenizer(tokenizer)}",
        f"## Use\n\n{_use(config)}",
    ]
    return "\n\n".join(sections) + "\n"


def _header(manifest: Manifest | None) -> str:
    licences = sorted({s.licence for s in manifest.sources if s.licence}) if manifest else []
    name = json.dumps("; ".join(licences) or "not stated", ensure_ascii=False)
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n"
        f"license: other\nlicense_name: {name}\n"
        "tags: [recurrent-depth, huginn, pretrain]\n---"
    )


def _what(config: TrainConfig, parameters: int) -> str:
    model, depth = config.model, config.depth
    if depth.law is Law.fixed:
        law = f"always {depth.mean} iterations"
    else:
        law = f"a random number of iterations around {depth.mean}"
    return (
        "A recurrent-depth language model in the architecture of Huginn-0125 (arXiv 2502.05171): "
        f"{parameters:,} parameters, width {model.width}, context {model.context}; "
        f"{model.prelude_layers} + {model.core_layers} + {model.coda_layers} layers of prelude, "
        "core and coda, of which the core runs any number of times. It was trained with "
        f"{law}, gradient through the last {depth.backprop}. More iterations (`num_steps`) are "
        "more thought per token, at the same size."
    )


def _training(config: TrainConfig, state: dict[str, Any]) -> str:
    train, optimizer, size = state["train"], config.optimizer, config.batch.global_tokens
    # a life may have changed the batch
    sizes = f" of {size:,}" if train["step"] * size == train["tokens"] else " of several sizes"
    lines = [
        f"- {train['tokens']:,} tokens in {train['step']:,} steps{sizes}, "
        f"in {config.engine.precision.value}",
        f"- {optimizer.name}, peak learning rate {optimizer.learning_rate:g}, weight decay "
        f"{optimizer.weight_decay:g}",
        f"- seed {config.run.seed}, made with pretrain {__version__}",
    ]
    if origin := state.get("adopted_from"):
        lines.insert(0, f"- continued from the weights of `{origin}`; tokens are those since")
    return "\n".join(lines)


def _data(state: dict[str, Any], manifest: Manifest | None, shares: dict[str, float]) -> str:
    fingerprint = state.get("data_fingerprint")
    if fingerprint is None:
        return "This run has read no data yet."
    if manifest is None:
        return f"Fingerprint `{fingerprint}`. Its manifest was not at hand when this was written."
    rows = [
        f"| {source.name} | {shares[source.name]:.2%} | {source.totals('train').tokens:,} | "
        f"{_cell(source.licence)} | {_cell(source.provenance)} |"
        for source in manifest.sources
    ]
    head = "| source | share | tokens there are | licence | provenance |\n|---|---|---|---|---|"
    return f"Fingerprint `{fingerprint}`.\n\n{head}\n" + "\n".join(rows)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split()) or "not stated"


def _tokenizer(tokenizer: Tokenizer) -> str:
    text = f"{tokenizer.vocabulary_size:,} pieces, sha256 `{tokenizer.sha256}`."
    if tokenizer.reads_special:
        return f"{text} The files are those that the weights came with."
    return (
        f"{text} `AutoTokenizer` gives the ids of training. It reads special tokens where a text "
        "spells them, which training never did: pass `split_special_tokens=True` for text that you "
        "do not trust."
    )


def _use(config: TrainConfig) -> str:
    depth = config.depth.mean
    return f"""```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
ids = tokenizer("The capital of Norway is", add_special_tokens=False).input_ids
input_ids = torch.tensor([[model.config.bos_token_id, *ids]])
logits = model(input_ids, num_steps={depth}).logits
settings = GenerationConfig(max_new_tokens=64)
text = model.generate(input_ids, settings, tokenizer=tokenizer, num_steps={depth})
```

`num_steps` is the depth of every token: fewer for speed, more for thought. In training every
document begins with the begin token. The recurrence starts at random; `init_scale=0` makes it start
at zero."""
