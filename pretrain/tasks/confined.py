"""The process that runs one program: it gives up what it does not need, then runs it.

A program of its own, of the standard library only: `python -I -S -B confined.py`, with a JSON
object on stdin (`program`, `token`, `cpu_s`, `memory_bytes`). If the program ends without an
exception, `token` is the last thing on stdout and the exit code is 0.

Resource limits bound time and memory. A seccomp filter lets through only the system calls that
pure Python needs: none that opens a socket, writes, creates or removes a file, starts a process or
a thread, or signals another process. It needs no privileges and cannot be taken off. Numbers of
calls: the kernel's tables for x86_64 and for the generic ABI (aarch64).
"""

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys

EXIT_UNCONFINED = 97
"""This machine cannot confine a program."""

# from linux/seccomp.h, linux/filter.h and linux/prctl.h
_SET_PARENT_DEATH_SIGNAL, _SET_SECCOMP, _NO_NEW_PRIVILEGES = 1, 22, 38
_FILTER_MODE = 2
_ALLOW, _KILL, _DENY = 0x7FFF0000, 0x80000000, 0x00050000 | 1
_LOAD, _IS_EQUAL, _HAS_BITS, _RETURN = 0x20, 0x15, 0x45, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# read, write, close, stat, fstat, lstat, poll, lseek, mmap, mprotect, munmap, brk, rt_sigaction,
# rt_sigprocmask, rt_sigreturn, pread64, readv, writev, access, select, sched_yield, mremap,
# madvise, dup, nanosleep, setitimer, getpid, exit, uname, getcwd, readlink, gettimeofday,
# getrusage, sysinfo, times, getuid, getgid, geteuid, getegid, sigaltstack, gettid, time, futex,
# sched_getaffinity, getdents64, restart_syscall, clock_gettime, clock_getres, clock_nanosleep,
# exit_group, newfstatat, readlinkat, faccessat, getrandom, statx, rseq, faccessat2
_X86_64 = (
    0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 19, 20, 21, 23, 24, 25, 28, 32, 35, 38,
    39, 60, 63, 79, 89, 96, 98, 99, 100, 102, 104, 107, 108, 131, 186, 201, 202, 204, 217, 219,
    228, 229, 230, 231, 262, 267, 269, 318, 332, 334, 439,
)  # fmt: skip
# getcwd, dup, faccessat, close, getdents64, lseek, read, write, readv, writev, pread64, pselect6,
# ppoll, readlinkat, newfstatat, fstat, exit, exit_group, futex, nanosleep, setitimer,
# clock_gettime, clock_getres, clock_nanosleep, sched_getaffinity, sched_yield, restart_syscall,
# sigaltstack, rt_sigaction, rt_sigprocmask, rt_sigreturn, times, uname, getrusage, gettimeofday,
# getpid, getuid, geteuid, getgid, getegid, gettid, sysinfo, brk, munmap, mremap, mmap, mprotect,
# madvise, getrandom, statx, rseq, faccessat2
_AARCH64 = (
    17, 23, 48, 57, 61, 62, 63, 64, 65, 66, 67, 72, 73, 78, 79, 80, 93, 94, 98, 101, 103, 113, 114,
    115, 123, 124, 128, 132, 134, 135, 139, 153, 160, 165, 169, 172, 174, 175, 176, 177, 178, 179,
    214, 215, 216, 222, 226, 233, 278, 291, 293, 439,
)  # fmt: skip
_ALLOWED = {"x86_64": _X86_64, "aarch64": _AARCH64}
# open and openat, and which argument holds the flags: only for reading
_OPENING = {"x86_64": ((2, 1), (257, 2)), "aarch64": ((56, 2),)}


def main() -> None:
    """Read the request, confine this process, run the program."""
    request = json.loads(sys.stdin.read())
    try:
        limit(request["cpu_s"], request["memory_bytes"])
        confine()
    except OSError as error:
        print(error)
        sys.stdout.flush()
        os._exit(EXIT_UNCONFINED)
    code = compile(request["program"], "<program>", "exec")
    try:
        exec(code, {"__name__": "__main__"})
    except SystemExit as left:
        # whoever leaves before the end has not passed the rest
        raise RuntimeError(f"the program left with SystemExit({left.code!r})") from None
    sys.stdout.flush()
    os.write(1, request["token"].encode())
    os._exit(0)


def limit(cpu_s: int, memory_bytes: int) -> None:
    """Bounds of this process that it cannot lift again once it is confined."""
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


def confine() -> None:
    """Take from this process all system calls but those of the list, for good.

    Raises OSError if the kernel or the processor's architecture does not allow it.
    """
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _ALLOWED:
        raise OSError(f"{sys.platform} on {machine}: only Linux on {', '.join(_ALLOWED)}")
    program = _filter(machine)
    code = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: the number of instructions, and where they are
    described = ctypes.create_string_buffer(
        struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(code))
    )
    library = ctypes.CDLL(None, use_errno=True)
    arguments = [ctypes.c_ulong] * 4
    library.prctl.argtypes = [ctypes.c_int, *arguments]
    for option, first, second in (
        (_SET_PARENT_DEATH_SIGNAL, int(signal.SIGKILL), 0),
        (_NO_NEW_PRIVILEGES, 1, 0),
        (_SET_SECCOMP, _FILTER_MODE, ctypes.addressof(described)),
    ):
        if library.prctl(option, first, second, 0, 0) != 0:
            code_of_error = ctypes.get_errno()
            raise OSError(code_of_error, f"prctl({option}): {os.strerror(code_of_error)}")


def _filter(machine: str) -> bytes:
    """The filter as BPF instructions; what it does not name is refused with EPERM."""
    allow = _step(_RETURN, 0, 0, _ALLOW)
    steps = [
        _step(_LOAD, 0, 0, _ARCHITECTURE_AT),
        _step(_IS_EQUAL, 1, 0, _ARCHITECTURES[machine]),
        _step(_RETURN, 0, 0, _KILL),
        _step(_LOAD, 0, 0, _NUMBER_AT),
    ]
    for number in _ALLOWED[machine]:
        steps += [_step(_IS_EQUAL, 0, 1, number), allow]
    for number, argument in _OPENING[machine]:
        steps += [
            _step(_IS_EQUAL, 0, 4, number),
            # the lower half of the argument: both architectures are little-endian
            _step(_LOAD, 0, 0, _ARGUMENTS_AT + 8 * argument),
            _step(_HAS_BITS, 1, 0, _WRITING),
            allow,
            _step(_RETURN, 0, 0, _DENY),
        ]
    return b"".join([*steps, _step(_RETURN, 0, 0, _DENY)])


def _step(code: int, if_true: int, if_false: int, value: int) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)


if __name__ == "__main__":
    main()
