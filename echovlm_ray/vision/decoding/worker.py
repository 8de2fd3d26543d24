"""The decoder process: one file after the other, until the gateway closes its end.

It loads Pillow, pydicom and their decoders, and nothing of what serves.
"""

import json
import mmap
import os
import socket
import traceback
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from echovlm_ray.errors import InvalidRequestError
from echovlm_ray.free_memory import return_free_memory
from echovlm_ray.vision.decoding.confinement import confine
from echovlm_ray.vision.decoding.job import JOB, MAX_REFUSAL_CHARACTERS, MAX_TEXT_CHARACTERS, MAX_TEXTS
from echovlm_ray.vision.decoding.settings import DecoderSettings
from echovlm_ray.vision.images import DecodedImage, decode_image_file
from echovlm_ray.vision.picture import FrameArray

# After this long without a file, free memory is returned to the system.
IDLE_S = 1.0


def run(settings: DecoderSettings, descriptors: Sequence[int]) -> int:
    """Serves a gateway.

    Args:
        settings: limits.
        descriptors: a socket of packets for jobs and answers; the memory in which files come; the memory, of
            `max_output_bytes`, in which pixels go.
    """
    jobs, inbox, outbox = descriptors
    pixels = np.frombuffer(mmap.mmap(outbox, settings.max_output_bytes), dtype=np.uint8)
    os.close(outbox)
    errors = _silence_libraries()
    confine(settings.max_memory_bytes)
    with socket.socket(fileno=jobs) as connection:
        while job := _next_job(connection):
            (length,) = JOB.unpack(job)
            try:
                answer = _answer(os.pread(inbox, length, 0), settings, pixels)
            except Exception as error:
                # Its text may quote the file (P12); where it happened does not.
                where = "".join(traceback.format_tb(error.__traceback__))
                os.write(errors, f"a decoder failed with {type(error).__name__}:\n{where}".encode())
                return 1
            connection.send(json.dumps(answer, ensure_ascii=False).encode(errors="replace"))
    return 0


def _silence_libraries() -> int:
    """Leads standard output and errors nowhere: what C libraries print may quote the file (P12).

    Returns:
        A descriptor of what were the standard errors.
    """
    errors, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    return errors


def _next_job(connection: socket.socket) -> bytes:
    connection.settimeout(IDLE_S)
    try:
        return connection.recv(JOB.size)
    except TimeoutError:
        return_free_memory()
    connection.settimeout(None)
    return connection.recv(JOB.size)


def _answer(content: bytes, settings: DecoderSettings, pixels: npt.NDArray[np.uint8]) -> dict[str, object]:
    """The fields of `answer.Answer`."""
    try:
        decoded = decode_image_file(content, limits=settings.limits, field="")
        frames = _scaled(decoded, settings)
    except InvalidRequestError as error:
        if _is_out_of_memory(error):
            return {"out_of_memory": True}
        return {"refused": error.description[:MAX_REFUSAL_CHARACTERS]}
    except MemoryError:
        return {"out_of_memory": True}
    start = 0
    for frame in frames:
        pixels[start : start + frame.size] = frame.reshape(-1)
        start += frame.size
    height, width, _ = frames[0].shape
    picture = {
        "num_frames": len(frames),
        "height": height,
        "width": width,
        "frames_taken": decoded.frames_taken,
        "source_frames": decoded.source_frames,
        "anatomy_terms": _bounded(decoded.anatomy_terms),
        "notices": _bounded(decoded.notices),
    }
    return {"picture": picture}


def _scaled(decoded: DecodedImage, settings: DecoderSettings) -> list[FrameArray]:
    try:
        return [settings.scaling.apply(frame) for frame in decoded.frames]
    except ValueError as error:
        raise InvalidRequestError("", f"is {error}") from None


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether lack of memory is the cause of a failure, whatever exception it was converted to."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            return True
        cause = cause.__context__
    return False


def _bounded(texts: Sequence[str]) -> list[str]:
    return [text[:MAX_TEXT_CHARACTERS] for text in texts[:MAX_TEXTS]]
