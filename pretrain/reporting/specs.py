"""Which metrics share a chart, and in what order a page has them."""

from dataclasses import dataclass

from pretrain.reporting.scale import Kind


@dataclass(frozen=True, slots=True)
class Spec:
    """One chart of metrics that share an axis; comparisons draw only the first of them."""

    title: str
    keys: tuple[str, ...]
    labels: tuple[str, ...] = ("",)
    kind: Kind = Kind.linear
    note: str = ""


PARTS = ("prelude", "adapter", "core", "coda", "embedding")
SPEED = (
    Spec("Tokens per second", ("speed/tokens_per_s",)),
    Spec("Seconds per step", ("speed/step_s", "data/wait_s"), ("step", "waiting for data")),
    Spec(
        "Share of the peak that is used",
        ("speed/mfu", "speed/hfu"),
        ("model FLOPs", "with what is computed again"),
    ),
    Spec(
        "Where a step's time goes",
        ("time/forward_s", "time/backward_s", "time/update_s", "time/wait_s"),
        ("forward", "backward", "update", "waiting for ranks"),
    ),
    Spec(
        "Seconds of a validation",
        ("time/validation_s", "time/samples_s"),
        ("held-out loss", "samples"),
    ),
    Spec("Model FLOPs per second and rank", ("speed/model_flops_per_s_per_rank",)),
    Spec("Goodput", ("progress/goodput",), note="share of the time since the run began in steps"),
    Spec(
        "Slowest rank",
        ("ranks/slowest_ratio",),
        note="its time for equal work, over the median rank's",
    ),
)
OPTIMIZATION = (
    Spec("Gradient norm", ("gradient/norm",), kind=Kind.log, note="before clipping"),
    Spec(
        "Gradient norm by part",
        tuple(f"gradient/norm_{part}" for part in PARTS),
        PARTS,
        kind=Kind.log,
    ),
    Spec("Learning rate", ("optimizer/learning_rate",)),
    Spec(
        "How far updates reach, by part",
        tuple(f"optimizer/effective_rate_{part}" for part in PARTS),
        PARTS,
        kind=Kind.log,
        note="learning rate over the root of the second moment, mean of a part's weights",
    ),
    Spec("Spike score", ("loss/spike_score",), note="of each step's loss among those before it"),
    Spec("Updates skipped so far", ("optimizer/skipped_updates",)),
)
RECURRENCE = (
    Spec("Depth of the rows", ("depth/mean", "depth/max", "depth/min"), ("mean", "most", "least")),
    Spec(
        "What depth gains",
        ("validation/loss_at_mean_nats", "validation/loss_at_1_nats"),
        ("held out, mean depth", "held out, depth 1"),
        note="nats per token",
    ),
    Spec(
        "How far the last iteration moves a state",
        ("state/relative_residual",),
        kind=Kind.log,
        note="||s_r − s_(r−1)|| / ||s_r|| at the mean depth",
    ),
    Spec(
        "How alike the tokens are",
        ("state/token_correlation", "hidden/token_correlation"),
        ("state", "before the head"),
        note="near 1 the recurrence has collapsed",
    ),
    Spec("Norm of the state", ("state/norm",)),
)
RESOURCES = (
    Spec("Peak memory of the GPU", ("memory/peak_bytes",)),
    Spec("Memory of the host process", ("memory/host_bytes",)),
    Spec("Seconds to write a checkpoint", ("checkpoint/written_s",)),
    Spec("Seconds that training waited for a save", ("checkpoint/blocked_s",)),
)
SENSORS = (
    Spec("GPU busy", ("gpu/utilization",), note="share of time in which a kernel ran"),
    Spec("GPU power", ("gpu/power_w",), note="mean of the ranks"),
    Spec("GPU temperature", ("gpu/temperature_c",), note="mean of the ranks"),
    Spec("GPU clock", ("gpu/clock_hz",), note="of the multiprocessors, mean of the ranks"),
)
# Drawn elsewhere, or numbers whose curve says nothing.
NOT_CURVES = {
    "loss/nats", "data/first_row", "data/checksum", "data/rows", "checkpoint/step",
    "validation/rows", "validation/tokens",
}  # fmt: skip

# Metrics of which there is one for each source of the data.
SHARE, EPOCHS = "data/share_", "data/epochs_"

# Lists of a validation, against the list of their places, or 1, 2, ... where there is none.
LISTS = (
    (
        "How far each iteration moves the states",
        "state/moves",
        None,
        "iteration",
        "||s_t − s_(t−1)|| / ||s_t|| over held-out tokens",
    ),
    (
        "How much a prediction still changes",
        "validation/kl_nats",
        "validation/kl_depths",
        "depth (iterations of the core)",
        "KL divergence from the next smaller depth, nats per token",
    ),
)
