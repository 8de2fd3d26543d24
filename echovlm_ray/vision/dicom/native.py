"""Frames of pixel data that are not compressed (DICOM PS3.5 8.2): as many as there are bytes for."""

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from echovlm_ray.vision.dicom.colours import CERTAINLY_GREYER, looks_like
from echovlm_ray.vision.dicom.errors import FrameError, InvalidDicomError
from echovlm_ray.vision.dicom.fragments import Encapsulated, joined, starts_frame
from echovlm_ray.vision.dicom.header import (
    ONE_SAMPLE,
    SUBSAMPLED,
    YBR,
    FrameLayout,
    PixelHeader,
    settled_bits,
    settled_colours,
)
from echovlm_ray.vision.dicom.parsing import PixelElement

_ALLOCATED = (1, 8, 16, 32, 64)
_SIZE_NAMES = (
    "Rows (0028,0010), Columns (0028,0011), Samples per Pixel (0028,0002), Bits Allocated (0028,0100) and "
    "Photometric Interpretation (0028,0004)"
)
# Differences between neighbours must be this much smaller to override the declared layout by plane or by pixel.
_CLEARLY_SMOOTHER = 0.8
# In a smaller picture chance decides.
_SMALLEST_SIDE = 24
# So many values, spread over the first frame, tell enough.
_SAMPLES = 20_000


def uncompressed(encapsulated: Encapsulated, header: PixelHeader) -> bytes | None:
    """The pixel data of fragments with uncompressed frames (PS3.5 A.4.11), or None for other fragments.

    Each frame is a separate fragment, possibly padded to an even length, or all of them are in one.
    """
    if not (header.rows and header.columns and header.allocated):
        return None
    size = header.rows * header.columns * (header.samples or 1) * header.allocated // 8
    lengths = {len(fragment.data) for fragment in encapsulated.fragments}
    if not size or any(starts_frame(bytes(fragment.data[:64])) for fragment in encapsulated.fragments):
        return None
    if lengths <= {size, size + size % 2}:
        return b"".join(fragment.data[:size] for fragment in encapsulated.fragments)
    data = joined(encapsulated.fragments)
    return data if len(data) >= size and len(data) % size in (0, 1) else None


class NativeFrames:
    """The frames of native pixel data.

    Attributes:
        layout: of every frame.
        count: how many frames there are bytes for.
        usable: their indices.
        is_cut_off: whether there are fewer bytes than the frames take.
    """

    def __init__(self, element: PixelElement, header: PixelHeader, has_palette: bool, notices: list[str]) -> None:
        """Determines the frames.

        Raises:
            InvalidDicomError: attributes contradict each other or the number of bytes.
        """
        if header.rows is None or header.columns is None:
            raise InvalidDicomError(
                "has no Rows (0028,0010) or no Columns (0028,0011), without which pixel data that are not compressed "
                "have no shape; export it again"
            )
        self._element = element
        self._header = header
        self._floating = element.keyword != "PixelData"
        available = len(element.rest) if element.length is None else min(element.length, len(element.rest))
        self.layout, self._packed = self._settled(header, available, has_palette, notices)
        available = self._available(available, notices)
        self._data = element.rest[:available]
        self.is_cut_off = self._is_cut_off(available)
        self.count = self._counted(available, notices)
        self.usable = tuple(range(self.count))
        if self.layout.samples > 1 and self.layout.allocated >= 8 and not self._packed:
            self._settle_planes(notices)
        self._colours = self._settled_colours(notices) if self.layout.samples == 3 else ""

    @property
    def decoded_bytes(self) -> int:
        """Bytes that decoding one frame takes."""
        return self.layout.decoded_bytes

    @cached_property
    def _frame_bits(self) -> int:
        return self._bits(self.layout.samples, self.layout.allocated, self._packed)

    def _bits(self, samples: int, allocated: int, packed: bool = False) -> int:
        assert self._header.rows is not None
        assert self._header.columns is not None
        pixels = self._header.rows * self._header.columns
        return pixels * 2 * allocated if packed else pixels * samples * allocated

    def _is_one_frame(self, available: int, bits: int) -> bool:
        return available - -(-bits // 8) in (0, 1)

    def _fits(self, available: int, bits: int) -> bool:
        """Whether the bytes are a whole number of such frames, as many as stated, perhaps with a byte to be even."""
        if self._header.frames is not None:
            expected = -(-bits * self._header.frames // 8)
            return available in (expected, expected + 1)
        return available * 8 >= bits and (bits % 8 != 0 or available % (bits // 8) in (0, 1))

    def _settled(
        self, header: PixelHeader, available: int, has_palette: bool, notices: list[str]
    ) -> tuple[FrameLayout, bool]:
        allocated = self._settled_allocated(header, available, notices)
        samples = self._settled_samples(header, available, allocated, notices)
        if self._bits(samples, allocated) > 8 * available and not self._fits_packed(header, available, samples):
            other = next(
                (
                    (other_samples, other_bits)
                    for other_samples, other_bits in ((samples, 8), (1, allocated), (1, 8))
                    if other_bits <= allocated and other_samples <= samples
                    if self._fits(available, self._bits(other_samples, other_bits))
                ),
                None,
            )
            if other is not None and other != (samples, allocated):
                samples, allocated = other
                notices.append(
                    f"has less pixel data than its attributes say; {samples} samples of {allocated} bits are read"
                )
        if samples == 1 and header.photometric and header.photometric not in ONE_SAMPLE:
            raise InvalidDicomError(
                "has a Photometric Interpretation (0028,0004) that contradicts its Samples per Pixel (0028,0002) and "
                "its pixel data: colours take three samples; correct one of the two"
            )
        photometric = settled_colours(header, samples, has_palette, notices)
        assert header.rows is not None
        assert header.columns is not None
        layout = FrameLayout(
            rows=header.rows,
            columns=header.columns,
            samples=samples,
            allocated=allocated,
            stored=allocated,
            high_bit=allocated - 1,
            signed=header.signed,
            photometric=photometric,
        )
        if not self._floating:
            layout = settled_bits(layout, header, notices)
        return layout, self._settled_packing(layout, available, notices)

    def _settled_allocated(self, header: PixelHeader, available: int, notices: list[str]) -> int:
        if self._floating:
            return 32 if self._element.keyword == "FloatPixelData" else 64
        if header.allocated in _ALLOCATED:
            if header.stored is not None and header.allocated < header.stored <= 16 and header.allocated == 8:
                samples = header.samples or 1
                if self._fits(available, self._bits(samples, 16)):
                    notices.append("has fewer Bits Allocated (0028,0100) than its pixel data have; 16 are taken")
                    return 16
            return header.allocated
        if header.allocated is not None:
            raise InvalidDicomError(
                "has a number of Bits Allocated (0028,0100) that is not accepted; convert it to 8 or 16 bits"
            )
        samples = header.samples or (1 if header.photometric in ONE_SAMPLE or not header.photometric else 3)
        # Bits Stored tells at least how few it cannot be.
        for allocated in (8, 16, 32):
            if allocated >= (header.stored or 1) and self._fits(available, self._bits(samples, allocated)):
                notices.append(f"has no Bits Allocated (0028,0100); its pixel data fit {allocated} bits")
                return allocated
        raise InvalidDicomError("has no Bits Allocated (0028,0100), and its pixel data fit neither 8 nor 16 bits")

    def _settled_samples(self, header: PixelHeader, available: int, allocated: int, notices: list[str]) -> int:
        if self._floating:
            return 1
        by_photometric = None if not header.photometric else 1 if header.photometric in ONE_SAMPLE else 3
        if header.samples is None:
            samples = by_photometric
            if samples is None:
                is_colour = self._is_one_frame(available, self._bits(3, allocated))
                if header.frames is not None:
                    is_colour = self._fits(available, self._bits(3, allocated))
                samples = 3 if is_colour else 1
            notices.append(f"has no Samples per Pixel (0028,0002); {samples} is taken")
            return samples
        if header.samples not in (1, 3):
            raise InvalidDicomError(
                "has a number of Samples per Pixel (0028,0002) that is not accepted; convert it to 1 or 3"
            )
        if by_photometric in (None, header.samples):
            return header.samples
        candidates = [samples for samples in (by_photometric, header.samples) if samples is not None]
        if header.frames is None:
            # A still is more likely than a loop without Number of Frames.
            candidates.sort(key=lambda samples: not self._is_one_frame(available, self._bits(samples, allocated)))
        for samples in candidates:
            if self._fits(available, self._bits(samples, allocated)):
                if samples != header.samples:
                    notices.append(
                        "has Samples per Pixel (0028,0002) that contradict its Photometric Interpretation (0028,0004); "
                        f"its pixel data have {samples}"
                    )
                return samples
        return header.samples

    def _fits_packed(self, header: PixelHeader, available: int, samples: int) -> bool:
        return samples == 3 and header.photometric in YBR and self._fits(available, self._bits(3, 8, packed=True))

    def _settled_packing(self, layout: FrameLayout, available: int, notices: list[str]) -> bool:
        """Whether two pixels share their chroma (PS3.3 C.7.6.3.1.2, YBR_FULL_422)."""
        if layout.samples != 3 or layout.allocated != 8 or layout.photometric not in YBR or layout.columns % 2:
            return False
        labelled = layout.photometric in SUBSAMPLED
        whole = self._fits(available, self._bits(3, 8))
        packed = self._fits(available, self._bits(3, 8, packed=True))
        if whole == packed:
            return labelled
        if packed != labelled:
            notices.append(
                "has pixel data whose chroma is stored "
                f"{'for two pixels together' if packed else 'for every pixel'}, against its Photometric "
                "Interpretation (0028,0004); the data decide"
            )
        return packed

    def _available(self, available: int, notices: list[str]) -> int:
        """The bytes that are pixels: where the written length is too short, the file itself may have the rest."""
        expected = -(-self._frame_bits * (self._header.frames or 1) // 8)
        if available < expected <= len(self._element.rest):
            notices.append("has pixel data that are longer than their written length; they are read in full")
            return expected
        if self._element.length is not None and self._element.length > len(self._element.rest):
            missing = expected - available
            if missing > 0 or self._element.length - len(self._element.rest) > 1:
                notices.append("is cut off within its pixel data")
        return available

    def _is_cut_off(self, available: int) -> bool:
        if 8 * available < self._frame_bits * (self._header.frames or 1):
            return True
        # Without a number of frames only what is left behind those of a loop tells; behind a still it is padding.
        count, left = divmod(8 * available, self._frame_bits)
        return self._header.frames is None and count > 1 and left >= self._frame_bits // self.layout.rows

    def _counted(self, available: int, notices: list[str]) -> int:
        row_bits = self._frame_bits // self.layout.rows
        count, left = divmod(8 * available, self._frame_bits)
        if left > 0 and self._frame_bits - left < row_bits:
            # A byte or some pixels less than a row: nothing of a picture.
            notices.append("has less than a row too little pixel data; what is missing is shown black")
            count, left = count + 1, 0
        if count == 0:
            raise InvalidDicomError(
                f"has less pixel data than one frame takes: it is cut off, or {_SIZE_NAMES} are not those of its data"
            )
        if left >= row_bits and count != (self._header.frames or 1):
            notices.append("has part of a frame at the end of its pixel data, which is left out")
        return count

    def _settle_planes(self, notices: list[str]) -> None:
        """By plane or by pixel: read the wrong way, neighbours have little to do with each other."""
        labelled = self._header.planar
        values = self._values(0)
        line = self.layout.columns
        if min(self.layout.rows, line) < _SMALLEST_SIDE:
            self._by_plane = labelled == 1
            return
        step = max(1, values.size // _SAMPLES) | 1
        here, next_line, next_pixels = (
            values[shift : values.size - 3 * line + shift : step].astype(np.float32) for shift in (0, line, 3 * line)
        )
        by_plane = float(np.abs(next_line - here).mean())
        by_pixel = float(np.abs(next_pixels - here).mean())
        self._by_plane = labelled == 1
        if by_plane < _CLEARLY_SMOOTHER * by_pixel:
            self._by_plane = True
        elif by_pixel < _CLEARLY_SMOOTHER * by_plane:
            self._by_plane = False
        if labelled is None or self._by_plane != (labelled == 1):
            notices.append(
                f"has {'no' if labelled is None else 'a wrong'} Planar Configuration (0028,0006); its colours are read "
                f"{'by plane' if self._by_plane else 'by pixel'}"
            )

    _by_plane = False

    @cached_property
    def _dtype(self) -> np.dtype[Any]:
        order = "<" if self._element.little_endian else ">"
        kind = "f" if self._floating else "u"
        return np.dtype(f"{order}{kind}{self.layout.value_bytes}")

    @cached_property
    def _bytes(self) -> memoryview:
        if self.layout.allocated > 8 or self._element.little_endian or self._element.vr != "OW":
            return self._data
        # In big endian files bytes of an OW element lie in swapped pairs, if the writer knew.
        written = np.frombuffer(bytes(self._data) + b"\0" * (len(self._data) % 2), np.uint8)
        swapped = written.view("u2").byteswap().view(np.uint8)
        is_swapped = self._roughness(swapped) <= self._roughness(written)
        return memoryview((swapped if is_swapped else written).tobytes())

    def _roughness(self, values: npt.NDArray[np.uint8]) -> float:
        distance = self.layout.samples if self._header.planar != 1 else 1
        sample = values[: _SAMPLES * 10].astype(np.int16)
        return float(np.abs(sample[distance:] - sample[:-distance]).mean()) if len(sample) > distance else 0.0

    def _values(self, index: int) -> npt.NDArray[Any]:
        """The values of a frame as they follow each other, in the machine's byte order."""
        if self.layout.allocated == 1:
            pixels = self._frame_bits
            first, shift = divmod(index * pixels, 8)
            packed = np.frombuffer(self._bytes, np.uint8, offset=first, count=-(-(pixels + shift) // 8))
            return np.unpackbits(packed, bitorder="little")[shift : shift + pixels]
        size = self._frame_bits // 8
        frame = self._bytes[index * size : (index + 1) * size]
        if len(frame) < size:
            frame = memoryview(bytes(frame) + bytes(size - len(frame)))
        values: npt.NDArray[Any] = np.frombuffer(frame, self._dtype)
        return values if values.dtype.isnative else values.astype(values.dtype.newbyteorder("="))

    def decode(self, index: int) -> tuple[npt.NDArray[Any], str]:
        """One frame, rows × columns (× 3), and what its three samples are: RGB, YBR_FULL or YBR_PARTIAL."""
        try:
            values = self._values(index)
        except ValueError:
            raise FrameError from None
        layout = self.layout
        if layout.samples == 1:
            return values.reshape(layout.rows, layout.columns), ""
        return self._pixels(values), self._colours

    def _settled_colours(self, notices: list[str]) -> str:
        """What the three samples are: as labelled, unless the first frame is far greyer when it is read otherwise."""
        labelled = "RGB"
        if self.layout.photometric in YBR - {"YBR_ICT", "YBR_RCT"}:
            labelled = "YBR_PARTIAL" if "PARTIAL" in self.layout.photometric else "YBR_FULL"
        if self.layout.stored != self.layout.allocated or self.layout.signed:
            return labelled
        found = looks_like(self._pixels(self._values(0)), self.layout.stored, CERTAINLY_GREYER)
        if found is None or (found == "RGB") == (labelled == "RGB"):
            return labelled
        notices.append(
            "has pixel data whose colours are not those that its Photometric Interpretation (0028,0004) says; the data "
            "decide"
        )
        return found

    def _pixels(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The values of a frame of three samples, rows × columns × 3."""
        layout = self.layout
        if self._packed:
            return _unpacked(values.reshape(layout.rows, layout.columns // 2, 4))
        if self._by_plane:
            return np.moveaxis(values.reshape(3, layout.rows, layout.columns), 0, -1)
        return values.reshape(layout.rows, layout.columns, 3)


def _unpacked(pairs: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Y Y Cb Cr of two neighbours to three values of each."""
    rows, half, _ = pairs.shape
    pixels = np.empty((rows, half, 2, 3), pairs.dtype)
    pixels[..., 0] = pairs[..., :2]
    pixels[..., 1:] = pairs[..., None, 2:]
    return pixels.reshape(rows, 2 * half, 3)
