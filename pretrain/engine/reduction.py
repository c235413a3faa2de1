"""Sums of gradients over ranks, beside the backward pass that makes them.

A reduction is issued on a second stream as soon as its gradients are there, so it runs while the
pass goes on, and under ZeRO-2 while the next one begins. What is issued does not depend on whether
there is a second stream: CPUs run the same operations in the same order.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.optim.slices import Fragment


class SideStream:
    """A stream of work beside the current one; where there is none, the current one."""

    def __init__(self, device: torch.device, *, overlaps: bool) -> None:
        """CPUs have no streams."""
        has_stream = overlaps and device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if has_stream else None

    @contextlib.contextmanager
    def after(self, *given: Tensor) -> Iterator[None]:
        """Issue work that begins when all issued so far is done.

        `given` are tensors that it reads and whose owner may let go of them before it has.
        """
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        for tensor in given:
            tensor.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """What is issued from here on begins when the work beside is done."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)


class OwnedShard(NamedTuple):
    """Where this rank keeps its part of a tensor's gradient sum."""

    total: Tensor
    """A flat fp32 partition."""
    fragment: Fragment


class _Piece(NamedTuple):
    """A run of a flattened gradient that lies in the bucket."""

    parameter: nn.Parameter
    start: int
    offset: int
    """In the bucket."""
    numel: int


class ShardedSums:
    """The gradient sums of ZeRO-2: of each tensor, this rank keeps what it will update.

    Every gradient goes through one fp32 bucket, which is summed over all ranks when it is full; a
    gradient larger than the bucket goes in pieces. Bytes per parameter and pass: 6 to widen, 12 / n
    to add, and what the sum over ranks takes; DeepSpeed 0.19's buckets add 4 to collect, 4 to
    flatten and 6 + 3 to copy back. All ranks must bring the same gradients in the same order.
    """

    def __init__(
        self,
        totals: Sequence[Tensor],
        shards: Mapping[nn.Parameter, OwnedShard],
        side: SideStream,
        *,
        bucket_elements: int,
        group: dist.ProcessGroup,
    ) -> None:
        """`totals` are zero; a parameter without a shard has all its elements on other ranks."""
        self._totals, self._shards, self._side, self._group = totals, shards, side, group
        device = totals[0].device
        self._bucket = torch.empty(bucket_elements, dtype=torch.float32, device=device)
        self._filled = 0
        self._pieces: list[_Piece] = []

    def add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Let a gradient join the bucket, and let go of it."""
        flat = gradient.reshape(-1)
        with self._side.after(flat):
            start = 0
            while start < flat.numel():
                numel = min(flat.numel() - start, self._bucket.numel() - self._filled)
                place = self._bucket.narrow(0, self._filled, numel)
                place.copy_(flat.narrow(0, start, numel))
                self._pieces.append(_Piece(parameter, start, self._filled, numel))
                self._filled += numel
                start += numel
                if self._filled == self._bucket.numel():
                    self._empty_bucket()

    def flush(self) -> None:
        """Sum what is left in the bucket, at the end of a backward pass."""
        if self._filled:
            with self._side.after():
                self._empty_bucket()

    def take(self) -> Sequence[Tensor]:
        """The sums of this step, one for each partition; `forget` them when they are used."""
        self.flush()
        self._side.join()
        return self._totals

    def forget(self) -> None:
        """The next gradient begins new sums."""
        # not on the side stream: the memory may be given away as soon as nobody holds this object
        for total in self._totals:
            total.zero_()

    def _empty_bucket(self) -> None:
        dist.all_reduce(self._bucket.narrow(0, 0, self._filled), group=self._group)
        for piece in self._pieces:
            shard = self._shards.get(piece.parameter)
            if shard is None:
                continue
            total, fragment = shard
            start = max(piece.start, fragment.tensor_start)
            end = min(piece.start + piece.numel, fragment.tensor_start + fragment.numel)
            if start < end:
                place = fragment.partition_start + start - fragment.tensor_start
                source = self._bucket.narrow(0, piece.offset + start - piece.start, end - start)
                total.narrow(0, place, end - start).add_(source)
        self._pieces.clear()
        self._filled = 0


class EarlySums:
    """The reduction of ZeRO-1's sums, of large tensors as soon as the last gradient is there.

    Small ones are left to the end, where many travel together. Each tensor gets one gradient in a
    backward pass, and all ranks get them in the same order.
    """

    LEAST = 1 << 14
    """Elements of a tensor that travels alone: the matrices of any model, no gains or biases."""

    def __init__(self, side: SideStream, group: dist.ProcessGroup) -> None:
        self._side, self._group = side, group
        self._sent: set[int] = set()

    def finished(self, total: Tensor) -> None:
        """The step's last gradient has joined this sum."""
        if total.numel() < self.LEAST:
            return
        assert id(total) not in self._sent, "a gradient came after its sum was sent"
        with self._side.after():
            dist.all_reduce(total, group=self._group)
        self._sent.add(id(total))

    def left(self, totals: Sequence[Tensor]) -> list[Tensor]:
        """At the end of the last backward pass: wait for what was sent, and return the others."""
        self._side.join()
        left = [total for total in totals if id(total) not in self._sent]
        self._sent.clear()
        return left
