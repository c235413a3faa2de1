"""Huginn, the recurrent-depth language model (arXiv 2502.05171), for transformers 4.5x and 5.x.

e      = prelude(sqrt(D) E[tokens])
s_t    = core(A [s_(t-1) ; e])              t = 1..num_steps, s_0 random unless given
logits = norm(coda(norm(s_r))) E^T          one norm, one E

This file stands alone: it needs torch and transformers, and travels with the weights. Names of
parameters and of the classes in config.json are the published model's.
"""

# B rows  T tokens of this call  S tokens with those in the cache  D width  H heads  K head width
# P = K / 2 pairs of a head's channels  V rows of the embedding

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

# Where a layer keeps its keys: part of the model, layer within it, iteration of the core.
Slot = tuple[str, int, int]

# huginn-0125's.
_DEFAULTS = {
    "n_embd": 5280,
    "n_heads": 55,
    "intermediate_size": 17920,
    "n_layers_in_prelude": 2,
    "n_layers_in_recurrent_block": 4,
    "n_layers_in_coda": 2,
    "vocab_size": 65536,
    "block_size": 4096,
    "mean_recurrence": 32,
    "mean_backprop_depth": 8,
    "rope_base": 50_000,
    "norm_eps": 1e-6,
}
_FIXED = {
    "block_class_name": "SandwichBlock",
    "norm_class_name": "RMSNorm_llama",
    "mlp_class_name": "GatedMLP",
    "nonlin_name": "SiLU",
    "injection_type": "linear",
    "qk_bias": True,
    "bias": False,
    "tie_embeddings": True,
}


class RavenConfig(PretrainedConfig):
    """Shape of the model and how deep it usually runs."""

    model_type = "huginn_raven"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "hidden_size": "n_embd",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "max_position_embeddings": "block_size",
    }

    def __init__(self, **kwargs: Any) -> None:
        for key, default in _DEFAULTS.items():
            setattr(self, key, kwargs.pop(key, default))
        self.padded_vocab_size = kwargs.pop("padded_vocab_size", self.vocab_size)
        for key, value in {**_FIXED, **self.derived()}.items():
            setattr(self, key, kwargs.pop(key, value))
        super().__init__(**kwargs)

    def derived(self) -> dict[str, int]:
        """What the keys that repeat others must be."""
        layers = self.n_layers_in_prelude + self.n_layers_in_recurrent_block + self.n_layers_in_coda
        width = self.n_embd // self.n_heads
        return {"n_layers": layers, "head_dim": width, "num_key_value_heads": self.n_heads}


@dataclass
class RavenOutput(ModelOutput):
    """What one forward pass gives."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    latent_states: Tensor | None = None
    hidden_states: Tensor | None = None


class RecurrentCache(Cache):
    """Keys and values by (part, layer, iteration), and which of the tokens read are no padding."""

    is_compileable = False

    # Not the base's: its arguments differ between releases. They all look into `layers`.
    def __init__(self) -> None:
        self.layers: list[Any] = []
        self.entries: dict[Slot, tuple[Tensor, Tensor]] = {}
        self.valid_BS: Tensor | None = None

    def extend(self, slot: Slot, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values; all of the slot's so far, [B, H, S, K] each."""
        read = self.get_seq_length()
        entry = self.entries.get(slot)
        held = 0 if entry is None else entry[0].shape[2]
        if held != read:
            said = f"{slot} holds {held} of {read} tokens read before"
            raise ValueError(f"{said}; every token of a text needs the same num_steps")
        if entry is not None:
            k_BHTK = torch.cat((entry[0], k_BHTK), dim=2)
            v_BHTK = torch.cat((entry[1], v_BHTK), dim=2)
        self.entries[slot] = (k_BHTK, v_BHTK)
        return self.entries[slot]

    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        """Tokens read, the same in all layers."""
        return 0 if self.valid_BS is None else self.valid_BS.shape[1]

    def crop(self, max_length: int) -> None:
        """Keep so many tokens; a negative number, or 0, is how many to take away."""
        read = self.get_seq_length()
        keep = min(max_length, read) if max_length > 0 else max(read + max_length, 0)
        for slot, (k_BHSK, v_BHSK) in self.entries.items():
            self.entries[slot] = (k_BHSK[:, :, :keep], v_BHSK[:, :, :keep])
        if self.valid_BS is not None:
            self.valid_BS = self.valid_BS[:, :keep]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order."""
        for slot, (k_BHSK, v_BHSK) in self.entries.items():
            index_B = indices.to(k_BHSK.device)
            self.entries[slot] = (k_BHSK[index_B], v_BHSK[index_B])
        if self.valid_BS is not None:
            self.valid_BS = self.valid_BS[indices.to(self.valid_BS.device)]

    reorder_cache = batch_select_indices

    def reset(self) -> None:
        """Forget all tokens."""
        self.entries, self.valid_BS = {}, None


class RMSNorm(nn.Module):
    """x / RMS(x) in float32, cast back, times a gain."""

    def __init__(self, config: RavenConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.epsilon = config.norm_eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] in x's dtype."""
        wide_BTD = x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32))
        scale_BT1 = torch.rsqrt(wide_BTD.square().mean(-1, keepdim=True) + self.epsilon)
        return (wide_BTD * scale_BT1).to(x_BTD.dtype) * self.weight


def rotate(x_BTHK: Tensor, cos_BT1P: Tensor, sin_BT1P: Tensor) -> Tensor:
    """Turn the adjacent pairs (x_2j, x_2j+1), in float32."""
    wide_BTHK = x_BTHK.to(torch.promote_types(x_BTHK.dtype, torch.float32))
    even_BTHP, odd_BTHP = wide_BTHK[..., 0::2], wide_BTHK[..., 1::2]
    first_BTHP = even_BTHP * cos_BT1P - odd_BTHP * sin_BT1P
    second_BTHP = even_BTHP * sin_BT1P + odd_BTHP * cos_BT1P
    return torch.stack((first_BTHP, second_BTHP), dim=-1).flatten(-2).to(x_BTHK.dtype)


@dataclass
class Layout:
    """Where the tokens of one call stand, which keys they see, and what was read before."""

    cos_BT1P: Tensor
    sin_BT1P: Tensor
    mask_B1TS: Tensor | None
    cache: RecurrentCache | None


class BranchEnd(nn.Linear):
    """The last matrix of a branch, which starts smaller than others."""


class Attention(nn.Module):
    """Causal attention; queries and keys get a bias, then their rotation."""

    def __init__(self, config: RavenConfig) -> None:
        super().__init__()
        self.heads = config.n_heads
        self.Wqkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.qk_bias = nn.Parameter(torch.zeros(2, 1, config.n_heads, config.head_dim))
        self.proj = BranchEnd(config.n_embd, config.n_embd, bias=False)

    def forward(self, x_BTD: Tensor, layout: Layout, slot: Slot) -> Tensor:
        """[B, T, D] of [B, T, D]."""
        rows, tokens, _ = x_BTD.shape
        qkv_BT3HK = self.Wqkv(x_BTD).view(rows, tokens, 3, self.heads, -1)
        q_BTHK, k_BTHK, v_BTHK = qkv_BT3HK.unbind(2)
        q_BTHK = rotate(q_BTHK + self.qk_bias[0], layout.cos_BT1P, layout.sin_BT1P)
        k_BTHK = rotate(k_BTHK + self.qk_bias[1], layout.cos_BT1P, layout.sin_BT1P)
        k_BHSK, v_BHSK = k_BTHK.transpose(1, 2), v_BTHK.transpose(1, 2)
        if layout.cache is not None:
            k_BHSK, v_BHSK = layout.cache.extend(slot, k_BHSK, v_BHSK)
        mixed_BHTK = F.scaled_dot_product_attention(
            q_BTHK.transpose(1, 2),
            k_BHSK,
            v_BHSK,
            attn_mask=layout.mask_B1TS,
            is_causal=layout.mask_B1TS is None and tokens > 1,
        )
        return self.proj(mixed_BHTK.transpose(1, 2).flatten(-2))


class GatedMLP(nn.Module):
    """proj (SiLU(gate x) * up x); the gate's rows come first."""

    def __init__(self, config: RavenConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 2 * config.intermediate_size, bias=False)
        self.proj = BranchEnd(config.intermediate_size, config.n_embd, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] of [B, T, D]."""
        gate_BTI, up_BTI = self.fc(x_BTD).chunk(2, dim=-1)
        return self.proj(F.silu(gate_BTI) * up_BTI)


class SandwichBlock(nn.Module):
    """x <- n2(x + attention(n1 x));  x <- n4(x + mlp(n3 x))."""

    def __init__(self, config: RavenConfig) -> None:
        super().__init__()
        self.norm_1 = RMSNorm(config)
        self.attn = Attention(config)
        self.norm_2 = RMSNorm(config)
        self.norm_3 = RMSNorm(config)
        self.mlp = GatedMLP(config)
        self.norm_4 = RMSNorm(config)

    def forward(self, x_BTD: Tensor, layout: Layout, slot: Slot) -> Tensor:
        """[B, T, D] of [B, T, D]."""
        x_BTD = self.norm_2(x_BTD + self.attn(self.norm_1(x_BTD), layout, slot))
        return self.norm_4(x_BTD + self.mlp(self.norm_3(x_BTD)))


class Parts(nn.Module):
    """Everything that has weights."""

    def __init__(self, config: RavenConfig) -> None:
        super().__init__()

        def layers(count: int) -> nn.ModuleList:
            return nn.ModuleList(SandwichBlock(config) for _ in range(count))

        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.prelude = layers(config.n_layers_in_prelude)
        self.adapter = nn.Linear(2 * config.n_embd, config.n_embd, bias=False)
        self.core_block = layers(config.n_layers_in_recurrent_block)
        self.coda = layers(config.n_layers_in_coda)
        self.ln_f = RMSNorm(config)


class RavenForCausalLM(PreTrainedModel, GenerationMixin):
    """The model with its head, which is its embedding."""

    config_class = RavenConfig
    _no_split_modules = ["SandwichBlock"]  # noqa: RUF012
    # A tied copy, and a table that is computed here: other writers of the format store both.
    _keys_to_ignore_on_load_unexpected = [r"lm_head\.weight", r"freqs_cis"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_cache_class = True
    accepts_loss_kwargs = False

    def __init__(self, config: RavenConfig) -> None:
        super().__init__(config)
        for key, wanted in {**_FIXED, **config.derived()}.items():
            if (value := getattr(config, key)) != wanted:
                raise ValueError(f"{key}={value!r} must be {wanted!r} in this model")
        self.transformer = Parts(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        input_embeds: Tensor | None = None,
        input_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_steps: int | Tensor | tuple[int, int] | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        init_scale: float = 1.0,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
    ) -> RavenOutput | tuple[Any, ...]:
        """Run all rows through `num_steps` iterations of the core (mean_recurrence by default).

        input_ids [B, T], or input_embeds [B, T, D], rows of the embedding before its scale;
        input_states [B, T, D] is s_0, otherwise drawn and multiplied by init_scale (0: zeros);
        attention_mask [B, S] is 0 on padding, on either side; labels [B, T] are aligned with the
        inputs (the next token, -100 does not count). Gradient flows through the last
        mean_backprop_depth iterations, or, with num_steps = (n, k), through k after n without.
        latent_states is norm(s_r), hidden_states what the head sees.
        """
        prefix, suffix = self._depth(num_steps)
        if (input_ids is None) == (input_embeds is None):
            raise ValueError("give either input_ids or input_embeds")
        x_BTD = self.transformer.wte(input_ids) if input_embeds is None else input_embeds
        cache = _own_cache(past_key_values, use_cache)
        layout, valid_BS = self._layout(x_BTD, attention_mask, position_ids, cache)
        e_BTD = x_BTD * math.sqrt(self.config.n_embd)
        for index, layer in enumerate(self.transformer.prelude):
            e_BTD = layer(e_BTD, layout, ("prelude", index, 0))
        state_BTD = self._start(e_BTD, input_states, init_scale)
        has_grad = torch.is_grad_enabled()
        for step in range(prefix + suffix):
            with torch.set_grad_enabled(has_grad and step >= prefix):
                state_BTD = self._iterate(state_BTD, e_BTD, layout, step)
        latent_BTD = hidden_BTD = self.transformer.ln_f(state_BTD)
        for index, layer in enumerate(self.transformer.coda):
            hidden_BTD = layer(hidden_BTD, layout, ("coda", index, 0))
        hidden_BTD = self.transformer.ln_f(hidden_BTD)
        if cache is not None:
            cache.valid_BS = valid_BS
        logits_BTV = self._logits(hidden_BTD, logits_to_keep)
        output = RavenOutput(
            loss=None if labels is None else _loss(logits_BTV, labels),
            logits=logits_BTV,
            past_key_values=cache,
            latent_states=latent_BTD,
            hidden_states=hidden_BTD,
        )
        return output.to_tuple() if return_dict is False else output

    def _iterate(self, state_BTD: Tensor, e_BTD: Tensor, layout: Layout, step: int) -> Tensor:
        x_BTD = self.transformer.adapter(torch.cat((state_BTD, e_BTD), dim=-1))
        for index, layer in enumerate(self.transformer.core_block):
            x_BTD = layer(x_BTD, layout, ("core", index, step))
        return x_BTD

    def _depth(self, num_steps: int | Tensor | tuple[int, int] | None) -> tuple[int, int]:
        """Iterations without gradient and with it."""
        asked = self.config.mean_recurrence if num_steps is None else num_steps
        if isinstance(asked, Tensor):
            asked = asked.tolist()
        parts = list(asked) if isinstance(asked, (list, tuple)) else [asked]
        if not 1 <= len(parts) <= 2 or not all(type(part) is int for part in parts):
            raise ValueError(f"num_steps={num_steps!r} is neither an integer nor a pair of them")
        if min(parts) < 0 or sum(parts) < 1:
            raise ValueError(f"num_steps={num_steps!r} must make at least 1 iteration")
        if len(parts) == 2:
            return parts[0], parts[1]
        suffix = min(parts[0], self.config.mean_backprop_depth)
        return parts[0] - suffix, suffix

    def _layout(
        self,
        x_BTD: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: RecurrentCache | None,
    ) -> tuple[Layout, Tensor]:
        tokens = x_BTD.shape[1]
        read = 0 if cache is None else cache.get_seq_length()
        if read + tokens > (limit := self.config.block_size):
            raise ValueError(f"{read + tokens} tokens exceed the context of block_size={limit}")
        valid_BS = _valid(x_BTD, attention_mask, cache)
        if position_ids is None:
            # Padding does not count, on either side.
            position_ids = (valid_BS.cumsum(-1) - 1).clamp(min=0)[:, read:]
        if position_ids.shape[-1] != tokens:
            raise ValueError(f"position_ids {tuple(position_ids.shape)} must be (rows, {tokens})")
        even_P = torch.arange(0, self.config.head_dim, 2, dtype=torch.float32, device=x_BTD.device)
        theta_P = 1.0 / self.config.rope_base ** (even_P / self.config.head_dim)
        angles_BT1P = (position_ids.to(torch.float32)[..., None] * theta_P)[:, :, None]
        mask_B1TS = _mask(valid_BS, tokens)
        return Layout(angles_BT1P.cos(), angles_BT1P.sin(), mask_B1TS, cache), valid_BS

    def _start(self, e_BTD: Tensor, states_BTD: Tensor | None, init_scale: float) -> Tensor:
        """s_0: given, or a normal of variance 2/5, cut at three sigma."""
        if states_BTD is not None:
            if states_BTD.shape != e_BTD.shape:
                found, wanted = tuple(states_BTD.shape), tuple(e_BTD.shape)
                raise ValueError(f"input_states {found} must be {wanted}")
            return states_BTD.to(e_BTD)
        sigma = math.sqrt(2 / 5)
        drawn_BTD = torch.empty(e_BTD.shape, dtype=torch.float32, device=e_BTD.device)
        nn.init.trunc_normal_(drawn_BTD, std=sigma, a=-3 * sigma, b=3 * sigma)
        return (drawn_BTD * init_scale).to(e_BTD.dtype)

    def _logits(self, hidden_BTD: Tensor, logits_to_keep: int | Tensor) -> Tensor:
        """Float32 logits of the last `logits_to_keep` tokens (0: all), or of those it indexes."""
        is_count = isinstance(logits_to_keep, int)
        kept = slice(-logits_to_keep or None, None) if is_count else logits_to_keep
        logits_BTV = F.linear(hidden_BTD[:, kept], self.transformer.wte.weight)
        return logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        input_states: Tensor | None = None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Only the tokens that the cache has not read: 5.x says how many, 4.x gives all of them."""
        read = 0 if past_key_values is None else past_key_values.get_seq_length()
        if next_sequence_length is not None:
            input_ids = input_ids[:, -next_sequence_length:]
        elif cache_position is not None:
            input_ids = input_ids[:, read:]
        total = read + input_ids.shape[1]
        if position_ids is not None:
            # 4.x does not extend what it was given; then they follow from the mask.
            position_ids = position_ids[..., read:] if position_ids.shape[-1] == total else None
        if input_states is not None:
            # States are given for the prompt; later tokens draw their own.
            input_states = input_states[:, read:total] if read < input_states.shape[1] else None
        passed = ("num_steps", "init_scale", "use_cache", "logits_to_keep")
        return {name: kwargs[name] for name in passed if name in kwargs} | {
            "input_ids": input_ids.contiguous(),
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "input_states": input_states,
        }

    def get_input_embeddings(self) -> nn.Module:
        """E."""
        return self.transformer.wte

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Refused: published readers and writers expect padded_vocab_size rows."""
        raise ValueError("the vocabulary of this model is fixed; unused ids can be given meaning")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The published initialisation; from_pretrained asks for it where weights are missing."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            layers = self.config.n_layers_in_prelude + self.config.n_layers_in_coda
            layers += self.config.n_layers_in_recurrent_block * self.config.mean_recurrence
            shrink = 2 * layers if isinstance(module, BranchEnd) else 1
            std = math.sqrt(2 / (5 * self.config.n_embd * shrink))
            nn.init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, Attention):
            nn.init.zeros_(module.qk_bias)


def _own_cache(given: Cache | None, use_cache: bool | None) -> RecurrentCache | None:
    """generate() brings an empty cache of its own kind, which has no place for iterations."""
    if isinstance(given, RecurrentCache):
        return given
    if given is not None and given.get_seq_length() > 0:
        raise ValueError(f"past_key_values must be a RecurrentCache, not {type(given).__name__}")
    is_wanted = given is not None if use_cache is None else use_cache
    return RecurrentCache() if is_wanted else None


def _valid(x_BTD: Tensor, attention_mask: Tensor | None, cache: RecurrentCache | None) -> Tensor:
    """Which tokens, those in the cache first, are no padding: booleans [B, S]."""
    new_BT = x_BTD.new_ones(x_BTD.shape[:2], dtype=torch.bool)
    read_BS = None if cache is None else cache.valid_BS
    valid_BS = new_BT if read_BS is None else torch.cat((read_BS, new_BT), dim=1)
    if attention_mask is None:
        return valid_BS
    if attention_mask.shape != valid_BS.shape:
        found, wanted = tuple(attention_mask.shape), tuple(valid_BS.shape)
        raise ValueError(f"attention_mask {found} must be {wanted}, with all tokens read before")
    return attention_mask.to(valid_BS)


def _mask(valid_BS: Tensor, tokens: int) -> Tensor | None:
    """Keys that each query sees, booleans [B, 1, T, S]; None where plain causality says it."""
    total = valid_BS.shape[1]
    if tokens in (1, total) and bool(valid_BS.all()):
        return None
    key_S = torch.arange(total, device=valid_BS.device)
    query_T1 = key_S[total - tokens :, None]
    seen_BTS = (key_S <= query_T1) & valid_BS[:, None]
    # Padding sees itself: of a row without keys, some kernels make NaN.
    return (seen_BTS | (key_S == query_T1))[:, None]


def _loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean nats over the labels that count."""
    if logits_BTV.shape[:2] != labels_BT.shape:
        found = tuple(logits_BTV.shape[:2])
        raise ValueError(
            f"labels {tuple(labels_BT.shape)} need as many logits, not {found}; "
            "leave logits_to_keep at 0"
        )
    return F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=-100)
