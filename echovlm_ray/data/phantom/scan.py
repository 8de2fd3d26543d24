"""The geometry of a probe: the position of its samples in the picture, and scan conversion.

Positions are shares of the picture: x from -0.5 (left) to 0.5, z from 0 (top) to 1.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from echovlm_ray.data.phantom.schema import Probe

SAMPLES = 512
LINES = 192
SIZE = 224

Grid = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Optics:
    """A probe's beam. Lengths in cm, frequency in MHz.

    Attributes:
        depth: of the picture.
        frequency: the centre frequency.
        cycles: of a pulse.
        f_number: focal length to aperture.
        focus: depth of the focus.
    """

    depth: float
    frequency: float
    cycles: float
    f_number: float
    focus: float

    @property
    def wavelength(self) -> float:
        """In cm, at 1540 m/s."""
        return 0.154 / self.frequency


@dataclass(frozen=True, slots=True, eq=False)
class Scan:
    """A probe's sampling.

    Attributes:
        x: of each sample, samples × lines, float32, shares of the picture.
        z: likewise.
        range_: of each sample along its line, float32, shares of the picture.
        spacing: between lines at each sample's range, float32, likewise.
        step: between samples along a line, likewise.
        apex: z of the point in which the lines of a convex or sector probe meet; None for a linear probe.
        angle: between the middle and the outermost line, radians; 0 for a linear probe.
        first: range of the first samples, shares of the picture.
        inside: the field of view in the picture, 224 × 224, bool.
        corners: the four samples around each inside pixel, 4 × pixels, flat indices.
        weights: of those, 4 × pixels, float32.
        nearest: the sample nearest to each inside pixel, flat indices.
    """

    x: Grid
    z: Grid
    range_: Grid
    spacing: Grid
    step: float
    apex: float | None
    angle: float
    first: float
    inside: npt.NDArray[np.bool_]
    corners: npt.NDArray[np.intp]
    weights: npt.NDArray[np.float32]
    nearest: npt.NDArray[np.intp]

    def picture(self, values: Grid) -> Grid:
        """Scan conversion, bilinear: samples × lines to 224 × 224, zero outside."""
        flat = values.reshape(-1)
        picture = np.zeros(self.inside.shape, dtype=np.float32)
        picture[self.inside] = np.einsum("cp,cp->p", flat[self.corners], self.weights)
        return picture

    def labels(self, labels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Scan conversion to the nearest sample."""
        picture = np.zeros(self.inside.shape, dtype=np.uint8)
        picture[self.inside] = labels.reshape(-1)[self.nearest]
        return picture

    def window(self, x: float, z: float, reach: float) -> tuple[slice, slice]:
        """Slices of samples and lines that include all samples within `reach` of a point."""
        if self.apex is None:
            return (
                _slice((z - reach - self.first) / self.step, (z + reach - self.first) / self.step, SAMPLES),
                _slice((x - reach + 0.5) * (LINES - 1), (x + reach + 0.5) * (LINES - 1), LINES),
            )
        distance = float(np.hypot(x, z - self.apex))
        rows = _slice((distance - reach - self.first) / self.step, (distance + reach - self.first) / self.step, SAMPLES)
        if distance <= reach:
            return rows, slice(0, LINES)
        centre, half = np.arctan2(x, z - self.apex), np.arcsin(reach / distance)
        scale = (LINES - 1) / (2 * self.angle)
        return rows, _slice((centre - half + self.angle) * scale, (centre + half + self.angle) * scale, LINES)


def _slice(low: float, high: float, count: int) -> slice:
    start = int(np.clip(np.floor(low), 0, count))
    return slice(start, int(np.clip(np.ceil(high) + 1, start, count)))


# Half angle in radians, z of the apex, first and last range of the lines.
_FANS: dict[Probe, tuple[float, float, float, float]] = {
    "convex": (0.48, -0.115, 0.17, 1.06),
    "sector": (0.64, 0.04, 0.015, 0.835),
}


@cache
def scan_of(probe: Probe) -> Scan:
    """The sampling of a probe; cached."""
    pixel = (np.arange(SIZE, dtype=np.float64) + 0.5) / SIZE
    picture_x, picture_z = np.meshgrid(pixel - 0.5, pixel)
    if probe == "linear":
        first, last, angle, apex = 0.0, 1.0, 0.0, None
        line = np.linspace(-0.5, 0.5, LINES)
        range_ = np.linspace(first, last, SAMPLES)
        x, z = np.broadcast_to(line, (SAMPLES, LINES)), np.broadcast_to(range_[:, None], (SAMPLES, LINES))
        spacing = np.full((SAMPLES, LINES), 1 / (LINES - 1))
        at_line, at_range = (picture_x + 0.5) * (LINES - 1), picture_z
    else:
        angle, apex, first, last = _FANS[probe]
        angles = np.linspace(-angle, angle, LINES)
        range_ = np.linspace(first, last, SAMPLES)
        x, z = range_[:, None] * np.sin(angles), apex + range_[:, None] * np.cos(angles)
        spacing = np.broadcast_to(range_[:, None] * (2 * angle / (LINES - 1)), (SAMPLES, LINES))
        at_line = (np.arctan2(picture_x, picture_z - apex) + angle) / (2 * angle) * (LINES - 1)
        at_range = np.hypot(picture_x, picture_z - apex)
    step = (last - first) / (SAMPLES - 1)
    at_sample = (at_range - first) / step
    inside = (at_sample >= 0) & (at_sample <= SAMPLES - 1) & (at_line >= 0) & (at_line <= LINES - 1)
    corners, weights = _bilinear(at_sample[inside], at_line[inside])
    return Scan(
        x=np.ascontiguousarray(x, dtype=np.float32),
        z=np.ascontiguousarray(z, dtype=np.float32),
        range_=np.ascontiguousarray(np.broadcast_to(range_[:, None], (SAMPLES, LINES)), dtype=np.float32),
        spacing=np.ascontiguousarray(spacing, dtype=np.float32),
        step=step,
        apex=apex,
        angle=angle,
        first=first,
        inside=inside,
        corners=corners,
        weights=weights,
        nearest=np.take_along_axis(corners, weights.argmax(axis=0)[None], axis=0)[0],
    )


def _bilinear(
    sample: npt.NDArray[np.float64], line: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float32]]:
    row = np.clip(sample.astype(np.intp), 0, SAMPLES - 2)
    column = np.clip(line.astype(np.intp), 0, LINES - 2)
    down, right = sample - row, line - column
    start = row * LINES + column
    corners = np.stack([start, start + 1, start + LINES, start + LINES + 1])
    weights = np.stack([(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right])
    return corners, weights.astype(np.float32)
