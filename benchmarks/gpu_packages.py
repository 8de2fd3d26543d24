"""Carries Python packages to a machine without network: `python -m benchmarks.gpu_packages FOLDER` fetches them here.

There `python -m benchmarks.gpu_check --packages FOLDER` uses them from where they lie; nothing is installed.
"""

import argparse
import os
import subprocess
import sys
import zipfile
from pathlib import Path

# Their code is Python and Triton; they name an old torch that they do not need.
PURE = ("megablocks==0.10.0", "stanford-stk==0.7.1")
# What a machine for GPU work often lacks. The binary one is fetched for the Python that is there.
OTHERS = ("pydantic==2.14.3", "annotated-types", "typing-inspection")


def fetch(folder: Path, python_version: str) -> None:
    """Fills the folder with wheels. Needs the network, and torch and setuptools here, which MegaBlocks' build uses."""
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, *PURE], check=True)
    platforms = (f"--platform=manylinux{name}_x86_64" for name in ("2014", "_2_17", "_2_28"))
    target = ["--implementation=cp", f"--python-version={python_version}", *platforms]
    subprocess.run(
        [*pip, "download", "--only-binary=:all:", *target, "-d", folder, *OTHERS],
        check=True,
    )


def unpack(folder: Path, target: Path) -> list[str]:
    """Unpacks the folder's wheels side by side; their names.

    Raises:
        ValueError: the folder has no wheels, or one of them would write elsewhere.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise ValueError(f"there are no wheels in {folder}; fill it with: python -m benchmarks.gpu_packages {folder}")
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if not (target / name).resolve().is_relative_to(target.resolve()):
                    raise ValueError(f"{wheel.name} has the file {name!r}, which would lie outside the folder")
            archive.extractall(target)
    return [wheel.name for wheel in wheels]


def use(target: Path) -> None:
    """Makes unpacked packages importable here and in the processes that this one starts, before what is installed."""
    sys.path.insert(0, str(target))
    known = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{target}{os.pathsep}{known}" if known else str(target)


def main() -> None:
    """Fetches the packages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the wheels go")
    parser.add_argument("--python-version", default="3.12", help="of the other machine (default: %(default)s)")
    arguments = parser.parse_args()
    fetch(arguments.folder, arguments.python_version)


if __name__ == "__main__":
    main()
