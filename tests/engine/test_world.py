import multiprocessing
from typing import Any

import pytest
import torch

from pretrain.engine.config import Device, EngineConfig, Precision
from pretrain.engine.world import Place, World, _make_deterministic, find_place, first_host
from pretrain.errors import ConfigError
from pretrain.testing import RanksError, run_ranks

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "somewhere",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "alpha,beta",
    "SLURM_JOB_NODELIST": "gamma",
}


def test_ranks_come_from_torchrun() -> None:
    assert find_place(TORCHRUN) == Place(
        rank=3, size=8, local_rank=1, meeting="env://", host="somewhere"
    )


def test_torchrun_inside_a_slurm_step_wins() -> None:
    assert find_place(SRUN | TORCHRUN) == find_place(TORCHRUN)


@pytest.mark.parametrize(
    "missing", [("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"), ("MASTER_ADDR",)]
)
def test_what_pyxis_adds_for_pytorch_leaves_slurm_s_place(missing: tuple[str, ...]) -> None:
    added = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_PORT": "16242"}
    own = {name: value for name, value in added.items() if name not in missing}
    assert find_place(SRUN | own) == find_place(SRUN)


def test_ranks_come_from_an_srun_step() -> None:
    place = find_place(SRUN)
    assert place == Place(rank=3, size=4, local_rank=1, meeting="tcp://alpha:16242", host="alpha")


def test_address_and_port_can_be_chosen_under_slurm() -> None:
    place = find_place(SRUN | {"MASTER_ADDR": "delta", "MASTER_PORT": "77"})
    assert place.meeting == "tcp://delta:77"


def test_a_port_that_is_no_number_is_named_under_slurm() -> None:
    with pytest.raises(ConfigError, match="MASTER_PORT='any' in the environment must be a number"):
        find_place(SRUN | {"MASTER_PORT": "any"})


def test_two_jobs_on_a_host_meet_at_different_ports() -> None:
    assert find_place(SRUN).meeting != find_place(SRUN | {"SLURM_JOB_ID": "4243"}).meeting


def test_a_life_does_not_meet_where_the_life_before_may_still_listen() -> None:
    lives = [find_place(SRUN | {"SLURM_RESTART_COUNT": str(n)}).meeting for n in range(100)]
    assert lives[0] == find_place(SRUN).meeting
    assert len(set(lives)) == 100


@pytest.mark.parametrize("step", ["", "batch", "interactive", "4294967290", "4294967291"])
def test_a_batch_script_or_interactive_shell_is_alone(step: str) -> None:
    environ = SRUN | {"SLURM_STEP_ID": step}
    assert find_place(environ) == Place(rank=0, size=1, local_rank=0, meeting="")


def test_without_a_launcher_the_process_is_alone() -> None:
    assert find_place({}) == Place(rank=0, size=1, local_rank=0, meeting="")


@pytest.mark.parametrize("name", sorted(TORCHRUN))
def test_an_incomplete_environment_names_what_is_missing(name: str) -> None:
    environ = {key: value for key, value in TORCHRUN.items() if key != name}
    with pytest.raises(ConfigError, match=rf"not {name}"):
        find_place(environ)


def test_a_rank_beyond_the_world_is_refused() -> None:
    with pytest.raises(ConfigError, match="RANK=8 is not below WORLD_SIZE=8"):
        find_place(TORCHRUN | {"RANK": "8"})


@pytest.mark.parametrize("text", ["", "-1", "one", "1.0"])
@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"])
def test_a_variable_that_is_no_number_is_named(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}='{text}' in the environment must be a number"):
        find_place(TORCHRUN | {name: text})


@pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID"])
def test_an_incomplete_srun_step_names_what_is_missing(name: str) -> None:
    environ = {key: value for key, value in SRUN.items() if key != name}
    with pytest.raises(ConfigError, match=name):
        find_place(environ)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node7", "node7"),
        ("login,node[1-4]", "login"),
        ("node[1-4]", "node1"),
        ("gpu-a[007-010,012],login", "gpu-a007"),
        ("n[8,11-12]", "n8"),
        ("rack[1-2]-node[03-04],login", "rack1-node03"),
    ],
)
def test_the_first_host_of_a_list_is_found_without_scontrol(
    hosts: str, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # scontrol of SLURM 22.05 says the same; a container has none
    monkeypatch.setenv("PATH", "")
    assert first_host(hosts) == first


def test_deterministic_runs_do_not_fill_memory_that_they_overwrite(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    fills = torch.utils.deterministic.fill_uninitialized_memory
    try:
        _make_deterministic()
        assert torch.are_deterministic_algorithms_enabled()
        # 64 MiB, fresh from the system
        assert not torch.empty(1 << 24).isnan().any()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fills


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_is_refused() -> None:
    from pretrain.engine.world import join

    config = EngineConfig(zero_stage=1, precision=Precision.fp32, device=Device.cuda)
    with pytest.raises(ConfigError, match=r"engine\.device=cuda.*engine\.device=cpu"):
        join(config)


def use_collectives(world: World) -> dict[str, Any]:
    """What each collective of a world gives on this rank."""
    return {
        "rank": world.rank,
        "sum": world.sum([1.0, world.rank, 1e-17]),
        "any": (world.any(world.rank == 1), world.any(False)),
        "agree": (world.agree("same"), world.agree(world.rank)),
        "broadcast": world.broadcast_object({"from": world.rank}),
        "gather": world.gather_objects(world.rank * 10),
    }


@pytest.mark.parametrize("ranks", [1, 3])
def test_collectives_agree_on_every_rank(ranks: int) -> None:
    for rank, got in enumerate(run_ranks(use_collectives, ranks)):
        assert got == {
            "rank": rank,
            "sum": [ranks, sum(range(ranks)), pytest.approx(ranks * 1e-17)],
            "any": (ranks > 1, False),
            "agree": (True, ranks == 1),
            "broadcast": {"from": 0},
            "gather": [10 * other for other in range(ranks)],
        }


def fail_on_rank_1(world: World) -> None:
    if world.rank == 1:
        raise ValueError("rank 1 is unwell")
    world.barrier()


def hang_on_rank_1(world: World) -> None:
    import time

    if world.rank == 1:
        time.sleep(600)
    world.barrier()


@pytest.mark.faults
def test_a_failing_rank_fails_the_run_with_its_traceback() -> None:
    with pytest.raises(RanksError, match="rank 1 is unwell"):
        run_ranks(fail_on_rank_1, 2)


@pytest.mark.faults
def test_a_hanging_rank_is_ended_and_nothing_is_left_running() -> None:
    before = set(multiprocessing.active_children())
    with pytest.raises(RanksError, match="rank 1: ended by signal 9"):
        run_ranks(hang_on_rank_1, 2, timeout_s=5)
    assert set(multiprocessing.active_children()) <= before
