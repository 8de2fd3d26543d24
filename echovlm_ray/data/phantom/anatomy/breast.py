"""A breast under a linear probe: skin, fat, the layer of gland, pectoral muscle, chest wall."""

import numpy as np

from echovlm_ray.data.phantom.anatomy.parts import Scene, muscle_band, skin
from echovlm_ray.data.phantom.attributes import Attributes
from echovlm_ray.data.phantom.canvas import Shape, lifted, ripple
from echovlm_ray.data.phantom.tissue import BONE, CONNECTIVE, CYST, FAT, GLAND, SUBCUTANEOUS, Tissue, solid

# Attenuation of the layer of gland, which the time-gain compensation is set to.
COMPENSATED = 0.70
_LAYER = (0.17, 0.77)


def draw(scene: Scene, attributes: Attributes) -> None:
    """Draws a breast with these attributes."""
    _tissue(scene, attributes["tissue"])
    if attributes["lesion"] == "mass":
        _mass(scene, attributes)


def _tissue(scene: Scene, kind: str) -> None:
    canvas, rng = scene.canvas, scene.rng
    canvas.fill(canvas.band(-1.0, 2.0), Tissue(SUBCUTANEOUS.label, SUBCUTANEOUS.echo, COMPENSATED))
    top, bottom = (lifted(ripple(rng, 0.015), height) for height in _LAYER)
    layer = canvas.band(top, bottom)
    base = FAT if kind == "fatty" else GLAND
    canvas.fill(layer, Tissue(base.label, -6.0 if kind == "fatty" else base.echo, COMPENSATED))
    if kind == "fibroglandular":
        canvas.raise_echo(layer, 1.2 * canvas.noise(rng, 10, 40))
    elif kind == "mixed":
        patches = canvas.noise(rng, 7, 9)
        canvas.raise_echo(layer, np.where(patches > 0.15, np.float32(-13.0), np.float32(0.0)))
    else:
        _ligaments(scene, *_LAYER, count=8)
    _ligaments(scene, 0.04, _LAYER[0], count=6)
    if kind != "fatty":
        canvas.edge(canvas.band(top, 2.0), 7.0, 0.005)
    skin(scene)
    muscle_band(scene, _LAYER[1] + 0.02, 0.9)
    wall = lifted(ripple(rng, 0.01), 0.93)
    canvas.fill(canvas.band(wall, 2.0), Tissue(BONE.label, -16.0, COMPENSATED))
    canvas.edge(canvas.band(wall, 2.0), 15.0, 0.01)


def _ligaments(scene: Scene, top: float, bottom: float, count: int) -> None:
    """Cooper's ligaments: thin, bright, oblique."""
    canvas = scene.canvas
    for x in np.linspace(-0.5, 0.5, count) + scene.rng.normal(0, 0.04, count):
        lean = scene.sign() * scene.between(0.3, 0.7) * min(bottom - top, 0.45)
        bend = scene.between(-0.05, 0.05)
        points = [[x, top], [x + lean / 2 + bend, (top + bottom) / 2], [x + lean, bottom]]
        canvas.edge(canvas.tube(points, [0.001] * 3), CONNECTIVE.echo + 5, 0.004, specular=0.3)


def _mass(scene: Scene, attributes: Attributes) -> None:
    canvas = scene.canvas
    long = scene.diameter(attributes["size"]) / 2
    short = long / scene.between(1.6, 1.95)
    parallel = attributes["orientation"] == "parallel"
    rx, rz = (long, short) if parallel else (short * 1.12, long)
    middle = scene.between(0.28, 0.33) if attributes["depth"] == "superficial" else scene.between(0.57, 0.62)
    z = float(np.clip(middle, 0.07 + rz, (0.86 if parallel else 0.80) - rz))
    x = scene.between(-0.42 + rx, 0.42 - rx)
    tilt = scene.between(-0.12, 0.12)
    if attributes["margin"] == "spiculated":
        _spiculated(scene, x, z, rx, rz)
        return
    shape = canvas.blob(x, z, rx, rz, tilt, scene.waves(0.03))
    if attributes["echo"] == "anechoic":
        canvas.fill(shape, CYST)
        canvas.edge(shape, 10.0, 0.005)
    elif attributes["echo"] == "complex":
        canvas.fill(shape, CYST)
        _solid_part(scene, shape, x, z, rx, rz)
        canvas.edge(shape, 8.0, 0.007)
    else:
        enhancing = attributes["posterior"] == "enhancement"
        canvas.fill(shape, solid(-14.0, 0.1 if enhancing else COMPENSATED))
        canvas.raise_echo(shape, 1.5 * canvas.noise(scene.rng, 16, 30))
        canvas.edge(shape, 9.0, 0.006)


def _solid_part(scene: Scene, cyst: Shape, x: float, z: float, rx: float, rz: float) -> None:
    """A thick nodule on the wall of a cyst, and a thick septum."""
    canvas = scene.canvas
    side = scene.sign()
    part = canvas.blob(x + side * rx * 0.5, z + rz * 0.25, rx * 0.62, rz * 0.8, waves=scene.waves(0.08))
    canvas.fill(part, solid(-4.0, 0.3), within=cyst)
    lean = scene.between(-0.2, 0.2) * rx
    at = x - side * rx * 0.35
    septum = canvas.tube([[at - lean, z - rz * 1.1], [at + lean, z + rz * 1.1]], [0.011, 0.011])
    canvas.fill(septum, solid(0.0, 0.3), within=cyst)


def _spiculated(scene: Scene, x: float, z: float, rx: float, rz: float) -> None:
    canvas, rng = scene.canvas, scene.rng
    corona = canvas.blob(x, z, rx * 1.08, rz * 1.08, waves=scene.waves(0.1))
    canvas.fill(corona, Tissue(GLAND.label, 6.0, COMPENSATED))
    count = int(rng.integers(11, 15))
    for turn in np.linspace(0, 2 * np.pi, count, endpoint=False) + rng.normal(0, 0.12, count):
        length = scene.between(1.25, 1.6)
        inner = [x + 0.6 * rx * np.cos(turn), z + 0.6 * rz * np.sin(turn)]
        outer = [x + length * rx * np.cos(turn), z + length * rz * np.sin(turn)]
        canvas.fill(canvas.tube([inner, outer], [0.30 * rx, 0.002]), solid(-15.0, COMPENSATED))
        reach = [x + (length + 0.35) * rx * np.cos(turn), z + (length + 0.35) * rz * np.sin(turn)]
        canvas.edge(canvas.tube([outer, reach], [0.001, 0.001]), 9.0, 0.004, specular=0.1)
    core = canvas.blob(
        x, z, rx * 0.85, rz * 0.85, waves=((5, 0.1, scene.between(0, 6)), (8, 0.08, scene.between(0, 6)))
    )
    canvas.fill(core, solid(-13.0, COMPENSATED))
    # Fibrous tissue absorbs; the shadow is as wide as the mass.
    canvas.attenuate(canvas.blob(x, z + 0.1 * rz, rx * 0.9, rz * 0.9), COMPENSATED + 0.19 / rz)
