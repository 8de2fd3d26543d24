"""A kidney in long section under a convex probe."""

import numpy as np

from echovlm_ray.data.phantom.anatomy.parts import Scene, wall_layers
from echovlm_ray.data.phantom.attributes import Attributes
from echovlm_ray.data.phantom.canvas import Shape
from echovlm_ray.data.phantom.tissue import (
    CYST,
    FASCIA,
    FLUID,
    KIDNEY,
    LIVER,
    MUSCLE,
    PYRAMID,
    SINUS,
    STONE,
    Tissue,
    bright,
)

COMPENSATED = 0.80
_URINE = Tissue(CYST.label, FLUID.echo, 0.05)


def draw(scene: Scene, attributes: Attributes) -> None:
    """Draws a kidney with these attributes."""
    canvas = scene.canvas
    canvas.fill(canvas.band(-1.0, 2.0), Tissue(MUSCLE.label, -3.0, COMPENSATED))
    canvas.fill(canvas.band(-1.0, 0.36), Tissue(LIVER.label, LIVER.echo, COMPENSATED))
    wall_layers(scene, 0.10)
    for height in (0.84, 0.90):
        line = canvas.tube([[-0.45, height], [0.45, height + scene.between(-0.03, 0.03)]], [0.004, 0.004])
        canvas.edge(line, 3.0, 0.012, specular=0.3)
    tilt = scene.between(-0.14, 0.14)
    place = _Place(scene.between(-0.02, 0.02), scene.between(0.50, 0.53), tilt)
    kidney = _parenchyma(scene, place)
    collecting = attributes["collecting"]
    if collecting == "not_dilated":
        _sinus(scene, place)
    elif collecting == "mild":
        _sinus(scene, place)
        _mild(scene, place)
    else:
        _marked(scene, place, kidney)
    if attributes["lesion"] == "stone":
        _stone(scene, attributes["size"], place)
    elif attributes["lesion"] == "focal":
        _focal(scene, attributes, place)


class _Place:
    """The kidney's own axes in the picture."""

    def __init__(self, x: float, z: float, tilt: float) -> None:
        self.x, self.z, self.tilt = x, z, tilt

    def at(self, along: float, across: float) -> tuple[float, float]:
        """A point of the kidney's axes in the picture."""
        cosine, sine = float(np.cos(self.tilt)), float(np.sin(self.tilt))
        return self.x + along * cosine - across * sine, self.z + along * sine + across * cosine


def _parenchyma(scene: Scene, place: _Place) -> Shape:
    canvas = scene.canvas
    fat = canvas.blob(place.x, place.z, 0.365, 0.195, place.tilt)
    canvas.fill(fat, Tissue(SINUS.label, 3.0, COMPENSATED))
    kidney = canvas.blob(place.x, place.z, 0.345, 0.175, place.tilt)
    canvas.fill(kidney, Tissue(KIDNEY.label, KIDNEY.echo, COMPENSATED))
    canvas.edge(kidney, FASCIA.echo, 0.007, specular=0.5)
    for turn in np.linspace(0, 2 * np.pi, 11, endpoint=False) + scene.between(0, 0.5):
        x, z = place.at(0.265 * np.cos(turn), 0.112 * np.sin(turn))
        canvas.fill(canvas.blob(x, z, 0.03, 0.026, turn), Tissue(PYRAMID.label, PYRAMID.echo, COMPENSATED))
    return kidney


def _sinus(scene: Scene, place: _Place) -> None:
    canvas = scene.canvas
    sinus = canvas.blob(place.x, place.z, 0.215, 0.068, place.tilt, scene.waves(0.06))
    canvas.fill(sinus, Tissue(SINUS.label, SINUS.echo, COMPENSATED))


def _mild(scene: Scene, place: _Place) -> None:
    """A dilated pelvis with short branches to some calyces, in a sinus that still is bright around it."""
    canvas = scene.canvas
    pelvis = canvas.blob(*place.at(0, 0.0), 0.085, 0.034, place.tilt)
    canvas.fill(pelvis, _URINE)
    for along, across in ((-0.15, -0.022), (-0.11, 0.035), (0.15, -0.022), (0.11, 0.035)):
        branch = canvas.tube([place.at(0.0, 0.0), place.at(along, across)], [0.012, 0.017])
        canvas.fill(branch, _URINE)


def _marked(scene: Scene, place: _Place, kidney: Shape) -> None:
    """Calyces like a hand of balloons around a wide pelvis; only a rim of parenchyma is left."""
    canvas, rng = scene.canvas, scene.rng
    parts = [(0.0, 0.01, 0.19, 0.088)]
    for along, across, radius in (
        (-0.235, 0.0, 0.08),
        (0.235, 0.0, 0.08),
        (-0.14, -0.07, 0.075),
        (0.0, -0.085, 0.07),
        (0.14, -0.07, 0.075),
        (-0.14, 0.07, 0.075),
        (0.0, 0.085, 0.07),
        (0.14, 0.07, 0.075),
    ):
        parts.append((along + rng.normal(0, 0.006), across, radius, radius))
    for along, across, rx, rz in parts:
        calyx = canvas.blob(*place.at(along, across), rx, rz, place.tilt)
        canvas.edge(calyx, 6.0, 0.010, specular=0.0)
    for along, across, rx, rz in parts:
        canvas.fill(canvas.blob(*place.at(along, across), rx - 0.005, rz - 0.005, place.tilt), _URINE, within=kidney)


def _stone(scene: Scene, size: str, place: _Place) -> None:
    """A bright cap with a clean shadow behind it."""
    canvas = scene.canvas
    radius = scene.between(0.020, 0.024) if size == "small" else scene.between(0.045, 0.052)
    x, z = place.at(scene.between(-0.11, 0.11), scene.between(-0.01, 0.015))
    canvas.fill(canvas.blob(x, z, radius, radius * 0.7), Tissue(STONE.label, STONE.echo, COMPENSATED))
    canvas.attenuate(canvas.blob(x, z + radius * 0.5, radius, radius * 0.2), STONE.attenuation * 2)


def _focal(scene: Scene, attributes: Attributes, place: _Place) -> None:
    canvas = scene.canvas
    radius = scene.between(0.055, 0.065) if attributes["size"] == "small" else scene.between(0.105, 0.12)
    side = scene.sign()
    across = -0.115 if attributes["size"] == "small" else -0.125
    along = scene.between(0.13, 0.18) if attributes["size"] == "small" else scene.between(0.05, 0.09)
    x, z = place.at(side * along, across + scene.between(-0.01, 0.01))
    shape = canvas.blob(x, z, radius, radius * 0.95, waves=scene.waves(0.02))
    if attributes["echo"] == "anechoic":
        canvas.fill(shape, CYST)
        canvas.edge(shape, 10.0, 0.006)
    else:
        canvas.fill(shape, bright(13.0, COMPENSATED))
