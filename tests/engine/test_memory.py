"""Memory by ZeRO stage: what is exact by ZeRO's arithmetic, the sum by measured peaks."""

import csv
import dataclasses
import itertools
from pathlib import Path

import pytest

from model_forms import HUGINN
from pretrain.engine.config import EngineConfig, Precision
from pretrain.engine.memory import GIB, checkpoint_bytes, rank_memory
from pretrain.model.activations import peak_activation_bytes
from pretrain.model.config import ComputePath, ProductPrecision
from pretrain.model.cost import count_parameters

RESULTS = Path(__file__).parents[2] / "kernels/benchmarks/results"
PARAMETERS = 3_564_976_800
OTHER_BUCKET = ("2", "d9370de")
BF16 = EngineConfig(zero_stage=1, precision=Precision.bf16)


def memory(stage=1, ranks=1, micro_rows=1, **changes):
    engine = dataclasses.replace(BF16, zero_stage=stage, **changes)
    return rank_memory(
        HUGINN, engine, backprop=8, ranks=ranks, micro_rows=micro_rows, micro_steps=1
    )


def test_states_on_one_gpu_are_sixteen_bytes_and_two_per_parameter():
    """bf16 weights 6.6, fp32 gradients 13.3, masters 13.3, moments 26.6: 59.8 GiB."""
    one = memory()
    sizes = [one.weights, one.gradients, one.masters, one.moments]
    assert sizes == [2 * PARAMETERS, 4 * PARAMETERS, 4 * PARAMETERS, 8 * PARAMETERS]
    assert sum(sizes) / GIB == pytest.approx(59.8, abs=0.05)


@pytest.mark.parametrize(
    ("stage", "weights", "gradients"), [(1, 2, 4), (2, 2, 4 / 8), (3, 2 / 8, 4 / 8)]
)
def test_each_stage_shards_one_thing_more(stage, weights, gradients):
    eight = memory(stage, ranks=8)
    assert eight.weights == weights * PARAMETERS
    assert eight.gradients == gradients * PARAMETERS
    assert eight.masters + eight.moments == 12 * PARAMETERS / 8


def test_fp32_doubles_weights_but_not_the_optimizer():
    wide = memory(precision=Precision.fp32)
    assert wide.weights == 2 * memory().weights
    assert wide.masters + wide.moments == memory().masters + memory().moments


def test_stage_3_gathers_the_core_at_once():
    """1.64 G parameters of core and adapter in bf16, weights and gradients."""
    buckets, waiting = (4 + 2) * BF16.bucket_elements, memory(1).buffers
    extra = memory(3, ranks=8).buffers - buckets - waiting
    assert extra == 4 * (1_581_592_320 + 55_756_800)


def test_rows_buckets_overlap_and_recomputation_count():
    rows = [memory(micro_rows=rows).activations for rows in (1, 2, 3)]
    assert rows[2] - rows[1] == rows[1] - rows[0] > 40 * GIB
    assert memory(checkpoint_activations=True).activations < memory().activations / 3
    # stage 1 sums in place: only the embedding's gradient waits
    assert memory(1, bucket_elements=10**6).buffers == memory(1).buffers == 2 * 65536 * 5280
    # one bucket in float32, which fills and empties on one stream
    assert memory(2, bucket_elements=10**6).buffers == memory(1).buffers + 4 * 10**6
    for stage in (1, 2):
        assert memory(stage, overlap_comm=True).buffers == memory(stage).buffers
    buckets = (4 + 2) * BF16.bucket_elements
    assert memory(3, overlap_comm=True).buffers == memory(3).buffers + buckets
    parts = dataclasses.asdict(memory())
    assert memory().total == sum(parts.values())


def measured(name):
    with (RESULTS / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def on_path(row):
    is_8 = row["precision"] == "fp8"
    return dataclasses.replace(
        HUGINN,
        path=ComputePath(row["path"]),
        no_grad_precision=ProductPrecision("same" if row["precision"] == "bf16" else "fp8"),
        grad_precision=ProductPrecision("fp8" if is_8 else "same"),
    )


def test_bare_passes_peak_where_it_is_predicted():
    """Within 4 %, of one to four rows, 4 and 8 iterations with gradient, bf16 and float8.

    In them bf16 gradients of coda and embedding stand beside the core's, 2.3 GB, counted at every
    moment here; where the fullest one is the head they are not there yet: up to 4 % of two rows.
    """
    whole = [row for row in measured("step.csv") if row["preset"] == "huginn-3.5b"]
    bare = [row for row in whole if row["zero"] == "0"]
    paths = {(row["path"], row["precision"], row["rows"]) for row in bare}
    assert {("fused", "bf16", "4"), ("fused", "fp8", "1"), ("reference", "bf16", "2")} <= paths
    for row in bare:
        model = on_path(row)
        activations = peak_activation_bytes(
            model, int(row["with_grad"]), rows=int(row["rows"]), element_bytes=2,
            kept_iterations=None,
        )  # fmt: skip
        counts = count_parameters(model)
        gradients = 2 * (counts["embedding"] + counts["coda"])
        predicted, peak = 2 * PARAMETERS + gradients + activations, int(row["peak_bytes"])
        if row["path"] == "compiled":
            # counted as plain layers, which is said to be too much
            assert predicted > 1.2 * peak
        else:
            assert predicted == pytest.approx(peak, rel=0.04), row


def test_a_step_through_the_engine_peaks_where_it_is_predicted():
    """92,978,767,872 bytes: ZeRO-1 on one GPU, one row. Half a per cent is 0.46 GB."""
    # under ZeRO-2 at d9370de DeepSpeed's bucket was narrower
    rows = [row for row in measured("engine.csv") if (row["zero"], row["commit"]) != OTHER_BUCKET]
    several = set(itertools.product("24", "123"))
    assert {(row["gpus"], row["zero"]) for row in rows} == {("1", "1")} | several
    for row in rows:
        predicted = rank_memory(
            on_path(row),
            dataclasses.replace(BF16, zero_stage=int(row["zero"])),
            backprop=8,
            ranks=int(row["gpus"]),
            micro_rows=1,
            micro_steps=int(row["accumulation"]),
        )
        assert predicted.total == pytest.approx(int(row["peak_bytes"]), rel=0.005)


def test_kept_iterations_count_between_none_and_all():
    fused = dataclasses.replace(HUGINN, path=ComputePath.fused)

    def total(**changes):
        engine = dataclasses.replace(BF16, **changes)
        found = rank_memory(fused, engine, backprop=8, ranks=1, micro_rows=1, micro_steps=1)
        return found.activations

    kept = [total(checkpoint_activations=True, kept_iterations=kept) for kept in (0, 2, 4, 8)]
    assert kept == sorted(set(kept))
    assert kept[-1] == total()


# a layer's weights, which are bytes in float8, and its scales, four bytes each
LAYER = 4 * 5280**2 + 3 * 17920 * 5280
OUTPUTS, INPUTS = 5 * 5280 + 2 * 17920, 3 * 5280 + 17920


def activations(*, micro_steps, stage, precisions):
    # a small head, so that the fullest moment is in the core
    model = dataclasses.replace(
        HUGINN, path=ComputePath.fused, vocabulary_size=8,
        **dict.fromkeys(precisions, ProductPrecision.fp8),
    )  # fmt: skip
    engine = dataclasses.replace(BF16, zero_stage=stage)
    found = rank_memory(model, engine, backprop=8, ranks=1, micro_rows=1, micro_steps=micro_steps)
    return found.activations


@pytest.mark.parametrize(
    ("precisions", "more"),
    [
        ([], 0),
        (["no_grad_precision"], 4 * (LAYER + 4 * OUTPUTS)),
        (["grad_precision"], 2 * (2 * LAYER + 4 * (OUTPUTS + INPUTS))),
    ],
    ids=["bf16", "prefix", "all"],
)
def test_float8_copies_stay_where_there_are_several_micro_steps(precisions, more):
    """1.6 GB of the core; with gradient in float8, whose copies are there anyway, of the coda."""
    found = {
        (stage, micro_steps): activations(
            micro_steps=micro_steps, stage=stage, precisions=precisions
        )
        for stage in (1, 2, 3)
        for micro_steps in (1, 2, 8)
    }
    alone = found[1, 1]
    for (stage, micro_steps), size in found.items():
        assert size - alone == (more if stage < 3 and micro_steps > 1 else 0), (stage, micro_steps)


def test_a_checkpoint_is_weights_and_two_moments_in_fp32():
    assert checkpoint_bytes(HUGINN) == 12 * PARAMETERS
