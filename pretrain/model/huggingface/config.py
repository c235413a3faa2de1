"""config.json of the published format: read strictly, written whole."""

import difflib
import json
import math
from pathlib import Path
from typing import Any

from pretrain.errors import CheckpointError, ConfigError
from pretrain.model.config import Block, Injection, ModelConfig
from pretrain.model.depth import Depth

# What the published model trained with; written if a model does not say how it is used.
PUBLISHED_DEPTH = Depth(no_grad=24, with_grad=8)

_PUBLISHED_PADDING = 4096
_MODELING_FILE = "modeling_huginn"

# What this code's model is; a folder that says otherwise is another model.
_FIXED: dict[str, Any] = {
    "model_type": "huginn_raven",
    "block_class_name": "SandwichBlock",
    "norm_class_name": "RMSNorm_llama",
    "mlp_class_name": "GatedMLP",
    "nonlin_name": "SiLU",
    "injection_type": "linear",
    "qk_bias": True,
    "bias": False,
    "tie_embeddings": True,
}
# The same, where older folders may leave the key out.
_FIXED_IF_PRESENT: dict[str, Any] = {
    "architecture_class_name": "RecurrentGPT",
    "state_init": "like-init",
    "test_time_noise": 0,
    "tie_word_embeddings": True,
}
_COUNTS = (
    "n_embd",
    "n_heads",
    "intermediate_size",
    "n_layers_in_prelude",
    "n_layers_in_recurrent_block",
    "n_layers_in_coda",
    "vocab_size",
    "padded_vocab_size",
    "block_size",
    "mean_recurrence",
    "mean_backprop_depth",
)
_REALS = ("rope_base", "norm_eps")
# Follow from the others; `_check_derived` compares them.
_DERIVED = ("n_layers", "head_dim", "num_key_value_heads", "init_values")
# How the weights came about and were trained, or bookkeeping: nothing that a forward pass reads.
_HISTORY = frozenset(
    """activation_checkpoint_impl effective_expected_depth init_orthogonal init_strategy
    padding_multiple sampling_scheme test_time_noise_type architectures auto_map""".split()  # noqa: SIM905
)
# What transformers 4.x and 5.x keep in any config.json, generation settings of 4.x included.
_BOOKKEEPING = frozenset(
    """_name_or_path _commit_hash _attn_implementation_autoset transformers_version dtype
    torch_dtype use_cache return_dict output_hidden_states output_attentions torchscript
    use_bfloat16 tf_legacy_loss is_decoder finetuning_task id2label label2id num_labels
    tokenizer_class prefix bos_token_id eos_token_id pad_token_id sep_token_id
    decoder_start_token_id task_specific_params problem_type max_length min_length do_sample
    early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids num_return_sequences output_scores return_dict_in_generate
    forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens""".split()  # noqa: SIM905
)
# Also theirs, but each would change the forward pass unless it is empty.
_MUST_BE_EMPTY = frozenset(
    """add_cross_attention chunk_size_feed_forward cross_attention_hidden_size is_encoder_decoder
    tie_encoder_decoder pruned_heads quantization_config rope_scaling rope_parameters""".split()  # noqa: SIM905
)
_KNOWN = (
    {*_FIXED, *_FIXED_IF_PRESENT, *_COUNTS, *_REALS, *_DERIVED}
    | _HISTORY
    | _BOOKKEEPING
    | _MUST_BE_EMPTY
)


def read_config(folder: str | Path) -> tuple[ModelConfig, Depth]:
    """Shape and usual depth of the model in a Hugging Face folder, from its config.json.

    Raises CheckpointError for keys that are missing, unknown, of a wrong type, or those of
    another model.
    """
    path = Path(folder) / "config.json"
    found = read_json(path)
    try:
        _check_keys(found)
        _check_fixed(found)
        _check_types(found)
        config = ModelConfig(
            name=Path(folder).resolve().name,
            width=found["n_embd"],
            heads=found["n_heads"],
            inner=found["intermediate_size"],
            prelude_layers=found["n_layers_in_prelude"],
            core_layers=found["n_layers_in_recurrent_block"],
            coda_layers=found["n_layers_in_coda"],
            vocabulary_size=found["padded_vocab_size"],
            context=found["block_size"],
            rope_base=float(found["rope_base"]),
            norm_epsilon=float(found["norm_eps"]),
        )
        _check_derived(found, config)
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    mean, backprop = found["mean_recurrence"], found["mean_backprop_depth"]
    return config, Depth(no_grad=mean - backprop, with_grad=backprop)


def write_config(config: ModelConfig, usual_depth: Depth, dtype: str) -> dict[str, Any]:
    """config.json of a model, key by key as the published one.

    Raises ConfigError if the model is a variant that the published format has no words for.
    """
    _check_published(config)
    mean = usual_depth.total
    edges = config.prelude_layers + config.coda_layers
    layers = edges + config.core_layers * mean
    std = math.sqrt(2 / (5 * config.width))
    rows = config.vocabulary_size
    return _FIXED | {
        "activation_checkpoint_impl": "per-iteration",
        "architecture_class_name": "RecurrentGPT",
        "architectures": ["RavenForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{_MODELING_FILE}.RavenConfig",
            "AutoModelForCausalLM": f"{_MODELING_FILE}.RavenForCausalLM",
        },
        "block_size": config.context,
        "effective_expected_depth": layers,
        "head_dim": config.head_width,
        "init_orthogonal": False,
        "init_strategy": "takase",
        "init_values": {
            "embed_scale": math.sqrt(config.width),
            "embedding": std,
            "out_proj": std / math.sqrt(2 * layers),
            "std": std,
        },
        "intermediate_size": config.inner,
        "mean_backprop_depth": usual_depth.with_grad,
        "mean_recurrence": mean,
        "n_embd": config.width,
        "n_heads": config.heads,
        "n_layers": edges + config.core_layers,
        "n_layers_in_coda": config.coda_layers,
        "n_layers_in_prelude": config.prelude_layers,
        "n_layers_in_recurrent_block": config.core_layers,
        "norm_eps": config.norm_epsilon,
        "num_key_value_heads": config.heads,
        "padded_vocab_size": rows,
        "padding_multiple": rows if rows % _PUBLISHED_PADDING else _PUBLISHED_PADDING,
        "rope_base": int(config.rope_base) if config.rope_base % 1 == 0 else config.rope_base,
        "sampling_scheme": "poisson-lognormal-filling",
        "state_init": "like-init",
        "test_time_noise": 0,
        "test_time_noise_type": "fixed",
        "torch_dtype": dtype,
        # The oldest release that the modeling file is tested with.
        "transformers_version": "4.53.2",
        "vocab_size": rows,
    }


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; is this a Hugging Face folder?") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds a {type(found).__name__}, not an object.")
    return found


def _check_keys(found: dict[str, Any]) -> None:
    # Another model has other keys; its type is the better message.
    if found.get("model_type", _FIXED["model_type"]) == _FIXED["model_type"]:
        unknown = []
        for key in sorted(found.keys() - _KNOWN):
            near = difflib.get_close_matches(key, sorted(_KNOWN), n=1)
            unknown.append(f"{key!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
        if unknown:
            raise CheckpointError(
                f"the key {', '.join(unknown)} is unknown; nothing here would obey it. "
                "Remove it if it does not change the model."
            )
    missing = [key for key in (*_FIXED, *_COUNTS, *_REALS) if key not in found]
    if missing:
        raise CheckpointError(f"the key {', '.join(map(repr, missing))} is missing.")


def _check_fixed(found: dict[str, Any]) -> None:
    for key, wanted in (_FIXED | _FIXED_IF_PRESENT).items():
        value = found.get(key, wanted)
        # `1` is no `True` here; 0 and 0.0 are the same number.
        if value != wanted or isinstance(value, bool) is not isinstance(wanted, bool):
            raise CheckpointError(f"{key}={value!r}, but only {wanted!r} is this model.")
    for key in sorted(_MUST_BE_EMPTY & found.keys()):
        if found[key]:
            raise CheckpointError(f"{key}={found[key]!r}, but this model knows nothing of it.")


def _check_types(found: dict[str, Any]) -> None:
    for key in _COUNTS:
        value = found[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"{key}={value!r} must be a whole number of at least 1.")
    for key in _REALS:
        value = found[key]
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e300:
            raise CheckpointError(f"{key}={value!r} must be a number above 0.")
    if found["padded_vocab_size"] < found["vocab_size"]:
        raise CheckpointError(
            f"padded_vocab_size={found['padded_vocab_size']} is smaller than "
            f"vocab_size={found['vocab_size']}; the embedding has a row for every token."
        )


def _check_derived(found: dict[str, Any], config: ModelConfig) -> None:
    """Keys that repeat others must agree with them."""
    layers = config.prelude_layers + config.core_layers + config.coda_layers
    if found.get("num_key_value_heads", config.heads) != config.heads:
        raise CheckpointError(
            f"num_key_value_heads={found['num_key_value_heads']} differs from "
            f"n_heads={config.heads}; grouped-query attention is not this model."
        )
    for key, wanted in (("n_layers", layers), ("head_dim", config.head_width)):
        if found.get(key, wanted) != wanted:
            raise CheckpointError(f"{key}={found[key]!r}, but the other keys make it {wanted}.")
    values = found.get("init_values") or {}
    wanted_scale = math.sqrt(config.width)
    scale = values.get("embed_scale", wanted_scale) if isinstance(values, dict) else values
    if not isinstance(scale, int | float) or not math.isclose(scale, wanted_scale, rel_tol=1e-6):
        raise CheckpointError(
            f"init_values.embed_scale={scale!r}, but this model scales embedded tokens by "
            f"sqrt(n_embd) = {wanted_scale:g}."
        )


def _check_published(config: ModelConfig) -> None:
    # Not `documents`: a folder's text is one document, where both masks are the same.
    published = {
        "block": Block.sandwich,
        "norm_gain": True,
        "injection": Injection.linear,
        "embedding_scale": True,
        "qk_bias": True,
        "digit_positions": None,
    }
    for key, wanted in published.items():
        value = getattr(config, key)
        if value != wanted:
            raise ConfigError(
                f"model.{key}={getattr(value, 'value', value)} has no place in the published "
                f"format, which means {getattr(wanted, 'value', wanted)}; such a model cannot be "
                "exported."
            )
