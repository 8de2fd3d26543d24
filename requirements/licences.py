"""Writes docs/licences.md from the metadata of the packages that are pinned: `make licences`."""

import argparse
import re
from importlib.metadata import PackageMetadata, PackageNotFoundError, metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "licences.md"
LISTS = {
    "serve": "`serve`, `video`",
    "torch-cuda": "torch",
    "torch-cpu": "torch",
    "dev": "tests and other extras",
    "megablocks": "`gpu`",
    "triton": "`make triton-check`",
}
# Where the metadata has no licence, or not its whole name: read in the package itself.
READ = {
    "av": "BSD-3-Clause; its FFmpeg, with x264 and x265, GPL-2.0-or-later",
    "blinker": "MIT",
    "cycler": "BSD-3-Clause",
    "kiwisolver": "BSD-3-Clause",
    "matplotlib": "PSF-2.0 (matplotlib's)",
    "python-dateutil": "Apache-2.0 OR BSD-3-Clause",
    "sigstore-models": "MIT",
}
# Not installed everywhere, so their metadata cannot be read.
ABSENT = {
    "triton": "MIT",
    "wheel": "MIT",
    "cuda-bindings": "Apache-2.0",
    "cuda-pathfinder": "Apache-2.0",
    "megablocks": "Apache-2.0",
    "stanford-stk": "Apache-2.0",
}
NVIDIA = "NVIDIA's own terms"
INTRODUCTION = """\
# Licences

EchoVLM-Ray is under the Apache License 2.0. These are the licences of what it installs, as the packages' metadata names
them. [NOTICE](../NOTICE) says which have conditions beyond attribution. No package of the base install, of `serve` or
of `train` is under the GPL or the AGPL; a test holds that, and that this list is whole. `make licences` writes it.

| package | licence | for |
| --- | --- | --- |
"""


def pins(name: str) -> list[str]:
    """The packages of a list of this folder, normalized."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    return [re.sub("[-_.]+", "-", found).lower() for found in re.findall(r"^([\w.-]+)==", text, re.MULTILINE)]


def licence_of(package: str) -> str:
    """A package's licence, in one line."""
    if known := READ.get(package) or ABSENT.get(package):
        return known
    if package.startswith(("nvidia-", "cuda-")):
        return NVIDIA
    try:
        return _named(metadata(package))
    except PackageNotFoundError:
        return "unknown"


def page() -> str:
    """The whole page."""
    purposes: dict[str, str] = {}
    for name, purpose in LISTS.items():
        for package in pins(name):
            purposes.setdefault(package, purpose)
    rows = (f"| {package} | {licence_of(package)} | {purposes[package]} |\n" for package in sorted(purposes))
    return INTRODUCTION + "".join(rows)


def _named(fields: PackageMetadata) -> str:
    if expression := fields.get_all("License-Expression"):
        return str(expression[0])
    classifiers = [text.split(" :: ")[-1] for text in fields.get_all("Classifier") or () if text.startswith("License")]
    text = " ".join(fields.get_all("License") or ()).strip()
    if text and "\n" not in text and len(text) < 60:
        return text
    return "; ".join(classifiers) or "unknown"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(page())
