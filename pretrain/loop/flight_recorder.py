"""What torch's flight recorder remembers: the last collectives of this process, and their state."""

from torch._C import _distributed_c10d

# The second is its name before torch 2.9, of NCCL's alone.
_DUMPS = ("_dump_fr_trace_json", "_dump_nccl_trace_json")


def flight_record() -> bytes | None:
    """The last collectives as JSON, newest last; None if this build of torch keeps none.

    How many are kept is TORCH_FR_BUFFER_SIZE. Nothing is pickled, and no collective is run.
    """
    for name in _DUMPS:
        dump = getattr(_distributed_c10d, name, None)
        if dump is not None:
            record: bytes = dump(True, False)
            return record
    return None
