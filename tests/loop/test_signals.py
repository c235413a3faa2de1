import os
import signal
import subprocess
import sys
import time

import pytest

from pretrain.loop.signals import StopSignals

SENT = """
import os, signal, sys
from pretrain.loop.signals import StopSignals
with StopSignals() as stop:
    said = [stop.received]
    for number in sys.argv[1:]:
        os.kill(os.getpid(), int(number))
    said.append(stop.received)
print(*(number and number.name for number in said))
"""


@pytest.mark.parametrize(
    "numbers",
    [[signal.SIGUSR1], [signal.SIGTERM], [signal.SIGINT], [signal.SIGUSR1, signal.SIGTERM]],
    ids=str,
)
def test_the_first_signal_is_the_reason_and_does_nothing_else(numbers):
    """In a process of one thread: others, such as those of pytest-xdist, may be slow to take it."""
    words = [str(int(number)) for number in numbers]
    done = subprocess.run([sys.executable, "-c", SENT, *words], stdout=subprocess.PIPE, text=True)
    assert (done.returncode, done.stdout) == (0, f"None {numbers[0].name}\n")


def test_handlers_are_restored():
    numbers = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    with StopSignals():
        os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.faults
def test_what_training_starts_survives_the_signal_for_all_processes_of_a_step():
    """A compiler that ended there would take the rank with it, which is about to save."""
    with StopSignals() as stop:
        child = subprocess.Popen(["sleep", "60"])
        try:
            for pid in (child.pid, os.getpid()):
                os.kill(pid, signal.SIGUSR1)
            time.sleep(0.5)
            assert child.poll() is None
            assert stop.received is signal.SIGUSR1
        finally:
            child.kill()
            child.wait()


def test_a_signal_that_nobody_has_asked_about_does_not_strike_at_the_end():
    with StopSignals():
        os.kill(os.getpid(), signal.SIGUSR1)
    # its default action would have ended this process
    assert signal.SIGUSR1 not in signal.sigpending()


RACE = """
import os, signal, threading, time
from pretrain.loop.signals import StopSignals
threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
for _ in range(10000):
    with StopSignals():
        os.kill(os.getpid(), signal.SIGUSR1)
print("done")
"""


def test_an_older_thread_may_take_the_signal_at_the_end():
    """It was looked for and then waited for: a run hung at its end, and SIGTERM did not end it."""
    done = subprocess.run([sys.executable, "-c", RACE], stdout=subprocess.PIPE, timeout=240)
    assert done.stdout == b"done\n"


PROGRAM = """
import time
from pretrain.loop.signals import StopSignals
with StopSignals() as stop:
    print("ready", flush=True)
    while stop.received is None:
        time.sleep(0.01)
    print(stop.received.name, flush=True)
    time.sleep(60)
"""


@pytest.mark.faults
def test_a_second_interrupt_ends_the_process_at_once():
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == b"SIGINT\n"
            started = time.monotonic()
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) == -signal.SIGINT
            # Far below the 60 s that the program would sleep.
            assert time.monotonic() - started < 20
        finally:
            process.kill()
