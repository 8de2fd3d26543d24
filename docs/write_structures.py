"""Writes docs/structures.md from what the modules say of themselves: `make structures`."""

import argparse
import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "structures.md"
TITLES = {
    "protos": "protos: the contracts",
    "experts": "experts: one organ's expert group",
    "router": "router: where requests and tokens go",
    "echovlm_ray": "echovlm_ray",
    "requirements": "requirements: what is installed, with hashes",
    "cluster": "cluster: configuration files",
}
INTRODUCTION = """\
# Structures

One line for each module: what it is for. Imports run one way only,
`protos ← experts ← router ← echovlm_ray`, and within `echovlm_ray` from the command line down to the model.

Data goes one way too: image → gateway → router (→ vision encoder) → engine → per layer the gates → dispatch → an
expert replica's stream → its kernel, and straight back → sampler → gateway. [One request](request.md) and [one
swap](swap.md) are drawn with their objects; [names](names.md) has the vocabulary and the letters of dimensions.
"""


def modules() -> list[Path]:
    """All files with a line of their own, relative to the repository: sources, contracts and configuration files."""
    return [
        path.relative_to(ROOT)
        for package in TITLES
        for path in sorted((ROOT / package).rglob("*"))
        if path.suffix in (".py", ".proto", ".yaml", ".c", ".h")
        and not re.search(r"_pb2(_grpc)?\.py$", path.name)
        and (path.name != "__init__.py" or path.read_text().strip())
    ]


def page() -> str:
    """The whole page."""
    folders: dict[str, list[str]] = {}
    for path in modules():
        folders.setdefault(str(path.parent), []).append(f"| `{path}` | {_first_sentence(ROOT / path)} |")
    parts = [INTRODUCTION]
    for folder, rows in folders.items():
        parts.append("\n".join([f"## {TITLES.get(folder, folder)}", "", "| module | |", "| --- | --- |", *rows]) + "\n")
    return "\n".join(parts)


def _first_sentence(path: Path) -> str:
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
    elif path.suffix in (".c", ".h"):
        comment = re.match(r"/\*(.*?)\*/", path.read_text(), re.DOTALL)
        text = re.sub(r"^ \* ?", "", comment.group(1), flags=re.MULTILINE) if comment else ""
    else:
        comment = re.match(r"(?:(?://|#).*\n)+", path.read_text())
        text = re.sub(r"^(?://|#) ?", "", comment.group(0), flags=re.MULTILINE) if comment else ""
    paragraph = text.strip().split("\n\n")[0].replace("\n", " ")
    sentence = re.match(r"(.*?[.!?])(?:\s[A-Z`]|$)", paragraph)
    return sentence.group(1) if sentence else paragraph


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(page())
