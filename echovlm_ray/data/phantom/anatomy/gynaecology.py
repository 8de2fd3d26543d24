"""Uterus and one adnexa under a convex probe."""

import numpy as np

from echovlm_ray.data.phantom.anatomy.parts import Scene, wall_layers
from echovlm_ray.data.phantom.attributes import Attributes
from echovlm_ray.data.phantom.canvas import Shape
from echovlm_ray.data.phantom.tissue import (
    CYST,
    ENDOMETRIUM,
    FLUID,
    GROUND_GLASS,
    MUSCLE,
    OVARY,
    UTERUS,
    Tissue,
    solid,
)

COMPENSATED = 0.70
_SURROUNDINGS = Tissue(MUSCLE.label, 1.0, COMPENSATED)


def draw(scene: Scene, attributes: Attributes) -> None:
    """Draws uterus and adnexa with these attributes."""
    canvas = scene.canvas
    canvas.fill(canvas.band(-1.0, 2.0), _SURROUNDINGS)
    canvas.raise_echo(canvas.band(-1.0, 2.0), 2.5 * canvas.noise(scene.rng, 5, 8))
    wall_layers(scene, 0.075)
    side = scene.sign()
    if attributes["lesion"] == "myometrial":
        _uterus_with_leiomyoma(scene, attributes, side)
    elif attributes["lesion"] == "cyst":
        diameter = scene.diameter(attributes["size"])
        x = side * min(0.15, 0.325 - diameter / 2)
        _uterus(scene, x - side * (diameter / 2 + 0.175), 0.46, side, scale=0.95)
        _cyst(scene, attributes, side, x, diameter)
    else:
        _uterus(scene, -side * 0.09, 0.46, side, scale=1.1)
        _ovary(scene, side * 0.25, 0.58)


def _uterus(scene: Scene, x: float, z: float, side: float, scale: float) -> Shape:
    """Pear-shaped and mid-grey, with the bright stripe of the endometrium in a dark halo."""
    canvas = scene.canvas
    tilt = 0.25 * side
    body = canvas.blob(x, z, 0.2 * scale, 0.125 * scale, tilt, ((1, 0.08, 0.0), (2, 0.05, 1.0)))
    canvas.fill(body, Tissue(UTERUS.label, UTERUS.echo - 3, COMPENSATED))
    canvas.edge(body, 7.0, 0.007, specular=0.5)
    canvas.fill(canvas.blob(x, z, 0.135 * scale, 0.036 * scale, tilt), Tissue(UTERUS.label, -14.0, COMPENSATED))
    canvas.fill(canvas.blob(x, z, 0.125 * scale, 0.021 * scale, tilt), ENDOMETRIUM)
    return body


def _ovary(scene: Scene, x: float, z: float) -> None:
    """Dark, with a few small round follicles."""
    canvas, rng = scene.canvas, scene.rng
    ovary = canvas.blob(x, z, 0.1, 0.072, scene.between(-0.3, 0.3))
    canvas.fill(ovary, Tissue(OVARY.label, OVARY.echo, COMPENSATED))
    canvas.edge(ovary, 5.0, 0.005)
    for turn in np.linspace(0, 2 * np.pi, 5, endpoint=False) + rng.uniform(0, 1):
        follicle = canvas.blob(x + 0.06 * np.cos(turn), z + 0.042 * np.sin(turn), 0.017, 0.017)
        canvas.fill(follicle, Tissue(FLUID.label, FLUID.echo, 0.5))


def _cyst(scene: Scene, attributes: Attributes, side: float, x: float, diameter: float) -> None:
    canvas = scene.canvas
    rx = diameter / 2
    rz = rx * scene.between(0.76, 0.84)
    z = scene.between(0.54, 0.57)
    cyst = canvas.blob(x, z, rx, rz, scene.between(-0.15, 0.15), scene.waves(0.02))
    if attributes["contents"] == "ground_glass":
        canvas.fill(cyst, GROUND_GLASS)
    else:
        canvas.fill(cyst, CYST)
    if attributes["locules"] == "multilocular":
        _septa(scene, cyst, x, z, rx, rz)
    if attributes["solid"] == "present":
        turn = scene.between(-0.5, 0.5) + np.pi / 2 + side * 0.9
        part = canvas.blob(
            x + 0.55 * rx * np.cos(turn), z + 0.55 * rz * np.sin(turn), 0.5 * rx, 0.5 * rz, waves=scene.waves(0.09)
        )
        canvas.fill(part, solid(0.0, 0.4), within=cyst)
    canvas.edge(cyst, 8.0, 0.009, specular=0.4)


def _septa(scene: Scene, cyst: Shape, x: float, z: float, rx: float, rz: float) -> None:
    """Three thin walls that meet inside, so that there are several locules."""
    canvas = scene.canvas
    start = scene.between(0, 2 * np.pi)
    hub = (x + scene.between(-0.12, 0.12) * rx, z + scene.between(-0.12, 0.12) * rz)
    for number in range(5 if rx > 0.1 else 3):
        turn = start + number * 2 * np.pi / (5 if rx > 0.1 else 3)
        end = (x + 1.1 * rx * np.cos(turn), z + 1.1 * rz * np.sin(turn))
        septum = canvas.tube([hub, end], [0.006, 0.006])
        canvas.fill(septum, Tissue(CYST.label, 6.0, 0.1), within=cyst)


def _uterus_with_leiomyoma(scene: Scene, attributes: Attributes, side: float) -> None:
    """A dark, whorled, sharply limited mass, with fan-shaped shadows.

    Intramural it lies within the outline of the uterus, subserosal most of it lies outside.
    """
    canvas = scene.canvas
    radius = scene.diameter(attributes["size"]) / 2
    if attributes["site"] == "intramural":
        x, z = scene.between(-0.03, 0.03), 0.5
        body = canvas.blob(x, z, 0.15 + radius * 0.95, 0.10 + radius * 0.95, waves=scene.waves(0.02))
        canvas.fill(body, Tissue(UTERUS.label, UTERUS.echo + 1, COMPENSATED))
        canvas.edge(body, 7.0, 0.007, specular=0.5)
        mass_x, mass_z = x + side * 0.07, z + 0.03
        stripe = -side * (radius + 0.045) + mass_x
        canvas.fill(
            canvas.tube(
                [[stripe - side * 0.02, z - 0.08 - radius * 0.5], [stripe, z + 0.08 + radius * 0.5]], [0.018] * 2
            ),
            ENDOMETRIUM,
            within=body,
        )
    else:
        x, z = -side * (0.13 + 0.3 * radius), 0.44
        _uterus(scene, x, z, side, scale=0.8)
        mass_x, mass_z = side * (0.10 + 0.15 * radius), 0.52
    mass = canvas.blob(mass_x, mass_z, radius, radius * 0.92, waves=scene.waves(0.02))
    canvas.fill(mass, solid(-15.0, COMPENSATED))
    for share in (0.35, 0.65):
        canvas.edge(canvas.blob(mass_x, mass_z, radius * share, radius * 0.92 * share), -4.0, 0.006, specular=0.0)
    canvas.edge(mass, 8.0, 0.008, specular=0.5)
    _striped_shadows(scene, mass_x, mass_z, radius)


def _striped_shadows(scene: Scene, x: float, z: float, radius: float) -> None:
    canvas = scene.canvas
    for share in (-0.62, 0.0, 0.62):
        focus = canvas.blob(x + share * radius, z, 0.15 * radius, 0.5 * radius)
        canvas.attenuate(focus, COMPENSATED + 0.30 / radius)
