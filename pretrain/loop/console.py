"""What a person who watches a run reads: one line per step."""

# Steps that the estimate looks back on: the first of a life compile and are forgotten.
_MEMORY_STEPS = 50


class Progress:
    """Estimates the time left, and formats the console's line of each step.

    The estimate is the steps left times a running mean of step times: exact when all steps cost
    the same, and within about 50 steps it forgets a slow start.
    """

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self._mean_s = 0.0
        self._seen_steps = 0

    def left_s(self, *, step: int, step_s: float) -> float:
        """Seconds to the end of the run, after the step that has just taken `step_s`."""
        self._seen_steps += 1
        self._mean_s += (step_s - self._mean_s) / min(self._seen_steps, _MEMORY_STEPS)
        return self._mean_s * (self._total_steps - step)

    def line(
        self,
        *,
        step: int,
        left_s: float,
        loss_nats: float,
        mean_depth: float,
        tokens_per_s: float,
        grad_norm: float,
        learning_rate: float,
    ) -> str:
        """The line of the step that has just ended, `left_s` seconds before the run's end."""
        width = len(str(self._total_steps))
        return (
            f"step {step:>{width}}/{self._total_steps}  loss {loss_nats:.4f}  "
            f"depth {mean_depth:4.1f}  {tokens_per_s:,.0f} tokens/s  grad {grad_norm:.3g}  "
            f"lr {learning_rate:.2e}  left {format_duration(left_s)}"
        )


def one_line(text: str, most: int) -> str:
    """A text on one line of a terminal: white space joined, nothing that a terminal would obey."""
    joined = " ".join(text.split())
    plain = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in joined)
    return plain if len(plain) <= most else plain[: most - 1] + "…"


def format_duration(seconds: float) -> str:
    """Seconds as a person says them: 42s, 3m07s, 2h05m, 3d04h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    hours = round(seconds / 3600)
    return f"{hours // 24}d{hours % 24:02d}h"
