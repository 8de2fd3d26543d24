"""The engine with all experts in its process: `python -m benchmarks.systems.engine --checkpoint DIR --threads N`.

It is built by the function that the served router is built by, with `router.experts: local`.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.measured_engine import measured_engine
from benchmarks.systems.protocol import Run, serve_workloads


@contextmanager
def open_engine(checkpoint: Path, threads: int, max_batch_size: int) -> Iterator[Run]:
    """The engine, loaded and started."""
    with measured_engine(checkpoint, "in process", max_batch_size=max_batch_size, threads=threads) as measured:
        yield measured.run


def main() -> None:
    """Runs workloads from the standard input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="the split folder")
    parser.add_argument("--threads", type=int, required=True, help="torch threads")
    parser.add_argument("--max-batch-size", type=int, required=True, help="router.max_batch_size")
    options = parser.parse_args()
    serve_workloads(lambda: open_engine(options.checkpoint, options.threads, options.max_batch_size))


if __name__ == "__main__":
    main()
