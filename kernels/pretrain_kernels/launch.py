"""How kernels are launched: warps by block size, programs that walk over rows."""

# Streaming multiprocessors of an H100 or H200. A constant, and not what the device at hand has:
# programs that walk over rows sum gradients of gains on the way, so their number decides how
# those are rounded.
_MULTIPROCESSORS = 132
# Elements of all the walking programs that one multiprocessor holds at a time: at 126 registers
# for each of 512 threads (tests/kernels/test_compiled.py) one program of 8,192.
_RESIDENT = 8192


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()


def num_warps(block: int, *, elements_per_thread: int = 32) -> int:
    """Between 1 and 16, for a block of so many elements."""
    return max(1, min(16, block // (32 * elements_per_thread)))


def num_walkers(block: int, rows: int) -> int:
    """Programs that walk over `rows`, each with a block of so many elements in registers."""
    return min(rows, _MULTIPROCESSORS * max(1, min(16, _RESIDENT // block)))
