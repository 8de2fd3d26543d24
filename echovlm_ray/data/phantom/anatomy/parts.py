"""Parts that several regions share: lesion sizes by size class, and the layers under the skin."""

from dataclasses import dataclass

import numpy as np

from echovlm_ray.data.phantom.canvas import Canvas, lifted, ripple
from echovlm_ray.data.phantom.tissue import FASCIA, MUSCLE, SUBCUTANEOUS

# The longest diameter as a share of the picture's width; the gaps keep a share of the pixels from deciding the class.
SIZES = {"small": (0.16, 0.19), "medium": (0.27, 0.31), "large": (0.42, 0.48)}


@dataclass(frozen=True, slots=True)
class Scene:
    """The drawing state: the canvas, the anatomy's random numbers, and the phase of a cine loop.

    Attributes:
        canvas: the samples.
        rng: with the same numbers in every frame of a loop.
        phase: from 0 to 1, of one cycle of motion; 0 for a still picture.
    """

    canvas: Canvas
    rng: np.random.Generator
    phase: float = 0.0

    def between(self, low: float, high: float) -> float:
        """A random number of a range."""
        return float(self.rng.uniform(low, high))

    def sign(self) -> float:
        """-1 or 1."""
        return 1.0 if self.rng.random() < 0.5 else -1.0

    def diameter(self, size: str) -> float:
        """The longest diameter of a lesion of a size class."""
        return self.between(*SIZES[size])

    def waves(self, height: float, count: int = 3) -> tuple[tuple[int, float, float], ...]:
        """Slow waves for an outline that is not quite an ellipse."""
        return tuple((number, self.between(0.3, 1) * height, self.between(0, 6.28)) for number in range(2, 2 + count))


def half_width(scene: Scene, z: float) -> float:
    """Half the width of a convex or sector probe's field of view at a depth."""
    scan = scene.canvas.scan
    assert scan.apex is not None
    return float((z - scan.apex) * np.tan(scan.angle))


def skin(scene: Scene, thickness: float = 0.035) -> None:
    """The skin on top of a linear probe's picture: two bright lines with a darker one between."""
    canvas = scene.canvas
    line = ripple(scene.rng, 0.003)
    canvas.fill(canvas.band(-1.0, lifted(line, thickness)), SUBCUTANEOUS)
    canvas.fill(canvas.band(-1.0, lifted(line, thickness * 0.35)), FASCIA)
    canvas.edge(canvas.band(-1.0, lifted(line, thickness)), FASCIA.echo, 0.006)


def muscle_band(scene: Scene, top: float, bottom: float, echo: float = MUSCLE.echo, wave: float = 0.012) -> None:
    """A muscle along the skin: dark, with bright fibres and a fascia on both sides."""
    canvas, rng = scene.canvas, scene.rng
    upper, lower = ripple(rng, wave), ripple(rng, wave)
    shape = canvas.band(lifted(upper, top), lifted(lower, bottom))
    canvas.fill(shape, MUSCLE)
    canvas.raise_echo(shape, echo - MUSCLE.echo)
    for share in np.linspace(0.2, 0.8, max(2, round((bottom - top) / 0.03))):
        height = top + share * (bottom - top)
        start, slope = scene.between(-0.5, 0.1), scene.between(-0.03, 0.03)
        fibre = canvas.tube([[start, height], [start + scene.between(0.2, 0.5), height + slope]], [0.002, 0.002])
        canvas.edge(fibre, echo + 11, 0.005, specular=0.2)
    canvas.edge(shape, FASCIA.echo - 2, 0.006)


def wall_layers(scene: Scene, depth: float) -> None:
    """Skin, fat and muscle under a convex probe, down to a depth below its face."""
    canvas = scene.canvas
    scan = canvas.scan
    below = scan.range_ - np.float32(scan.first)
    fat = below < depth * 0.55
    wall = below < depth
    for where, tissue in ((wall, MUSCLE), (fat, SUBCUTANEOUS)):
        canvas.echo[where] = tissue.echo
        canvas.attenuation[where] = 0.6
        canvas.labels[where] = tissue.label
    for height in (0.008, depth * 0.3, depth * 0.55, depth * 0.78, depth):
        canvas.echo[np.abs(below - np.float32(height)) < 0.004] = FASCIA.echo - 1
