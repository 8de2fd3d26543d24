"""Pools of real decoder processes for tests, and files that keep them busy."""

import asyncio
import functools
import io
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import numpy as np
import psutil
from PIL import Image

from echovlm_ray.vision.decoding.pool import DecoderPool
from echovlm_ray.vision.decoding.settings import DecoderSettings
from echovlm_ray.vision.images import ImageLimits
from echovlm_ray.vision.scaling import Scaling
from tests.waiting import until_async

LIMITS = ImageLimits(max_image_bytes=64 * 2**20, max_image_pixels=40_000_000, max_frames=8)
SCALING = Scaling(28, 3136, 196 * 28 * 28, 196, 3)
SETTINGS = DecoderSettings(LIMITS, SCALING, max_memory_bytes=2**30)
FIELD = "images[1].content"


@asynccontextmanager
async def running_pool(
    settings: DecoderSettings = SETTINGS, *, processes: int = 1, max_cpu_s: float = 10.0
) -> AsyncIterator[DecoderPool]:
    pool = DecoderPool(settings, processes=processes, max_cpu_s=max_cpu_s)
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close()


def picture(width: int = 60, height: int = 40) -> np.ndarray:
    return np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(width: int = 60, height: int = 40) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(width, height)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


@functools.cache
def large_png(side: int = 6000) -> bytes:
    """Of one colour, so that it is made fast; 6,000² take a third of a second or more to decode."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (9, 20, 160)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def fork_server_of(pool: DecoderPool) -> psutil.Process:
    """What all decoders are forked from. Between it and every decoder is a process that watches the decoder."""
    watcher = psutil.Process(pool.process_ids[0]).parent()
    assert watcher is not None
    fork_server = watcher.parent()
    assert fork_server is not None
    return fork_server


def is_gone(pid: int) -> bool:
    """Whether the process has ended; one that only waits for its parent to ask how has."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@asynccontextmanager
async def held_job(pool: DecoderPool, job: Callable[[], Awaitable[object]]) -> AsyncIterator["asyncio.Task[object]"]:
    """A job that its decoder has and does not go on with: the process of the pool, the only one, is stopped."""
    (pid,) = pool.process_ids
    os.kill(pid, signal.SIGSTOP)
    await until_async(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    done = sum(pool.outcomes.values())
    task = asyncio.ensure_future(job())
    await until_async(lambda: pool.queue_length > 0)
    # Long enough for the job to be sent, and for the watch to begin.
    await asyncio.sleep(0.1)
    assert sum(pool.outcomes.values()) == done
    yield task
