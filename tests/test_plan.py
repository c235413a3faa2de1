"""`pretrain plan`: quick, without torch, with the published numbers, and honest about misfits."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.budget import advice, make_plan
from pretrain.compose import load
from pretrain.errors import ConfigError
from pretrain.plan import main

ROOT = Path(__file__).resolve().parent.parent
HUGINN = ["experiment=huginn-3.5b", "cluster.nodes=32"]


def plan_of(*overrides):
    return make_plan(load("train", [*overrides]))


def run(program):
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": "", "COLUMNS": "120"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def test_plan_of_huginn_prints_the_published_numbers_without_torch():
    output = run(
        "import sys\n"
        "from pretrain.compose import load\n"
        "from pretrain.plan import main\n"
        f"main(load('train', {HUGINN}))\n"
        "print('torch-free', not {'torch', 'deepspeed', 'wandb'} & set(sys.modules))\n"
    )
    assert "torch-free True" in output
    for text in (
        "3,564,976,800",
        "12.08 + 3.4475 (n + 3 k)",
        "16,777,216 = 4,096 rows of 4,096",
        "256 on 32 hosts; 16 rows each",
        "238,419",
        "mean 33.00; 1 % 8, median 29, 99 % 94",
        "ZeRO",
        "tokens/s needed",
    ):
        assert text in output, text


def test_plan_takes_under_a_second_of_processor_time():
    """In the best of up to six runs, as others may share the core and its caches."""
    seconds = []
    while len(seconds) < 6 and min(seconds, default=9.0) >= 1.0:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "pretrain", "plan", *HUGINN],
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 1.0, seconds


def test_batch_that_does_not_divide_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"does not divide: 24 ranks") as caught:
        plan_of("experiment=huginn-3.5b", "cluster.nodes=3")
    assert "16711680 (170 micro-steps)" in str(caught.value)


@pytest.mark.parametrize(
    ("word", "unit"),
    [
        ("cluster.gpu_flops=312", "FLOP per second: 312 TFLOP/s are 3.12e14"),
        ("cluster.gpu_memory_bytes=80", "bytes: 80 GB are 80_000_000_000"),
        ("cluster.gpu_flops=inf", "FLOP per second"),
    ],
)
def test_a_rate_or_size_in_another_unit_is_refused(word, unit):
    with pytest.raises(ConfigError) as caught:
        plan_of(word)
    name, _, _ = word.partition("=")
    assert f"{name}=" in str(caught.value)
    assert f"is in {unit}" in str(caught.value)


def test_published_cluster_reaches_the_published_speed():
    """512 Frontier nodes in lockstep, checkpointed: the paper reports 244-293 tokens/s for each of
    4096 devices at 41-51 % of their measured matrix rate."""
    plan = plan_of(
        "experiment=huginn-3.5b",
        "cluster=frontier",
        "depth.scope=step",
        "engine.checkpoint_activations=true",
    )
    assert 244 < plan.tokens_per_s_per_gpu < 293
    assert plan.wait == 1
    assert plan.micro_steps == 1
    assert plan.tokens_per_s == pytest.approx(4096 * plan.tokens_per_s_per_gpu)
    # the run that was planned, and that stopped after 47,360 steps of 14-17 s
    step_s = 16_777_216 / plan.tokens_per_s
    assert 14 < step_s < 17
    assert plan.hours > plan.config.total_steps * step_s / 3600


def test_expected_speed_is_what_one_h200_did():
    """602.2 model TFLOP/s in step.csv: whole steps of the fused path, of eight rows."""
    plan = plan_of(
        "experiment=huginn-3.5b",
        "cluster.gpus_per_node=1",
        "batch.global_tokens=32768",
    )
    measured = 602.2e12 / plan.flops.model(25.02, 7.98)
    assert plan.tokens_per_s_per_gpu == pytest.approx(measured, rel=0.02)


def test_kept_iterations_are_not_recomputed():
    """Of 8 with gradient, rows of small depth have fewer: 7.98 on average."""
    recomputed = "engine.checkpoint_activations=true"
    plans = [
        plan_of(*HUGINN, *overrides)
        for overrides in (
            [],
            [recomputed, "engine.kept_iterations=5"],
            [recomputed],
            [recomputed, "engine.kept_iterations=8"],
        )
    ]
    counts = [plan.recomputed for plan in plans]
    assert counts == [0, pytest.approx(2.98, abs=0.01), pytest.approx(7.98, abs=0.01), 0]
    base = plans[0]
    for plan in plans:
        extra = plan.executed_flops - base.model_flops
        assert extra == pytest.approx(plan.recomputed * plan.flops.iteration)
    speeds = [plan.tokens_per_s for plan in plans]
    assert speeds[0] == speeds[3] > speeds[1] > speeds[2]


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["engine.checkpoint_activations=true", "engine.kept_iterations=3"], "all but 3"),
        (["engine=zero2-bf16", "engine.overlap_comm=true"], "model.path=fused"),
    ],
)
def test_memory_of_other_stages_is_shown_whatever_is_configured(overrides, text, capsys):
    """Kept iterations may not stand where they would be refused."""
    main(load("train", [*HUGINN, *overrides]))
    output = capsys.readouterr().out
    assert text in output
    stages = [line for line in output.splitlines() if re.match(r"[│|] [123]( \*)? ", line)]
    assert len(stages) == 6
    assert sum("*" in line for line in stages) == 1


def test_wait_is_the_estimates_and_grows_where_ranks_meet_often():
    plan = plan_of(*HUGINN, "depth.sampling=independent")
    assert plan.price.depth.sampling.value == "independent"
    step = plan.estimate.step
    assert plan.wait == pytest.approx(1 + step.depth_wait_s / (step.total_s - step.depth_wait_s))
    often = plan_of(*HUGINN, "depth.sampling=independent", "engine=zero2-bf16")
    assert often.wait > plan.wait > 1.1 > 1.02 > plan_of(*HUGINN).wait


def test_plan_prints_what_the_model_of_wall_time_says():
    plan = plan_of(*HUGINN)
    expected, output = (
        plan.estimate,
        run(
            "from pretrain.compose import load\n"
            "from pretrain.plan import main\n"
            f"main(load('train', {HUGINN}))\n"
        ),
    )
    lines = output.splitlines()
    for name, value in (
        ("all ranks", f"{expected.tokens_per_s:,.0f} tokens/s"),
        ("one step", f"{expected.step.total_s:,.2f} s, {expected.step.idle:.1%} of it idle"),
        ("between failures", f"{expected.interruptions.mtbf_s / 3600:,.1f} hours"),
        ("goodput", f"{expected.goodput:.1%}"),
        ("whole run", f"{expected.hours:,.1f} hours"),
        ("saves", f"every {expected.best_every_steps} steps would be near the best"),
        *((cause, f"{share:.2%}") for cause, share in expected.wall.items()),
    ):
        assert any(name in line and value in line for line in lines), (name, value)
    for price in plan.alternatives:
        speed = f"{price.estimate.tokens_per_s:,.0f}"
        hours = f"{price.estimate.hours:,.0f}"
        assert any(
            price.depth.sampling.value in line and speed in line and hours in line for line in lines
        ), price.depth


def test_every_row_of_the_table_of_memory_is_a_line():
    overrides = ["experiment=huginn-3.5b", "batch.micro_rows=8"]
    output = run(
        "from pretrain.compose import load\n"
        "from pretrain.plan import main\n"
        f"main(load('train', {overrides}))\n"
    )
    table = output[output.index("Memory of one rank") : output.index("Expected speed")]
    rows = [line for line in table.splitlines() if line.startswith("│")]
    assert [row.split()[1] for row in rows] == ["1", "1", "2", "2", "3", "3"]
    assert [("over: " in row) for row in rows] == [True, False] * 3


def test_hours_include_what_failures_cost():
    plan = plan_of(*HUGINN)
    steps_s = plan.config.total_tokens / plan.tokens_per_s
    assert plan.hours * 3600 * plan.estimate.goodput == pytest.approx(steps_s)
    assert 0.9 < plan.estimate.goodput < 1


def test_every_scope_and_sampling_is_priced_but_only_where_ranks_wait():
    assert len(plan_of(*HUGINN).alternatives) == 6
    assert plan_of().alternatives == []
    assert plan_of(*HUGINN, "depth=fixed").alternatives == []
    assert plan_of(*HUGINN, "depth=fixed").wait == pytest.approx(1)


def test_advice_says_what_does_not_fit_and_which_lanes_would_help():
    assert advice(plan_of(*HUGINN)) == []
    (memory,) = advice(plan_of(*HUGINN, "batch.micro_rows=8"))
    assert "Does not fit" in memory
    assert "engine.checkpoint_activations=true" in memory
    (lanes,) = advice(plan_of("experiment=huginn-3.5b", "cluster.nodes=128"))
    assert "depth.lanes=1024 would wait" in lanes
    chosen = plan_of("experiment=huginn-3.5b", "cluster.nodes=128", "depth.lanes=1024")
    assert advice(chosen) == []
    assert chosen.price.once.slowest < 1.35
    (step,) = advice(plan_of("experiment=huginn-3.5b", "cluster.nodes=512"))
    assert "depth.scope=step" in step


def test_advice_names_a_better_interval_between_saves_where_it_is_worth_a_per_cent():
    assert advice(plan_of(*HUGINN)) == []
    often = "cluster.hardware.failures_per_gpu_hour=2e-4"
    plan = plan_of(*HUGINN, often)
    (saves,) = advice(plan)
    best = plan.estimate.best_every_steps
    assert f"checkpoint.every_steps=128 leaves {plan.estimate.shares.useful:.1%}" in saves
    assert f"{best} would leave {plan.estimate.best.useful:.1%}" in saves
    assert best < 128
    assert advice(plan_of(*HUGINN, often, f"checkpoint.every_steps={best}")) == []


def test_advice_names_a_validation_that_takes_long():
    one_card = [*HUGINN, "cluster.nodes=1", "cluster.gpus_per_node=1"]
    short = [*one_card, "batch.global_tokens=131_072", "run.tokens=null", "run.steps=100"]
    plan = plan_of(*short)
    assert plan.estimate.validating > 0.5
    (said,) = advice(plan)
    assert f"Validation takes {plan.estimate.validating:.1%}" in said
    assert "validation.rows=4096" in said
    assert advice(plan_of(*short, "validation.rows=32")) == []


@pytest.mark.parametrize(("pieces", "token_bytes"), [(65_536, 2), (65_537, 4)])
def test_loaders_are_priced_at_the_bytes_that_shards_keep_of_a_token(pieces, token_bytes, capsys):
    main(load("train", [f"model.vocabulary_size={pieces}"]))
    found = re.search(
        r"loaders of a host +│ ([\d,]+) tokens/s = ([\d.]+) MB", capsys.readouterr().out
    )
    tokens_per_s, megabytes_per_s = float(found[1].replace(",", "")), float(found[2])
    # the rate is shown to a whole number of some hundred, the bytes to three digits
    assert megabytes_per_s * 1e6 / tokens_per_s == pytest.approx(token_bytes, rel=0.01)


def test_short_runs_and_the_half_of_a_large_batch_are_shown(capsys):
    main(load("train", ["batch.global_tokens=8192", "batch.micro_rows=64"]))
    output = capsys.readouterr().out
    assert re.search(r"whole run +│ [\d.]+ minutes", output)
    assert re.search(r"x 4 ┃ +x 32 ┃ +x 64", output)


@pytest.mark.parametrize(
    ("setting", "wrong"),
    [("nodes", "0"), ("gpu_flops", "0"), ("utilization", "1.5"), ("gpu_memory_bytes", "-1")],
)
def test_impossible_clusters_are_refused(setting, wrong):
    with pytest.raises(ConfigError, match=f"cluster.{setting}"):
        load("train", [f"cluster.{setting}={wrong}"])
