"""One thyroid lobe in transverse section under a linear probe, with trachea, carotid artery and strap muscles."""

import numpy as np

from echovlm_ray.data.phantom.anatomy.parts import Scene, muscle_band, skin
from echovlm_ray.data.phantom.attributes import Attributes
from echovlm_ray.data.phantom.canvas import Shape
from echovlm_ray.data.phantom.tissue import (
    BLOOD,
    CYST,
    GAS,
    MUSCLE,
    SUBCUTANEOUS,
    THYROID,
    THYROID_DIFFUSE,
    VESSEL_WALL,
    Tissue,
    bright,
    solid,
)

COMPENSATED = 1.25
_SMALL, _LARGE = (0.16, 0.19), (0.32, 0.36)


def draw(scene: Scene, attributes: Attributes) -> None:
    """Draws a thyroid lobe with these attributes. The trachea lies towards the other lobe, as the marker has it."""
    canvas = scene.canvas
    canvas.fill(canvas.band(-1.0, 2.0), Tissue(MUSCLE.label, -5.0, COMPENSATED))
    canvas.fill(canvas.band(-1.0, 0.14), Tissue(SUBCUTANEOUS.label, SUBCUTANEOUS.echo, COMPENSATED))
    skin(scene)
    muscle_band(scene, 0.12, 0.235, echo=-9.0)
    muscle_band(scene, 0.84, 0.97, echo=-11.0)
    # The patient's right is on the left of the picture, so the right lobe has the trachea on its right.
    medial = {"right": 1.0, "left": -1.0}[attributes.side] if attributes.side else scene.sign()
    lobe = _lobe(scene, attributes, medial)
    if attributes["lesion"] == "nodule":
        _nodule(scene, attributes, lobe, -0.05 * medial)
    _trachea(scene, medial)
    _carotid(scene, -medial)


def _lobe(scene: Scene, attributes: Attributes, medial: float) -> Shape:
    canvas = scene.canvas
    diffuse = attributes["parenchyma"] == "diffuse"
    roomy = attributes.get("size") == "large" or diffuse
    rx = scene.between(0.29, 0.31) if roomy else scene.between(0.25, 0.28)
    rz = scene.between(0.25, 0.27) if roomy else scene.between(0.20, 0.23)
    shape = canvas.blob(-0.02 * medial, 0.53, rx, rz, waves=scene.waves(0.025))
    isthmus = canvas.tube([[0.1 * medial, 0.37], [0.6 * medial, 0.3]], [0.09, 0.03])
    tissue = THYROID_DIFFUSE if diffuse else THYROID
    for part in (isthmus, shape):
        canvas.fill(part, Tissue(tissue.label, tissue.echo, COMPENSATED))
    if diffuse:
        _septa(scene, shape, rx, rz)
    canvas.edge(shape, 10.0, 0.006, specular=0.5)
    return shape


def _septa(scene: Scene, lobe: Shape, rx: float, rz: float) -> None:
    """Bright fibrous strands through the gland, as in long-standing thyroiditis."""
    canvas, rng = scene.canvas, scene.rng
    canvas.raise_echo(lobe, 2.0 * canvas.noise(rng, 22, 30))
    for _ in range(9):
        x, z = rng.uniform(-0.75, 0.75) * rx, 0.53 + rng.uniform(-0.75, 0.75) * rz
        turn = rng.normal(0, 0.5)
        half = rng.uniform(0.04, 0.09)
        points = [
            [x - half * np.cos(turn), z - half * np.sin(turn)],
            [x + half * np.cos(turn), z + half * np.sin(turn)],
        ]
        canvas.edge(canvas.tube(points, [0.002, 0.002]), 7.0, 0.006, specular=0.0)


def _trachea(scene: Scene, medial: float) -> None:
    """A bright arch of cartilage and air, with a dark, streaked shadow."""
    canvas = scene.canvas
    x = 0.5 * medial
    ring = canvas.blob(x, 0.62, 0.17, 0.25)
    canvas.fill(ring, Tissue(GAS.label, -24.0, COMPENSATED))
    for number in range(4):
        inner = canvas.blob(x, 0.66 + 0.05 * number, 0.145, 0.235)
        canvas.edge(inner, 6.0 - 7.0 * number, 0.008, specular=0.9)
    canvas.edge(ring, 17.0, 0.012, specular=0.6)
    canvas.attenuate(canvas.blob(x, 0.62, 0.16, 0.22), 3.5)


def _carotid(scene: Scene, lateral: float) -> None:
    canvas = scene.canvas
    artery = canvas.blob(0.4 * lateral, scene.between(0.6, 0.66), 0.075, 0.075)
    canvas.fill(artery, Tissue(BLOOD.label, BLOOD.echo, 0.5))
    canvas.edge(artery, VESSEL_WALL.echo + 2, 0.009, specular=0.3)


def _nodule(scene: Scene, attributes: Attributes, lobe: Shape, centre: float) -> None:
    canvas = scene.canvas
    long = scene.between(*(_SMALL if attributes["size"] == "small" else _LARGE)) / 2
    short = long / scene.between(1.3, 1.45)
    taller = attributes["shape"] == "taller"
    rx, rz = (short, long) if taller else (long, short)
    room = 0.02 if attributes["size"] == "large" else 0.09
    x, z = centre + scene.between(-room, room), 0.53 + scene.between(-room, room) * 0.6
    waves = scene.waves(0.02)
    if attributes["margin"] == "irregular":
        waves = ((7, 0.13, scene.between(0, 6)), (4, 0.12, scene.between(0, 6)), (11, 0.06, scene.between(0, 6)))
    shape = canvas.blob(x, z, rx, rz, waves=waves)
    if attributes["composition"] == "cystic":
        canvas.fill(shape, Tissue(CYST.label, CYST.echo, 0.5))
        canvas.edge(shape, 9.0, 0.005)
        _comet_tails(scene, x, z, rx, rz)
    elif attributes["composition"] == "spongiform":
        _sponge(scene, shape, x, z, rx, rz)
    elif attributes["echogenicity"] == "isoechoic":
        canvas.fill(canvas.blob(x, z, rx + 0.02, rz + 0.02, waves=waves), Tissue(THYROID.label, -17.0, COMPENSATED))
        canvas.fill(shape, solid(THYROID.echo, COMPENSATED))
    else:
        canvas.fill(shape, solid(-22.0, COMPENSATED))
        _punctate(scene, x, z, rx, rz)


def _comet_tails(scene: Scene, x: float, z: float, rx: float, rz: float) -> None:
    """Bright spots of colloid, each with a tapering train of echoes behind it."""
    canvas, rng = scene.canvas, scene.rng
    for at in np.linspace(-0.5, 0.5, 3 if rx > 0.12 else 2) + rng.uniform(-0.08, 0.08):
        start_x, start_z = x + at * rx, z + rng.uniform(-0.5, -0.25) * rz
        for step in range(5):
            width, depth = 0.11 * rx * (1 - step / 5.5), start_z + 0.17 * rz * step
            echo = canvas.tube([[start_x - width, depth], [start_x + width, depth]], [0.004, 0.004])
            canvas.fill(echo, bright(14.0 - 3.5 * step, 0.5))


def _sponge(scene: Scene, shape: Shape, x: float, z: float, rx: float, rz: float) -> None:
    """Many small cysts that fill more than half of the nodule, between thin bright walls."""
    canvas, rng = scene.canvas, scene.rng
    canvas.fill(shape, solid(5.0, COMPENSATED))
    pitch = 0.037
    rows = np.arange(-rz, rz + pitch, pitch * 0.87)
    for number, row in enumerate(rows):
        for column in np.arange(-rx, rx + pitch, pitch) + (number % 2) * pitch / 2:
            at_x, at_z = column + rng.normal(0, 0.003), row + rng.normal(0, 0.003)
            if (at_x / rx) ** 2 + (at_z / rz) ** 2 < 0.86:
                cell = canvas.blob(x + at_x, z + at_z, 0.0155, 0.0135)
                canvas.fill(cell, Tissue(CYST.label, -45.0, COMPENSATED), within=None)
    canvas.edge(shape, 9.0, 0.005)


def _punctate(scene: Scene, x: float, z: float, rx: float, rz: float) -> None:
    canvas, rng = scene.canvas, scene.rng
    count = 6 if rz < 0.12 else 12
    turns = np.arange(count) * 2.4 + rng.uniform(0, 6.28)
    away = 0.72 * np.sqrt((np.arange(count) + 0.5) / count)
    for turn, distance in zip(turns, away, strict=True):
        spot = canvas.blob(x + distance * rx * np.cos(turn), z + distance * rz * np.sin(turn), 0.008, 0.0065)
        canvas.fill(spot, bright(21.0, COMPENSATED))
