import dataclasses

import pytest

from pretrain.engine.config import Precision
from pretrain.engine.ds_config import build_deepspeed_config
from pretrain.optim.config import EllisAdamConfig
from pretrain.testing import tiny_config, tiny_engine


def test_a_run_becomes_exactly_this_dict() -> None:
    config = tiny_config(
        engine=tiny_engine(zero_stage=3, precision=Precision.bf16, bucket_elements=333)
    )
    assert build_deepspeed_config(config, micro_steps=4) == {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1.0,
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": False,
            "reduce_bucket_size": 333,
            "allgather_bucket_size": 334,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": 0,
        },
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True, "immediate_grad_update": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "gradient_allreduce_op": "mean",
        "steps_per_print": 1 << 62,
        "wall_clock_breakdown": False,
    }


@pytest.mark.parametrize(
    "change",
    [
        {"zero_stage": 2},
        {"precision": Precision.bf16},
        {"bucket_elements": 7},
        {"overlap_comm": True},
    ],
)
def test_every_engine_setting_that_is_deepspeed_s_reaches_it(change: dict[str, object]) -> None:
    base = build_deepspeed_config(tiny_config(), micro_steps=1)
    assert build_deepspeed_config(tiny_config(engine=tiny_engine(**change)), micro_steps=1) != base


def test_deepspeed_overlaps_only_sums_that_are_its_own() -> None:
    told = {
        (stage, precision): build_deepspeed_config(
            tiny_config(
                engine=tiny_engine(zero_stage=stage, precision=precision, overlap_comm=True)
            ),
            micro_steps=1,
        )["zero_optimization"]["overlap_comm"]
        for stage in (1, 2, 3)
        for precision in Precision
    }
    ours = [(1, Precision.bf16), (2, Precision.bf16)]
    assert told == {case: case not in ours for case in told}


def test_gradients_are_summed_over_ranks_where_deepspeed_can() -> None:
    operations = {
        stage: build_deepspeed_config(
            tiny_config(engine=tiny_engine(zero_stage=stage)), micro_steps=1
        )["gradient_allreduce_op"]
        for stage in (1, 2, 3)
    }
    assert operations == {1: "sum", 2: "sum", 3: "mean"}


def test_clipping_reaches_deepspeed() -> None:
    optimizer = EllisAdamConfig(
        name="ellis-adam", learning_rate=0.1, weight_decay=0.0, gradient_clip=0.0
    )
    config = dataclasses.replace(tiny_config(), optimizer=optimizer)
    assert build_deepspeed_config(config, micro_steps=1)["gradient_clipping"] == 0.0
