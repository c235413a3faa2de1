"""How kernels are launched: warps by block size, programs that walk over rows."""

# Streaming multiprocessors of an H100 or H200. A constant, and not what the device at hand has:
# programs that walk over rows sum gradients of gains on the way, so their number decides how
# those are rounded.
_MULTIPROCESSORS = 132
# The block of huginn-3.5b's width, for which programs a multiprocessor are counted.
_BLOCK = 8192


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()


def num_warps(block: int, *, elements_per_thread: int = 32) -> int:
    """Between 1 and 16, for a block of so many elements."""
    return max(1, min(16, block // (32 * elements_per_thread)))


def num_walkers(block: int, rows: int, programs: int) -> int:
    """Programs that walk over `rows`, each with a block of so many elements in registers.

    `programs`: how many share a multiprocessor with a block of 8,192, more with a smaller one.
    """
    return min(rows, _MULTIPROCESSORS * max(1, min(16, programs * _BLOCK // block)))
