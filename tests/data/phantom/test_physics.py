"""Speckle, attenuation and beam, against theory."""

import numpy as np
import pytest

from echovlm_ray.data.phantom.anatomy import ANATOMY
from echovlm_ray.data.phantom.regions import REGIONS
from echovlm_ray.data.phantom.scan import LINES, SAMPLES, Grid, Optics, scan_of
from echovlm_ray.data.phantom.schema import ORGANS, Organ
from echovlm_ray.data.phantom.speckle import (
    MAX_ENHANCEMENT_DB,
    attenuation_left,
    beam_width,
    envelope,
    scatterers,
)
from tests.data.phantom.generators import generator

# Mean to standard deviation of a Rayleigh distribution: fully developed speckle (Burckhardt 1978).
RAYLEIGH_SNR = (np.pi / (4 - np.pi)) ** 0.5


def uniform(organ: Organ, seed: int) -> Grid:
    flat = np.zeros((SAMPLES, LINES), dtype=np.float32)
    return envelope(scatterers(generator(seed)), flat, REGIONS[organ].probe, ANATOMY[organ].optics)


@pytest.mark.parametrize("organ", ORGANS)
def test_speckle_of_a_uniform_patch_is_fully_developed(organ: Organ) -> None:
    patches = [uniform(organ, seed)[64:-64, 24:-24] for seed in range(4)]
    ratio = float(np.mean([patch.mean() / patch.std() for patch in patches]))
    assert pytest.approx(1.91, abs=0.01) == RAYLEIGH_SNR
    assert ratio == pytest.approx(1.91, abs=0.1)


@pytest.mark.parametrize("organ", ORGANS)
def test_a_uniform_patch_is_as_bright_at_every_depth(organ: Organ) -> None:
    power = np.mean([uniform(organ, seed)[:, 24:-24] ** 2 for seed in range(8)], axis=(0, 2))
    thirds = [power[part].mean() for part in (slice(20, 170), slice(170, 340), slice(340, 490))]
    assert thirds == pytest.approx([1.0, 1.0, 1.0], abs=0.2)


def test_attenuation_left_over_is_the_formula() -> None:
    optics = Optics(depth=4.0, frequency=5.0, cycles=3.0, f_number=2.0, focus=2.0)
    attenuation = np.full((SAMPLES, LINES), 0.9, dtype=np.float32)
    step = scan_of("linear").step
    left = attenuation_left(attenuation, 0.7, optics, step)
    # A(z) = 2 f (α - α0) z: 2 · 5 MHz · 0.2 dB/cm/MHz · 4 cm = 8 dB at the bottom.
    assert left[-1, 0] == pytest.approx(8.0, rel=0.01)
    assert left[SAMPLES // 2, 0] == pytest.approx(4.0, rel=0.01)


def test_weaker_attenuation_enhances_up_to_a_limit() -> None:
    optics = Optics(depth=10.0, frequency=5.0, cycles=3.0, f_number=2.0, focus=2.0)
    left = attenuation_left(np.zeros((SAMPLES, LINES), dtype=np.float32), 0.7, optics, scan_of("linear").step)
    assert left[10, 0] < 0
    assert left.min() == -MAX_ENHANCEMENT_DB


def test_the_beam_is_narrowest_in_its_focus() -> None:
    optics = Optics(depth=4.0, frequency=7.7, cycles=3.0, f_number=2.0, focus=2.0)
    widths = beam_width(np.array([0.5, 1.0, 2.0, 3.0, 3.5]), optics)
    # λ F in the focus: 0.02 cm · 2.
    assert widths[2] == pytest.approx(0.04)
    assert widths[0] > widths[1] > widths[2] < widths[3] < widths[4]


@pytest.mark.parametrize("organ", ORGANS)
def test_a_point_is_as_wide_as_beam_and_pulse(organ: Organ) -> None:
    probe, optics = REGIONS[organ].probe, ANATOMY[organ].optics
    scan = scan_of(probe)
    field = np.zeros((SAMPLES, LINES), dtype=np.complex64)
    field[300, 96] = 1
    spot = envelope(field, np.zeros((SAMPLES, LINES), dtype=np.float32), probe, optics)
    # The full width at half maximum of a Gaussian is 2.355 standard deviations.
    across, along = spot[300], spot[:, 96]

    def width(profile: Grid, spacing: float) -> float:
        places = np.arange(profile.size)
        # Below this there is only rounding.
        weights = np.where(profile > 1e-3 * profile.max(), profile, 0).astype(np.float64)
        weights /= weights.sum()
        middle = (places * weights).sum()
        return float(2.355 * np.sqrt((((places - middle) ** 2) * weights).sum()) * spacing * optics.depth)

    depth = (scan.range_[300, 0] - scan.first) * optics.depth
    expected = float(beam_width(np.array([depth], dtype=np.float64), optics)[0])
    assert width(across, float(scan.spacing[300, 0])) == pytest.approx(expected, rel=0.05)
    assert width(along, scan.step) == pytest.approx(optics.cycles * optics.wavelength / 2, rel=0.05)


@pytest.mark.parametrize("organ", ORGANS)
def test_scan_conversion_keeps_a_constant(organ: Organ) -> None:
    scan = scan_of(REGIONS[organ].probe)
    picture = scan.picture(np.full((SAMPLES, LINES), 7, dtype=np.float32))
    assert picture[scan.inside] == pytest.approx(7.0, abs=1e-4)
    assert not picture[~scan.inside].any()


@pytest.mark.parametrize("organ", ORGANS)
def test_scan_conversion_puts_samples_where_they_lie(organ: Organ) -> None:
    scan = scan_of(REGIONS[organ].probe)
    rows, columns = np.nonzero(scan.inside)
    assert scan.picture(scan.x)[scan.inside] == pytest.approx((columns + 0.5) / 224 - 0.5, abs=2e-3)
    assert scan.picture(scan.z)[scan.inside] == pytest.approx((rows + 0.5) / 224, abs=2e-3)
