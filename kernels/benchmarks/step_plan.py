"""What step.py is asked to measure: words KEY=VALUE, all of them read before anything runs."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from measurements import RESULTS
from pretrain.model.depth import Depth
from pretrain_kernels.dispatch import OFF, switched_off

T = TypeVar("T")
PATHS = ("reference", "compiled", "fused", "fused+fp8", "fused+fp8-all")
OPTIONS = {
    "presets": "huginn-3.5b", "paths": ",".join(PATHS), "rows": "1", "seconds": "20",
    "no_grad": "24", "with_grad": "8", "kept": "", "profile": "", "parity": "1", "depths": "",
    "without": "", "held": "0", "device": "cuda", "results": str(RESULTS),
}  # fmt: skip
LISTED = ", with commas between them"
ITERATIONS = "a number of iterations from 0 on"
MEANINGS = {
    "presets": f"names of experiments{LISTED}", "paths": f"some of {', '.join(PATHS)}{LISTED}",
    "rows": f"numbers from 1 on{LISTED}", "seconds": "a number from 0 on",
    "no_grad": ITERATIONS, "with_grad": ITERATIONS, "kept": f"{ITERATIONS}, or nothing for all",
    "profile": "some of the paths that are measured", "parity": "0 or 1",
    "depths": f"iterations without and with gradient, as 8/8,56/8{LISTED}",
    "held": "a number from 0 on", "device": "cuda or cpu",
}  # fmt: skip
"""What a value may be, for those who gave another."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is asked for."""

    presets: list[str]
    paths: list[str]
    """As compute path + precision: fused+fp8."""
    rows: list[int]
    seconds: float
    """Of every measurement."""
    depth: Depth
    kept: int | None
    """Iterations that keep their intermediate results; None: all."""
    profile: list[str]
    """Paths whose kernels are listed."""
    checks: bool
    depths: list[Depth]
    """Measured at one row besides `depth`, a quarter of the time each."""
    without: list[str]
    held: int
    """Pairs of measurements with float8 copies made anew and held."""
    device: torch.device
    """cpu is for tests of this program: such a speed says nothing."""
    results: Path

    @staticmethod
    def of(words: list[str]) -> "Plan":
        """From words KEY=VALUE; SystemExit, with what is right, where one means nothing."""
        options = dict(OPTIONS)
        for word in words:
            key, _, value = word.partition("=")
            if key not in options:
                raise SystemExit(f"{word} is no option; there are {', '.join(options)}.")
            options[key] = value
        try:
            switched_off(options["without"])
        except ValueError as error:
            raise SystemExit(str(error).replace(OFF, "without")) from None

        def read(key: str, parse: Callable[[str], T]) -> T:
            try:
                return parse(options[key])
            except ValueError:
                given = f"{key}={options[key]}"
                raise SystemExit(f"{given} means nothing; it takes {MEANINGS[key]}.") from None

        paths = read("paths", _some(_one_of(*PATHS)))
        plan = Plan(
            presets=read("presets", _some(str)), paths=paths, rows=read("rows", _some(_count(1))),
            seconds=read("seconds", _seconds),
            depth=Depth(read("no_grad", _count(0)), read("with_grad", _count(0))),
            kept=read("kept", _count(0)) if options["kept"] else None,
            profile=read("profile", _list(_one_of(*paths))),
            checks=read("parity", _one_of("0", "1")) == "1",
            depths=read("depths", _list(_depth)), without=_list(str)(options["without"]),
            held=read("held", _count(0)), results=Path(options["results"]),
            device=torch.device(read("device", _one_of("cuda", "cpu"))),
        )  # fmt: skip
        plan.check(options)
        return plan

    def check(self, options: dict[str, str]) -> None:
        """SystemExit where options do not go together, or not on this machine."""
        if not self.depth.total:
            raise SystemExit("no_grad=0 with_grad=0 asks for no iteration at all.")
        if self.without and not any(path.startswith("fused") for path in self.paths):
            raise SystemExit(
                f"without={options['without']} asks for a fused path, which has kernels to go "
                f"without, and paths={options['paths']} has none."
            )
        if self.held and not all("+" in path for path in self.paths):
            raise SystemExit(
                f"held={self.held} asks for paths with float8, as fused+fp8, and "
                f"paths={options['paths']} has others."
            )
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise SystemExit("torch sees no GPU here, and the speed of a step is measured on one.")

    @property
    def tables(self) -> list[Path]:
        """Every table that rows will be added to."""
        names = ["step"] + ["ablation"] * bool(self.without) + ["held"] * bool(self.held)
        return [self.results / f"{name}.csv" for name in names]


def _list(parse: Callable[[str], T]) -> Callable[[str], list[T]]:
    return lambda value: [parse(part) for part in value.split(",") if part]


def _some(parse: Callable[[str], T]) -> Callable[[str], list[T]]:
    """At least one."""

    def parsed(value: str) -> list[T]:
        if found := _list(parse)(value):
            return found
        raise ValueError

    return parsed


def _one_of(*words: str) -> Callable[[str], str]:
    def parsed(value: str) -> str:
        if value not in words:
            raise ValueError
        return value

    return parsed


def _count(least: int) -> Callable[[str], int]:
    def parsed(value: str) -> int:
        if (number := int(value)) < least:
            raise ValueError
        return number

    return parsed


def _seconds(value: str) -> float:
    # written so that NaN is refused
    if not 0 <= (seconds := float(value)) < math.inf:
        raise ValueError
    return seconds


def _depth(pair: str) -> Depth:
    no_grad, _, with_grad = pair.partition("/")
    depth = Depth(_count(0)(no_grad), _count(0)(with_grad))
    if not depth.total:
        raise ValueError
    return depth
