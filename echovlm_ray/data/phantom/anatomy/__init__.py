"""Drawing of the seven regions' anatomy, one module per region."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from echovlm_ray.data.phantom.anatomy import breast, gynaecology, heart, kidney, liver, thyroid, vessel
from echovlm_ray.data.phantom.anatomy.parts import Scene
from echovlm_ray.data.phantom.attributes import Attributes
from echovlm_ray.data.phantom.scan import Optics
from echovlm_ray.data.phantom.schema import Organ


@dataclass(frozen=True, slots=True)
class Anatomy:
    """How a region is scanned and drawn.

    Attributes:
        draw: fills the canvas.
        optics: of the probe.
        compensated: the attenuation that the time-gain compensation assumes, dB/cm/MHz.
        motion: the amplitude of the tissue's motion in a cine loop, by probe and breathing, as shares of the picture.
    """

    draw: Callable[[Scene, Attributes], None]
    optics: Optics
    compensated: float
    motion: float


_SHALLOW = Optics(depth=4.0, frequency=8.0, cycles=3.0, f_number=2.5, focus=2.0)
_DEEP = Optics(depth=15.0, frequency=3.5, cycles=3.0, f_number=2.8, focus=8.0)

ANATOMY: Mapping[Organ, Anatomy] = {
    "breast": Anatomy(breast.draw, _SHALLOW, breast.COMPENSATED, 0.02),
    "gynaecology": Anatomy(gynaecology.draw, Optics(11.0, 4.0, 3.0, 2.2, 6.0), gynaecology.COMPENSATED, 0.02),
    "heart": Anatomy(heart.draw, Optics(15.0, 3.0, 3.0, 2.2, 8.0), heart.COMPENSATED, 0.0),
    "kidney": Anatomy(kidney.draw, Optics(12.0, 3.5, 3.0, 2.2, 6.0), kidney.COMPENSATED, 0.03),
    "liver": Anatomy(liver.draw, _DEEP, liver.COMPENSATED, 0.03),
    "thyroid": Anatomy(thyroid.draw, _SHALLOW, thyroid.COMPENSATED, 0.01),
    "vessel": Anatomy(vessel.draw, _SHALLOW, vessel.COMPENSATED, 0.01),
}
