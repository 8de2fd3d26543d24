"""Everything that only a machine with a GPU can tell about the expert kernels: `make gpu-check`.

Needs no network: packages that the machine lacks are carried as wheels (`python -m benchmarks.gpu_packages`).
Writes `benchmarks/results/gpu_check.md` part by part, so that an interrupted run leaves what it had. Ends with 0 if all
is well, with 1 if a part failed, and with 2 where there is no CUDA device. `--device cpu` is a dry run at tiny sizes.
"""

import argparse
import datetime
import platform
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks import gpu_packages
from benchmarks.measure_table import table_head

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "gpu_check.md"
NO_CUDA = 2
PARTS = ("conformance", "library-tests", "table", "end-to-end")
# Only on request: it takes long, and its results are for tuning the kernels.
EXTRA_PARTS = ("tiles",)
KERNELS = ("reference", "torch_grouped", "triton_small", "megablocks_sparse", "megablocks_grouped", "auto")
LIBRARIES = ("torch", "triton", "megablocks", "stanford-stk", "grouped_gemm", "transformers", "numpy")
# The tests import nothing of what serves, which such a machine may lack.
PYTEST = ("-m", "pytest", "-o", "addopts=-q --import-mode=importlib", "-p", "no:cacheprovider", "--noconftest")


@dataclass
class Report:
    """What is written, and whether all of it is well."""

    path: Path
    head: str
    parts: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def add(self, title: str, text: str, well: bool) -> None:
        """Adds a part, prints it and writes the file."""
        self.parts.append(f"## {title}\n\n{text}\n")
        if not well:
            self.failed.append(title)
        print(f"\n## {title}\n\n{text}\n{'' if well else '(failed)'}", flush=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        outcome = f"Failed: {', '.join(self.failed)}." if self.failed else "All parts well so far."
        self.path.write_text("\n".join([self.head, outcome, "", *self.parts]))


def arguments_of(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a dry run (default: %(default)s)")
    parser.add_argument("--packages", type=Path, help="a folder of wheels that this machine lacks")
    parser.add_argument("--checkpoint", type=Path, help="a split checkpoint (default: the demo, made for this run)")
    parser.add_argument("--megablocks-tests", type=Path, help="the folder tests/ of MegaBlocks' repository")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS + EXTRA_PARTS, default=PARTS, help=f"default: {' '.join(PARTS)}"
    )
    parser.add_argument("--kernels", nargs="+", default=KERNELS, help="default: all")
    parser.add_argument("--tokens", nargs="+", type=int, default=(1, 8, 32, 128, 512, 2048, 8192))
    parser.add_argument("--ffn", nargs="+", type=int, default=(1408, 18944))
    parser.add_argument("--experts", nargs="+", type=int, default=(1, 4, 8))
    parser.add_argument("--hidden", type=int, default=3584)
    parser.add_argument("--output", type=Path, default=RESULT, help="default: %(default)s")
    return parser.parse_args(argv)


def describe(device: str) -> str:
    """Where and with what this was measured, in a line of Markdown."""
    import torch

    def of(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "absent"

    processor = platform.processor() or platform.machine()
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        memory = properties.total_memory / 1024**3
        processor = f"{properties.name}, {properties.multi_processor_count} multiprocessors, {memory:.0f} GiB"
    libraries = ", ".join(f"{name} {of(name)}" for name in LIBRARIES)
    return (
        f"Measured on {datetime.date.today().isoformat()}: {processor}, CUDA {torch.version.cuda}, "
        f"Python {platform.python_version()}, {libraries}."
    )


def conformance(arguments: argparse.Namespace) -> tuple[str, bool]:
    """The whole suite on the GPU in bfloat16, bit-equality, and the capture and replay of a CUDA graph."""
    return _pytest([str(ROOT / "tests" / "gpu")], may_skip_all=arguments.device == "cpu")


def library_tests(arguments: argparse.Namespace) -> tuple[str, bool]:
    """stk's own tests, which its package carries, and MegaBlocks' if a folder of them is given."""
    from experts.kernels.gpu_support import import_megablocks

    if arguments.device == "cpu":
        return "Not run without a GPU.", True
    try:
        _, stk = import_megablocks()
    except ImportError as error:
        return f"Not run: {error}", False
    text, well = _pytest([str(Path(stk.__file__).parent / "ops"), "-o", "python_files=*_test.py"])
    text = f"stk: {text}"
    if arguments.megablocks_tests:
        # The module that stands in for the compiled one must be there before their first import.
        options = [*PYTEST[2:], "-W", "ignore", str(arguments.megablocks_tests / "ops")]
        preload = "import sys, pytest; from experts.kernels import megablocks_ops as ours; ours.install(); "
        code = f"{preload}sys.exit(pytest.main({options!r}))"
        of_megablocks, also_well = _outcome([sys.executable, "-c", code])
        text, well = f"{text}\n\nMegaBlocks: {of_megablocks}", well and also_well
    return text, well


def table(arguments: argparse.Namespace) -> tuple[str, bool]:
    """All kernels as shares of the roofline; its ceilings are measured first."""
    import torch

    from benchmarks.gpu_roofline import measure_ceilings
    from benchmarks.gpu_table import markdown, measure, shapes

    on_gpu = arguments.device.startswith("cuda")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    ceilings = measure_ceilings(arguments.device, dtype, 8192 if on_gpu else 256, 2**32 if on_gpu else 2**24)
    grid = shapes(arguments.experts, arguments.ffn, arguments.tokens, arguments.hidden)
    rows = []
    for row in measure(arguments.kernels, grid, arguments.device, dtype):
        print(row, flush=True)
        rows.append(row)
    ceiling = (
        f"Ceilings, measured in this run: {ceilings.flops_per_s / 1e12:.2f} TFLOP/s ({dtype} matrix product), "
        f"{ceilings.bytes_per_s / 1e9:.0f} GB/s (copy or read, the faster). Hidden size {arguments.hidden}, "
        f"{'weights not in the cache' if on_gpu else 'dry run'}. TFLOP/s, GB/s and share are of the shorter time."
    )
    measured = any(row.seconds is not None for row in rows)
    return f"{ceiling}\n\n{markdown(rows, ceilings)}", measured


def tiles(arguments: argparse.Namespace) -> tuple[str, bool]:
    """How the kernels' own choices of tiles compare with others."""
    import torch

    from benchmarks.gpu_table import shapes
    from benchmarks.gpu_tiles import sweep

    dtype = torch.bfloat16 if arguments.device.startswith("cuda") else torch.float32
    grid = list(shapes(arguments.experts, arguments.ffn, arguments.tokens, arguments.hidden))
    return "\n".join(sweep(grid, arguments.device, dtype)), True


def end_to_end(arguments: argparse.Namespace) -> tuple[str, bool]:
    """The demo system: logits and greedy tokens on the device against those on the CPU."""
    import torch

    from benchmarks.gpu_end_to_end import compare
    from echovlm_ray.checkpoint.demo import make_demo
    from experts.kernels.registry import KernelUnavailableError, get_kernel

    usable = {torch.float32: ("triton_small",), torch.bfloat16: ("megablocks_sparse", "triton_small", "torch_grouped")}
    if arguments.device == "cpu":
        usable = {torch.float32: ("cpu_packed",), torch.bfloat16: ("torch_grouped",)}
    lines = table_head("| kernel | dtype | error | tokens equal | |")
    well = True
    with tempfile.TemporaryDirectory() as work:
        checkpoint = arguments.checkpoint
        if checkpoint is None:
            checkpoint = Path(work) / "demo"
            make_demo(checkpoint)
        for dtype, names in usable.items():
            there = []
            for name in names:
                try:
                    get_kernel(name)
                    there.append(name)
                except KernelUnavailableError as error:
                    lines.append(f"| {name} | {dtype} | | | {error} |")
                    well = False
            for found in compare(checkpoint, arguments.device, there, dtype):
                lines.append(
                    f"| {found.kernel} | {dtype} | {found.error:.1e} | {'yes' if found.tokens_equal else 'no'} | "
                    f"{'' if found.well else 'outside the bounds'} |"
                )
                well &= found.well
    return "\n".join(lines), well


def _pytest(what: Sequence[str], may_skip_all: bool = False) -> tuple[str, bool]:
    text, well = _outcome([sys.executable, *PYTEST, "-W", "ignore", "--tb=short", *what])
    nothing_ran = not re.search(r"\d+ passed", text)
    return text, well and (may_skip_all or not nothing_ran)


def _outcome(command: Sequence[str]) -> tuple[str, bool]:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    output = done.stdout.strip().splitlines()
    failed = [line for line in output if line.startswith(("FAILED", "ERROR"))]
    if done.returncode:
        print(done.stdout[-20_000:], done.stderr[-5_000:], sep="\n", flush=True)
    last = output[-1] if output else done.stderr.strip()[-500:]
    return "\n".join([last, *(f"- {line}" for line in failed[:40])]), done.returncode == 0


DOES: dict[str, Callable[[argparse.Namespace], tuple[str, bool]]] = {
    "conformance": conformance,
    "library-tests": library_tests,
    "table": table,
    "end-to-end": end_to_end,
    "tiles": tiles,
}


def main(argv: Sequence[str]) -> int:
    """Runs the parts; the exit code."""
    arguments = arguments_of(argv)
    with tempfile.TemporaryDirectory() as work:
        if arguments.packages:
            print("carried:", *gpu_packages.unpack(arguments.packages, Path(work)), flush=True)
            gpu_packages.use(Path(work))
        try:
            import torch
        except ModuleNotFoundError:
            print("torch is not installed; this check needs a CUDA build of it", file=sys.stderr)
            return NO_CUDA
        if arguments.device.startswith("cuda") and not torch.cuda.is_available():
            print(
                f"there is no CUDA device (torch {torch.__version__}): run this on a machine with a GPU, or dry with "
                "--device cpu --hidden 64 --ffn 64 --experts 2 --tokens 1 8",
                file=sys.stderr,
            )
            return NO_CUDA
        report = Report(arguments.output, f"# Expert kernels on a GPU\n\n{describe(arguments.device)}")
        for part in arguments.parts:
            start = time.monotonic()
            try:
                text, well = DOES[part](arguments)
            except Exception as error:
                # The other parts still tell something, and machine time is dear.
                traceback.print_exc()
                text, well = f"Ended with {type(error).__name__}: {error}", False
            report.add(part, f"{text}\n\n({time.monotonic() - start:.0f} s)", well)
        return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
