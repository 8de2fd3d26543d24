"""DICOM files whose bytes are sound and whose beginnings, labels or lengths are not."""

import io
import zlib
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread, dcmwrite
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from echovlm_ray.vision.dicom import DicomPicture, InvalidDicomError, decode_dicom, is_dicom
from tests.vision.dicom_samples import made, picture, real, region

PICTURE = picture(48, 64)
MEGABYTE_OF_PIXELS = 1_000_000


def decode(content: bytes, *, max_pixels: int = MEGABYTE_OF_PIXELS, crop: bool = False) -> DicomPicture:
    return decode_dicom(content, max_pixels=max_pixels, max_frames=8, crop_to_regions=crop)


def refused(content: bytes, **limits: Any) -> str:
    with pytest.raises(InvalidDicomError) as caught:
        decode(content, **limits)
    return str(caught.value)


def data_set(transfer_syntax: str, **attributes: Any) -> tuple[bytes, bytes]:
    """A file's meta information with everything before it, and its attributes."""
    content = made(PICTURE, **attributes)
    dataset = dcmread(io.BytesIO(content))
    buffer = io.BytesIO()
    dataset.file_meta.TransferSyntaxUID = UID(transfer_syntax)
    implicit = transfer_syntax == ImplicitVRLittleEndian
    little = transfer_syntax != ExplicitVRBigEndian
    dcmwrite(buffer, dataset, implicit_vr=implicit, little_endian=little, force_encoding=True)
    content = buffer.getvalue()
    length = int.from_bytes(content[140:144], "little")
    return content[: 144 + length], content[144 + length :]


ENCODINGS = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian)


@pytest.mark.parametrize("syntax", ENCODINGS)
def test_preamble_meta_and_transfer_syntax_may_be_missing(syntax: str) -> None:
    head, attributes = data_set(syntax)
    whole = decode(head + attributes)
    assert np.array_equal(whole.frames[0], np.repeat(PICTURE[..., None], 3, -1))
    assert whole.notices == ()
    without_syntax = _without_transfer_syntax(head) + attributes
    for content, notice in (
        (attributes, "no File Meta Information"),
        (bytes(128) + attributes, "no preamble"),
        (bytes(128) + b"DICM" + attributes, "no File Meta Information"),
        (head[128:] + attributes, "no preamble"),
        (head[132:] + attributes, "no preamble"),
        (without_syntax, "no Transfer Syntax UID"),
    ):
        assert is_dicom(content)
        found = decode(content)
        assert np.array_equal(found.frames[0], whole.frames[0])
        assert any(notice in text for text in found.notices), found.notices


def _without_transfer_syntax(head: bytes) -> bytes:
    at = head.index(b"\x02\x00\x10\x00UI")
    return head[:at] + head[at + 8 + int.from_bytes(head[at + 6 : at + 8], "little") :]


@pytest.mark.parametrize("named", ENCODINGS)
@pytest.mark.parametrize("written", ENCODINGS)
def test_the_bytes_decide_how_attributes_are_encoded(named: str, written: str) -> None:
    head, _ = data_set(named)
    _, attributes = data_set(written)
    found = decode(head + attributes)
    assert np.array_equal(found.frames[0][..., 0], PICTURE)
    assert bool(found.notices) == (named != written)


def test_eight_bit_words_of_big_endian_files_are_read_whether_they_are_swapped_or_not() -> None:
    head, attributes = data_set(ExplicitVRBigEndian)
    pixels = PICTURE.tobytes()
    swapped = np.frombuffer(pixels, "u2").byteswap().tobytes()
    assert attributes.endswith(b"\x7f\xe0\x00\x10OW\0\0" + len(pixels).to_bytes(4, "big") + pixels)
    for values in (pixels, swapped):
        assert np.array_equal(decode(head + attributes[: -len(pixels)] + values).frames[0][..., 0], PICTURE)


@pytest.mark.parametrize("length", [0, 1, 10_000, 2**32 - 1])
def test_the_group_length_of_the_meta_information_is_not_believed(length: int) -> None:
    content = made(PICTURE)
    content = content[:140] + length.to_bytes(4, "little") + content[144:]
    assert np.array_equal(decode(content).frames[0][..., 0], PICTURE)


@pytest.mark.parametrize("window_bits", [-15, 15])
def test_deflated_files_are_inflated(window_bits: int) -> None:
    head, attributes = data_set(ExplicitVRLittleEndian)
    head = _renamed(head, DeflatedExplicitVRLittleEndian)
    squeezer = zlib.compressobj(wbits=window_bits)
    content = head + squeezer.compress(attributes) + squeezer.flush()
    assert np.array_equal(decode(content).frames[0][..., 0], PICTURE)
    assert any("not deflated" in text for text in decode(head + attributes).notices)


def test_inflating_stops_at_the_limit_of_bytes() -> None:
    head, attributes = data_set(ExplicitVRLittleEndian)
    head = _renamed(head, DeflatedExplicitVRLittleEndian)
    squeezer = zlib.compressobj(wbits=-15)
    content = head + squeezer.compress(attributes + bytes(40 * 1024**2)) + squeezer.flush()
    assert len(content) < 100_000
    assert "inflates to more than" in refused(content)
    assert decode(content, max_pixels=20_000_000).frames[0].shape == (48, 64, 3)


def _renamed(head: bytes, transfer_syntax: str) -> bytes:
    at = head.index(b"\x02\x00\x10\x00UI")
    end = at + 8 + int.from_bytes(head[at + 6 : at + 8], "little")
    uid = transfer_syntax.encode() + b"\0" * (len(transfer_syntax) % 2)
    return head[:at] + b"\x02\x00\x10\x00UI" + len(uid).to_bytes(2, "little") + uid + head[end:]


@pytest.mark.parametrize("wrong_by", [-2, -1, 1, 2, 7])
@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
def test_an_attribute_whose_length_is_wrong_costs_only_itself(syntax: str, wrong_by: int) -> None:
    head, attributes = data_set(syntax, PatientName="ZZTOP^PATIENT", BodyPartExamined="LIVER")
    at = attributes.index(b"\x10\x00\x10\x00")
    place, size = (at + 4, 4) if syntax == ImplicitVRLittleEndian else (at + 6, 2)
    wrong = int.from_bytes(attributes[place : place + size], "little") + wrong_by
    found = decode(head + attributes[:place] + wrong.to_bytes(size, "little") + attributes[place + size :])
    assert np.array_equal(found.frames[0][..., 0], PICTURE)
    assert found.anatomy_terms == ("LIVER",)
    assert any("written length is wrong" in text for text in found.notices)


def test_a_sequence_without_its_delimiter_keeps_the_picture() -> None:
    content = made(PICTURE, SequenceOfUltrasoundRegions=[region(4, 5, 60, 44)])
    dataset = dcmread(io.BytesIO(content))
    dataset["SequenceOfUltrasoundRegions"].is_undefined_length = True
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    content = buffer.getvalue()
    delimiter = b"\xfe\xff\xdd\xe0\0\0\0\0"
    assert content.count(delimiter) == 1
    assert decode(content, crop=True).frames[0].shape == (40, 57, 3)
    found = decode(content.replace(delimiter, b""), crop=True)
    assert found.frames[0].shape == (40, 57, 3)
    assert any("written length is wrong" in text for text in found.notices)


@pytest.mark.parametrize("charset", ["ISO_IR 999", "GB18030", "ISO 2022 IR 87", "", "\\\\", "ISO_IR 192\\nonsense"])
def test_a_wrong_character_set_does_not_prevent_the_picture(charset: str) -> None:
    marked = made(PICTURE, SpecificCharacterSet="ISO_IR 100", BodyPartExamined="LIVER")
    content = marked.replace(
        b"CS\x0a\x00ISO_IR 100",
        b"CS" + (len(charset) + len(charset) % 2).to_bytes(2, "little") + charset.encode() + b" " * (len(charset) % 2),
    )
    assert np.array_equal(decode(content).frames[0][..., 0], PICTURE)


def test_what_is_no_dicom_file_is_not_taken_for_one() -> None:
    for content in (
        b"",
        b"hello",
        bytes(200),
        b"\x89PNG\r\n\x1a\n" + bytes(200),
        b"\xff\xd8\xff\xe0" + bytes(200),
        b"BM",
    ):
        assert not is_dicom(content)


@pytest.mark.parametrize(
    "name", ["image_dfl.dcm", "meta_missing_tsyntax.dcm", "OT-PAL-8-face.dcm", "JPEG-lossy.dcm", "MR_truncated.dcm"]
)
def test_real_files_that_were_refused(name: str) -> None:
    if name == "meta_missing_tsyntax.dcm":
        assert "Rows (0028,0010)" in refused(real(name))
    else:
        assert decode(real(name)).frames[0].std() > 1
