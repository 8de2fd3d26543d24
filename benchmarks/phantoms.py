"""How long a phantom takes on one core, and how close its speckle is to theory: `python -m benchmarks.phantoms`.

Draws phantoms of every class on one thread, and measures the processor's time and not the clock's, so that other work
on the machine does not count. Writes `benchmarks/results/phantoms.md`.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks.machine import describe
from benchmarks.measure_table import table_head
from benchmarks.terminal import progress_of_parts
from echovlm_ray.data.phantom.anatomy import ANATOMY
from echovlm_ray.data.phantom.catalogue import select_classes
from echovlm_ray.data.phantom.phantom import phantom
from echovlm_ray.data.phantom.regions import REGIONS
from echovlm_ray.data.phantom.scan import LINES, SAMPLES
from echovlm_ray.data.phantom.schema import ORGANS, Organ
from echovlm_ray.data.phantom.speckle import envelope, scatterers

RESULT = Path(__file__).resolve().parent / "results" / "phantoms.md"
TARGET_MILLISECONDS = 25.0
RAYLEIGH_SNR = (np.pi / (4 - np.pi)) ** 0.5


def milliseconds(organ: Organ, count: int) -> list[float]:
    """Processor time of each of so many phantoms of a region."""
    classes = select_classes([organ])
    phantom(0, 0, classes=classes)
    times = []
    for index in range(count):
        started = time.thread_time()
        phantom(1, index, classes=classes)
        times.append((time.thread_time() - started) * 1e3)
    return times


def speckle_snr(organ: Organ, patches: int = 4) -> float:
    """Mean to standard deviation of the envelope of uniform tissue."""
    flat = np.zeros((SAMPLES, LINES), dtype=np.float32)
    ratios = []
    for seed in range(patches):
        field = scatterers(np.random.default_rng(seed))
        patch = envelope(field, flat, REGIONS[organ].probe, ANATOMY[organ].optics)[64:-64, 24:-24]
        ratios.append(float(patch.mean() / patch.std()))
    return statistics.mean(ratios)


def main() -> None:
    """Measures, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=120, help="phantoms a region (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULT, help="the page to write (default: %(default)s)")
    options = parser.parse_args()
    console = Console()
    rows = []
    with progress_of_parts(console) as bar:
        task = bar.add_task("drawing", total=len(ORGANS))
        for organ in ORGANS:
            times = milliseconds(organ, options.count)
            slow = sorted(times)[round(0.95 * (len(times) - 1))]
            rows.append(
                f"| {organ} | {REGIONS[organ].probe} | **{statistics.mean(times):.1f}** | {slow:.1f} "
                f"| {speckle_snr(organ):.3f} |"
            )
            bar.advance(task)
    text = "\n".join(
        [
            "# Phantoms",
            "",
            describe(),
            f"{options.count} phantoms of 224 × 224 a region, all classes in turns, one thread, processor time. The "
            f"target is at most {TARGET_MILLISECONDS:.0f} ms. The theory of speckle is {RAYLEIGH_SNR:.3f}.",
            "",
            *table_head("| region | probe | mean, ms | 95th percentile, ms | speckle signal to noise |"),
            *rows,
            "",
        ]
    )
    options.out.write_text(text)
    console.print(text, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
