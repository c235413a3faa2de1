import os
import signal
import subprocess
import sys
import time

import pytest

from pretrain.loop.signals import StopSignals


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_only_sets_the_flag(number):
    with StopSignals() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received is number


def test_the_first_signal_names_the_reason():
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received is signal.SIGUSR1


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
