"""The beam against a simulation of the sound field itself, by pymust (LGPL; not among our dependencies)."""

import numpy as np
import pytest

from echovlm_ray.data.phantom.scan import Optics
from echovlm_ray.data.phantom.speckle import beam_width

pymust = pytest.importorskip("pymust", reason="pip install pymust to compare with a simulated sound field")

FOCUS_CM, F_NUMBER = 2.5, 2.0


def test_the_beam_in_its_focus_is_as_wide_as_a_simulated_one() -> None:
    array = pymust.getparam("L11-5v")
    elements = round(FOCUS_CM / 100 / F_NUMBER / array.pitch)
    array.Nelements = elements
    delays = pymust.txdelay(0.0, FOCUS_CM / 100, array)
    across = np.linspace(-1.5e-3, 1.5e-3, 301)
    pressure, *_ = pymust.pfield(across, np.zeros_like(across), np.full_like(across, FOCUS_CM / 100), delays, array)
    # There and back: the same aperture sends and receives.
    both_ways = np.asarray(pressure).ravel() ** 2
    above_half = across[both_ways >= both_ways.max() / 2]
    simulated_cm = float(above_half[-1] - above_half[0]) * 100
    optics = Optics(4.0, array.fc / 1e6, cycles=3.0, f_number=F_NUMBER, focus=FOCUS_CM)
    assert float(beam_width(np.array([FOCUS_CM]), optics)[0]) == pytest.approx(simulated_cm, rel=0.25)
