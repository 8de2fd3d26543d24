"""The pool of decoder processes of a gateway, which are reused, and replaced after a crash."""

import asyncio
import logging
import os
import signal
import time
from collections import Counter
from typing import Literal

from echovlm_ray.errors import InvalidRequestError, PartUnavailableError, ShuttingDownError
from echovlm_ray.fair_queue import FairSemaphore
from echovlm_ray.vision.decoding.answer import WrongAnswerError
from echovlm_ray.vision.decoding.decoder import Decoder, DecoderEndedError, DecoderLimitError, FileRefusedError
from echovlm_ray.vision.decoding.settings import DecoderSettings
from echovlm_ray.vision.images import DecodedImage
from experts.checks.fork_server import ForkServer

logger = logging.getLogger(__name__)

Outcome = Literal["ok", "refused", "limit", "crash", "lost", "cancelled"]

# All that the processes see of the environment: where programs and libraries are, and no secret.
ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "LANG", "LC_ALL")
# One heap and no threads in libraries; memory is reused for the next file until the process is idle.
_SETTINGS_OF_LIBRARIES = {
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": str(64 * 1024 * 1024),
    "MALLOC_MMAP_THRESHOLD_": str(64 * 1024 * 1024),
}
# A caller of which a file took longer, in seconds, leaves one process to others for ten minutes.
SLOW_S = 2.0
# The number of attempts for a file if its decoder is killed from outside.
ATTEMPTS = 2
# After a decoder could not be started, the next try.
RESTART_S = 1.0
# Signals by which a process is ended from outside; with all others it has ended itself.
_FROM_OUTSIDE = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT})
_CRASHED = "could not be decoded, because the decoder crashed on it; export it again"


class DecoderPool:
    """Decodes files, each in one of a few processes. Belongs to the event loop in which it was started.

    Callers take turns; a caller's files wait for a process in the order in which they came. No caller holds all of
    several processes while another one has sent files within the last minute, or after a file of its own took long.
    """

    def __init__(self, settings: DecoderSettings, *, processes: int, max_cpu_s: float) -> None:
        """
        Args:
            settings: limits of a file, its frames' size, and memory.
            processes: the number of files that are decoded in parallel.
            max_cpu_s: processor time for one file.
        """
        self._settings = settings
        self._processes = processes
        # One is left to the other callers, who would wait for as long as `max_cpu_s` if one held all.
        self._places = FairSemaphore(processes, most_when_shared=max(1, processes - 1))
        self._max_cpu_s = max_cpu_s
        self._server: ForkServer | None = None
        # None wakes those who wait when the pool is closed.
        self._idle: asyncio.Queue[Decoder | None] = asyncio.Queue()
        self._decoders: set[Decoder] = set()
        self._renewals: set[asyncio.Task[None]] = set()
        self._starting = asyncio.Lock()
        self._closed = False
        # Files waiting or being decoded.
        self.queue_length = 0
        # How files ended since the start.
        self.outcomes: Counter[str] = Counter()

    @property
    def process_ids(self) -> list[int]:
        """Of the decoders."""
        return [decoder.process_id for decoder in self._decoders if decoder.process_id is not None]

    async def start(self) -> None:
        """Starts the processes and waits for them, about half a second.

        Raises:
            PartUnavailableError: they cannot be started.
        """
        self._server = self._new_server()
        try:
            for _ in range(self._processes):
                self._idle.put_nowait(await self._start_decoder())
        except (OSError, DecoderEndedError):
            await self.close()
            raise PartUnavailableError("image decoding", "its processes end at once; stderr says why") from None

    async def close(self) -> None:
        """Ends the processes; running and waiting files end with `ShuttingDownError`."""
        self._closed = True
        self._idle.put_nowait(None)
        if self._server is not None:
            # Its processes end with it.
            self._server.close()
        await asyncio.gather(*self._renewals)
        while self._idle.qsize():
            if (decoder := self._idle.get_nowait()) is not None:
                self._drop(decoder)
        self._idle.put_nowait(None)

    async def decode(self, content: bytes, *, field: str, request_id: str = "", caller: bytes = b"") -> DecodedImage:
        """Decodes a file, see `decode_image_file`; its frames are scaled. Cancellation ends it immediately.

        Args:
            content: the whole file.
            field: the file's place in the request, for errors.
            request_id: for the log.
            caller: callers take turns.

        Raises:
            InvalidRequestError: the file cannot be decoded, or not within the limits.
            ShuttingDownError: the pool is closed.
        """
        limit = self._settings.limits.max_image_bytes
        if len(content) > limit:
            # Before any of it is copied.
            raise InvalidRequestError(
                field,
                f"has {len(content)} bytes and the limit is {limit} (gateway.max_image_bytes): "
                "send a smaller or a compressed file",
            )
        self.queue_length += 1
        try:
            for _ in range(ATTEMPTS):
                try:
                    async with self._places.place(caller):
                        began = time.monotonic()
                        try:
                            return await self._decode(content, request_id)
                        finally:
                            if time.monotonic() - began > SLOW_S:
                                self._places.restrict(caller)
                except DecoderEndedError as error:
                    if error.status is not None and -error.status not in _FROM_OUTSIDE:
                        self.outcomes["crash"] += 1
                        raise FileRefusedError(_CRASHED) from None
                    self.outcomes["lost"] += 1
            raise FileRefusedError(
                f"could not be decoded, because its decoder was killed {ATTEMPTS} times, perhaps for want of memory; "
                "scale it down before sending"
            )
        except FileRefusedError as error:
            raise InvalidRequestError(field, str(error)) from None
        finally:
            self.queue_length -= 1

    async def _decode(self, content: bytes, request_id: str) -> DecodedImage:
        """One attempt. What is raised is `FileRefusedError`, `DecoderEndedError` or a cancellation."""
        assert self._server is not None, "the pool was not started"
        decoder = await self._next_decoder()
        try:
            decoded = await decoder.decode(content)
        except DecoderLimitError as error:
            self._replace(decoder, "limit", f"the file {error}", request_id)
            raise
        except FileRefusedError:
            self.outcomes["refused"] += 1
            self._idle.put_nowait(decoder)
            raise
        except WrongAnswerError as error:
            self._replace(decoder, "crash", f"its answer is wrong, {error}", request_id)
            raise FileRefusedError(_CRASHED) from None
        except DecoderEndedError as error:
            self._replace(decoder, None, f"it ended with {_name(error.status)}", request_id)
            raise
        except BaseException:
            self._replace(decoder, "cancelled", "its request has ended", request_id)
            raise
        self.outcomes["ok"] += 1
        self._idle.put_nowait(decoder)
        return decoded

    async def _next_decoder(self) -> Decoder:
        while True:
            decoder = await self._idle.get()
            if self._closed or decoder is None:
                # For the next one who waits.
                self._idle.put_nowait(decoder)
                raise ShuttingDownError("the gateway is about to stop")
            if not decoder.has_ended():
                return decoder
            self._replace(decoder, None, "it ended between two files", "")

    def _replace(self, decoder: Decoder, outcome: Outcome | None, why: str, request_id: str) -> None:
        if outcome is not None:
            self.outcomes[outcome] += 1
        if not self._closed:
            of_request = f", request id {request_id}" if request_id else ""
            logger.warning("decoder %s is replaced: %s%s", decoder.process_id, why, of_request)
        decoder.kill()
        renewal = asyncio.create_task(self._renew(decoder))
        self._renewals.add(renewal)
        renewal.add_done_callback(self._renewals.discard)

    async def _renew(self, decoder: Decoder) -> None:
        # Not before its memory is free.
        if not decoder.has_ended():
            await decoder.ended()
        self._drop(decoder)
        while not self._closed:
            try:
                self._idle.put_nowait(await self._start_decoder())
                return
            except (OSError, DecoderEndedError):
                if self._closed:
                    return
                logger.exception("a decoder could not be started; the next try follows")
                await asyncio.sleep(RESTART_S)

    def _drop(self, decoder: Decoder) -> None:
        self._decoders.discard(decoder)
        decoder.close()

    async def _start_decoder(self) -> Decoder:
        async with self._starting:
            try:
                return await self._fork()
            except (OSError, DecoderEndedError):
                if self._closed:
                    raise
                # The fork server was killed.
                assert self._server is not None
                self._server.close()
                self._server = self._new_server()
                return await self._fork()

    async def _fork(self) -> Decoder:
        assert self._server is not None
        decoder = Decoder(self._server, self._settings, max_cpu_s=self._max_cpu_s)
        try:
            await decoder.started()
        except BaseException:
            decoder.close()
            raise
        self._decoders.add(decoder)
        return decoder

    def _new_server(self) -> ForkServer:
        environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        return ForkServer(
            "echovlm_ray.vision.decoding.fork_server",
            self._settings.to_json(),
            environment=environment | _SETTINGS_OF_LIBRARIES,
        )


def _name(status: int | None) -> str:
    if status is None:
        return "the process that it was forked from"
    return signal.Signals(-status).name if status < 0 else f"exit code {status}"
