"""The right lobe of a liver under a convex probe, with hepatic veins, diaphragm and the kidney below it."""

import numpy as np

from echovlm_ray.data.phantom.anatomy.parts import Scene, half_width, wall_layers
from echovlm_ray.data.phantom.attributes import Attributes
from echovlm_ray.data.phantom.canvas import Shape
from echovlm_ray.data.phantom.tissue import (
    BLOOD,
    CYST,
    FAT,
    FLUID,
    GAS,
    KIDNEY,
    LIVER,
    LIVER_CIRRHOTIC,
    LIVER_FATTY,
    SINUS,
    VESSEL_WALL,
    Tissue,
    bright,
    solid,
)

COMPENSATED = 0.50


def draw(scene: Scene, attributes: Attributes) -> None:
    """Draws a liver with these attributes."""
    canvas = scene.canvas
    fatty = attributes["echogenicity"] == "increased"
    coarse = attributes["texture"] == "coarse"
    tissue = LIVER_FATTY if fatty else LIVER_CIRRHOTIC if coarse else LIVER
    canvas.fill(canvas.band(-1.0, 2.0), Tissue(tissue.label, tissue.echo, 0.72 if fatty else COMPENSATED))
    if coarse:
        canvas.raise_echo(canvas.band(-1.0, 2.0), 4.5 * canvas.noise(scene.rng, 22, 30))
    _vessels(scene, fatty)
    if attributes["lesion"] == "focal":
        _focal(scene, attributes)
    _kidney(scene)
    _diaphragm(scene)
    _surface(scene, attributes["surface"] == "nodular", attributes.get("ascites") == "present")


def _surface(scene: Scene, nodular: bool, ascites: bool) -> None:
    """The abdominal wall, and the capsule of the liver under it: a smooth line, or one of bumps."""
    canvas = scene.canvas
    scan = canvas.scan
    wall = 0.085
    below = scan.range_ - np.float32(scan.first)
    around = np.arctan2(scan.x, scan.z - np.float32(scan.apex or 0.0))
    start = scene.between(0, 6.28)
    bumps = np.float32(0.0)
    if nodular:
        bumps = np.float32(0.036) * (np.abs(np.sin(np.float32(15) * around + np.float32(start))) - np.float32(0.5))
    capsule = np.float32(wall + (0.10 if ascites else 0.045)) - bumps
    outside = below < capsule
    filling = FLUID if ascites else FAT
    canvas.echo[outside] = FLUID.echo if ascites else -16.0
    canvas.attenuation[outside] = COMPENSATED
    canvas.labels[outside] = filling.label
    canvas.echo[np.abs(below - capsule) < 0.006] = 13.0
    wall_layers(scene, wall)


def _vessels(scene: Scene, faded: bool) -> None:
    """Hepatic veins without a wall of their own, portal branches with a bright one; a fatty liver hides the walls."""
    canvas = scene.canvas
    lean = scene.between(-0.05, 0.05)
    veins = (
        ([[-0.02 + lean, 0.80], [-0.08 + lean, 0.6], [-0.2 + lean, 0.42]], [0.02, 0.014, 0.006]),
        ([[-0.02 + lean, 0.80], [0.03 + lean, 0.58], [0.06 + lean, 0.36]], [0.02, 0.014, 0.006]),
    )
    for points, radii in veins:
        canvas.fill(canvas.tube(points, radii), Tissue(BLOOD.label, -8.0 if faded else BLOOD.echo, COMPENSATED))
    for x, z in ((-0.17, 0.62), (0.12, 0.45), (-0.04, 0.36)):
        turn = scene.between(-0.4, 0.4)
        points = [
            [x + lean - 0.05 * np.cos(turn), z - 0.05 * np.sin(turn)],
            [x + lean + 0.05 * np.cos(turn), z + 0.05 * np.sin(turn)],
        ]
        branch = canvas.tube(points, [0.011, 0.009])
        canvas.fill(branch, Tissue(BLOOD.label, -6.0 if faded else BLOOD.echo, COMPENSATED))
        if not faded:
            canvas.edge(branch, VESSEL_WALL.echo + 1, 0.007, specular=0.2)


def _kidney(scene: Scene) -> None:
    """The upper half of the right kidney at the lower right: darker than a fatty liver, about as bright as a normal."""
    canvas = scene.canvas
    x, z = 0.27 + scene.between(-0.02, 0.02), 0.70 + scene.between(-0.02, 0.02)
    kidney = canvas.blob(x, z, 0.17, 0.085, -0.5)
    canvas.fill(kidney, Tissue(KIDNEY.label, -7.0, COMPENSATED))
    canvas.fill(canvas.blob(x, z, 0.1, 0.03, -0.5), Tissue(SINUS.label, SINUS.echo, COMPENSATED))
    canvas.edge(kidney, 9.0, 0.006, specular=0.5)


def _diaphragm(scene: Scene) -> None:
    """A bright arc that bounds the liver below, with air behind it."""
    canvas = scene.canvas
    dome = canvas.blob(-0.08, 0.33 + scene.between(-0.02, 0.02), 0.62, 0.57)
    beyond = Shape(dome.window, -dome.distance)
    canvas.fill(beyond, Tissue(GAS.label, -14.0, COMPENSATED))
    canvas.edge(dome, 17.0, 0.012, specular=0.3)


def _focal(scene: Scene, attributes: Attributes) -> None:
    canvas = scene.canvas
    diameter = scene.diameter(attributes["size"])
    rx = diameter / 2
    rz = rx * scene.between(0.84, 0.92)
    middle = scene.between(0.31, 0.34) if attributes["depth"] == "superficial" else scene.between(0.60, 0.63)
    z = float(np.clip(middle, 0.17 + rz, 0.82 - rz))
    # The fan is narrow near the probe.
    room = max(half_width(scene, z) - rx - 0.02, 0.0)
    x = float(np.clip(scene.between(-0.2, 0.06), -room, room))
    shape = canvas.blob(x, z, rx, rz, scene.between(-0.3, 0.3), scene.waves(0.03))
    if attributes["echo"] == "anechoic":
        canvas.fill(shape, CYST)
        canvas.edge(shape, 10.0, 0.006)
    elif attributes["echo"] == "hyperechoic":
        canvas.fill(shape, bright(11.0, COMPENSATED))
    else:
        canvas.fill(shape, solid(-15.0, COMPENSATED))
        canvas.raise_echo(shape, 1.5 * canvas.noise(scene.rng, 14, 20))
