"""The attributes of a DICOM image that describe its pixels (DICOM PS3.3 C.7.6.3), checked and corrected.

Attributes may be missing or contradict each other and the pixel data. Where one sensible reading is left, it is taken
and named in a notice; where none is, the file is refused by the names of the attributes.
"""

from dataclasses import dataclass, replace

from pydicom import Dataset

from echovlm_ray.vision.dicom.attributes import has, integer, word
from echovlm_ray.vision.dicom.errors import InvalidDicomError

MONOCHROME = frozenset(("MONOCHROME1", "MONOCHROME2"))
YBR = frozenset(
    (
        "YBR_FULL",
        "YBR_FULL_422",
        "YBR_PARTIAL_422",
        "YBR_PARTIAL_420",
        "YBR_ICT",
        "YBR_RCT",
    )
)
SUBSAMPLED = frozenset(("YBR_FULL_422", "YBR_PARTIAL_422"))
ONE_SAMPLE = MONOCHROME | {"PALETTE COLOR"}
KNOWN = ONE_SAMPLE | YBR | {"RGB"}
_BITS_ALLOCATED = (1, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class PixelHeader:
    """The attributes of the Image Pixel module; None where one is missing or impossible.

    Attributes:
        rows: height, pixels.
        columns: width, pixels.
        samples: values of a pixel.
        allocated: bits that a value takes in native pixel data.
        stored: bits of it that count.
        high_bit: the highest of these, from 0.
        signed: whether values are two's complement.
        planar: 0 for colours by pixel, 1 for colours by plane.
        photometric: Photometric Interpretation.
        frames: Number of Frames.
    """

    rows: int | None
    columns: int | None
    samples: int | None
    allocated: int | None
    stored: int | None
    high_bit: int | None
    signed: bool
    planar: int | None
    photometric: str
    frames: int | None


@dataclass(frozen=True, slots=True)
class FrameLayout:
    """`PixelHeader` once it has been settled what the frames of an object are.

    Attributes:
        rows, columns, samples: of each frame.
        allocated: bits that a value takes.
        stored, high_bit, signed: which of them count, as in `PixelHeader`.
        photometric: one of the defined terms.
    """

    rows: int
    columns: int
    samples: int
    allocated: int
    stored: int
    high_bit: int
    signed: bool
    photometric: str

    @property
    def value_bytes(self) -> int:
        """Bytes of one value, decoded."""
        return max(1, self.allocated // 8)

    @property
    def decoded_bytes(self) -> int:
        """Bytes of one frame, decoded."""
        return self.rows * self.columns * self.samples * self.value_bytes


def read_header(dataset: Dataset, notices: list[str]) -> PixelHeader:
    """The attributes as they are; an impossible value counts as missing."""
    photometric = word(dataset, "PhotometricInterpretation").replace("_COLOR", " COLOR")
    if photometric and photometric not in KNOWN:
        raise InvalidDicomError(
            "has a Photometric Interpretation (0028,0004) that is not accepted; convert it to MONOCHROME2, RGB, "
            "YBR_FULL or PALETTE COLOR"
        )
    representation = _within(dataset, "PixelRepresentation", 0, 1)
    if representation is None:
        notices.append(f"{_absent(dataset, 'PixelRepresentation')}; its values are read as unsigned")
    return PixelHeader(
        rows=_within(dataset, "Rows", 1, 65535),
        columns=_within(dataset, "Columns", 1, 65535),
        samples=_within(dataset, "SamplesPerPixel", 1, 4),
        allocated=_within(dataset, "BitsAllocated", 1, 64),
        stored=_within(dataset, "BitsStored", 1, 64),
        high_bit=_within(dataset, "HighBit", 0, 63),
        signed=representation == 1,
        planar=_within(dataset, "PlanarConfiguration", 0, 1),
        photometric=photometric,
        frames=_within(dataset, "NumberOfFrames", 1, 2**31),
    )


_NAMES = {
    "PixelRepresentation": "Pixel Representation (0028,0103)",
    "PlanarConfiguration": "Planar Configuration (0028,0006)",
    "NumberOfFrames": "Number of Frames (0028,0008)",
}


def _absent(dataset: Dataset, keyword: str) -> str:
    return f"has {'a wrong' if has(dataset, keyword) else 'no'} {_NAMES[keyword]}"


def absent_frames(dataset: Dataset) -> str:
    """The start of a notice about a missing or invalid Number of Frames."""
    return _absent(dataset, "NumberOfFrames")


def _within(dataset: Dataset, keyword: str, low: int, high: int) -> int | None:
    value = integer(dataset, keyword)
    return value if value is not None and low <= value <= high else None


def settled_colours(header: PixelHeader, samples: int, has_palette: bool, notices: list[str]) -> str:
    """The photometric interpretation of frames that have `samples` values a pixel."""
    photometric = header.photometric
    if samples == 1:
        if photometric in ONE_SAMPLE:
            return photometric
        taken = "PALETTE COLOR" if has_palette else "MONOCHROME2"
    else:
        if photometric and photometric not in ONE_SAMPLE:
            return photometric
        taken = "RGB"
    what = "has no" if not photometric else "has, for frames of another number of samples, a wrong"
    notices.append(f"{what} Photometric Interpretation (0028,0004); its pixels are taken as {taken}")
    return taken


def settled_bits(layout: FrameLayout, header: PixelHeader, notices: list[str]) -> FrameLayout:
    """The layout with bits stored and high bit that fit what is allocated."""
    stored = header.stored
    if stored is None or stored > layout.allocated:
        if header.stored is not None or layout.allocated > 8:
            notices.append(
                f"has {'no' if stored is None else 'more'} Bits Stored (0028,0101)"
                f"{'' if stored is None else ' than it has bits'}; all {layout.allocated} bits are taken"
            )
        stored = layout.allocated
    high_bit = header.high_bit
    if high_bit is None or not stored - 1 <= high_bit < layout.allocated:
        if high_bit is not None:
            notices.append("has a High Bit (0028,0102) that does not fit Bits Stored (0028,0101); Bits Stored is taken")
        high_bit = stored - 1
    return replace(layout, stored=stored, high_bit=high_bit)
