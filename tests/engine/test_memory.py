"""Memory by ZeRO stage: what is exact, against the arithmetic of the design."""

import dataclasses

import pytest

from pretrain.engine.config import EngineConfig, Precision
from pretrain.engine.memory import GIB, checkpoint_bytes, rank_memory
from pretrain.model.config import ModelConfig

HUGINN = ModelConfig(
    name="huginn-3.5b",
    width=5280,
    heads=55,
    inner=17920,
    prelude_layers=2,
    core_layers=4,
    coda_layers=2,
    vocabulary_size=65536,
    context=4096,
)
PARAMETERS = 3_564_976_800
BF16 = EngineConfig(zero_stage=1, precision=Precision.bf16)


def memory(stage=1, ranks=1, micro_rows=1, **changes):
    engine = dataclasses.replace(BF16, zero_stage=stage, **changes)
    return rank_memory(HUGINN, engine, backprop=8, ranks=ranks, micro_rows=micro_rows)


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
    extra = memory(3, ranks=8).buffers - memory(2, ranks=8).buffers
    assert extra == 4 * (1_581_592_320 + 55_756_800)


def test_rows_buckets_overlap_and_recomputation_count():
    rows = [memory(micro_rows=rows).activations for rows in (1, 2, 3)]
    assert rows[2] - rows[1] == rows[1] - rows[0] > 40 * GIB
    assert memory(checkpoint_activations=True).activations < memory().activations / 3
    overlapped = memory(stage=2, overlap_comm=True)
    assert overlapped.buffers == 2 * memory(stage=2).buffers
    assert memory(bucket_elements=10**6).buffers == 4 * 10**6
    parts = dataclasses.asdict(memory())
    assert memory().total == sum(parts.values())


def test_a_checkpoint_is_weights_and_two_moments_in_fp32():
    assert checkpoint_bytes(HUGINN) == 12 * PARAMETERS
