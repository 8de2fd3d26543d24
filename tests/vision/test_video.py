"""Videos, alone and inside DICOM: which frames are taken, and what a container may not do."""

import builtins
import io
import json
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from echovlm_ray.errors import InvalidRequestError
from echovlm_ray.vision import video
from echovlm_ray.vision.images import ImageLimits
from echovlm_ray.vision.kinds import file_kind
from echovlm_ray.vision.sampling import sample_frames
from tests.vision.video_samples import (
    CASES,
    FRAMES,
    H264_OPTIONS,
    HEIGHT,
    KINDS,
    WIDTH,
    decode,
    made,
    number_of,
    numbered,
    numbers,
    refused,
)


@pytest.fixture(scope="module", params=KINDS)
def kind_and_content(request: pytest.FixtureRequest) -> tuple[str, bytes]:
    kind, (container, codec), options = KINDS[request.param]
    return kind, made(container, codec, **options)


def test_frames_are_sampled_evenly_in_every_kind(kind_and_content: tuple[str, bytes]) -> None:
    kind, content = kind_and_content
    assert file_kind(content) == kind
    image = decode(content)
    assert (image.source_frames, image.frames_taken, len(image.frames)) == (FRAMES, 8, 8)
    assert numbers(image) == list(sample_frames(FRAMES, 8))
    right = numbered(0)
    assert np.abs(image.frames[0].astype(float) - right).mean() < 6
    assert image.notices == ()


def test_frames_found_by_time_are_those_found_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [made(*KINDS[name][1], **KINDS[name][2]) for name in ("mp4", "mp4, open groups", "mp4 of HEVC", "webm")]
    sought = [decode(content).frames for content in contents]
    monkeypatch.setattr(video._Frames, "_by_time", lambda self, frames: None)
    for content, frames in zip(contents, sought, strict=True):
        assert all(np.array_equal(one, other) for one, other in zip(decode(content).frames, frames, strict=True))


def test_only_what_is_needed_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    original = video._Frames._decoded

    def counting(self: Any, packets: list[Any]) -> Any:
        decoded.append(len(packets))
        return original(self, packets)

    monkeypatch.setattr(video._Frames, "_decoded", counting)
    decode(made("avi", "mjpeg", pixels="yuvj420p"))
    assert sum(decoded) == 8


def cases() -> list[dict[str, Any]]:
    return [case for case in json.loads((CASES / "cases.json").read_text()) if case["file"].startswith("video")]


@pytest.mark.parametrize("case", cases(), ids=lambda case: str(case["file"]))
def test_files_that_failed_once(case: dict[str, Any]) -> None:
    image = decode((CASES / case["file"]).read_bytes())
    frames = {"video.avi": 8}.get(case["file"], 12)
    assert (image.source_frames, image.frames_taken) == (frames, 8)
    assert {frame.shape for frame in image.frames} == {(96, 128, 3)}
    # Each frame is the still of the other cases, three columns further to the right than the one before.
    still = np.load(CASES / "other.bmp.npz")["frames"][0].astype(float)
    for index, frame in zip(sample_frames(frames, 8), image.frames, strict=True):
        assert np.abs(frame - np.roll(still, 3 * index, axis=1)).mean() < 5
    assert image.notices == ()


# What the container says of the picture.
def test_uneven_times_change_nothing() -> None:
    times = np.cumsum([40 if number % 3 else 400 for number in range(FRAMES)]).tolist()
    assert numbers(decode(made("matroska", "libx264", times=times, **H264_OPTIONS))) == list(sample_frames(FRAMES, 8))


@pytest.mark.parametrize(
    ("matrix", "quarters"), [((0, 1, -1, 0), 3), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)], ids=["90", "180", "270"]
)
def test_rotation_is_applied(matrix: tuple[int, int, int, int], quarters: int) -> None:
    content = bytearray(made("mp4", "libx264", **H264_OPTIONS))
    place = content.index(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    upright = decode(bytes(content)).frames[0]
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    assert np.array_equal(decode(bytes(content)).frames[0], np.rot90(upright, quarters))


def test_pixels_that_are_not_square_are_stretched() -> None:
    wide = decode(made("mp4", "libx264", ratio=Fraction(2), **H264_OPTIONS))
    assert {frame.shape for frame in wide.frames} == {(HEIGHT, 2 * WIDTH, 3)}
    # What is stretched counts as it is shown.
    assert "gateway.max_image_pixels" in refused(
        made("mp4", "libx264", ratio=Fraction(2), **H264_OPTIONS), ImageLimits(16 * 1024**2, WIDTH * HEIGHT * 8, 8)
    )
    absurd = decode(made("mp4", "libx264", ratio=Fraction(100), **H264_OPTIONS))
    assert {frame.shape for frame in absurd.frames} == {(HEIGHT, WIDTH, 3)}
    assert "far from square" in absurd.notices[0]


def test_full_range_is_full_range() -> None:
    for content in (made("avi", "mjpeg", pixels="yuvj420p"), made("mp4", "libx264", bf=0)):
        assert np.abs(decode(content).frames[0][100:, 150:].astype(int) - 40).max() <= 3


def test_interlaced_is_a_notice() -> None:
    content = made("mpegts", "mpeg2video", flags="+ildct+ilme", field_order="tt")
    with av.open(io.BytesIO(content), "r") as source:
        assert any(frame.interlaced_frame for frame in source.decode(video=0))
    assert "interlaced" in decode(content).notices[0]


def test_one_frame_is_a_still() -> None:
    image = decode(made("mp4", "libx264", frames=1))
    assert not image.is_video
    assert number_of(image.frames[0]) == 0


# Cut, damaged, and lying.
def boxes(mp4: bytes) -> dict[bytes, bytes]:
    found, offset = {}, 0
    while offset < len(mp4):
        length = int.from_bytes(mp4[offset : offset + 4], "big")
        found[mp4[offset + 4 : offset + 8]] = mp4[offset : offset + length]
        offset += length
    return found


def with_index_first(mp4: bytes) -> bytes:
    parts = boxes(mp4)
    index = bytearray(parts[b"moov"])
    at = index.index(b"stco") + 8
    for place in range(at + 4, at + 4 + 4 * int.from_bytes(index[at : at + 4], "big"), 4):
        index[place : place + 4] = (int.from_bytes(index[place : place + 4], "big") + len(index)).to_bytes(4, "big")
    rest = b"".join(part for name, part in parts.items() if name not in (b"ftyp", b"moov"))
    return parts[b"ftyp"] + bytes(index) + rest


@pytest.mark.parametrize("name", ["mp4", "matroska", "avi of MJPEG", "mp4 in fragments", "H.264", "program stream"])
def test_of_a_video_that_is_cut_off_the_frames_before_are_taken(name: str) -> None:
    content = made(*KINDS[name][1], **KINDS[name][2])
    if name == "mp4":
        content = with_index_first(content)
    image = decode(content[: len(content) * 2 // 3])
    assert 5 < image.source_frames < FRAMES
    # A stream without a container does not say how long it is; there a damaged last frame is the only sign.
    assert any("cut off" in notice or "left out" in notice for notice in image.notices)
    assert numbers(image)[0] == 0
    assert numbers(image) == sorted(numbers(image))


@pytest.mark.parametrize(
    "name", ["avi of MJPEG", "avi of MPEG-4", "avi without compression", "avi of Microsoft Video 1"]
)
def test_without_its_index_an_avi_is_whole(name: str) -> None:
    content = made(*KINDS[name][1], **KINDS[name][2])
    assert numbers(decode(content[: content.rindex(b"idx1")])) == list(sample_frames(FRAMES, 8))


def test_without_its_index_an_mp4_is_refused() -> None:
    content = made("mp4", "libx264", **H264_OPTIONS)
    assert "convert it to MP4" in refused(content[: len(content) // 2])


def test_a_stream_that_begins_in_the_middle_begins_at_its_first_key_frame() -> None:
    content = made("mpegts", "libx264", **H264_OPTIONS)
    images = [decode(content[188 * packets :]) for packets in range(20, 40, 2)]
    assert {number_of(image.frames[0]) for image in images} <= {12, 24}
    assert all(number_of(image.frames[-1]) == FRAMES - 1 for image in images)
    assert any("begins in the middle" in notice for image in images for notice in image.notices)


def test_a_number_of_frames_that_is_not_true_is_a_notice() -> None:
    content = bytearray(made("avi", "mjpeg", pixels="yuvj420p"))
    for at in (content.index(b"avih") + 24, content.index(b"strh") + 40):
        content[at : at + 4] = struct.pack("<I", 5000)
    image = decode(bytes(content))
    assert image.source_frames == FRAMES
    assert any("says that it has 5000 frames" in notice for notice in image.notices)


def test_damaged_frames_are_left_out() -> None:
    content = bytearray(made("avi", "mjpeg", pixels="yuvj420p"))
    place = content.index(b"movi")
    for _ in range(18):
        place = content.index(b"00dc", place) + 8
    length = int.from_bytes(content[place - 4 : place], "little")
    content[place : place + length] = bytes(length)
    image = decode(bytes(content))
    assert image.source_frames == FRAMES - 1
    assert 17 not in numbers(image)
    assert numbers(image) == [index + (index >= 17) for index in sample_frames(FRAMES - 1, 8)]
    assert any("damaged and were left out" in notice for notice in image.notices)


def test_a_container_without_a_frame_is_refused() -> None:
    content = made("mp4", "libx264", frames=8)
    parts = boxes(content)
    assert "no frame can be decoded" in refused(content.replace(parts[b"mdat"][8:], bytes(len(parts[b"mdat"]) - 8)))
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as output:
        sound = output.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
        frame.rate = 44100
        output.mux(sound.encode(frame))
        output.mux(sound.encode(None))
    assert "no video in it" in refused(buffer.getvalue())


def test_an_encrypted_video_is_refused() -> None:
    key: dict[str, str] = {
        "encryption_scheme": "cenc-aes-ctr",
        "encryption_key": "00" * 16,
        "encryption_kid": "11" * 16,
    }
    content = made("mp4", "libx264", container_options=key, **H264_OPTIONS)
    assert "encrypted" in refused(content)


def test_unknown_codecs_are_refused_with_what_to_send() -> None:
    content = made("avi", "mjpeg", pixels="yuvj420p").replace(b"MJPG", b"ZZZZ")
    assert "H.264" in refused(content)


# Costs, and reach.
def test_limits_of_pixels() -> None:
    content = made("mp4", "libx264", **H264_OPTIONS)
    few = ImageLimits(16 * 1024**2, WIDTH * HEIGHT * 8 - 1, 8)
    assert "gateway.max_image_pixels" in refused(content, few)
    assert decode(content, ImageLimits(16 * 1024**2, WIDTH * HEIGHT * 8, 8)).frames_taken == 8


def test_of_a_long_video_frames_that_stand_alone_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "MAX_DECODED", 1)
    limits = ImageLimits(16 * 1024**2, WIDTH * HEIGHT * 8, 8)
    image = decode(made("mp4", "libx264", **H264_OPTIONS), limits)
    assert set(numbers(image)) == {0, 12, 24, 36}
    assert (image.frames_taken, image.source_frames) == (4, FRAMES)
    assert "nearest to an even spread" in image.notices[0]
    assert "would have to be decoded" in refused(made("h264", "libx264", **H264_OPTIONS), limits)


def test_a_container_cannot_name_the_same_bytes_again_and_again() -> None:
    content = bytearray(made("mp4", "libx264", frames=2, bf=0, g=1))
    parts = content.index(b"stsz")
    assert parts > 0
    sizes = int.from_bytes(content[parts + 12 : parts + 16], "big")
    assert sizes == 2
    claimed = 1_000_000
    # One size for all samples, in one chunk that holds all of them, each as long as the file.
    content[parts + 8 : parts + 16] = struct.pack(">II", len(content), claimed)
    for name, at in ((b"stts", 12), (b"stsc", 16)):
        place = content.index(name) + at
        content[place : place + 4] = struct.pack(">I", claimed)
    assert "video" in refused(bytes(content))


def alias(path: str) -> bytes:
    """A data reference of QuickTime to another file, by its absolute path."""
    name = path.encode() + bytes(len(path) % 2)
    fields = struct.pack(">hH", 2, len(name)) + name + struct.pack(">hH", -1, 0)
    data = bytes(4 + 10 + 28 + 12 + 64 + 16 + 4 + 16) + fields
    return struct.pack(">I", 8 + len(data)) + b"alis" + data


def with_reference(mp4: bytes, entry: bytes) -> bytes:
    """The MP4, its pixels in another file; only the boxes around the reference grow."""
    at = mp4.index(b"dref") - 4
    length = int.from_bytes(mp4[at : at + 4], "big")
    changed = bytearray(mp4[:at] + struct.pack(">I4sII", 16 + len(entry), b"dref", 0, 1) + entry + mp4[at + length :])
    for name in (b"moov", b"trak", b"mdia", b"minf", b"dinf"):
        place = changed.index(name) - 4
        grown = int.from_bytes(changed[place : place + 4], "big") + 16 + len(entry) - length
        changed[place : place + 4] = struct.pack(">I", grown)
    return bytes(changed)


def test_nothing_outside_the_bytes_is_opened(tmp_path: Path) -> None:
    secret = tmp_path / "secret.mp4"
    content = made("mov", "libx264", **H264_OPTIONS)
    secret.write_bytes(content)
    pixels = boxes(content)[b"mdat"]
    changed = with_reference(content.replace(pixels[8:], bytes(len(pixels) - 8)), alias(str(secret)))
    # With everything allowed, FFmpeg does show the other file.
    with av.open(io.BytesIO(changed), "r", options={"enable_drefs": "1", "use_absolute_path": "1"}) as allowed:
        assert len(list(allowed.decode(video=0))) == FRAMES
    assert "secret" not in refused(changed)
    for playlist in (
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{secret}",
        f"ffconcat version 1.0\nfile {secret}",
        f"<MPD><BaseURL>file://{secret}</BaseURL></MPD>",
    ):
        assert "secret" not in refused(playlist.encode())


def test_without_pyav_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "av":
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install 'echovlm-ray[video]'" in refused((CASES / "video.avi").read_bytes())
    assert "pip install 'echovlm-ray[video]'" in refused((CASES / "video_mpeg2.dcm").read_bytes())


SEEDS = [
    made(*KINDS[name][1], frames=10, **KINDS[name][2])
    for name in ("mp4", "avi of MJPEG", "matroska", "program stream", "transport stream", "H.264", "wmv")
]


@given(data=st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow])
def test_damaged_videos_are_taken_or_refused(data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(SEEDS)))
    span = data.draw(st.sampled_from([200, 2000, len(content)]))
    places = st.integers(0, min(span, len(content)) - 1)
    for position, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=8)):
        content[position] = value
    damaged = bytes(content[: data.draw(st.integers(1, len(content)))] if data.draw(st.booleans()) else content)
    try:
        image = decode(damaged)
    except InvalidRequestError:
        return
    assert len({frame.shape for frame in image.frames}) == 1
    assert all(frame.dtype == np.uint8 and frame.shape[2] == 3 for frame in image.frames)
    assert len(image.frames) == 1 or len(image.frames) % 2 == 0


@pytest.mark.parametrize("cut", [3000, 6000, 9001])
def test_half_a_frame_at_the_end_is_left_out(cut: int) -> None:
    found = decode(made("avi", "mjpeg", pixels="yuvj420p")[:-cut])
    shown = numbers(found)
    assert shown == sorted(shown)
    assert shown[-1] == found.source_frames - 1
    assert any("cut off" in text for text in found.notices)
