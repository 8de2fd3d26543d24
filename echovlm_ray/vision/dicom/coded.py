"""Frames of compressed pixel data: the codestreams' headers take precedence over the DICOM attributes."""

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import Dataset

from echovlm_ray.vision.codestream import FrameSize, frame_size, is_ended
from echovlm_ray.vision.dicom.colours import CERTAINLY_GREYER, looks_like
from echovlm_ray.vision.dicom.decoders import (
    decode_codestream,
    decode_rle,
    rle_segments,
)
from echovlm_ray.vision.dicom.errors import FrameError, InvalidDicomError
from echovlm_ray.vision.dicom.fragments import Encapsulated, Fragment, group_frames, joined, starts_rle
from echovlm_ray.vision.dicom.header import (
    YBR,
    FrameLayout,
    PixelHeader,
    settled_bits,
    settled_colours,
)

# Encoders work on blocks of this many pixels, and some leave the padding of the last ones in the codestream.
_BLOCK = 16
# OpenJPEG works with four bytes a value.
_JPEG2000_VALUE_BYTES = 4


class CodedFrames:
    """The frames of encapsulated pixel data.

    Attributes:
        layout: of every usable frame.
        count: how many frames there are.
        usable: the indices of those whose headers are sound and that have the common size.
    """

    def __init__(
        self,
        encapsulated: Encapsulated,
        header: PixelHeader,
        extended_offsets: tuple[int, ...],
        has_palette: bool,
        notices: list[str],
    ) -> None:
        """Determines the frames.

        Raises:
            InvalidDicomError: none of them can be decoded.
        """
        self._frames, by_table = group_frames(encapsulated, header.frames, extended_offsets)
        self.count = len(self._frames)
        self._header = header
        self._notices = notices
        claims = [self._claim(fragments) for fragments in self._frames]
        known = Counter(claim for claim in claims if claim is not None)
        if not known:
            raise InvalidDicomError(
                "has compressed pixel data in which no frame starts: it is damaged, or compressed in a way that is not "
                "accepted; convert it to Explicit VR Little Endian, JPEG or JPEG 2000"
            )
        # Most frames of a loop agree; one that does not is damaged.
        claim = known.most_common(1)[0][0]
        self.usable = tuple(index for index, other in enumerate(claims) if other == claim)
        self._rle = claim[0] == "RLE"
        self._samples = claim[3]
        self.layout = self._settled(claim, has_palette, notices)
        self.is_cut_off = not encapsulated.fragments[-1].is_whole
        if self.is_cut_off:
            notices.append("is cut off within its pixel data")
        elif not encapsulated.is_ended:
            notices.append("has no Sequence Delimitation Item behind its pixel data")
        if (encapsulated.offsets or extended_offsets) and not by_table:
            notices.append(
                "has an offset table that is not that of its fragments; where frames start was found from them"
            )
        if encapsulated.has_wrong_lengths:
            notices.append("has a fragment of pixel data whose written length is wrong")

    @property
    def decoded_bytes(self) -> int:
        """Bytes that decoding one frame takes."""
        pixels = self._coded_size[0] * self._coded_size[1] * self._samples
        return pixels * max(self.layout.value_bytes, _JPEG2000_VALUE_BYTES if self._jpeg2000 else 1)

    def _claim(self, fragments: tuple[Fragment, ...]) -> tuple[str, int, int, int, int, bool] | None:
        """Kind, width, height, samples, bits and sign from the frame's header."""
        start = bytes(fragments[0].data[:4096])
        if starts_rle(start):
            segments = rle_segments(start)
            samples, value_bytes = self._rle_shape(segments)
            if self._header.rows is None or self._header.columns is None:
                raise InvalidDicomError(
                    "has no Rows (0028,0010) or no Columns (0028,0011), which RLE frames do not hold themselves"
                )
            return "RLE", self._header.columns, self._header.rows, samples, 8 * value_bytes, False
        size = frame_size(start) or frame_size(joined(fragments))
        if size is None or size.samples not in (1, 3) or not 1 <= size.bits <= 16 or not size.width * size.height:
            return None
        return size.kind, size.width, size.height, size.samples, size.bits, size.signed

    def _rle_shape(self, segments: int) -> tuple[int, int]:
        samples = self._header.samples
        value_bytes = (self._header.allocated or 8) // 8
        if samples in (1, 3) and samples * value_bytes == segments:
            return samples, value_bytes
        return (3, segments // 3) if segments % 3 == 0 else (1, segments)

    def _settled(
        self, claim: tuple[str, int, int, int, int, bool], has_palette: bool, notices: list[str]
    ) -> FrameLayout:
        kind, width, height, samples, bits, signed = claim
        header = self._header
        self._coded_size = (height, width)
        self._jpeg2000 = kind == "JPEG 2000"
        rows, columns = self._settled_size(height, width, notices)
        if header.samples != samples:
            notices.append(
                f"has frames of {samples} samples a pixel, against its Samples per Pixel (0028,0002); the frames decide"
            )
        photometric = settled_colours(header, samples, has_palette, notices)
        allocated = next((size for size in (8, 16, 32, 64) if bits <= size), 64)
        if kind == "RLE" and bits not in (8, 16, 32):
            raise InvalidDicomError(
                "has a number of Bits Allocated (0028,0100) that is not accepted; convert it to 8 or 16 bits"
            )
        layout = FrameLayout(
            rows=rows,
            columns=columns,
            samples=samples,
            allocated=allocated,
            stored=bits,
            high_bit=bits - 1,
            signed=header.signed or signed,
            photometric=photometric,
        )
        # A decoder returns exactly the bits of the frame's header; attributes can only narrow them.
        if kind == "RLE" or (header.stored is not None and header.stored < bits):
            return settled_bits(layout, header, notices)
        return layout

    def _settled_size(self, height: int, width: int, notices: list[str]) -> tuple[int, int]:
        rows, columns = self._header.rows, self._header.columns
        if (rows, columns) == (height, width):
            return height, width
        if rows is not None and columns is not None and 0 <= height - rows < _BLOCK and 0 <= width - columns < _BLOCK:
            notices.append("has frames with some rows or columns more than its attributes say; these are left out")
            return rows, columns
        notices.append(
            "has frames of another size than its Rows (0028,0010) and Columns (0028,0011) say; the frames decide"
        )
        return height, width

    def decode(self, index: int) -> tuple[npt.NDArray[Any], str]:
        """One frame, rows × columns (× 3), and what its three samples are: RGB or YBR_FULL.

        Raises:
            FrameError: it cannot be decoded.
        """
        frame = joined(self._frames[index])
        layout = self.layout
        if self._rle:
            values = decode_rle(frame, layout.rows, layout.columns, layout.samples, layout.value_bytes)
            return values, self._without_marker(values, layout.stored)
        size = frame_size(frame)
        if size is None:
            raise FrameError
        values, colours = self._decoded(frame, size)
        return values[: layout.rows, : layout.columns], colours

    def _decoded(self, frame: bytes, size: FrameSize) -> tuple[npt.NDArray[Any], str]:
        if not is_ended(frame):
            self.is_cut_off = True
            self._notices.append("has a frame without its end marker")
        if size.samples == 1:
            return decode_codestream(frame, size), ""
        labelled = self._labelled
        if size.kind != "JPEG":
            values = decode_codestream(frame, size)
            return values, self._noted(size.colours) if size.colours else self._without_marker(values, size.bits)
        is_ybr = size.colours == "YBR" and (size.certain or labelled == "YBR_FULL")
        if is_ybr and size.bits == 8:
            self._noted("YBR_FULL")
            return decode_codestream(frame, size, reverse_ybr=True), "RGB"
        values = decode_codestream(frame, size)
        stated = "YBR_FULL" if size.colours == "YBR" else size.colours or labelled
        return values, self._noted(stated if size.certain else looks_like(values, size.bits) or stated)

    @property
    def _labelled(self) -> str:
        # Of the transforms of JPEG 2000, decoders return RGB.
        return "YBR_FULL" if self.layout.photometric in YBR - {"YBR_ICT", "YBR_RCT"} else "RGB"

    def _without_marker(self, values: npt.NDArray[Any], bits: int) -> str:
        """The colours of a frame of three samples whose header does not specify them."""
        if values.ndim != 3:
            return ""
        return self._noted(looks_like(values, bits, CERTAINLY_GREYER) or self._labelled)

    def _noted(self, colours: str) -> str:
        if colours != self._labelled:
            self._notices.append(
                "has frames whose colours are not those that its Photometric Interpretation (0028,0004) says; the "
                "frames decide"
            )
        return colours


def extended_offsets(dataset: Dataset) -> tuple[int, ...]:
    """The Extended Offset Table, empty without one or where it cannot be read."""
    try:
        table = dataset.get("ExtendedOffsetTable", None)
        return tuple(int(offset) for offset in np.frombuffer(bytes(table or b""), "<u8"))
    except Exception:
        return ()
