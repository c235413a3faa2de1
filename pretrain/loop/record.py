"""What a run leaves behind: metrics.jsonl is the truth, the rest are copies of it."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.compose import as_dict
from pretrain.config import TrainConfig
from pretrain.engine.saving import Saved
from pretrain.errors import PretrainError
from pretrain.loop.alarms import Alarms
from pretrain.loop.console import Progress, one_line
from pretrain.loop.lineage import GoodputSoFar
from pretrain.loop.metrics import MetricLog, read_metrics
from pretrain.loop.origin import write_origin
from pretrain.loop.plots import plot_run
from pretrain.loop.sink import SAMPLES, Alerts, message
from pretrain.loop.state import TrainState, last_step
from pretrain.loop.steps import StepRecord
from pretrain.loop.tensorboard_sink import start_tensorboard
from pretrain.loop.wandb_sink import start_wandb

log = logging.getLogger(__name__)

# Characters of a sample that the console shows.
_SHOWN_CHARACTERS = 100


class Record:
    """Rank 0's record of a run. Other ranks make one too, and it writes nothing there."""

    def __init__(
        self,
        config: TrainConfig,
        run_dir: Path,
        state: TrainState,
        *,
        rank: int,
        origin: Mapping[str, Any],
    ) -> None:
        """`origin`: where this life comes from, for the configuration that pages show."""
        self._run_dir = run_dir
        self._is_writer = rank == 0
        if not self._is_writer:
            return
        self._config, self._name = config, config.run.name
        self._resume(state)
        write_origin(run_dir, origin)
        shown = as_dict(config) | {"origin": dict(origin)}
        started = (
            start_wandb(config.logging, run_dir, shown, run_name=config.run.name),
            start_tensorboard(config.logging, run_dir, tokens=state.tokens),
        )
        self._sinks = [sink for sink in started if sink is not None]
        self._alerts = Alerts(self._sinks, cooldown_s=config.logging.alert_cooldown_s)

    def step(self, record: StepRecord) -> None:
        """One line on the console, one object in the log, one point in each sink."""
        if not self._is_writer:
            return
        metrics, step_s = record.metrics, record.metrics["speed/step_s"]
        left_s = self._progress.left_s(step=record.step, step_s=step_s)
        progress = {"progress/left_s": left_s, "progress/goodput": self._goodput.after(step_s)}
        log.info(
            self._progress.line(
                step=record.step,
                left_s=left_s,
                loss_nats=metrics["loss/nats"],
                mean_depth=metrics["depth/mean"],
                tokens_per_s=metrics["speed/tokens_per_s"],
                grad_norm=metrics["gradient/norm"],
                learning_rate=metrics["optimizer/learning_rate"],
            )
        )
        self._write({"step": record.step, "tokens": record.tokens, **metrics, **progress})
        self._tell_of_step(record)

    def validation(self, state: TrainState, result: dict[str, Any]) -> None:
        """Held-out loss at several depths and samples: one object, a line each on the console."""
        if not self._is_writer:
            return
        pairs = zip(result["validation/depths"], result["validation/loss_nats"], strict=True)
        shown = "  ".join(f"r={depth} {loss:.4f}" for depth, loss in pairs)
        log.info("validation at step %d: %s", state.step, shown)
        if samples := result.get(SAMPLES):
            first = [sample for sample in samples if sample["prompt"] == samples[0]["prompt"]][-1]
            text = one_line(first["prompt"] + first["text"], _SHOWN_CHARACTERS)
            log.info("sample at step %d, r=%d: %s", state.step, first["depth"], text)
        alarms = self._alarms.judge(state.step, result)
        for name, is_on in alarms.items():
            if is_on:
                kind = name.removeprefix("alarm/")
                self.alert(kind, f"{self._name}: alarm {kind} at step {state.step}: {shown}")
        self._write({"step": state.step, "tokens": state.tokens, **result, **alarms})

    def saved(self, state: TrainState, saved: Saved, *, blocked_s: float) -> None:
        """A committed checkpoint: its size, and how long training waited for it."""
        if not self._is_writer:
            return
        values = {
            "checkpoint/step": saved.step,
            "checkpoint/bytes": saved.bytes,
            "checkpoint/copied_s": saved.copied_s,
            "checkpoint/written_s": saved.written_s,
            "checkpoint/blocked_s": blocked_s,
        }
        self._write({"step": state.step, "tokens": state.tokens, **values})

    def rewound(self, state: TrainState) -> None:
        """The run has gone back to `state`: later records move aside, as after a resume."""
        if not self._is_writer:
            return
        self._log.close()
        self._resume(state)

    def alert(self, kind: str, text: str) -> None:
        """Tell whoever watches the copies; rank 0 only, and not too often."""
        if self._is_writer:
            self._alerts.raise_(kind, text)

    def save_failed(self, state: TrainState, error: Exception) -> None:
        """A checkpoint was not written, and training goes on."""
        if self._is_writer:
            self.alert("save failed", f"{self._name} at step {state.step}: {error}")

    def stalled(self, step: int) -> None:
        """No rank has got on for guards.stall_s; the process is about to end."""
        if self._is_writer:
            self.alert("stall", f"{self._name} stands still at step {step}; see stalls.jsonl")

    def requeued(self, state: TrainState, reason: str) -> None:
        """The life has saved and ends before the run does."""
        if self._is_writer:
            self.alert("requeue", f"{self._name} saved step {state.step} and leaves: {reason}")

    def _tell_of_step(self, record: StepRecord) -> None:
        """WARNING and alert of a step whose update was dropped, or whose loss was a spike."""
        metrics, limits = record.metrics, self._config.guards.spike
        loss, norm, score = (
            metrics[key] for key in ("loss/nats", "gradient/norm", "loss/spike_score")
        )
        if not (math.isfinite(loss) and math.isfinite(norm)):
            kind, what = "non-finite", f"loss {loss}, gradient norm {norm}; no update"
        elif score >= limits.alert_score:
            update = "no update" if score >= limits.skip_score else "updated all the same"
            kind, what = "spike", f"loss {loss:.4f}, {score:.1f} deviations up; {update}"
        else:
            return
        log.warning("%s at step %d: %s", kind, record.step, what)
        self.alert(kind, f"{self._name} at step {record.step}: {what}")

    def sync(self) -> None:
        """Make what was written last through a power cut; called with each checkpoint."""
        if self._is_writer:
            self._log.sync()

    def finish(self, exit_code: int) -> list[Path]:
        """Close the log and the sinks, draw the plots, and say where they are."""
        if not self._is_writer:
            return []
        self._log.close()
        for sink in self._sinks:
            sink.close(exit_code)
        try:
            return plot_run(self._run_dir)
        except (OSError, PretrainError) as error:
            log.warning("the plots could not be drawn: %s", error)
            return []

    def _resume(self, state: TrainState) -> None:
        path = self._run_dir / "metrics.jsonl"
        self._log = MetricLog(path, resumed_step=state.step)
        earlier = read_metrics(path)
        self._alarms = Alarms(self._config, earlier)
        self._goodput = GoodputSoFar(self._run_dir, earlier)
        self._progress = Progress(last_step(self._config, state))

    def _write(self, values: dict[str, Any]) -> None:
        self._log.write(values)
        for sink in self._sinks:
            sink.send(message(values))
