import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from echovlm_ray.cli.interruptible import interruptible
from tests.cli.control_server import System

TIMES = 100


def press_ctrl_c() -> None:
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def test_messages_come_as_they_are_and_only_when_they_are_wanted() -> None:
    asked: list[int] = []

    def messages() -> Iterator[int]:
        for number in range(3):
            asked.append(number)
            yield number

    with interruptible(messages()) as received:
        assert asked == []
        assert next(received) == 0
        time.sleep(0.05)
        assert asked == [0]
        assert list(received) == [1, 2]


def test_what_the_messages_raise_is_raised() -> None:
    def messages() -> Iterator[int]:
        yield 1
        raise ValueError("no more")

    with interruptible(messages()) as received:
        assert next(received) == 1
        with pytest.raises(ValueError, match="no more"):
            next(received)


def test_ctrl_c_interrupts_the_waiting_and_not_who_waits_for_the_message() -> None:
    went_on = threading.Event()

    def messages() -> Iterator[int]:
        press_ctrl_c()
        time.sleep(0.05)
        went_on.set()
        yield 1

    with interruptible(messages()) as received, pytest.raises(KeyboardInterrupt):
        next(received)
    assert went_on.wait(5)


def test_ctrl_c_lets_the_work_on_a_message_end_first() -> None:
    with interruptible(iter([1, 2])) as received:
        assert next(received) == 1
        press_ctrl_c()
        time.sleep(0.05)
        with pytest.raises(KeyboardInterrupt):
            next(received)


def test_a_second_ctrl_c_interrupts_that_work_too() -> None:
    with interruptible(iter([1, 2])) as received:
        assert next(received) == 1
        press_ctrl_c()
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - it may come after either line
            press_ctrl_c()
            time.sleep(5)


def test_afterwards_ctrl_c_is_what_it_was() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interruptible(iter([1])):
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before


def test_a_watch_can_be_interrupted_at_any_moment(system: System) -> None:
    """Ctrl-C at once after each first line: with plain `KeyboardInterrupt`s some leave gRPC's locks held, or free."""
    code = (
        "import sys\n"
        "from echovlm_ray.cli.experts_watch import watch_state\n"
        "from echovlm_ray.client.control import ExpertControlClient\n"
        f"for _ in range({TIMES}):\n"
        "    with ExpertControlClient(sys.argv[1]) as control:\n"
        "        watch_state(control, '', False)\n"
        "    print('ended')\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, system.address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:
        watchdog = threading.Timer(60, process.kill)
        watchdog.start()
        assert process.stdout is not None
        ended = 0
        for line in process.stdout:
            ended += line == "ended\n"
            if "heart: 1.0.0" in line:
                process.send_signal(signal.SIGINT)
        watchdog.cancel()
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait() == 0
    assert ended == TIMES
