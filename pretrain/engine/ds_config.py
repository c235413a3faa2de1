"""The configuration that DeepSpeed is given: one pure function, its only writer."""

from typing import Any

from pretrain.config import TrainConfig
from pretrain.engine.config import Precision


def build_deepspeed_config(config: TrainConfig, *, micro_steps: int) -> dict[str, Any]:
    """DeepSpeed's dict for a run whose ranks do `micro_steps` backward passes per step.

    Batch sizes are ours; DeepSpeed derives its own total from the two it is told. No optimizer,
    schedule, logging or checkpoint section: those are ours too.
    """
    engine = config.engine
    is_bf16 = engine.precision is Precision.bf16
    return {
        "train_micro_batch_size_per_gpu": config.batch.micro_rows,
        "gradient_accumulation_steps": micro_steps,
        "gradient_clipping": config.optimizer.gradient_clip,
        "zero_optimization": _zero(config),
        # Ours is tested against an unsharded oracle (tests/optim, tests/distributed).
        "zero_allow_untested_optimizer": True,
        # immediate_grad_update: add each gradient to its fp32 sum at once and drop the bf16 one.
        "bf16": {"enabled": is_bf16, "immediate_grad_update": is_bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        # A loss is a sum. ZeRO-3 knows the mean alone.
        "gradient_allreduce_op": "mean" if engine.zero_stage == 3 else "sum",
        "steps_per_print": 1 << 62,
        "wall_clock_breakdown": False,
    }


def _zero(config: TrainConfig) -> dict[str, Any]:
    engine = config.engine
    zero: dict[str, Any] = {
        "stage": engine.zero_stage,
        "overlap_comm": engine.overlap_comm and not engine.reduces_itself,
        "reduce_bucket_size": engine.bucket_elements,
        # Even: DeepSpeed cuts it into pieces of two.
        "allgather_bucket_size": engine.bucket_elements + engine.bucket_elements % 2,
    }
    if engine.zero_stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": engine.zero3_persistent_elements,
            # Give weights back after each use, whatever the model's size.
            "stage3_max_reuse_distance": 0,
        }
    return zero
