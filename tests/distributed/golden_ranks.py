"""The published optimizer's trajectory through the real engine; imported by path in the ranks."""

import itertools
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pretrain.config import TrainConfig
from pretrain.engine.checkpoint import load_checkpoint
from pretrain.engine.deepspeed import Engine
from pretrain.engine.saving import save_checkpoint
from pretrain.engine.world import World
from pretrain.loop.config import BatchConfig
from pretrain.model.recurrent import RecurrentCore
from pretrain.optim.config import AdamWConfig, EllisAdamConfig
from pretrain.testing import tiny_config, tiny_engine

GOLDEN = Path(__file__).parents[1] / "golden" / "optimizer.safetensors"
FACTORS = (0.25, 0.5, 0.75, 1, 1, 0.5)
# (peak rate, weight decay) of the file's two cases
CASES = {"final": (4e-5, 4e-5), "amplified": (3e-3, 0.05)}
# steps after which the engine is thrown away and built again from a checkpoint
RESUMES = (2, 4)
SETTINGS = [
    {"stage": stage, "accumulation": accumulation, "case": case, "optimizer": optimizer}
    for stage, accumulation, case, optimizer in itertools.product(
        (1, 2, 3), (1, 4), CASES, ("ellis-adam", "adamw")
    )
]


class GivenGradient(RecurrentCore):
    """A matrix W and a vector b whose gradients are what the caller says.

    A RecurrentCore, so that the engine treats it as it treats the model's (a leaf of ZeRO-3).
    """

    def __init__(self, golden: dict[str, Tensor], case: str) -> None:
        nn.Module.__init__(self)
        self.W = nn.Parameter(golden[f"{case}.W.0"].clone())
        self.bias = nn.Parameter(golden[f"{case}.b.0"].clone())

    def forward(self, anchor: Tensor, of_matrix: Tensor, of_vector: Tensor) -> Tensor:  # type: ignore[override]
        return (self.W * of_matrix).sum() + (self.bias * of_vector).sum() + anchor


class Given(nn.Module):
    """A root module, which an engine may not take for a leaf."""

    def __init__(self, golden: dict[str, Tensor], case: str) -> None:
        super().__init__()
        self.core = GivenGradient(golden, case)

    def forward(self, *gradients: Tensor) -> Tensor:
        # ZeRO-3 gathers weights for the backward pass of modules that have an input with gradient
        return self.core(torch.zeros((), requires_grad=True), *gradients)


def new_engine(world: World, setting: dict[str, Any]) -> Engine:
    rate, decay = CASES[setting["case"]]
    kinds = {"ellis-adam": EllisAdamConfig, "adamw": AdamWConfig}
    optimizer = kinds[setting["optimizer"]](
        name=setting["optimizer"], learning_rate=rate, weight_decay=decay, gradient_clip=0.0
    )
    config: TrainConfig = tiny_config(
        engine=tiny_engine(zero_stage=setting["stage"], bucket_elements=16),
        batch=BatchConfig(global_tokens=32 * 8, micro_rows=1),
        optimizer=optimizer,
    )
    module: Any = Given(load_file(GOLDEN), setting["case"])
    return Engine(module, config, world, micro_steps=setting["accumulation"])


def step(engine: Engine, setting: dict[str, Any], number: int) -> None:
    golden = load_file(GOLDEN)
    gradients = [golden[f"{setting['case']}.g{name}.{number}"] for name in ("W", "b")]
    for _ in range(setting["accumulation"]):
        output: Any = engine(*gradients)
        # powers of two: the sum over ranks and micro-steps is the golden gradient to the bit
        engine.backward(output, scale=1 / (engine.world.size * setting["accumulation"]))
    rate = CASES[setting["case"]][0] * FACTORS[number - 1]
    assert engine.step(rate).is_applied


def own_pieces(engine: Engine) -> list[tuple[str, int, dict[str, Tensor]]]:
    """Name, first element, and copies of weights and moments of this rank's fragments."""
    found = []
    for partition in engine.layout.partitions:
        sections = {"master": partition.flat, **engine.moments(partition.flat)}
        for fragment in partition.fragments:
            values = {
                key: partition.piece(fragment, flat).detach().clone()
                for key, flat in sections.items()
            }
            name = partition.tensors[fragment.tensor].name.removeprefix("core.")
            found.append((name, fragment.tensor_start, values))
    return found


def trajectory(
    world: World, setting: dict[str, Any], folder: Path, *, resumes: bool
) -> list[dict[str, Tensor]]:
    """After each of the six steps: whole weights and moments under `section/name`."""
    engine = new_engine(world, setting)
    seen = []
    for number in range(1, len(FACTORS) + 1):
        step(engine, setting, number)
        whole: dict[str, Tensor] = {}
        for name, start, values in itertools.chain(*world.gather_objects(own_pieces(engine))):
            for section, piece in values.items():
                size = 8 if name == "bias" else 48
                flat = whole.setdefault(f"{section}/{name}", torch.full((size,), torch.nan))
                flat[start : start + len(piece)] = piece
        seen.append(whole)
        if resumes and number in RESUMES:
            saved = save_checkpoint(engine, world, folder, step=number, state={})
            engine = new_engine(world, setting)
            load_checkpoint(engine, world, saved)
    return seen


def trajectories(world: World, folder: str) -> list[Any]:
    """Every setting, straight through and with two resumes."""
    found = []
    for index, setting in enumerate(SETTINGS):
        straight = trajectory(world, setting, Path(folder), resumes=False)
        with_resumes = setting["accumulation"] == 1
        resumed = (
            trajectory(world, setting, Path(folder) / str(index), resumes=True)
            if with_resumes
            else straight
        )
        found.append((straight, resumed))
    return found if world.is_main else []


def oracle(setting: dict[str, Any]) -> list[dict[str, Tensor]]:
    """What the file says (ELLISAdam), or torch's AdamW on whole tensors with the same gradients."""
    golden, case = load_file(GOLDEN), setting["case"]
    names = {"W": "W", "b": "bias"}
    if setting["optimizer"] == "ellis-adam":
        return [
            {
                f"{section}/{ours}": golden[f"{case}.{theirs}.{infix}{number}"].flatten()
                for theirs, ours in names.items()
                for section, infix in (
                    ("master", ""),
                    ("exp_avg", "exp_avg."),
                    ("exp_avg_sq", "exp_avg_sq."),
                )
            }
            for number in range(1, len(FACTORS) + 1)
        ]
    rate, decay = CASES[case]
    weights = {k: nn.Parameter(golden[f"{case}.{k}.0"].clone()) for k in names}
    defaults = AdamWConfig(name="adamw", learning_rate=rate, weight_decay=decay)
    optimizer = torch.optim.AdamW(
        [
            {"params": [weights["W"]], "weight_decay": decay},
            {"params": [weights["b"]], "weight_decay": 0.0},
        ],
        betas=(defaults.beta1, defaults.beta2),
        eps=defaults.epsilon,
    )
    seen = []
    for number, factor in enumerate(FACTORS, start=1):
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        for key, weight in weights.items():
            weight.grad = golden[f"{case}.g{key}.{number}"].clone()
        optimizer.step()
        seen.append(
            {
                f"{section}/{ours}": (
                    weights[theirs]
                    if section == "master"
                    else optimizer.state[weights[theirs]][section]
                )
                .detach()
                .flatten()
                .clone()
                for theirs, ours in names.items()
                for section in ("master", "exp_avg", "exp_avg_sq")
            }
        )
    return seen
