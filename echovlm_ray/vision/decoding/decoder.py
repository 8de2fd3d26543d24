"""The gateway's handle of one decoder process."""

import asyncio
import math
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import psutil

from echovlm_ray.vision.decoding.answer import WrongAnswerError, read_answer
from echovlm_ray.vision.decoding.job import JOB, MAX_ANSWER_BYTES
from echovlm_ray.vision.decoding.memory import Memory
from echovlm_ray.vision.decoding.settings import DecoderSettings
from echovlm_ray.vision.images import DecodedImage
from experts.checks.fork_server import REPORT, ForkServer

# How often a process is looked at that takes longer than this.
WATCH_S = 0.05
# A process that has not used its processor time within so many times that time on the clock is not decoding.
STUCK_FACTOR = 10.0
# More bytes are copied on another thread, so that the event loop is not blocked.
MAX_COPY_ON_LOOP = 512 * 1024
# How long a killed process may take to end.
KILL_S = 5.0

P = ParamSpec("P")
T = TypeVar("T")


class FileRefusedError(ValueError):
    """The file cannot be decoded. The text begins with a verb, its subject being the file."""


class DecoderLimitError(FileRefusedError):
    """The file takes more than decoding may take, and its process is of no more use."""


class DecoderEndedError(RuntimeError):
    """The process has ended without an answer.

    Attributes:
        status: its exit code, or minus the number of the signal that ended it; None when it was lost together with the
            fork server.
    """

    def __init__(self, status: int | None) -> None:
        super().__init__("the decoder ended without an answer")
        self.status = status


@dataclass(frozen=True, slots=True)
class _Usage:
    """What a process has taken so far."""

    cpu_s: float
    resident_bytes: int


class Decoder:
    """A process that decodes one file at a time. Belongs to one event loop."""

    def __init__(self, server: ForkServer, settings: DecoderSettings, *, max_cpu_s: float) -> None:
        """Requests the process; `started` waits for it.

        Args:
            server: runs `echovlm_ray.vision.decoding.fork_server` with the same settings.
            settings: those of the process.
            max_cpu_s: processor time for one file.

        Raises:
            OSError: the fork server has ended.
        """
        self._settings = settings
        self._max_cpu_s = max_cpu_s
        self.process_id: int | None = None
        self._idle_bytes = 0
        self._ended = False
        self._inbox, self._outbox = Memory(0), Memory(settings.max_output_bytes)
        self._jobs, jobs_there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._report, report_there = socket.socketpair()
        self._jobs.setblocking(False)
        self._report.setblocking(False)
        try:
            with jobs_there, report_there:
                server.fork(jobs_there.fileno(), self._inbox.descriptor, self._outbox.descriptor, report_there.fileno())
        except OSError:
            self.close()
            raise

    async def started(self) -> None:
        """Waits until the process is there.

        Raises:
            DecoderEndedError: the fork server ended first.
        """
        self.process_id = await self._next_report()
        if self.process_id is None:
            raise DecoderEndedError(None)
        self._idle_bytes = self._usage().resident_bytes

    async def decode(self, content: bytes) -> DecodedImage:
        """Decodes a file. After any exception but `FileRefusedError`, the process cannot be used again.

        Raises:
            FileRefusedError: the decoder refused it.
            DecoderLimitError: decoding takes more processor time or memory than it may.
            DecoderEndedError: the process has ended.
            WrongAnswerError: the process has sent what no sound decoder sends.
        """
        await _copy(len(content), self._inbox.write, content)
        try:
            self._jobs.send(JOB.pack(len(content)))
            packet = await self._packet()
        except OSError:
            packet = b""
        if not packet:
            raise DecoderEndedError(await self.ended())
        self._inbox.give_back(len(content))
        answer = read_answer(packet, self._settings)
        if answer.out_of_memory:
            raise self._out_of_memory()
        picture = answer.picture
        if picture is None:
            raise FileRefusedError(answer.refused)
        shape = (picture.num_frames, picture.height, picture.width, 3)
        frames = await _copy(math.prod(shape), self._outbox.read, shape)
        if frames is None:
            raise WrongAnswerError("the shared memory ends before the pixels do")
        self._outbox.give_back(frames.nbytes)
        return DecodedImage(
            tuple(frames), picture.frames_taken, picture.source_frames, picture.anatomy_terms, picture.notices
        )

    async def _packet(self) -> bytes:
        """What the process answers, b"" when it has ended; watches the time that it takes."""
        receiving = asyncio.ensure_future(
            asyncio.get_running_loop().sock_recv(self._jobs, MAX_ANSWER_BYTES + 1),
        )
        began = time.monotonic()
        before: _Usage | None = None
        try:
            while not (await asyncio.wait({receiving}, timeout=WATCH_S))[0]:
                usage = self._usage()
                # What went by before the first look is not counted: it is at most `WATCH_S`.
                before = before or usage
                self._check(usage.cpu_s - before.cpu_s, usage.resident_bytes, time.monotonic() - began)
            return receiving.result()
        finally:
            receiving.cancel()

    def _check(self, cpu_s: float, resident_bytes: int, clock_s: float) -> None:
        if cpu_s > self._max_cpu_s:
            raise DecoderLimitError(
                f"takes more than {self._max_cpu_s:g} s of processor time to decode (gateway.decoders.max_cpu_s): "
                "export it again, scaled down or less compressed"
            )
        if resident_bytes - self._idle_bytes > self._settings.max_memory_bytes:
            raise self._out_of_memory()
        if clock_s > STUCK_FACTOR * self._max_cpu_s:
            raise DecoderLimitError(
                f"was not decoded within {STUCK_FACTOR * self._max_cpu_s:g} s, {STUCK_FACTOR:g} times "
                "gateway.decoders.max_cpu_s: send it again when the server is less busy"
            )

    def _out_of_memory(self) -> DecoderLimitError:
        return DecoderLimitError(
            f"takes more than {self._settings.max_memory_bytes} bytes of memory to decode "
            "(gateway.decoders.max_memory_bytes): scale it down before sending"
        )

    def _usage(self) -> "_Usage":
        try:
            process = psutil.Process(self.process_id)
            times = process.cpu_times()
            return _Usage(times.user + times.system, process.memory_info().rss)
        except psutil.NoSuchProcess:
            # It has just ended, which also ends the wait for its answer.
            return _Usage(0.0, 0)

    def has_ended(self) -> bool:
        """Whether the process has ended."""
        if self._ended:
            return True
        try:
            self._report.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        return True

    def kill(self) -> None:
        """Kills the process."""
        if self.process_id is not None and not self.has_ended():
            # It has not been reaped, so its id cannot have been reused.
            with suppress(ProcessLookupError):
                os.kill(self.process_id, signal.SIGKILL)

    async def ended(self) -> int | None:
        """Waits until the process has ended; to be called once.

        Returns:
            See `DecoderEndedError.status`.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(KILL_S):
                status = await self._next_report()
                self._ended = True
                return status
        return None

    async def _next_report(self) -> int | None:
        report = await asyncio.get_running_loop().sock_recv(self._report, REPORT.size)
        return int(REPORT.unpack(report)[0]) if len(report) == REPORT.size else None

    def close(self) -> None:
        """Releases the memory shared with the process, which then ends unless it decodes."""
        self._jobs.close()
        self._report.close()


async def _copy(nbytes: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    if nbytes <= MAX_COPY_ON_LOOP:
        return function(*args, **kwargs)
    return await asyncio.to_thread(function, *args, **kwargs)
