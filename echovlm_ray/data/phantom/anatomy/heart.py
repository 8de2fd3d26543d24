"""A heart in the apical four-chamber view under a sector probe: apex on top, left ventricle on the right."""

from dataclasses import dataclass

import numpy as np

from echovlm_ray.data.phantom.anatomy.parts import Scene
from echovlm_ray.data.phantom.attributes import Attributes
from echovlm_ray.data.phantom.canvas import Shape, union
from echovlm_ray.data.phantom.tissue import BLOOD, FLUID, HEART, PERICARDIUM, Tissue, solid

COMPENSATED = 0.52
_LUNG = Tissue(HEART.label, -9.0, COMPENSATED)
_MYOCARDIUM = Tissue(HEART.label, 0.0, COMPENSATED)
_CAVITY = Tissue(BLOOD.label, BLOOD.echo, COMPENSATED)
_EFFUSION = Tissue(FLUID.label, FLUID.echo, COMPENSATED)
# How much narrower the ventricles are at the end of systole.
_CONTRACTION = 0.12
_THIN_WALL = 0.018


@dataclass(frozen=True, slots=True)
class _Chamber:
    """An ellipse: centre and radii, and how far it is turned."""

    x: float
    z: float
    rx: float
    rz: float
    turned: float = 0.0

    def on(self, scene: Scene, more: float = 0.0, narrowed: float = 1.0) -> Shape:
        """Its shape, wider by a wall or narrowed by a beat."""
        canvas = scene.canvas
        return canvas.blob(self.x, self.z, (self.rx + more) * narrowed, self.rz + more, self.turned)


@dataclass(frozen=True, slots=True)
class _Heart:
    """The chambers, and the thickness of the left ventricle's wall and of the fluid around the heart."""

    left: _Chamber
    right: _Chamber
    left_atrium: _Chamber
    right_atrium: _Chamber
    wall: float
    effusion: float


def draw(scene: Scene, attributes: Attributes) -> None:
    """Draws a heart with these attributes."""
    canvas = scene.canvas
    canvas.fill(canvas.band(-1.0, 2.0), _LUNG)
    canvas.raise_echo(canvas.band(-1.0, 2.0), 3.0 * canvas.noise(scene.rng, 5, 7))
    heart = _measures(scene, attributes)
    _walls(scene, heart)
    narrowed = 1 - _CONTRACTION * float(0.5 - 0.5 * np.cos(2 * np.pi * scene.phase))
    ventricle = heart.left.on(scene, narrowed=narrowed)
    chambers = (
        ventricle,
        heart.right.on(scene, narrowed=narrowed),
        heart.left_atrium.on(scene),
        heart.right_atrium.on(scene),
    )
    for chamber in chambers:
        canvas.fill(chamber, _CAVITY)
        canvas.edge(chamber, 4.0, 0.005, specular=0.5)
    if attributes["thrombus"] == "present":
        _thrombus(scene, heart.left, ventricle)
    for with_valve in (heart.left, heart.right):
        _valve(scene, with_valve)


def _measures(scene: Scene, attributes: Attributes) -> _Heart:
    size = 0.86 if attributes["effusion"] == "large" else 1.0
    wall = scene.between(0.076, 0.084) if attributes["wall"] == "thickened" else scene.between(0.028, 0.032)
    effusion = {
        "absent": 0.0,
        "small": scene.between(0.034, 0.039),
        "large": scene.between(0.085, 0.095),
    }[attributes["effusion"]]
    if attributes["cavity"] == "dilated":
        width, length = scene.between(0.142, 0.152), 0.192
    else:
        width, length = scene.between(0.085, 0.093) * size, 0.188 * size
    middle = scene.between(-0.012, 0.012) + 0.068 + 0.35 * (width - 0.09)
    apex = 0.185 + 0.9 * effusion + wall
    left = _Chamber(middle, apex + length, width, length, 0.05)
    right_width = 0.072 * size
    right = _Chamber(middle - width - wall - right_width, left.z + 0.025, right_width, 0.80 * length, -0.08)
    radius = scene.between(0.118, 0.126) if attributes["atrium"] == "enlarged" else scene.between(0.066, 0.071)
    ring = apex + 2 * length + 0.008
    left_atrium = _Chamber(middle + (0.03 if radius > 0.1 else 0.0), ring + radius * 0.88, radius * 1.08, radius * 0.88)
    right_atrium = _Chamber(right.x - 0.002, ring + 0.058, 0.066, 0.060)
    return _Heart(left, right, left_atrium, right_atrium, wall, effusion)


def _walls(scene: Scene, heart: _Heart) -> None:
    """Muscle and pericardium, with fluid between them where there is an effusion."""
    canvas = scene.canvas

    def outline(around: float, atrial: float) -> Shape:
        return union(
            [
                heart.left.on(scene, heart.wall + around),
                heart.right.on(scene, _THIN_WALL + around),
                _between(heart.left, heart.right).on(scene, around),
                heart.left_atrium.on(scene, _THIN_WALL + atrial),
                heart.right_atrium.on(scene, _THIN_WALL + atrial),
            ]
        )

    sac = outline(heart.effusion, 0.0)
    canvas.fill(sac, _EFFUSION if heart.effusion else _MYOCARDIUM)
    if heart.effusion:
        muscle = outline(0.0, 0.0)
        canvas.fill(muscle, _MYOCARDIUM)
        canvas.edge(muscle, 4.0, 0.003, specular=0.3)
    canvas.edge(sac, PERICARDIUM.echo, 0.007, specular=0.2)
    # The cross in the middle of the heart, where the valves are hung up.
    crux = canvas.blob((heart.left.x + heart.right.x) / 2, heart.left_atrium.z - heart.left_atrium.rz, 0.04, 0.035)
    canvas.fill(crux, _MYOCARDIUM)
    septum = canvas.tube(
        [
            [(heart.left_atrium.x - heart.left_atrium.rx + heart.right_atrium.x + heart.right_atrium.rx) / 2, z]
            for z in (heart.right_atrium.z - 0.06, heart.right_atrium.z + 0.06)
        ],
        [0.014, 0.014],
    )
    canvas.fill(septum, _MYOCARDIUM, within=sac)


def _between(left: _Chamber, right: _Chamber) -> _Chamber:
    """What closes the notch between the ventricles, so that the heart has one outline."""
    return _Chamber(
        (left.x + right.x) / 2 + 0.01, left.z - 0.12 * left.rz, (left.x - right.x) / 2 + 0.03, 0.88 * left.rz
    )


def _thrombus(scene: Scene, left: _Chamber, ventricle: Shape) -> None:
    """A rounded mass that fills the apex, brighter than the muscle."""
    canvas = scene.canvas
    radius = scene.between(0.064, 0.074)
    x = left.x + scene.between(-0.008, 0.008) + 0.05 * left.rz
    mass = canvas.blob(x, left.z - left.rz + 0.85 * radius, 1.05 * radius, radius)
    canvas.fill(mass, solid(9.0, COMPENSATED), within=ventricle)


def _valve(scene: Scene, ventricle: _Chamber) -> None:
    """Two leaflets: closed in a still picture, open in the middle of a cycle."""
    canvas = scene.canvas
    opening = float(0.5 - 0.5 * np.cos(4 * np.pi * scene.phase))
    ring, reach = ventricle.z + 0.93 * ventricle.rz, 0.8 * ventricle.rx
    for side in (-1.0, 1.0):
        hinge = [ventricle.x + side * reach, ring]
        tip = [ventricle.x + side * reach * (0.05 + 0.75 * opening), ring - 0.025 - 0.04 * opening]
        leaflet = canvas.tube([hinge, tip], [0.005, 0.004])
        canvas.fill(leaflet, Tissue(PERICARDIUM.label, 9.0, COMPENSATED))
