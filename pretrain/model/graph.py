"""Functions of a cache and some tensors as CUDA graphs: one launch in place of thousands."""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from pretrain.model.cache import Span

Function = Callable[..., tuple[Tensor, ...]]


class Runner:
    """Calls functions of (span, tensors), or replays what it captured of them.

    A function may run more often than it is called, so it must be harmless to repeat, as writing
    the same keys again is. Graphs have fixed shapes: they attend to the whole cache, behind a mask.
    """

    def __init__(self, is_graphed: bool) -> None:
        self.is_graphed = is_graphed
        self._graphs: dict[Hashable, _Graph] = {}

    def run(
        self, name: Hashable, function: Function, span: Span, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """The function's outputs. Prompts and parts of a batch, of any shape, run as they are."""
        if not self.is_graphed or span.first == 0 or span.rows_A is not None:
            return function(span, *inputs)
        key = (name, *(each.shape for each in inputs))
        if key not in self._graphs:
            self._graphs[key] = _Graph(function, span, inputs)
        return self._graphs[key](span.positions_AT, *inputs)

    def forget(self) -> None:
        """Drop all graphs; for a cache whose rows have changed."""
        self._graphs = {}


class _Graph:
    def __init__(self, function: Function, span: Span, inputs: tuple[Tensor, ...]) -> None:
        self._inputs = [each.clone() for each in (span.positions_AT, *inputs)]
        # Libraries make their workspaces in a first call, which a capture must not see.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._call(function, span)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = self._call(function, span)

    def _call(self, function: Function, span: Span) -> tuple[Tensor, ...]:
        # A span of its own: what a span derives from its positions must be derived in the graph.
        return function(span.anywhere(self._inputs[0]), *self._inputs[1:])

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        for kept, new in zip(self._inputs, inputs, strict=True):
            kept.copy_(new)
        self._graph.replay()
        # The next replay overwrites the graph's own.
        return tuple(each.clone() for each in self._outputs)
