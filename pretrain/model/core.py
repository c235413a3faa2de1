"""The recurrence: one module that owns the whole loop, with its own depth for every row.

Rows are sorted by depth, deepest first, and aligned at the *end*: the deepest rows start alone and
others join as a growing prefix of the batch. Every row gets exactly its own iterations, every
active set is a contiguous slice, and the work is the sum of depths.
"""

# B rows  T tokens  D width  A active rows, a prefix of the sorted batch

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.errors import ConfigError
from pretrain.model.block import make_block
from pretrain.model.cache import Span
from pretrain.model.config import ComputePath, Injection, ModelConfig, ProductPrecision
from pretrain.model.depth import Depth
from pretrain.model.diagnostics import relative_move
from pretrain.model.fused.core import fused_core
from pretrain.model.fused.recurrence import Recurrence
from pretrain.model.layout import Layout
from pretrain.model.parameter import unset


class CoreIteration(nn.Module):
    """One iteration: s <- layers(adapter [s ; e]), the state first, or layers(s + e)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        is_linear = config.injection is Injection.linear
        self.adapter = unset(config.width, 2 * config.width) if is_linear else None
        self.layers = nn.ModuleList(make_block(config) for _ in range(config.core_layers))

    def forward(
        self,
        state_ATD: Tensor,
        embedded_ATD: Tensor,
        layout: Layout,
        span: Span | None = None,
        iteration: int = 0,
    ) -> Tensor:
        """The next state of the active rows; `iteration` counts from 0 and names cache slots."""
        x_ATD = self._inject(state_ATD, embedded_ATD)
        for index, layer in enumerate(self.layers):
            slot = None if span is None else span.slot("core", index, iteration)
            x_ATD = layer(x_ATD, layout, slot)
        return x_ATD

    def _inject(self, state_ATD: Tensor, embedded_ATD: Tensor) -> Tensor:
        if self.adapter is None:
            return state_ATD + embedded_ATD
        return F.linear(torch.cat((state_ATD, embedded_ATD), dim=-1), self.adapter)


class RecurrentCore(nn.Module):
    """The loop over iterations: a prefix without gradient, a suffix with it (arXiv 2502.05171).

    One call runs everything, so that an engine which follows module calls (ZeRO-3) sees the same
    call on every rank whatever the depths.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.iteration = CoreIteration(config)

    def forward(
        self,
        embedded_BTD: Tensor,
        state_BTD: Tensor,
        *,
        depths: Sequence[Depth],
        layout: Layout,
        keep: Sequence[int] = (),
        kept_iterations: int | None = None,
        measures_moves: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        """The state of each row after its own depth, and those after `keep` iterations.

        0 is the start; a row whose depth is smaller has its last state. With kept_iterations the
        backward pass computes all but the last so many iterations again. With measures_moves, for
        which all rows have one depth r, also ||s_t - s_(t-1)|| / ||s_t|| for t = 1..r, [r, B, T].

        Raises ConfigError where the fused path, which differentiates the last states alone, is
        asked for gradients of kept states or of the start.
        """
        order = sorted(range(len(depths)), key=lambda row: -depths[row].total)
        depths = [depths[row] for row in order]
        if is_mixed := order != sorted(order):
            index_B = torch.tensor(order, device=state_BTD.device)
            embedded_BTD, state_BTD = embedded_BTD[index_B], state_BTD[index_B]
            layout = layout.rows(index_B)
        is_fused = self.config.path is ComputePath.fused
        if is_fused and torch.is_grad_enabled():
            _check_differentiable(state_BTD, depths, keep)
        kept = _Kept(state_BTD, depths, keep, measures_moves=measures_moves)
        run = self._run_fused if is_fused else self._run
        last_BTD = run(embedded_BTD, state_BTD, depths, layout, kept, kept_iterations)
        states = (last_BTD, *(kept.after(iterations) for iterations in keep))
        if is_mixed:
            back_B = torch.argsort(index_B)
            states = tuple(state_BTD[back_B] for state_BTD in states)
        return states[0], states[1:], torch.stack(kept.moves) if measures_moves else None

    def _run(
        self,
        embedded_BTD: Tensor,
        state_BTD: Tensor,
        depths: Sequence[Depth],
        layout: Layout,
        kept: "_Kept",
        kept_iterations: int | None,
    ) -> Tensor:
        loop = _Loop(self.iteration, embedded_BTD, state_BTD, layout, depths)
        for iterations_left in range(depths[0].total, 0, -1):
            is_recomputed = kept_iterations is not None and iterations_left > kept_iterations
            loop.advance(iterations_left, is_recomputed)
            kept.see(depths[0].total - iterations_left + 1, loop.state_ATD)
        return loop.cut(iterations_left=0)

    def _run_fused(
        self,
        embedded_BTD: Tensor,
        state_BTD: Tensor,
        depths: Sequence[Depth],
        layout: Layout,
        kept: "_Kept",
        kept_iterations: int | None,
    ) -> Tensor:
        recurrence = Recurrence(
            iteration=self.iteration,
            depths=depths,
            layout=layout,
            epsilon=self.config.norm_epsilon,
            kept_iterations=depths[0].total if kept_iterations is None else kept_iterations,
            float8_prefix=self.config.no_grad_precision is ProductPrecision.fp8,
            float8_suffix=self.config.grad_precision is ProductPrecision.fp8,
            see=kept.see,
        )
        return fused_core(recurrence, embedded_BTD, state_BTD)


def _check_differentiable(start_BTD: Tensor, depths: Sequence[Depth], keep: Sequence[int]) -> None:
    """ConfigError if a gradient is wanted that the fused path would leave out in silence."""
    remedy = "call the model under torch.no_grad(), or take model.path=reference."
    if keep and any(depth.with_grad for depth in depths):
        raise ConfigError(
            f"model.path=fused keeps no gradient of the states after iterations {list(keep)}, and "
            f"gradients are enabled: {remedy}"
        )
    if start_BTD.requires_grad:
        raise ConfigError(
            "model.path=fused gives the initial state no gradient, and initial_state requires "
            f"one: {remedy}"
        )


class _Kept:
    """The states after some iterations, of rows that are sorted deepest first and end together."""

    def __init__(
        self,
        start_BTD: Tensor,
        depths: Sequence[Depth],
        keep: Sequence[int],
        *,
        measures_moves: bool = False,
    ) -> None:
        self.start_BTD = start_BTD
        self.moves: list[Tensor] = []
        self.previous_BTD = start_BTD if measures_moves else None
        self.totals = [depth.total for depth in depths]
        wanted = {self._time(total, number) for total in self.totals for number in keep}
        self.seen: dict[int, Tensor | None] = dict.fromkeys(wanted)

    def see(self, time: int, state_ATD: Tensor) -> None:
        """Remember the active rows after `time` iterations of the deepest one, if needed."""
        if self.previous_BTD is not None:
            self.moves.append(relative_move(self.previous_BTD, state_ATD))
            self.previous_BTD = state_ATD
        if time in self.seen:
            self.seen[time] = state_ATD

    def after(self, iterations: int) -> Tensor:
        """Each row after so many iterations of its own, or its last state: [B, T, D]."""
        times = [self._time(total, iterations) for total in self.totals]
        if iterations == 0:
            return self.start_BTD
        states = [self.seen[time] for time in times]
        assert all(state is not None for state in states)
        if len(set(self.totals)) == 1:
            return cast(Tensor, states[0])
        return torch.stack([cast(Tensor, state)[row] for row, state in enumerate(states)])

    def _time(self, total: int, iterations: int) -> int:
        return self.totals[0] - total + min(iterations, total)


class _Loop:
    """The rows of one call, sorted deepest first, on their way through the iterations."""

    def __init__(
        self,
        iteration: CoreIteration,
        embedded_BTD: Tensor,
        start_BTD: Tensor,
        layout: Layout,
        depths: Sequence[Depth],
    ) -> None:
        self.iteration = iteration
        self.embedded_BTD = embedded_BTD
        self.start_BTD = start_BTD
        self.layout = layout
        self.depths = depths
        self.gradient_iterations = max(depth.with_grad for depth in depths)
        self.active = 0
        self.active_layout = layout
        self.state_ATD = start_BTD[:0]

    def advance(self, iterations_left: int, is_recomputed: bool) -> None:
        """Let rows join whose depth is `iterations_left`, then iterate all active rows once."""
        has_grad = torch.is_grad_enabled() and iterations_left <= self.gradient_iterations
        with torch.set_grad_enabled(has_grad):
            self.state_ATD = self.cut(iterations_left)
            self._join(iterations_left)
            arguments = (self.state_ATD, self.embedded_BTD[: self.active], self.active_layout)
            if has_grad and is_recomputed:
                self.state_ATD = checkpoint(
                    self.iteration, *arguments, use_reentrant=False, preserve_rng_state=False
                )
            else:
                self.state_ATD = self.iteration(*arguments)

    def cut(self, iterations_left: int) -> Tensor:
        """The active state, without history for the rows whose gradient starts here.

        Nothing to do where the longest suffix starts (nothing before it has a gradient), nor for
        rows that start with their suffix; so min(backprop, depth) never costs a copy.
        """
        is_cut = [
            depth.with_grad == iterations_left < min(depth.total, self.gradient_iterations)
            for depth in self.depths[: self.active]
        ]
        if not any(is_cut):
            return self.state_ATD
        is_cut_A11 = torch.tensor(is_cut, device=self.state_ATD.device)[:, None, None]
        return torch.where(is_cut_A11, self.state_ATD.detach(), self.state_ATD)

    def _join(self, iterations_left: int) -> None:
        active = sum(depth.total >= iterations_left for depth in self.depths)
        if active > self.active:
            joining = self.start_BTD[self.active : active]
            self.state_ATD = torch.cat((self.state_ATD, joining)) if self.active else joining
            self.active = active
            self.active_layout = self.layout.rows(slice(active))
