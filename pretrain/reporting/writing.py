"""What the model wrote at validations: each prompt, continued at each depth, early and late."""

from collections.abc import Sequence
from typing import Any

from pretrain.loop.sink import SAMPLES
from pretrain.reporting.run import Run
from pretrain.reporting.svg import text_of

# Validations whose samples are shown: the first, the last, and some between.
_MOST_STEPS = 8
Sample = dict[str, Any]


def samples(runs: Sequence[Run]) -> str:
    """The last samples of each run, and how its text came to be so."""
    parts = []
    for run in runs:
        found = [(each["step"], part) for each in run.record.validations if (part := of(each))]
        if not found:
            continue
        if len(runs) > 1:
            parts.append(f"<h3>{text_of(run.name)}</h3>")
        parts.append(f'<p class="quiet">{_how(run)}</p>{_written(*found[-1])}')
        if len(found) > 1:
            earlier = "".join(_written(step, part) for step, part in reversed(_some(found[:-1])))
            parts.append(f"<details><summary>Earlier samples</summary>{earlier}</details>")
    return "".join(parts)


def _how(run: Run) -> str:
    temperature = run.config.validation.sample_temperature
    how = f"drawn at a temperature of {temperature:g}" if temperature else "the likeliest each time"
    return f"Up to {run.config.validation.sample_tokens} tokens behind each prompt, {how}."


def of(validation: dict[str, Any]) -> list[Sample]:
    """The samples of a validation that are whole."""
    found = validation.get(SAMPLES)
    if not isinstance(found, list):
        return []
    return [each for each in found if isinstance(each, dict) and {"prompt", "text"} <= each.keys()]


def _some(found: Sequence[tuple[int, list[Sample]]]) -> list[tuple[int, list[Sample]]]:
    """So many, evenly from the first to the last."""
    count = min(len(found), _MOST_STEPS)
    places = {round(n * (len(found) - 1) / max(1, count - 1)) for n in range(count)}
    return [found[place] for place in sorted(places)]


def _written(step: int, part: Sequence[Sample]) -> str:
    """One validation: a card for each prompt, a text for each depth."""
    cards = []
    for prompt in dict.fromkeys(str(each["prompt"]) for each in part):
        texts = "".join(
            f"<dt>r = {text_of(each.get('depth', '?'))}</dt><dd><pre><b>{text_of(prompt)}</b>"
            f"{text_of(each['text'])}</pre></dd>"
            for each in part
            if each["prompt"] == prompt
        )
        cards.append(f'<dl class="sample">{texts}</dl>')
    return f'<h3>Step {step:,}</h3><div class="grid">{"".join(cards)}</div>'
