"""What a decoder in hostile hands may send, and what the gateway believes of it."""

import asyncio
import json
import os
import socket
from collections.abc import Callable
from contextlib import closing

import numpy as np
import pytest

from echovlm_ray.vision.decoding.answer import Answer, WrongAnswerError, read_answer
from echovlm_ray.vision.decoding.decoder import Decoder, DecoderEndedError
from echovlm_ray.vision.decoding.job import JOB, MAX_ANSWER_BYTES, MAX_TEXT_CHARACTERS, MAX_TEXTS
from experts.checks.fork_server import REPORT, ForkServer
from tests.vision.decoding.pools import SETTINGS

PICTURE = {
    "num_frames": 2,
    "height": 56,
    "width": 84,
    "frames_taken": 2,
    "source_frames": 9,
    "anatomy_terms": ["LIVER"],
    "notices": ["2 of its frames are damaged."],
}
LARGEST = json.dumps(
    {"picture": PICTURE | dict.fromkeys(("anatomy_terms", "notices"), ["\0" * MAX_TEXT_CHARACTERS] * MAX_TEXTS)}
).encode()

WRONG = {
    "no JSON": b"\x80\x04\x95",
    "not UTF-8": b'{"refused": "\xff"}',
    "empty object": b"{}",
    "two of the fields": json.dumps({"picture": PICTURE, "refused": "is wrong"}).encode(),
    "unknown field": json.dumps({"refused": "is wrong", "more": 1}).encode(),
    "too long": b'{"refused": "x"}' + b" " * MAX_ANSWER_BYTES,
    "too long a text": json.dumps({"refused": "x" * 1001}).encode(),
    "deep": b"[" * 50_000,
}
WRONG_FIELDS = {
    "negative": {"height": -56},
    "zero frames": {"num_frames": 0},
    "not a number": {"width": "84"},
    "true": {"num_frames": True},
    "fraction": {"width": 84.5},
    "beyond 64 bits": {"source_frames": 2**70},
    "not a multiple": {"height": 57},
    "too large a frame": {"height": 28 * 197, "width": 28},
    "overflowing": {"height": 28 * 2**20, "width": 28 * 2**20},
    "too many frames": {"num_frames": 9},
    "too many texts": {"notices": [""] * (MAX_TEXTS + 1)},
    "no texts": {"notices": "text"},
    "too long a text": {"anatomy_terms": ["x" * (MAX_TEXT_CHARACTERS + 1)]},
}


def packet(**changes: object) -> bytes:
    return json.dumps({"picture": PICTURE | changes}).encode()


def test_a_sound_answer_is_read() -> None:
    answer = read_answer(packet(), SETTINGS)
    assert answer.picture is not None
    assert (answer.picture.height, answer.picture.anatomy_terms) == (56, ("LIVER",))
    assert read_answer(b'{"refused": "is wrong"}', SETTINGS) == Answer(refused="is wrong")


def test_the_largest_answer_fits() -> None:
    assert len(LARGEST) <= MAX_ANSWER_BYTES
    assert read_answer(LARGEST, SETTINGS).picture is not None


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_what_is_no_answer_is_refused(wrong: bytes) -> None:
    with pytest.raises(WrongAnswerError):
        read_answer(wrong, SETTINGS)


@pytest.mark.parametrize("changes", WRONG_FIELDS.values(), ids=WRONG_FIELDS.keys())
def test_a_picture_that_cannot_be_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(WrongAnswerError):
        read_answer(packet(**changes), SETTINGS)


class PlayedDecoder(ForkServer):
    """Gives the test the decoder's ends of all that a gateway shares with it."""

    def __init__(self) -> None:
        self.jobs: socket.socket
        self.outbox: int

    def fork(self, *descriptors: int) -> None:
        jobs, _, outbox, report = map(os.dup, descriptors)
        self.jobs, self.outbox = socket.socket(fileno=jobs), outbox
        os.write(report, REPORT.pack(os.getpid()))
        os.close(report)

    def close(self) -> None:
        self.jobs.close()
        os.close(self.outbox)


async def played(send: Callable[[PlayedDecoder], object]) -> tuple[np.ndarray, ...]:
    """The frames that a gateway takes from a decoder which answers its first job in this way."""
    with closing(PlayedDecoder()) as player:
        decoder = Decoder(player, SETTINGS, max_cpu_s=10.0)
        with closing(decoder):
            await decoder.started()
            decoding = asyncio.ensure_future(decoder.decode(b"file"))
            await asyncio.sleep(0)
            assert await asyncio.to_thread(player.jobs.recv, JOB.size) == JOB.pack(4)
            send(player)
            return (await decoding).frames


async def test_frames_are_copies_of_what_the_memory_held() -> None:
    pixels = np.arange(2 * 56 * 84 * 3).astype(np.uint8).reshape(2, 56, 84, 3)

    def send(player: PlayedDecoder) -> None:
        os.pwrite(player.outbox, pixels.tobytes(), 0)
        player.jobs.send(packet())

    assert np.array_equal(await played(send), pixels)


async def test_memory_that_was_made_shorter_is_refused_and_harms_nothing() -> None:
    def send(player: PlayedDecoder) -> None:
        os.ftruncate(player.outbox, 1000)
        player.jobs.send(packet())

    with pytest.raises(WrongAnswerError, match="ends before the pixels"):
        await played(send)


async def test_an_answer_over_the_limit_is_not_received_whole() -> None:
    with pytest.raises(WrongAnswerError, match="too long"):
        await played(lambda player: player.jobs.send(b" " * (MAX_ANSWER_BYTES + 5000)))


@pytest.mark.parametrize("leave", [lambda player: player.jobs.send(b""), lambda player: player.jobs.shutdown(2)])
async def test_silence_is_an_end(leave: Callable[[PlayedDecoder], object]) -> None:
    with pytest.raises(DecoderEndedError):
        await played(leave)
