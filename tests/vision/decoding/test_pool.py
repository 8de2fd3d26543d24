"""The pool with real processes: what it returns, and what files that cost too much cost the others."""

import asyncio
import os
import signal

import numpy as np
import psutil
import pytest
from pydicom.encaps import encapsulate
from pydicom.uid import RLELossless

from echovlm_ray.errors import InvalidRequestError, ShuttingDownError
from echovlm_ray.vision.decoding.pool import DecoderPool
from echovlm_ray.vision.decoding.settings import DecoderSettings
from echovlm_ray.vision.images import ImageLimits, decode_image_file
from tests.vision.decoding.pools import (
    FIELD,
    LIMITS,
    SCALING,
    fork_server_of,
    held_job,
    is_gone,
    large_png,
    picture,
    png,
    running_pool,
)
from tests.vision.dicom_samples import made, real
from tests.waiting import until_async

FILES = ["examples_rgb_color.dcm", "examples_ybr_color.dcm", "examples_jpeg2k.dcm", "examples_palette.dcm"]


async def decode(pool: DecoderPool, content: bytes) -> tuple[np.ndarray, ...]:
    return (await pool.decode(content, field=FIELD)).frames


async def test_pixels_and_notes_are_those_of_decoding_here() -> None:
    contents = [png(), png(1200, 900), *map(real, FILES)]
    async with running_pool(processes=2) as pool:
        found = await asyncio.gather(*(pool.decode(content, field=FIELD) for content in contents))
    for content, decoded in zip(contents, found, strict=True):
        here = decode_image_file(content, limits=LIMITS, field=FIELD)
        wanted = [SCALING.apply(frame) for frame in here.frames]
        assert len(decoded.frames) == len(wanted)
        assert all(np.array_equal(frame, other) for frame, other in zip(decoded.frames, wanted, strict=True))
        assert (decoded.frames_taken, decoded.source_frames) == (here.frames_taken, here.source_frames)
        assert (decoded.anatomy_terms, decoded.notices) == (here.anatomy_terms, here.notices)
        assert decoded.is_video == here.is_video


@pytest.mark.parametrize("content", [b"", b"no image", png()[:-20], made(np.zeros((4, 4), np.uint8))[:-10]])
async def test_a_refusal_is_that_of_decoding_here_and_costs_no_process(content: bytes) -> None:
    with pytest.raises(InvalidRequestError) as here:
        decode_image_file(content, limits=LIMITS, field=FIELD)
    async with running_pool() as pool:
        before = pool.process_ids
        with pytest.raises(InvalidRequestError) as there:
            await decode(pool, content)
        assert pool.process_ids == before
        assert pool.outcomes == {"refused": 1}
    assert (there.value.field, there.value.description) == (FIELD, here.value.description)


async def test_a_frame_that_cannot_be_scaled_is_refused() -> None:
    async with running_pool() as pool:
        with pytest.raises(InvalidRequestError, match=r"is 201 × 1 pixels: .* crop it"):
            await decode(pool, png(201, 1))


async def test_a_file_over_the_limit_of_bytes_reaches_no_process() -> None:
    settings = DecoderSettings(ImageLimits(1000, 40_000_000, 8), SCALING, 2**30)
    async with running_pool(settings) as pool:
        with pytest.raises(InvalidRequestError, match=r"has 1001 bytes and the limit is 1000 \(gateway.max_image_b"):
            await decode(pool, b"x" * 1001)
        assert not pool.outcomes


async def test_many_files_at_once_are_each_their_own() -> None:
    sizes = [(28 * (3 + index % 5), 28 * (2 + index % 3)) for index in range(16)]
    async with running_pool(processes=2) as pool:
        before = pool.process_ids
        found = await asyncio.gather(*(decode(pool, png(*size)) for size in sizes))
        assert pool.process_ids == before
        assert pool.queue_length == 0
    for size, (frame,) in zip(sizes, found, strict=True):
        assert np.array_equal(frame, picture(*size))


async def test_large_files_and_small_ones_take_turns() -> None:
    async with running_pool() as pool:
        for size in ((1600, 1100), (56, 56), (1600, 1100)):
            (frame,) = await decode(pool, png(*size))
            assert np.array_equal(frame, SCALING.apply(picture(*size)))


async def test_a_caller_whose_files_take_long_leaves_a_process_to_the_others() -> None:
    async def decode_of(caller: bytes, content: bytes) -> None:
        await pool.decode(content, field=FIELD, caller=caller)

    async with running_pool(processes=2) as pool:
        await decode_of(b"other", png())
        flood = [asyncio.create_task(decode_of(b"flood", large_png())) for _ in range(4)]
        await until_async(lambda: pool.queue_length == 4)
        for _ in range(3):
            await decode_of(b"other", png())
        assert not any(task.done() for task in flood)
        await asyncio.gather(*flood)


async def test_a_caller_with_a_slow_file_leaves_a_process_also_before_another_one_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("echovlm_ray.vision.decoding.pool.SLOW_S", 0.05)
    async with running_pool(processes=2) as pool:
        await pool.decode(large_png(), field=FIELD, caller=b"flood")
        flood = [asyncio.create_task(pool.decode(large_png(), field=FIELD, caller=b"flood")) for _ in range(4)]
        await until_async(lambda: pool.queue_length == 4)
        await pool.decode(png(), field=FIELD, caller=b"other")
        assert not any(task.done() for task in flood)
        await asyncio.gather(*flood)


async def test_processor_time_is_limited_and_a_process_replaced() -> None:
    async with running_pool(max_cpu_s=0.2) as pool:
        (before,) = pool.process_ids
        with pytest.raises(
            InvalidRequestError, match=r"more than 0.2 s of processor time .*gateway.decoders.max_cpu_s"
        ):
            await decode(pool, large_png())
        assert pool.outcomes == {"limit": 1}
        await decode(pool, png())
        assert pool.process_ids != [before]
        assert is_gone(before)


async def test_time_spent_on_earlier_files_does_not_count() -> None:
    async with running_pool(max_cpu_s=0.6) as pool:
        before = pool.process_ids
        content = large_png(1500)
        while sum(psutil.Process(before[0]).cpu_times()[:2]) < 1.0:
            await decode(pool, content)
        assert pool.process_ids == before


async def test_a_process_that_does_nothing_is_replaced() -> None:
    async with running_pool(max_cpu_s=0.05) as pool, held_job(pool, lambda: decode(pool, png())) as job:
        with pytest.raises(InvalidRequestError, match=r"was not decoded within 0.5 s, 10 times gateway.decoders"):
            await job
        await decode(pool, png())


def deep_rle(side: int) -> bytes:
    """RGB of 16 bits, all of one value: 6,300² are 3.8 MB of RLE and 238 MB of pixels."""
    row_segment = b"\x81\x07" * (-(-side * side // 128))
    header = np.zeros(16, "<u4")
    header[0] = 6
    header[1:7] = 64 + len(row_segment) * np.arange(6)
    frame = header.tobytes() + row_segment * 6
    return made(
        np.zeros((2, 2, 3), np.uint16),
        transfer_syntax=RLELossless,
        Rows=side,
        Columns=side,
        PixelData=encapsulate([frame]),
    )


async def test_memory_is_limited_and_the_limit_named() -> None:
    settings = DecoderSettings(LIMITS, SCALING, max_memory_bytes=256 * 2**20)
    async with running_pool(settings) as pool:
        (before,) = pool.process_ids
        with pytest.raises(
            InvalidRequestError, match=r"more than 268435456 bytes of memory .*decoders.max_memory_bytes"
        ):
            await decode(pool, deep_rle(6300))
        assert pool.outcomes == {"limit": 1}
        await decode(pool, png())
        assert is_gone(before)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE])
async def test_a_crash_is_the_files_fault(number: signal.Signals) -> None:
    async with running_pool() as pool, held_job(pool, lambda: decode(pool, png())) as job:
        (pid,) = pool.process_ids
        os.kill(pid, number)
        os.kill(pid, signal.SIGCONT)
        with pytest.raises(InvalidRequestError, match="could not be decoded, because the decoder crashed on it"):
            await job
        assert pool.outcomes == {"crash": 1}
        await decode(pool, png())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_a_file_whose_decoder_was_killed_from_outside_is_tried_again(number: signal.Signals) -> None:
    async with running_pool() as pool, held_job(pool, lambda: decode(pool, png())) as job:
        (pid,) = pool.process_ids
        os.kill(pid, number)
        os.kill(pid, signal.SIGCONT)
        await job
        assert pool.outcomes == {"lost": 1, "ok": 1}


async def test_a_file_that_loses_two_decoders_is_refused() -> None:
    async with running_pool() as pool, held_job(pool, lambda: decode(pool, large_png())) as job:
        (first,) = pool.process_ids
        os.kill(first, signal.SIGKILL)
        await until_async(lambda: bool(pool.process_ids) and pool.process_ids != [first])
        await asyncio.sleep(0.1)
        os.kill(pool.process_ids[0], signal.SIGKILL)
        with pytest.raises(InvalidRequestError, match="its decoder was killed 2 times"):
            await job
        assert pool.outcomes == {"lost": 2}


async def test_idle_processes_that_were_killed_cost_no_file() -> None:
    async with running_pool(processes=2) as pool:
        before = pool.process_ids
        for pid in before:
            os.kill(pid, signal.SIGSEGV)
        await until_async(lambda: all(map(is_gone, before)))
        await asyncio.gather(*(decode(pool, png()) for _ in range(4)))
        assert pool.outcomes == {"ok": 4}


async def test_a_killed_fork_server_is_replaced() -> None:
    async with running_pool(processes=2) as pool:
        before = pool.process_ids
        os.kill(fork_server_of(pool).pid, signal.SIGKILL)
        await until_async(lambda: all(map(is_gone, before)))
        await asyncio.gather(*(decode(pool, png()) for _ in range(4)))
        assert pool.outcomes == {"ok": 4}
        await until_async(lambda: len(pool.process_ids) == 2)


async def test_cancelling_ends_the_process_at_once() -> None:
    async with running_pool() as pool, held_job(pool, lambda: decode(pool, png())) as job:
        (pid,) = pool.process_ids
        waiting = asyncio.ensure_future(decode(pool, png()))
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        await waiting
        assert is_gone(pid)
        assert pool.outcomes == {"cancelled": 1, "ok": 1}


async def test_a_waiting_file_that_is_cancelled_costs_nothing() -> None:
    async with running_pool() as pool, held_job(pool, lambda: decode(pool, png())) as job:
        (pid,) = pool.process_ids
        waiting = asyncio.ensure_future(decode(pool, png()))
        await until_async(lambda: pool.queue_length == 2)
        waiting.cancel()
        await until_async(lambda: pool.queue_length == 1)
        os.kill(pid, signal.SIGCONT)
        await job
        assert pool.process_ids == [pid]


async def test_a_passed_deadline_frees_the_decoder() -> None:
    async with running_pool() as pool, held_job(pool, lambda: asyncio.wait_for(decode(pool, png()), 0.3)) as job:
        with pytest.raises(TimeoutError):
            await job
        await decode(pool, png())
        assert pool.outcomes == {"cancelled": 1, "ok": 1}


async def test_a_file_that_hangs_costs_one_decoder_and_no_other_file() -> None:
    async with running_pool(processes=2) as pool:
        hanging = pool.process_ids[0]
        os.kill(hanging, signal.SIGSTOP)
        # One of the two gets the process that is stopped.
        first = [asyncio.ensure_future(decode(pool, png())) for _ in range(2)]
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        for _ in range(3):
            await decode(pool, png())
        assert sorted(each.done() for each in first) == [False, True]
        os.kill(hanging, signal.SIGCONT)
        await asyncio.gather(*first)


async def test_closing_ends_jobs_under_way_and_waiting() -> None:
    async with running_pool() as pool, held_job(pool, lambda: decode(pool, png())) as job:
        (pid,) = pool.process_ids
        waiting = asyncio.ensure_future(decode(pool, png()))
        await until_async(lambda: pool.queue_length == 2)
        await pool.close()
        for each in (job, waiting):
            with pytest.raises(ShuttingDownError):
                await each
        await until_async(lambda: is_gone(pid))
        with pytest.raises(ShuttingDownError):
            await decode(pool, png())


async def test_no_descriptor_is_left_behind() -> None:
    async def cancel_and_decode() -> int:
        async with held_job(pool, lambda: decode(pool, png())) as job:
            job.cancel()
        await decode(pool, png(700, 500))
        return psutil.Process().num_fds()

    async with running_pool() as pool:
        numbers = [await cancel_and_decode() for _ in range(6)]
        # What a killed process held is closed when its end is noticed, which may be after the next job.
        await until_async(lambda: psutil.Process().num_fds() <= numbers[1])
