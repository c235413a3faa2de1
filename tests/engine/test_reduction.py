"""On a GPU, work on the second stream neither reads nor writes memory that is somebody else's.

The second stream sleeps first, so that whoever does not wait for it comes too early for sure.
"""

import gc
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.engine.reduction import EarlySums, OwnedShard, ShardedSums, SideStream
from pretrain.optim.slices import Fragment

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
CUDA = torch.device("cuda", 0)
# Tensors of this size have memory of their own, and one that is freed is the next one's.
NUMEL = 1 << 24
# Some 0.3 s: the host issues everything else meanwhile.
CYCLES = 500_000_000


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    """This process alone: what it sums over ranks stays as it is."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=CUDA)
    # the first collective sets up what the others need
    dist.all_reduce(torch.ones(1, device=CUDA))
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    yield dist.group.WORLD
    dist.destroy_process_group()


def delay(side: SideStream) -> None:
    with side.after():
        torch.cuda._sleep(CYCLES)


def new_sums(side: SideStream, group: dist.ProcessGroup) -> tuple[ShardedSums, nn.Parameter]:
    """Those of one parameter, through a bucket that it fills four times.

    A step is done: kernels that are loaded when first used would have the host wait for the GPU.
    """
    parameter = nn.Parameter(torch.zeros(NUMEL, dtype=torch.bfloat16, device=CUDA))
    shards = {parameter: OwnedShard(torch.zeros(NUMEL, device=CUDA), Fragment(0, 0, 0, NUMEL))}
    sums = ShardedSums(
        [shard.total for shard in shards.values()], shards, side,
        bucket_elements=NUMEL // 4, group=group,
    )  # fmt: skip
    sums.add(parameter, new_gradient(7.0))
    assert is_filled(sums.take()[0], 7.0)
    sums.forget()
    delay(side)
    torch.cuda.synchronize()
    return sums, parameter


def new_gradient(value: float) -> Tensor:
    return torch.full((NUMEL,), value, dtype=torch.bfloat16, device=CUDA)


def is_filled(tensor: Tensor, value: float) -> bool:
    """Asked on this stream, which waits for the other one only where it has been told to."""
    return bool((tensor == value).all())


def test_gradients_keep_their_memory_until_they_are_read(group: dist.ProcessGroup) -> None:
    side = SideStream(CUDA, overlaps=True)
    sums, parameter = new_sums(side, group)
    for _ in range(2):
        delay(side)
        for value in (1.0, 2.0):
            gradient = new_gradient(value)
            address = gradient.data_ptr()
            sums.add(parameter, gradient)
            del gradient
            assert new_gradient(torch.nan).data_ptr() != address
        sums.flush()
        assert is_filled(sums.take()[0], 3.0)
        sums.forget()


def test_sums_that_are_gone_are_not_written_to(group: dist.ProcessGroup) -> None:
    side = SideStream(CUDA, overlaps=True)
    sums, parameter = new_sums(side, group)
    sums.add(parameter, new_gradient(1.0))
    address = sums.take()[0].data_ptr()
    delay(side)
    sums.forget()
    del sums
    gc.collect()
    other = torch.full((NUMEL,), 5.0, device=CUDA)
    assert other.data_ptr() == address
    torch.cuda.synchronize()
    assert is_filled(other, 5.0)


def test_early_sums_are_there_when_the_pass_has_ended(group: dist.ProcessGroup) -> None:
    side = SideStream(CUDA, overlaps=True)
    early = EarlySums(side, group)
    large, small = torch.ones(EarlySums.LEAST, device=CUDA), torch.ones(3, device=CUDA)
    for value in (2.0, 4.0, 8.0):
        delay(side)
        with side.after():
            # what other ranks would add
            large.mul_(2)
        early.finished(large)
        early.finished(small)
        assert early.left([large, small]) == [small]
        assert is_filled(large, value)
    assert early.left([large, small]) == [large, small]
