"""Damaged and hostile DICOM files: frames or a refusal, within bounds, and never a word out of the file (P12)."""

import logging
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, JPEGLSLossless, RLELossless

from echovlm_ray.vision.dicom import InvalidDicomError, decode_dicom
from tests.vision.dicom_samples import colour_picture, encoded, made, made_compressed, picture, real, region
from tests.vision.test_dicom_frames import rle

# Texts of our own have words, numbers that count something, and tags; nothing of them is as long as a value can be.
ALLOWED = re.compile(r"[A-Za-z0-9 ,.;:()×'_-]+")
SECRET = "ZZTOPPATIENT"
COLOURS = colour_picture(48, 64)
PRIVATE = {"PatientName": SECRET, "PatientID": SECRET, "StudyDescription": SECRET}
SEEDS = [
    made(picture(48, 64), SequenceOfUltrasoundRegions=[region(2, 2, 60, 40)], **PRIVATE),
    made(picture(48, 64).astype(np.uint16) << 4, WindowCenter=2000, WindowWidth=4000, **PRIVATE),
    made(np.stack([COLOURS] * 3), frames=3, **PRIVATE),
    made_compressed([encoded("jpeg8", COLOURS)] * 3, JPEGBaseline8Bit, 48, 64, **PRIVATE),
    made_compressed([encoded("jpegls", COLOURS)], JPEGLSLossless, 48, 64, **PRIVATE),
    made_compressed(
        [encoded("jpeg2k", COLOURS, codecformat="j2k", reversible=True, level=0)],
        JPEG2000Lossless,
        48,
        64,
        **PRIVATE,
    ),
    made_compressed([rle([COLOURS[..., index] for index in range(3)])] * 2, RLELossless, 48, 64, **PRIVATE),
    real("examples_palette.dcm")[:40_000],
    real("emri_small.dcm"),
    real("image_dfl.dcm"),
]


def survives(content: bytes) -> None:
    try:
        found = decode_dicom(content, max_pixels=1_000_000, max_frames=4, crop_to_regions=True)
    except InvalidDicomError as error:
        texts = [str(error)]
    else:
        texts = list(found.notices)
        assert 1 <= len(found.frames) <= 4
        assert len({frame.shape for frame in found.frames}) == 1
        assert sum(frame.size for frame in found.frames) <= 3 * 1_000_000
        assert all(frame.dtype == np.uint8 and frame.shape[2] == 3 for frame in found.frames)
    for text in texts:
        assert ALLOWED.fullmatch(text), text
        assert "ZZTOP" not in text


@given(data=st.data())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow])
def test_mutated_files_are_decoded_or_refused(data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(SEEDS)))
    span = data.draw(st.sampled_from([600, 2000, len(content)]))
    start = data.draw(st.sampled_from([0, 132, max(0, len(content) - 4000)]))
    places = st.integers(start, min(start + span, len(content)) - 1)
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=8)):
        content[place] = value
    if data.draw(st.booleans()):
        at, size = data.draw(places), data.draw(st.integers(1, 40))
        inserted = data.draw(st.binary(max_size=40))
        content[at : at + size] = inserted
    survives(bytes(content[: data.draw(st.integers(1, len(content)))] if data.draw(st.booleans()) else content))


@given(content=st.binary(max_size=600), prefix=st.sampled_from([bytes(128) + b"DICM", b"DICM", b"\x08\0\x05\0CS", b""]))
@settings(max_examples=200, deadline=None)
def test_random_bytes_are_decoded_or_refused(content: bytes, prefix: bytes) -> None:
    survives(prefix + content)


LOUD = """
import sys, warnings, logging
logging.basicConfig(level=logging.DEBUG)
from echovlm_ray.vision.dicom import InvalidDicomError, decode_dicom
warnings.simplefilter("always", append=True)
for content in sys.stdin.buffer.read().split(b"=====END====="):
    try:
        print(decode_dicom(content, max_pixels=10**6, max_frames=8, crop_to_regions=True).notices)
    except InvalidDicomError as error:
        print(error)
"""


def test_nothing_of_a_file_is_printed_logged_or_warned_of() -> None:
    marked = [seed.replace(b"MONOCHROME2 ", SECRET.encode()) for seed in SEEDS]
    marked += [seed.replace(b"US\x02\0", b"ZZ\x02\0") for seed in SEEDS]
    marked += [made(picture(48, 64), SpecificCharacterSet=SECRET, BodyPartExamined=SECRET)]
    marked += [
        made(picture(48, 64), WindowCenter=1, WindowWidth=1).replace(b"DS\x02\x001 ", b"DS\x02\0ZZ"),
        made(picture(48, 64), NumberOfFrames=1).replace(b"IS\x02\x001 ", b"IS\x02\0ZZ"),
    ]
    process = subprocess.run(
        [sys.executable, "-c", LOUD], input=b"=====END=====".join(marked), capture_output=True, check=True
    )
    assert b"ZZ" not in process.stdout + process.stderr


def test_decoding_changes_nothing_outside_itself() -> None:
    state = (list(warnings.filters), logging.getLogger().level, np.geterr())
    for seed in SEEDS:
        survives(seed)
    assert (list(warnings.filters), logging.getLogger().level, np.geterr()) == state


def test_pylibjpeg_is_not_needed() -> None:
    code = """
import sys
for name in ("pylibjpeg", "libjpeg", "openjpeg", "rle", "gdcm", "jpeg_ls"):
    sys.modules[name] = None
from echovlm_ray.vision.dicom import decode_dicom
from tests.vision.dicom_samples import encoded, REAL, real
for name in (*REAL, "JPGExtended.dcm", "JPEG-lossy.dcm", "JPEG-LL.dcm", "MR2_J2KR.dcm"):
    decode_dicom(real(name), max_pixels=10**8, max_frames=2, crop_to_regions=True)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("items", [300_000])
def test_a_crowd_of_empty_fragments_is_refused(items: int) -> None:
    content = made_compressed([b"\0\0"], JPEGBaseline8Bit, 48, 64)
    start = content.index(b"\xe0\x7f\x10\0OB") + 12
    with pytest.raises(InvalidDicomError, match="more fragments"):
        decode_dicom(
            content[:start] + b"\xfe\xff\0\xe0\0\0\0\0" * items, max_pixels=10**6, max_frames=8, crop_to_regions=True
        )
