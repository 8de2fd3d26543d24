"""Anatomy on a probe's samples: shapes are filled with tissue and get bright edges.

Lengths and positions are shares of the picture, as in `scan`; a signed distance is negative inside.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from echovlm_ray.data.phantom.scan import LINES, SAMPLES, Grid, Scan
from echovlm_ray.data.phantom.tissue import Tissue

Profile = Callable[[Grid], Grid]


@dataclass(frozen=True, slots=True, eq=False)
class Shape:
    """A shape on the samples: the part of the grid that it touches, and the signed distance there."""

    window: tuple[slice, slice]
    distance: Grid

    @property
    def inside(self) -> npt.NDArray[np.bool_]:
        """The samples inside, in the window."""
        return self.distance < 0


class Canvas:
    """Echogenicity, attenuation and labels on the samples of a probe.

    Attributes:
        scan: the probe's samples.
        x: position of each sample, moved with the tissue.
        z: likewise.
        echo: dB, samples × lines.
        attenuation: dB/cm/MHz.
        labels: numbers of `tissue.LABELS`.
    """

    def __init__(self, scan: Scan, background: Tissue, shift: tuple[float, float] = (0.0, 0.0)) -> None:
        self.scan = scan
        self.x, self.z = scan.x - np.float32(shift[0]), scan.z - np.float32(shift[1])
        self._shift = shift
        self.echo: Grid = np.full((SAMPLES, LINES), background.echo, dtype=np.float32)
        self.attenuation: Grid = np.full((SAMPLES, LINES), background.attenuation, dtype=np.float32)
        self.labels: npt.NDArray[np.uint8] = np.full((SAMPLES, LINES), background.label, dtype=np.uint8)

    def blob(
        self,
        x: float,
        z: float,
        rx: float,
        rz: float,
        angle: float = 0.0,
        waves: tuple[tuple[int, float, float], ...] = (),
    ) -> Shape:
        """An ellipse, with waves on its outline where there are any.

        Args:
            x: of its centre.
            z: likewise.
            rx: half its width before it is turned.
            rz: half its height, likewise.
            angle: by which it is turned clockwise, radians.
            waves: number around, height as a share of the radius, phase.
        """
        reach = max(rx, rz) * (1.1 + sum(abs(height) for _, height, _ in waves)) + 0.03
        window = self.scan.window(x + self._shift[0], z + self._shift[1], reach)
        dx, dz = self.x[window] - np.float32(x), self.z[window] - np.float32(z)
        if angle:
            cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
            dx, dz = dx * cosine + dz * sine, dz * cosine - dx * sine
        dx, dz = dx / np.float32(rx), dz / np.float32(rz)
        radius = np.sqrt(dx * dx + dz * dz)
        outline = np.float32(1.0)
        if waves:
            around = np.arctan2(dz, dx)
            for number, height, phase in waves:
                outline = outline + np.float32(height) * np.cos(np.float32(number) * around + np.float32(phase))
        return Shape(window, (radius - outline) * np.float32(min(rx, rz)))

    def tube(self, points: npt.ArrayLike, radii: npt.ArrayLike) -> Shape:
        """A chain of straight pieces.

        Args:
            points: x and z of its points, n × 2.
            radii: half the width at each point.
        """
        path, widths = np.asarray(points, dtype=np.float32), np.asarray(radii, dtype=np.float32)
        centre = (path.min(axis=0) + path.max(axis=0)) / 2
        reach = float(np.hypot(*(path - centre).T).max() + widths.max() + 0.03)
        window = self.scan.window(float(centre[0]) + self._shift[0], float(centre[1]) + self._shift[1], reach)
        distance = np.full(self.x[window].shape, np.float32(1.0), dtype=np.float32)
        for start, end, r0, r1 in zip(path[:-1], path[1:], widths[:-1], widths[1:], strict=True):
            self._piece(distance, window, (start, end), (float(r0), float(r1)))
        return Shape(window, distance)

    def _piece(
        self, distance: Grid, window: tuple[slice, slice], ends: tuple[Grid, Grid], radii: tuple[float, float]
    ) -> None:
        """Lowers the distances in a window to those from one straight piece."""
        (x0, z0), along = ends[0], ends[1] - ends[0]
        middle = (ends[0] + ends[1]) / 2
        reach = float(np.hypot(*along)) / 2 + max(radii) + 0.02
        near = self.scan.window(float(middle[0]) + self._shift[0], float(middle[1]) + self._shift[1], reach)
        part = tuple(
            slice(max(inner.start - outer.start, 0), max(min(inner.stop, outer.stop) - outer.start, 0))
            for inner, outer in zip(near, window, strict=True)
        )
        dx, dz = self.x[window][part] - x0, self.z[window][part] - z0
        share = np.clip((dx * along[0] + dz * along[1]) / np.maximum(along @ along, np.float32(1e-12)), 0, 1)
        dx -= share * along[0]
        dz -= share * along[1]
        away = np.sqrt(dx * dx + dz * dz) - (np.float32(radii[0]) + share * np.float32(radii[1] - radii[0]))
        distance[part] = np.minimum(distance[part], away)

    def band(self, top: Profile | float, bottom: Profile | float) -> Shape:
        """What lies between two lines over the whole width, each a height or a function of x."""
        linear = self.scan.apex is None
        # Under a linear probe x is the same all along a line.
        x = self.x[:1] if linear else self.x
        upper = top(x) if callable(top) else np.float32(top)
        lower = bottom(x) if callable(bottom) else np.float32(bottom)
        rows = slice(0, SAMPLES)
        if linear:
            middle, reach = (np.min(upper) + np.max(lower)) / 2, (np.max(lower) - np.min(upper)) / 2 + 0.03
            rows, _ = self.scan.window(0.0, float(middle) + self._shift[1], max(float(reach), 0.03))
        window = (rows, slice(0, LINES))
        z = self.z[window]
        return Shape(window, np.maximum(upper - z, z - lower))

    def fill(self, shape: Shape, tissue: Tissue, within: Shape | None = None) -> None:
        """Makes the inside of a shape, or what of it lies within another, of one tissue."""
        inside = shape.inside
        if within is not None:
            inside = inside & self._on(within, shape.window)
        np.copyto(self.echo[shape.window], np.float32(tissue.echo), where=inside)
        np.copyto(self.attenuation[shape.window], np.float32(tissue.attenuation), where=inside)
        np.copyto(self.labels[shape.window], np.uint8(tissue.label), where=inside)

    def edge(self, shape: Shape, decibels: float, width: float = 0.006, specular: float = 0.7) -> None:
        """Brightens the outline of a shape up to an echogenicity.

        Args:
            shape: whose outline.
            decibels: of the brightest part.
            width: of the line.
            specular: how much the line fades where it runs along the beam: 0 not at all, 1 entirely.
        """
        distance = shape.distance
        near = np.abs(distance) < width
        if not near.any():
            return
        slope = np.ones_like(distance)
        if distance.shape[0] > 1:
            slope[:-1] = np.minimum(np.abs(np.diff(distance, axis=0)) / np.float32(self.scan.step), 1)
            slope[-1] = slope[-2]
        line = np.float32(decibels) + 20 * np.log10(np.maximum(1 - specular + specular * slope[near], np.float32(0.05)))
        echo = self.echo[shape.window]
        echo[near] = np.maximum(echo[near], line)

    def raise_echo(self, shape: Shape, decibels: Grid | float) -> None:
        """Adds to the echogenicity inside a shape; an array has the shape of the whole grid."""
        inside = shape.inside
        added = decibels[shape.window][inside] if isinstance(decibels, np.ndarray) else np.float32(decibels)
        self.echo[shape.window][inside] += added

    def attenuate(self, shape: Shape, attenuation: float) -> None:
        """Changes the attenuation inside a shape and nothing else."""
        np.copyto(self.attenuation[shape.window], np.float32(attenuation), where=shape.inside)

    def noise(self, rng: np.random.Generator, across: int, down: int) -> Grid:
        """Smooth noise of unit variance over the grid, `across` × `down` cells."""
        cells = rng.standard_normal((down + 3, across + 3)).astype(np.float32)
        rows, columns = _spread(SAMPLES, down + 3), _spread(LINES, across + 3)
        smooth: Grid = (rows @ cells @ columns.T).astype(np.float32, copy=False)
        smooth *= np.float32(1 / max(float(smooth.std()), 1e-6))
        return smooth

    def _on(self, shape: Shape, window: tuple[slice, slice]) -> npt.NDArray[np.bool_]:
        """The inside of a shape, seen in another one's window."""
        whole = np.zeros((SAMPLES, LINES), dtype=np.bool_)
        whole[shape.window] = shape.inside
        return whole[window]


def _spread(count: int, cells: int) -> Grid:
    """Quadratic B-spline weights of `cells` values on `count` samples."""
    at: Grid = np.linspace(1, cells - 2, count, dtype=np.float32)
    away = np.abs(at[:, None] - np.arange(cells, dtype=np.float32))
    weights: Grid = np.where(away < 0.5, 0.75 - away**2, np.where(away < 1.5, 0.5 * (1.5 - away) ** 2, 0)).astype(
        np.float32
    )
    return weights


def union(shapes: Sequence[Shape]) -> Shape:
    """All of the shapes as one, without outlines where they meet."""
    whole = np.full((SAMPLES, LINES), np.float32(1.0), dtype=np.float32)
    for shape in shapes:
        whole[shape.window] = np.minimum(whole[shape.window], shape.distance)
    return Shape((slice(0, SAMPLES), slice(0, LINES)), whole)


def ripple(rng: np.random.Generator, height: float, waves: float = 1.5) -> Profile:
    """A gently waved line around 0, as a function of x."""
    phases = rng.uniform(0, 2 * np.pi, 2)
    shares = rng.uniform(0.4, 1.0, 2)

    def profile(x: Grid) -> Grid:
        slow = np.sin(np.float32(2 * np.pi * waves * shares[0]) * x + np.float32(phases[0]))
        fast = np.sin(np.float32(2 * np.pi * waves * 2.3 * shares[1]) * x + np.float32(phases[1]))
        line: Grid = np.float32(height) * (slow + np.float32(0.4) * fast)
        return line

    return profile


def lifted(profile: Profile, height: float) -> Profile:
    """The line moved down by a height."""
    return lambda x: profile(x) + np.float32(height)
