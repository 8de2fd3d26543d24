"""Scatterers to echoes, by the convolution model of the literature (COLE, Gao 2009; Hergum 2009; arXiv 2109.10353).

Random complex scatterers, weighted by the tissue's echogenicity and by what attenuation leaves, convolved with a
Gaussian pulse along the lines and a Gaussian beam across them. In numpy and scipy.
"""

from functools import cache

import numpy as np
import numpy.typing as npt
from scipy import fft

from echovlm_ray.data.phantom.scan import LINES, SAMPLES, Grid, Optics, Scan, scan_of
from echovlm_ray.data.phantom.schema import Probe

Field = npt.NDArray[np.complex64]

# Widening of the beam with the distance from the focus.
_DEFOCUS = 0.25
_SIGMA_OF_FWHM = 1 / 2.3548
# The most that enhancement brightens: displays are adjusted to it.
MAX_ENHANCEMENT_DB = 9.0


def scatterers(rng: np.random.Generator) -> Field:
    """Complex scatterers of unit mean power, samples × lines."""
    parts = rng.standard_normal((SAMPLES, LINES, 2), dtype=np.float32)
    return parts.view(np.complex64)[..., 0] * np.float32(np.sqrt(0.5))


def attenuation_left(attenuation: Grid, compensated: float, optics: Optics, step: float) -> Grid:
    """The attenuation after time-gain compensation: A(z) = 2 f Σ (α - α0) Δz, in dB, positive where echoes are weaker.

    Args:
        attenuation: α, samples × lines, dB/cm/MHz.
        compensated: α0, likewise.
        optics: for depth and frequency.
        step: between samples, as a share of the picture.
    """
    per_sample = np.float32(2 * optics.frequency * step * optics.depth)
    left: Grid = np.cumsum(attenuation - np.float32(compensated), axis=0, dtype=np.float32) * per_sample
    return np.maximum(left, np.float32(-MAX_ENHANCEMENT_DB), out=left)


def envelope(field: Field, decibels: Grid, probe: Probe, optics: Optics) -> Grid:
    """The envelope of the echoes, float32. Where `decibels` is 0 all around, its mean square is 1.

    Args:
        field: scatterers of unit power.
        decibels: echogenicity less attenuation left, samples × lines.
        probe: for the grid.
        optics: for pulse and beam.
    """
    pulse, beam = _transfer(probe, optics)
    scaled = field * np.exp(decibels * np.float32(np.log(10) / 20))
    along = fft.ifft(fft.fft(scaled, axis=0) * pulse[:, None], axis=0)
    strength: Grid = np.abs(fft.ifft(fft.fft(along, axis=1) * beam, axis=1))
    return strength


def beam_width(range_: npt.NDArray[np.float64], optics: Optics) -> npt.NDArray[np.float64]:
    """FWHM of the beam across the lines in cm: √((λF)² + (κ (z - focus) / F)²)."""
    return np.hypot(optics.wavelength * optics.f_number, _DEFOCUS * (range_ - optics.focus) / optics.f_number / 4)


@cache
def _transfer(probe: Probe, optics: Optics) -> tuple[Grid, Grid]:
    """Transfer functions of the pulse (samples) and of the beam (samples × lines), each of unit noise power."""
    scan: Scan = scan_of(probe)
    pulse_sigma = optics.cycles * optics.wavelength / 2 * _SIGMA_OF_FWHM / (scan.step * optics.depth)
    pulse = _gaussian(fft.fftfreq(SAMPLES), np.array([pulse_sigma]))[0]
    range_ = (scan.range_[:, 0].astype(np.float64) - scan.first) * optics.depth
    beam_sigma = beam_width(range_, optics) * _SIGMA_OF_FWHM / (scan.spacing[:, 0] * optics.depth)
    return pulse, _gaussian(fft.fftfreq(LINES), beam_sigma)


def _gaussian(frequency: npt.NDArray[np.float64], sigma: npt.NDArray[np.float64]) -> Grid:
    """One row for each width in samples; the mean square of a row is 1, so that noise keeps its power."""
    response = np.exp(-2 * (np.pi * frequency * sigma[:, None]) ** 2)
    response /= np.sqrt(np.mean(response**2, axis=1, keepdims=True))
    return response.astype(np.float32)
