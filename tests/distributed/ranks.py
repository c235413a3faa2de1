"""What the ranks of the distributed tests run; imported by path, in processes of their own."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.config import TrainConfig
from pretrain.engine.checkpoint import load_checkpoint
from pretrain.engine.config import Precision
from pretrain.engine.deepspeed import Engine
from pretrain.engine.saving import save_checkpoint
from pretrain.engine.world import World
from pretrain.loop.config import BatchConfig
from pretrain.model.depth import step_depths
from pretrain.model.init import initialize
from pretrain.model.initial_state import initial_states
from pretrain.model.recurrent import Output, RecurrentModel
from pretrain.optim.build import build_optimizer
from pretrain.optim.config import AdamWConfig, EllisAdamConfig
from pretrain.testing import tiny_config, tiny_engine

ROWS = 16
STEPS = 3
RATE = 0.01
# below every gradient norm of the tiny model: clipping always acts
CLIP = 0.1
Case = dict[str, Any]
Poison = Callable[[int, int, Tensor], Tensor]


def case_config(case: Case, ranks: int) -> TrainConfig:
    """The tiny configuration with a case's stage, precision, accumulation and optimizer."""
    changes: dict[str, Any] = {
        "engine": tiny_engine(
            zero_stage=case["stage"],
            precision=Precision[case.get("precision", "fp32")],
            checkpoint_activations=case.get("checkpointed", False),
            overlap_comm=case.get("overlap", False),
            bucket_elements=case.get("bucket", 200_000_000),
        ),
        "batch": BatchConfig(
            global_tokens=ROWS * 8, micro_rows=ROWS // (ranks * case.get("accumulation", 1))
        ),
    }
    clip = {"gradient_clip": case.get("clip", CLIP)}
    if case.get("optimizer") == "adamw":
        changes["optimizer"] = AdamWConfig(
            name="adamw", learning_rate=RATE, weight_decay=0.1, **clip
        )
    else:
        changes["optimizer"] = EllisAdamConfig(
            name="ellis-adam", learning_rate=RATE, weight_decay=0.01, **clip
        )
    return tiny_config(**changes)


def new_model(config: TrainConfig) -> RecurrentModel:
    model = RecurrentModel(config.model)
    initialize(model, mean_depth=config.depth.mean, seed=config.run.seed)
    return model


def forward(model: Any, config: TrainConfig, step: int, rows: Sequence[int]) -> Output:
    """The forward pass of some rows of a step; a pure function of the step and the rows."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, config.model.vocabulary_size, (ROWS, 9), generator=generator)
    depths = step_depths(config.depth, seed=0, first_row=ROWS * step, rows=ROWS)
    dtype = torch.bfloat16 if config.engine.precision is Precision.bf16 else torch.float32
    states = initial_states(
        [ROWS * step + row for row in rows], seed=0, context=8, width=24, dtype=dtype
    )
    output: Output = model(
        tokens[rows, :-1],
        [depths[row] for row in rows],
        initial_state=states,
        labels=tokens[rows, 1:],
        keep_logits=False,
    )
    return output


def train_step(
    engine: Engine, config: TrainConfig, step: int, poison: Poison | None = None
) -> tuple[float, float, bool]:
    """One optimizer step: mean nats, gradient norm, whether it was applied."""
    world, micro_rows = engine.world, config.batch.micro_rows
    first = world.rank * ROWS // world.size
    nats = 0.0
    for micro_step in range(engine.micro_steps):
        start = first + micro_step * micro_rows
        output = forward(engine, config, step, range(start, start + micro_rows))
        assert output.nats is not None
        nats += output.nats.item()
        own = poison(world.rank, micro_step, output.nats) if poison else output.nats
        engine.backward(own, scale=1 / (ROWS * 8))
    result = engine.step(RATE)
    return world.sum([nats])[0] / (ROWS * 8), result.grad_norm, result.is_applied


def whole(engine: Engine) -> dict[str, Tensor]:
    """Every fp32 master and moment under `section/name`, assembled from all ranks."""
    own = []
    for partition in engine.layout.partitions:
        sections = {"master": partition.flat, **engine.moments(partition.flat)}
        for fragment in partition.fragments:
            info = partition.tensors[fragment.tensor]
            for section, flat in sections.items():
                piece = partition.piece(fragment, flat).detach().clone()
                own.append((f"{section}/{info.name}", info, fragment.tensor_start, piece))
    tensors: dict[str, Tensor] = {}
    for key, info, start, piece in (p for rank in engine.world.gather_objects(own) for p in rank):
        flat = tensors.setdefault(key, torch.full((info.numel,), torch.nan))
        flat[start : start + len(piece)] = piece
    return tensors


def new_engine(world: World, case: Case) -> tuple[Engine, TrainConfig]:
    config = case_config(case, world.size)
    micro_steps = case.get("accumulation", 1)
    return Engine(new_model(config), config, world, micro_steps=micro_steps), config


def run_case(world: World, case: Case) -> dict[str, Any]:
    """Three steps; what the first gradient, the losses and the last weights were."""
    engine, config = new_engine(world, case)
    start = whole(engine)
    results = [train_step(engine, config, 0)]
    first = whole(engine)
    with engine.evaluation() as model:
        evaluated = evaluate(model, config)
    results += [train_step(engine, config, step) for step in range(1, STEPS)]
    return {
        "start": start,
        "results": results,
        "first": first,
        "evaluated": evaluated,
        "last": whole(engine),
    }


def evaluate(model: RecurrentModel, config: TrainConfig) -> Tensor:
    """Nats of two rows at three depths."""
    dtype = torch.bfloat16 if config.engine.precision is Precision.bf16 else torch.float32
    tokens = torch.arange(2 * 9).view(2, 9)
    nats, _ = model.losses_at(
        tokens[:, :-1],
        [1, 3, 7],
        initial_state=initial_states([0, 1], seed=1, context=8, width=24, dtype=dtype),
        labels=tokens[:, 1:],
    )
    return nats


def oracle(case: Case) -> dict[str, Any]:
    """The same three steps by one plain process without DeepSpeed.

    bf16: fp32 masters, bf16 weights, each micro-batch's bf16 gradient added in fp32.
    """
    config = case_config(case, case["ranks"])
    model = new_model(config)
    named = dict(model.named_parameters())
    masters = {name: torch.nn.Parameter(p.detach().clone()) for name, p in named.items()}
    optimizer = build_optimizer(masters.items(), config.optimizer)
    dtype = torch.bfloat16 if config.engine.precision is Precision.bf16 else torch.float32
    model.to(dtype)
    results, first, evaluated = [], {}, torch.empty(0)
    for step in range(STEPS):
        nats, micro_rows = 0.0, config.batch.micro_rows
        sums = {name: torch.zeros_like(master) for name, master in masters.items()}
        for start in range(0, ROWS, micro_rows):
            output = forward(model, config, step, range(start, start + micro_rows))
            assert output.nats is not None
            nats += output.nats.item()
            # Times the ranks, as the engine does: exact for powers of two.
            (output.nats * (case["ranks"] / (ROWS * 8))).backward()
            for name, parameter in named.items():
                assert parameter.grad is not None
                sums[name] += parameter.grad.float() / case["ranks"]
                parameter.grad = None
        norm = float(torch.cat([g.flatten() for g in sums.values()]).double().norm())
        for name, master in masters.items():
            clip = config.optimizer.gradient_clip
            master.grad = sums[name] * (min(1.0, clip / norm) if clip else 1.0)
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = RATE
        optimizer.step()
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(masters[name])
        results.append((nats / (ROWS * 8), norm, True))
        if step == 0:
            evaluated = evaluate(model, config)
            first = {
                f"exp_avg/{name}": optimizer.state[master]["exp_avg"].flatten().clone()
                for name, master in masters.items()
            }
    last = {f"master/{name}": master.detach().flatten() for name, master in masters.items()}
    start = {f"master/{n}": p.detach().flatten() for n, p in new_model(config).named_parameters()}
    return {
        "results": results,
        "first": first,
        "evaluated": evaluated,
        "last": last,
        "start": start,
    }


def poisoned(world: World, case: Case) -> dict[str, Any]:
    """A good step, one with a non-finite loss on one rank, one with a NaN gradient, a good one."""
    engine, config = new_engine(world, case)
    bad_rank, bad_micro = world.size - 1, 0

    def bad_loss(rank: int, micro_step: int, nats: Tensor) -> Tensor:
        return nats * torch.inf if (rank, micro_step) == (bad_rank, bad_micro) else nats

    def bad_gradient(rank: int, micro_step: int, nats: Tensor) -> Tensor:
        if (rank, micro_step) == (bad_rank, bad_micro):
            nats.register_hook(lambda gradient: gradient * torch.nan)
        return nats

    def clipped_to_zero_loss(rank: int, micro_step: int, nats: Tensor) -> Tensor:
        """Finite gradient, non-finite loss: only the engine can see it."""
        bad = nats + torch.inf
        return bad if (rank, micro_step) == (bad_rank, bad_micro) else nats

    results = [train_step(engine, config, 0)]
    before = whole(engine)
    for poison in (bad_loss, bad_gradient, clipped_to_zero_loss):
        results.append(train_step(engine, config, 1, poison))
    after = whole(engine)
    results.append(train_step(engine, config, 1))
    clean, _ = new_engine(world, case)
    for step in range(2):
        train_step(clean, config, step)
    return {
        "results": results,
        "untouched": _equal(before, after),
        "goes_on": _equal(whole(engine), whole(clean)),
        "steps": engine.optimizer_steps,
    }


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def save_two_steps(world: World, case: Case, run_dir: Path) -> dict[str, Any]:
    """Two steps and a checkpoint; then two more steps, which a resume must repeat."""
    engine, config = new_engine(world, case)
    for step in range(2):
        train_step(engine, config, step)
    save_checkpoint(engine, world, run_dir, step=2, state={"rows": 2 * ROWS, "x": 0.1})
    saved = whole(engine)
    results = [train_step(engine, config, step) for step in (2, 3)]
    return {"saved": saved, "results": results, "last": whole(engine)}


def resume_twice(world: World, case: Case, source: Path, run_dir: Path) -> dict[str, Any]:
    """Resume, one step, save, resume, one step."""
    engine, config = new_engine(world, case)
    state = load_checkpoint(engine, world, source)
    loaded = whole(engine)
    weights_match = _weights_match(engine, loaded)
    if case.get("only_load"):
        return {"loaded": loaded, "weights_match": weights_match, "results": []}
    results = [train_step(engine, config, 2)]
    middle = save_checkpoint(engine, world, run_dir, step=3, state=state)
    engine, _ = new_engine(world, case)
    load_checkpoint(engine, world, middle)
    results.append(train_step(engine, config, 3))
    return {
        "loaded": loaded,
        "state": state,
        "weights_match": weights_match,
        "results": results,
        "last": whole(engine),
    }


def _weights_match(engine: Engine, tensors: dict[str, Tensor]) -> bool:
    """Whether the working weights are the rounded masters (whole ones: ZeRO-1 and 2)."""
    return all(
        torch.equal(parameter.detach().flatten(), tensors[f"master/{name}"].to(parameter.dtype))
        for name, parameter in engine.module.named_parameters()
        if engine.zero_stage < 3
    )


def everything(world: World, plan: dict[str, Any]) -> dict[str, Any]:
    """All that one number of ranks has to do, so that it is started only once."""
    folder = Path(plan["folder"])
    found: dict[str, Any] = {"cases": [run_case(world, case) for case in plan.get("cases", [])]}
    found["poisoned"] = [poisoned(world, case) for case in plan.get("poisoned", [])]
    found["saved"] = [
        save_two_steps(world, case, folder / case["name"]) for case in plan.get("save", [])
    ]
    found["resumed"] = [
        resume_twice(
            world,
            case,
            folder / case["source"] / "checkpoints" / "step-0000000002",
            folder / f"{case['name']}-of-{world.size}",
        )
        for case in plan.get("resume", [])
    ]
    return found if world.is_main else {}
