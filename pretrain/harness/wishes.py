"""What lm-evaluation-harness asks of one text that is to be written."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from pretrain.errors import ConfigError

DEFAULT_NEW_TOKENS = 256
# Each has been the name of the same thing; the first that is given counts.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_KNOWN = {*_LENGTHS, "until", "do_sample", "temperature", "top_k", "top_p", "num_beams"}


class Sampling(NamedTuple):
    """How each token is chosen: texts that agree in it may be written side by side."""

    max_new_tokens: int
    temperature: float = 0.0
    """0: the likeliest."""
    top_k: int | None = None
    top_p: float | None = None


class Wish(NamedTuple):
    """One text that is asked for."""

    sampling: Sampling
    until: tuple[str, ...]
    """The text ends before the first of these."""


def read_wish(given: Mapping[str, Any]) -> Wish:
    """The wish behind a request's generation arguments.

    Nothing is drawn unless `do_sample`, or a temperature, asks for it; then the temperature is 1
    by default. Raises ConfigError for arguments that would change the text in ways not known here.
    """
    if unknown := sorted(given.keys() - _KNOWN):
        raise ConfigError(
            f"The task's generation_kwargs (or --gen_kwargs) have {unknown[0]}="
            f"{given[unknown[0]]!r}; known are {', '.join(sorted(_KNOWN))}."
        )
    if (beams := given.get("num_beams", 1)) != 1:
        raise ConfigError(
            f"num_beams={beams}: there is no beam search; give --gen_kwargs num_beams=1."
        )
    until = given.get("until") or ()
    ends = (until,) if isinstance(until, str) else tuple(until)
    length = next((given[name] for name in _LENGTHS if given.get(name) is not None), None)
    new_tokens = DEFAULT_NEW_TOKENS if length is None else int(length)
    temperature = given.get("temperature")
    is_drawn = given.get("do_sample")
    if is_drawn is None:
        is_drawn = bool(temperature)
    if not is_drawn:
        return Wish(Sampling(new_tokens), _without_empty(ends))
    sampling = Sampling(
        new_tokens,
        1.0 if temperature is None else float(temperature),
        given.get("top_k") or None,
        given.get("top_p"),
    )
    return Wish(sampling, _without_empty(ends))


def _without_empty(ends: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(end for end in ends if end)
