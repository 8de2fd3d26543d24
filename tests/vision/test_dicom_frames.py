"""Which frames a DICOM object has: wrong numbers, offset tables, fragments and lengths lose none without a word."""

import io
import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom.uid import (
    HTJ2K,
    UID,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from echovlm_ray.vision.dicom import DicomPicture, InvalidDicomError, decode_dicom
from echovlm_ray.vision.dicom.decoders import MAX_PROGRESSIVE_SCANS
from tests.vision.dicom_samples import colour_picture, encoded, made, made_compressed, picture

PRIVATE = "1.2.826.0.1.3680043.9.3811.999"
GREYS = np.stack([np.roll(picture(48, 64), 7 * index, axis=1) for index in range(5)])
JPEGS = [encoded("jpeg8", frame, level=95) for frame in GREYS]


def decode(content: bytes, *, max_pixels: int = 10**6, max_frames: int = 8) -> DicomPicture:
    return decode_dicom(content, max_pixels=max_pixels, max_frames=max_frames, crop_to_regions=False)


def refused(content: bytes, **limits: int) -> str:
    with pytest.raises(InvalidDicomError) as caught:
        decode(content, **limits)
    return str(caught.value)


def grey(**attributes: Any) -> dict[str, Any]:
    return {
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "PlanarConfiguration": None,
        **attributes,
    }


def items(*values: bytes, table: Sequence[int] | None = (), delimiter: bool = True) -> bytes:
    """Encapsulated pixel data, with `table` as the basic offset table or without one."""
    fragments = [] if table is None else [struct.pack(f"<{len(table)}I", *table)]
    fragments += [value + b"\0" * (len(value) % 2) for value in values]
    body = b"".join(b"\xfe\xff\x00\xe0" + len(value).to_bytes(4, "little") + value for value in fragments)
    return body + (b"\xfe\xff\xdd\xe0\0\0\0\0" if delimiter else b"")


def compressed(pixel_data: bytes, *, frames: Any = 5, syntax: str = JPEGBaseline8Bit, **attributes: Any) -> bytes:
    """A file of 48 × 64 grey pixels around encapsulated pixel data that are not looked at here."""
    content = made_compressed([b"\0\0"], syntax, 48, 64, **grey(**attributes), **{})
    if frames is None:
        at = content.index(b"\x28\x00\x08\x00IS")
        content = content[:at] + content[at + 10 :]
    else:
        stated = str(frames).encode() + b" " * (len(str(frames)) % 2)
        at = content.index(b"\x28\x00\x08\x00IS")
        content = content[: at + 6] + len(stated).to_bytes(2, "little") + stated + content[at + 10 :]
    start = content.index(b"\xe0\x7f\x10\x00OB") + 12
    return content[:start] + pixel_data


def matches(found: DicomPicture, expected: Sequence[int]) -> None:
    assert sorted(set(found.indices)) == list(expected)
    for index, frame in zip(found.indices, found.frames, strict=True):
        assert np.abs(frame[..., 0].astype(int) - GREYS[index]).mean() < 2


OFFSETS = [sum(8 + len(jpeg) + len(jpeg) % 2 for jpeg in JPEGS[:index]) for index in range(5)]


@pytest.mark.parametrize("frames", [5, None, 0, -3, 3, 7, 2**31, "many"])
@pytest.mark.parametrize(
    "table", [(), OFFSETS, [0] * 5, [0], [1, 2, 3], OFFSETS[::-1], [offset + 2 for offset in OFFSETS], None]
)
def test_frames_are_found_whatever_the_number_and_the_offset_table_say(frames: Any, table: Sequence[int]) -> None:
    found = decode(compressed(items(*JPEGS, table=table), frames=frames))
    assert found.source_frames == 5
    matches(found, range(5))
    assert any("Number of Frames (0028,0008)" in text for text in found.notices) == (frames != 5)
    wrong_table = table not in ((), OFFSETS, None)
    assert any("offset table" in text for text in found.notices) == wrong_table


def test_the_extended_offset_table_is_used_and_may_be_wrong() -> None:
    for offsets, is_wrong in ((OFFSETS, False), ([0, 1, 2], True), ([], False)):
        table = struct.pack(f"<{len(offsets)}Q", *offsets)
        content = compressed(items(*JPEGS), ExtendedOffsetTable=table, ExtendedOffsetTableLengths=bytes(len(table)))
        found = decode(content)
        matches(found, range(5))
        assert any("offset table" in text for text in found.notices) == is_wrong


@pytest.mark.parametrize("frames", [5, None, 9, 15])
def test_a_frame_may_lie_in_several_fragments(frames: int | None) -> None:
    halves = [part for jpeg in JPEGS for part in (jpeg[:200], jpeg[200:400], jpeg[400:])]
    halves = [part + b"\0" * (len(part) % 2) for part in halves]
    found = decode(compressed(items(*halves), frames=frames))
    assert found.source_frames == 5
    matches(found, range(5))


def test_fragments_without_compression_are_native_frames() -> None:
    frames = np.stack([np.roll(picture(47, 63), 9 * index, axis=1) for index in range(3)])
    padded = [frame.tobytes() + b"\0" for frame in frames]
    for pixel_data in (items(*padded), items(frames.tobytes() + b"\0")):
        for syntax in ("1.2.840.10008.1.2.1.98", JPEGBaseline8Bit):
            content = compressed(pixel_data, frames=3, syntax=syntax, **grey(Rows=47, Columns=63))
            found = decode(content)
            assert found.source_frames == 3
            assert np.array_equal(np.stack(found.frames)[:3, ..., 0], frames)
            assert any("not compressed" in text for text in found.notices) == (syntax == JPEGBaseline8Bit)


def test_a_still_is_likelier_than_a_loop_that_does_not_say_it_is_one() -> None:
    colours = colour_picture(48, 64)
    for attributes in ({"PhotometricInterpretation": "MONOCHROME2"}, {"PhotometricInterpretation": "PALETTE COLOR"}):
        found = decode(made(colours, **attributes))
        assert found.source_frames == 1
        assert np.array_equal(found.frames[0], colours)


def test_frames_in_one_fragment_are_told_apart() -> None:
    padded = [jpeg + b"\0" * (len(jpeg) % 2) for jpeg in JPEGS]
    found = decode(compressed(items(b"".join(padded))))
    assert found.source_frames == 5
    matches(found, range(5))


@pytest.mark.parametrize("wrong_by", [-2, -1, 1, 2, 3])
@pytest.mark.parametrize("which", [0, 2, 4])
def test_lengths_of_fragments_may_be_wrong_by_some_bytes(wrong_by: int, which: int) -> None:
    pixel_data = bytearray(items(*JPEGS))
    place = 8 + OFFSETS[which] + 4
    pixel_data[place : place + 4] = (int.from_bytes(pixel_data[place : place + 4], "little") + wrong_by).to_bytes(
        4, "little"
    )
    found = decode(compressed(bytes(pixel_data)))
    matches(found, range(5))
    assert any("fragment of pixel data whose written length is wrong" in text for text in found.notices)


@pytest.mark.parametrize("length", [0, 2**31, 2**32 - 1])
def test_a_length_that_says_nothing_ends_at_the_next_frame(length: int) -> None:
    pixel_data = bytearray(items(*JPEGS))
    pixel_data[8 + OFFSETS[2] + 4 : 8 + OFFSETS[2] + 8] = length.to_bytes(4, "little")
    matches(decode(compressed(bytes(pixel_data))), range(5))


def test_the_whole_frames_of_a_file_that_is_cut_off_are_taken() -> None:
    pixel_data = items(*JPEGS, delimiter=False)
    for cut in range(1, 2 * len(JPEGS[-1]), 97):
        found = decode(compressed(pixel_data[:-cut]))
        lost = 5 - len(set(found.indices))
        assert 0 <= lost <= 2
        matches(found, range(5 - lost))
        assert found.notices


def test_only_the_end_marker_may_be_missing() -> None:
    for jpeg in (JPEGS[0], encoded("jpeg8", colour_picture(48, 64), level=90)):
        samples = 3 if jpeg is not JPEGS[0] else 1
        attributes = grey() if samples == 1 else {"PhotometricInterpretation": "YBR_FULL_422"}
        whole = decode(made_compressed([jpeg], JPEGBaseline8Bit, 48, 64, **attributes)).frames[0]
        for cut in (1, 2):
            found = decode(made_compressed([jpeg[:-cut]], JPEGBaseline8Bit, 48, 64, **attributes))
            assert np.array_equal(found.frames[0], whole)
            assert any("without its end marker" in text for text in found.notices)
        assert "damaged or cut off" in refused(made_compressed([jpeg[: len(jpeg) // 2]], JPEGBaseline8Bit, 48, 64))


@pytest.mark.parametrize("bad", [0, 2, 4])
@pytest.mark.parametrize("garbage", [bytes(200), b"\xff\xd8\xff\xe0 broken", b"\x12" * 300, JPEGS[0][:200]])
def test_bad_frames_of_a_loop_are_left_out_and_counted(bad: int, garbage: bytes) -> None:
    frames = [garbage if index == bad else jpeg for index, jpeg in enumerate(JPEGS)]
    found = decode(compressed(items(*frames)))
    matches(found, [index for index in range(5) if index != bad])
    assert len(found.frames) == 4
    assert "It has 5 frames, of which 1 cannot be decoded and are left out." in found.notices


def test_one_sound_frame_of_a_loop_is_shown_as_a_pair() -> None:
    found = decode(compressed(items(bytes(100), JPEGS[1], bytes(100), bytes(100), bytes(100))))
    assert (found.indices, found.source_frames) == ((1, 1), 5)
    assert "no frame starts" in refused(compressed(items(*[bytes(100)] * 5)))


ENCODERS: dict[str, Callable[[Any], bytes]] = {
    JPEGLSLossless: lambda frame: encoded("jpegls", frame),
    JPEG2000Lossless: lambda frame: encoded("jpeg2k", frame, codecformat="j2k", reversible=True, level=0),
    HTJ2KLossless: lambda frame: encoded("htj2k", frame, reversible=True),
    HTJ2K: lambda frame: encoded("htj2k", frame, reversible=True),
    JPEGLosslessSV1: lambda frame: encoded("ljpeg", frame, bitspersample=12),
}


@pytest.mark.parametrize("syntax", ENCODERS, ids=lambda uid: UID(uid).name)
@pytest.mark.parametrize("labelled", ["", JPEGBaseline8Bit, ExplicitVRLittleEndian, PRIVATE])
def test_the_frame_says_how_it_is_compressed(syntax: str, labelled: str) -> None:
    values = (picture(48, 64).astype(np.uint16) << 4) | 5
    frame = ENCODERS[syntax](values)
    content = made_compressed(
        [frame],
        JPEGBaseline8Bit,
        48,
        64,
        **grey(BitsAllocated=16, BitsStored=12, HighBit=11, WindowWidth=4096, WindowCenter=2048),
    )
    content = (
        content.replace(JPEGBaseline8Bit.encode() + b"\0", (labelled or syntax).encode().ljust(22, b"\0")[:22])
        if (len(labelled or syntax) <= 22)
        else content
    )
    expected = np.rint(values / 4095 * 255)
    assert np.abs(decode(content).frames[0][..., 0] - expected).max() <= 1


def test_a_codestream_may_lie_in_native_pixel_data() -> None:
    content = made(GREYS[0], PixelData=JPEGS[0] + b"\0" * (len(JPEGS[0]) % 2))
    found = decode(content)
    matches(found, [0])
    assert any("against its Transfer Syntax UID" in text for text in found.notices)


def test_native_pixels_may_be_labelled_as_compressed() -> None:
    head = compressed(b"", frames=1)
    pixels = GREYS[0].tobytes()
    content = head[:-4] + len(pixels).to_bytes(4, "little") + pixels
    found = decode(content)
    assert np.array_equal(found.frames[0][..., 0], GREYS[0])
    assert any("not compressed, against its Transfer Syntax UID" in text for text in found.notices)


@pytest.mark.parametrize("frames", [None, 0, 3, 5, 9, 2**31 - 1])
def test_native_frames_are_as_many_as_there_are_bytes_for(frames: Any) -> None:
    attributes: dict[str, Any] = {"NumberOfFrames": frames}
    found = decode(made(GREYS, frames=5, **attributes))
    assert found.source_frames == 5
    assert all(
        np.array_equal(frame[..., 0], GREYS[index]) for index, frame in zip(found.indices, found.frames, strict=True)
    )
    assert any("Number of Frames (0028,0008)" in text for text in found.notices) == (frames != 5)


def test_native_loops_that_are_cut_off_keep_their_whole_frames() -> None:
    content = made(GREYS, frames=5)
    found = decode(content[:-1000])
    assert (found.source_frames, len(set(found.indices))) == (4, 4)
    assert any("cut off" in text for text in found.notices)
    almost = decode(content[:-3])
    assert almost.source_frames == 5
    assert np.array_equal(almost.frames[-1][:-1, :, 0], GREYS[4][:-1])
    assert any("less than a row" in text for text in almost.notices)
    assert "less pixel data than one frame" in refused(made(GREYS[0])[:-1000])


@pytest.mark.parametrize("wrong_by", [-3000, -2, -1, 1, 2, 3000])
def test_the_length_of_native_pixel_data_may_be_wrong(wrong_by: int) -> None:
    content = bytearray(made(GREYS[0]))
    place = len(content) - GREYS[0].size - 4
    content[place : place + 4] = (GREYS[0].size + wrong_by).to_bytes(4, "little")
    found = decode(bytes(content))
    assert np.array_equal(found.frames[0][..., 0], GREYS[0])
    assert found.notices or wrong_by == 1


def rle(planes: Sequence[np.ndarray[Any, Any]]) -> bytes:
    """An RLE frame of byte planes."""
    segments = [encoded("packbits", plane.astype(np.uint8).ravel()) for plane in planes]
    segments = [segment + b"\0" * (len(segment) % 2) for segment in segments]
    offsets = [64 + sum(map(len, segments[:index])) for index in range(len(segments))]
    return struct.pack("<16I", len(segments), *offsets, *[0] * (15 - len(segments))) + b"".join(segments)


def test_rle_frames_say_how_many_bytes_they_have() -> None:
    colours = colour_picture(48, 64)
    planes = rle([colours[..., index] for index in range(3)])
    for planar in (0, 1, None):
        found = decode(made_compressed([planes], RLELossless, 48, 64, PlanarConfiguration=planar))
        assert np.array_equal(found.frames[0], colours)
    ybr = np.array(Image.fromarray(colours).convert("YCbCr"))
    content = made_compressed(
        [rle([ybr[..., index] for index in range(3)])], RLELossless, 48, 64, PhotometricInterpretation="YBR_FULL"
    )
    assert np.abs(decode(content).frames[0].astype(int) - colours).max() <= 2
    grey_labelled_colour = made_compressed([rle([GREYS[0]])], RLELossless, 48, 64)
    assert np.array_equal(decode(grey_labelled_colour).frames[0][..., 0], GREYS[0])
    wide = GREYS[0].astype(np.uint16) << 6
    content = made_compressed(
        [rle([wide >> 8, wide & 255])],
        RLELossless,
        48,
        64,
        **grey(BitsAllocated=16, BitsStored=14, HighBit=13, WindowWidth=16384, WindowCenter=8192),
    )
    assert np.abs(decode(content).frames[0][..., 0].astype(int) - np.rint(wide / 16383 * 255)).max() <= 1


def test_decoding_is_bounded_before_it_starts() -> None:
    bomb = b"".join(b"\x81\0" for _ in range(100_000))
    content = compressed(items(struct.pack("<16I", 1, 64, *[0] * 14) + bomb), frames=1, syntax=RLELossless)
    assert "damaged or cut off" in refused(content)
    assert "pixels in 5 frames" in refused(made(GREYS, frames=5), max_pixels=5 * 48 * 64 - 1)
    assert len(decode(made(GREYS, frames=5), max_pixels=5 * 48 * 64).frames) == 6
    assert len(decode(made(GREYS, frames=5), max_pixels=2 * 48 * 64, max_frames=2).frames) == 2
    deep = np.zeros((48, 64, 3), np.uint64)
    assert "bytes to decode" in refused(made(deep), max_pixels=48 * 64)


def test_progressive_scans_are_counted() -> None:
    buffer = io.BytesIO()
    Image.fromarray(GREYS[0]).save(buffer, "JPEG", progressive=True, quality=95)
    sound = buffer.getvalue()
    matches(decode(compressed(items(sound), frames=1)), [0])
    last = sound.rindex(b"\xff\xda")
    many = sound[:last] + sound[last:-2] * (MAX_PROGRESSIVE_SCANS + 1) + sound[-2:]
    assert f"more than {MAX_PROGRESSIVE_SCANS} progressive scans" in refused(compressed(items(many), frames=1))
