"""Still images of every kind and depth that is taken, and what is amiss with them."""

import json
import struct
import zlib
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from echovlm_ray.vision.orientation import oriented
from tests.vision.still_samples import (
    CASES,
    GREY,
    RGB,
    chunk,
    chunks,
    decode,
    difference,
    encoded,
    exif,
    grey_tags,
    refused,
    tiff,
    with_chunks,
)


def stills() -> list[dict[str, Any]]:
    cases = json.loads((CASES / "cases.json").read_text())
    return [case for case in cases if "picture" in case and not case["file"].endswith(".dcm")]


@pytest.mark.parametrize("case", stills(), ids=lambda case: str(case["file"]))
def test_files_that_failed_once(case: dict[str, Any]) -> None:
    right = np.load(CASES / case["picture"])["frames"]
    frames = decode((CASES / case["file"]).read_bytes()).frames
    assert len(frames) == len(right) == 1
    assert difference(frames[0], right[0]) <= case["tolerance"]


# Depths.
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_the_values_tell_how_many_of_16_bits_are_meant(bits: int, kind: str) -> None:
    values = np.rint(GREY / 255.0 * (2**bits - 1)).astype(np.uint16)
    decoded = decode(encoded(values, kind))
    assert difference(decoded.frames[0], GREY) < 0.6
    assert (f"shown as {bits}-bit values" in " ".join(decoded.notices)) == (bits < 16)
    colours = np.rint(RGB / 255.0 * (2**bits - 1)).astype(np.uint16)
    decoded = decode(imagecodecs.png_encode(colours) if kind == "PNG" else imagecodecs.tiff_encode(colours))
    assert difference(decoded.frames[0], RGB) < 0.6


@pytest.mark.parametrize("widened", [256, 257])
def test_eight_bits_that_were_widened_to_16_may_be_dark(widened: int) -> None:
    for right in (GREY // 4, GREY // 60):
        decoded = decode(encoded(right.astype(np.uint16) * widened, "PNG"))
        assert difference(decoded.frames[0], right) < 0.6
        assert decoded.notices == ()


def test_a_jpeg_2000_that_lacks_only_its_end_is_taken() -> None:
    for container in ("j2k", "jp2"):
        for values in (RGB, RGB.astype(np.uint16) * 257):
            whole = imagecodecs.jpeg2k_encode(values, codecformat=container, level=0, reversible=True)
            for missing in (1, 2):
                decoded = decode(whole[:-missing])
                assert difference(decoded.frames[0], RGB) < 0.6
                assert decoded.notices == ("The mark of the file's end is missing; its pixels are complete.",)
            assert decode(whole).notices == ()
            assert "truncated" in refused(whole[:-3])


def test_the_length_in_the_header_of_a_webp_may_be_wrong() -> None:
    webp = encoded(RGB, "WEBP", lossless=True)
    for length in (0, 99, len(webp), 2**31):
        content = webp[:4] + length.to_bytes(4, "little") + webp[8:]
        assert difference(decode(content).frames[0], RGB) == 0


def test_the_significant_bits_of_a_png_are_believed_where_they_fit() -> None:
    dark = GREY.astype(np.uint16) * 3  # under 10 bits, of 12 that the file names
    named = with_chunks(encoded(dark, "PNG"), chunk(b"sBIT", b"\x0c"))
    assert difference(decode(named).frames[0], dark * 255.0 / 4095) < 0.6
    full = with_chunks(encoded((GREY.astype(np.uint16) * 257), "PNG"), chunk(b"sBIT", b"\x0c"))
    assert difference(decode(full).frames[0], GREY) < 0.6
    assert decode(full).notices == ()


def test_16_bits_with_transparency() -> None:
    values = np.concatenate([RGB.astype(np.uint16) * 16, np.full((80, 112, 1), 32768, np.uint16)], -1)
    decoded = decode(imagecodecs.png_encode(values))
    assert difference(decoded.frames[0], RGB / 2) < 1.0


def test_a_black_picture_of_16_bits_stays_black() -> None:
    decoded = decode(encoded(np.zeros((32, 32), np.uint16), "PNG"))
    assert not decoded.frames[0].any()
    assert decoded.notices == ()


@pytest.mark.parametrize(
    ("values", "right", "notice"),
    [
        (GREY.astype(np.float32) / 255, GREY, "floats from 0 to 1"),
        (GREY.astype(np.float32), GREY, "floats below 256"),
        (GREY.astype(np.float64) * 100 - 300, (GREY - GREY.min()) * 255.0 / np.ptp(GREY), "floats"),
        (GREY.astype(np.int16) - 128, (GREY - GREY.min()) * 255.0 / np.ptp(GREY), "signed"),
        (GREY.astype(np.int16), GREY, "8-bit"),
        (GREY.astype(np.uint32) * 100_000, (GREY - GREY.min()) * 255.0 / np.ptp(GREY), "more than 16 bits"),
    ],
)
def test_floats_and_signed_values_of_tiff(values: npt.NDArray[Any], right: npt.NDArray[Any], notice: str) -> None:
    decoded = decode(imagecodecs.tiff_encode(values))
    assert difference(decoded.frames[0], right) < 1.0
    assert notice in decoded.notices[0]


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("picture", [GREY, RGB])
def test_lossless_kinds_of_jpeg_of_any_depth(bits: int, picture: npt.NDArray[Any]) -> None:
    values = picture if bits == 8 else np.rint(picture / 255.0 * (2**bits - 1)).astype(np.uint16)
    files = [
        imagecodecs.jpegls_encode(values),
        imagecodecs.jpeg2k_encode(values, level=0, bitspersample=bits, codecformat="jp2"),
        imagecodecs.jpeg2k_encode(values, level=0, bitspersample=bits, codecformat="j2k"),
    ]
    if picture is GREY:
        files.append(imagecodecs.ljpeg_encode(values, bitspersample=bits))
    for content in files:
        assert difference(decode(content).frames[0], picture) < 0.6


def test_12_bits_of_lossy_jpeg_in_grey_and_colour() -> None:
    for picture in (GREY, RGB):
        values = np.rint(picture / 255.0 * 4095).astype(np.uint16)
        content = imagecodecs.jpeg8_encode(values, level=98, bitspersample=12)
        assert difference(decode(content).frames[0], picture) < 3


# Files that are damaged where it does not matter.
def test_texts_and_profiles_are_not_inflated() -> None:
    bomb = zlib.compress(bytes(100 * 1024**2), 9)
    png = with_chunks(
        encoded(RGB, "PNG"),
        chunk(b"iCCP", b"profile\0\0" + bomb),
        chunk(b"zTXt", b"text\0\0" + bomb),
        chunk(b"iTXt", b"text\0\x01\0\0\0" + bomb),
        chunk(b"pHYs", b"short"),
        chunk(b"tEXt", b"text\0wrong", checksum=1),
    )
    assert np.array_equal(decode(png).frames[0], RGB)


def test_wrong_checksums_of_a_png_are_weighed_against_the_pixels() -> None:
    png = encoded(RGB, "PNG")
    for kind, notice in ((b"IDAT", "one over all of its pixels is right"), (b"IHDR", "all of its pixels is right")):
        wrong = png[:8] + b"".join(
            chunk(name, data, checksum=7 if name == kind else None) for name, data in chunks(png)
        )
        decoded = decode(wrong)
        assert np.array_equal(decoded.frames[0], RGB)
        assert notice in decoded.notices[0]
    palette = encoded(Image.fromarray(RGB).quantize(16), "PNG")
    wrong = palette[:8] + b"".join(chunk(name, data, 7 if name == b"PLTE" else None) for name, data in chunks(palette))
    assert "palette" in decode(wrong).notices[0]
    damaged = bytearray(png)
    damaged[-40] ^= 0xFF
    assert "damaged" in refused(bytes(damaged))


def test_a_png_that_lacks_only_its_end_is_taken() -> None:
    png = encoded(RGB, "PNG")
    for cut in (1, 4, 12, 14):
        decoded = decode(png[:-cut])
        assert np.array_equal(decoded.frames[0], RGB)
        assert "end of the file is missing" in decoded.notices[0]
    for cut in (17, 60, len(png) // 2):
        assert "truncated" in refused(png[:-cut])


def test_adam7_is_decoded_and_its_length_is_known() -> None:
    # Seven passes of a grey picture, written by hand: Pillow does not write them.
    data = b""
    for left, top, right, down in (
        (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2),
    ):  # fmt: skip
        data += b"".join(b"\0" + row.tobytes() for row in GREY[top::down, left::right])
    header = struct.pack(">II5B", 112, 80, 8, 0, 0, 0, 1)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data))
    assert np.array_equal(decode(png + chunk(b"IEND", b"")).frames[0][..., 0], GREY)
    assert np.array_equal(decode(png).frames[0][..., 0], GREY)
    assert "truncated" in refused(png[:-60])


def test_a_jpeg_is_taken_only_if_nothing_but_its_end_is_missing() -> None:
    for options in ({}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 4}):
        jpeg = encoded(RGB, "JPEG", quality=90, **options)
        whole = decode(jpeg).frames[0]
        for cut in (1, 2):
            decoded = decode(jpeg[:-cut])
            assert np.array_equal(decoded.frames[0], whole)
            assert "end is missing" in decoded.notices[0]
        for cut in (12, 40, len(jpeg) // 3, len(jpeg) // 2):
            assert "truncated" in refused(jpeg[:-cut]), (options, cut)


def test_a_jpeg_that_is_cut_where_decoding_starts_anew_is_refused() -> None:
    restarting = encoded(RGB, "JPEG", quality=90, restart_marker_rows=1)
    assert "truncated" in refused(restarting[: restarting.rfind(b"\xff\xd3")])
    progressive = encoded(RGB, "JPEG", quality=90, progressive=True)
    scans = [at for at in range(len(progressive)) if progressive[at : at + 2] == b"\xff\xda"]
    before = progressive.rfind(b"\xff\xc4", 0, scans[-1])
    assert "truncated" in refused(progressive[: before if before > scans[-2] else scans[-1]])


def test_bytes_behind_the_end_do_not_matter() -> None:
    for kind in ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "JPEG2000"):
        content = encoded(RGB, kind)
        assert np.array_equal(decode(content + b"\0\xff\xd9 and more").frames[0], decode(content).frames[0])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("broken_neighbour", [False, True])
def test_orientation_is_applied_in_every_kind_that_has_it(orientation: int, broken_neighbour: bool) -> None:
    right = oriented(RGB, orientation)
    data = exif(orientation, broken_neighbour)
    png = with_chunks(encoded(RGB, "PNG"), chunk(b"eXIf", data))
    assert np.array_equal(decode(png).frames[0], right)
    jpeg = encoded(RGB, "JPEG", quality=98, subsampling=0)
    segment = b"\xff\xe1" + struct.pack(">H", len(data) + 8) + b"Exif\0\0" + data
    assert difference(decode(jpeg[:2] + segment + jpeg[2:]).frames[0], right) < 2
    webp = encoded(RGB, "WEBP", lossless=True, exif=data)
    assert np.array_equal(decode(webp).frames[0], right)
    assert np.array_equal(decode(encoded(RGB, "TIFF", tiffinfo={274: orientation})).frames[0], right)
    ybr = encoded(Image.fromarray(RGB).convert("YCbCr"), "TIFF", tiffinfo={274: orientation})
    assert difference(decode(ybr).frames[0], right) < 2


def test_orientations_are_those_of_pillow() -> None:
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }  # fmt: skip
    for orientation, turn in turns.items():
        assert np.array_equal(oriented(RGB, orientation), np.asarray(Image.fromarray(RGB).transpose(turn)))


def test_orientation_of_xmp_counts_where_exif_has_none() -> None:
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    assert decode(encoded(RGB, "JPEG", xmp=xmp)).frames[0].shape == (112, 80, 3)
    assert decode(encoded(RGB, "WEBP", xmp=xmp)).frames[0].shape == (112, 80, 3)


def test_broken_exif_is_a_notice() -> None:
    jpeg = encoded(RGB, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    decoded = decode(jpeg)
    assert decoded.frames[0].shape == RGB.shape
    assert "EXIF is broken" in decoded.notices[0]


# Colours.
def test_colours_of_jpeg() -> None:
    image = Image.fromarray(RGB)
    for mode in ("RGB", "CMYK", "YCbCr"):
        assert difference(decode(encoded(image.convert(mode), "JPEG", quality=98, subsampling=0)).frames[0], RGB) < 3
    unmarked = encoded(image, "JPEG", quality=98, subsampling=0, keep_rgb=True)
    assert difference(decode(unmarked).frames[0], RGB) < 3


def test_alpha_that_hides_everything_is_left_out() -> None:
    hidden = np.concatenate([RGB, np.zeros((80, 112, 1), np.uint8)], -1)
    for kind, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})):
        decoded = decode(encoded(hidden, kind, **options))
        assert np.array_equal(decoded.frames[0], RGB)
        assert "transparent" in decoded.notices[0]


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
@pytest.mark.parametrize("white_is_zero", [False, True])
def test_tiff_of_every_number_of_bits(bits: int, white_is_zero: bool) -> None:
    levels = 2**bits - 1
    right = np.rint(GREY / 255.0 * levels).astype(np.uint16)
    stored = levels - right if white_is_zero else right
    if bits == 16:
        data = stored.astype("<u2").tobytes()
    else:
        planes = (stored[..., None] >> np.arange(bits - 1, -1, -1)) & 1
        data = np.packbits(planes.astype(np.uint8).reshape(80, -1), axis=1).tobytes()
    decoded = decode(tiff(data, grey_tags(bits, int(not white_is_zero))))
    assert difference(decoded.frames[0], right * 255.0 / levels) < 0.6


@pytest.mark.parametrize("shift", [0, 8])
def test_palettes_of_tiff_in_both_scales(shift: int) -> None:
    colours = np.stack([np.arange(256), 255 - np.arange(256), np.arange(256) // 2]).astype(np.uint16) << shift
    content = tiff(GREY.tobytes(), {**grey_tags(8, 3), 320: tuple(colours.ravel().tolist())})
    assert np.array_equal(decode(content).frames[0], RGB)


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "tiff_lzw"},
        {"compression": "tiff_deflate"},
        {"compression": "packbits"},
        {"compression": "jpeg", "quality": 98},
        {"big_tiff": True},
    ],
)
def test_compressions_of_tiff(options: dict[str, Any]) -> None:
    assert difference(decode(encoded(RGB, "TIFF", **options)).frames[0], RGB) < 2
    bilevel = Image.fromarray(GREY).convert("1")
    fax = encoded(bilevel, "TIFF", compression="group4")
    assert np.array_equal(decode(fax).frames[0][..., 0] > 0, np.asarray(bilevel))


def test_planes_tiles_and_cmyk_of_tiff() -> None:
    planes = np.ascontiguousarray(np.moveaxis(RGB, -1, 0))
    separate = imagecodecs.tiff_encode(planes, planarconfig="separate", photometric="rgb")
    assert np.array_equal(decode(separate).frames[0], RGB)
    assert np.array_equal(decode(imagecodecs.tiff_encode(RGB, tile=(32, 32))).frames[0], RGB)
    assert difference(decode(encoded(Image.fromarray(RGB).convert("CMYK"), "TIFF")).frames[0], RGB) < 2


# Many pictures in one file.
def test_pages_that_are_alike_are_a_cine() -> None:
    pages = [Image.fromarray(np.roll(RGB, 5 * index, 1)) for index in range(5)]
    decoded = decode(encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:]))
    assert (decoded.source_frames, decoded.frames_taken, len(decoded.frames)) == (5, 5, 6)
    assert all(np.array_equal(frame, page) for frame, page in zip(decoded.frames, map(np.asarray, pages), strict=False))


def test_of_pages_that_are_not_alike_the_first_is_shown() -> None:
    small = Image.fromarray(RGB[::2, ::2])
    decoded = decode(encoded(Image.fromarray(RGB), "TIFF", save_all=True, append_images=[small]))
    assert np.array_equal(decoded.frames[0], RGB)
    assert not decoded.is_video
    assert "2 pages" in decoded.notices[0]


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("GIF", {})])
def test_animations_are_a_cine(kind: str, options: dict[str, Any]) -> None:
    frames = [Image.new("RGB", (32, 24), (20 * index, 255 - 20 * index, 7)) for index in range(12)]
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    decoded = decode(content)
    assert (decoded.source_frames, decoded.frames_taken) == (12, 8)
    assert [int(frame[0, 0, 0]) for frame in decoded.frames] == [20 * index for index in (0, 2, 3, 5, 6, 8, 9, 11)]
    assert decoded.is_video
    assert not decode(encoded(frames[0], kind, **options)).is_video


def test_a_gif_that_is_cut_off_keeps_its_whole_frames() -> None:
    frames = [Image.fromarray(np.roll(RGB, 5 * index, 1)) for index in range(6)]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    decoded = decode(content[: len(content) * 3 // 4])
    assert 1 < decoded.source_frames < 6
    assert "cut off" in decoded.notices[0]
    assert "damaged" in refused(content[:900])


def test_of_several_pictures_in_a_jpeg_the_first_is_shown() -> None:
    images = [Image.fromarray(RGB), Image.fromarray(RGB[:, ::-1])]
    content = encoded(images[0], "MPO", save_all=True, append_images=images[1:], quality=98, subsampling=0)
    decoded = decode(content)
    assert difference(decoded.frames[0], RGB) < 2
    assert "several pictures" in decoded.notices[0]
