"""Holds that the repository is enough: nothing in it points out of it, nothing that it needs is left out of git."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("benchmarks", "cluster", "docs", "echovlm_ray", "experts", "protos", "requirements", "router", "tests")
# Written by tools, not by hand.
GENERATED = re.compile(r"_pb2(_grpc)?\.pyi?$|^benchmarks/results/.*\.json$|^tests/(cases|golden)/|package-lock\.json$")
# Parts of a path before the first step up, then the steps.
UP = re.compile(r"((?:[\w$(){}\"'@-]+(?:\.[\w$(){}\"'@-]+)*/)*)(?<!\.)((?:\.\./)*\.\.)(?![.\w])")
FILE_CHAIN = re.compile(r"Path\(__file__\)((?:\.resolve\(\)|\.absolute\(\)|\.parents?(?:\[\d+\])?)*)")
NAMED_CHAIN = re.compile(r"^(\w+)(?:: \w+)? = Path\(__file__\)((?:\.\w+(?:\(\)|\[\d+\])?)*)$", re.MULTILINE)
# Folders of machines, which no other machine has.
MACHINES = re.compile(r"(?<![\w.}])/(?:work|root)/\w+")
# Texts that a module writes into another folder.
WRITTEN_BELOW = {Path("benchmarks/scaling_report.py"): Path("benchmarks/results/scaling_model.md")}
# Results that later runs will write, a file of trained bundles, and keys in an object store.
ELSEWHERE = (
    "benchmarks/results/gpu_check.md",
    "benchmarks/results/training_step.md",
    "MODEL_CARD.md",
    "experts/bundles/",
    "experts/files/",
)
PAGE = re.compile(r"(?<![\w./{}*-])[\w-]+\.(?:md|proto)\b")
PATH = re.compile(rf"(?<![\w./@:-])(?:{'|'.join(FOLDERS)})/[\w./*-]*[\w*/]")


def git(*arguments: str) -> list[str]:
    done = subprocess.run(
        ["git", "-c", "safe.directory=*", "-C", ROOT, *arguments, "-z"], capture_output=True, text=True, check=True
    )
    return [line for line in done.stdout.split("\0") if line]


if not (ROOT / ".git").exists():
    pytest.skip("this is no checkout of git", allow_module_level=True)
TRACKED = [Path(name) for name in git("ls-files")]


def texts() -> Iterator[tuple[Path, str]]:
    """Every tracked text."""
    for path in TRACKED:
        if (ROOT / path).is_file() and not (ROOT / path).is_symlink():
            content = (ROOT / path).read_bytes()
            if b"\0" not in content:
                yield path, content.decode("utf-8", "replace")


def ways_out(path: Path, text: str) -> list[str]:
    """What in a file leads above the root, if it is read relative to the file's folder."""
    depth = len(path.parts) - 1
    found = []
    for match in UP.finditer(text):
        before, ups = match.group(1), match.group(2).count("..")
        # Of `a/../b` only the second step up leaves the folder; what a variable holds is taken for the folder itself.
        ups -= 0 if re.search(r"[$)}\"']", before) else before.count("/")
        if ups > depth:
            found.append(match.group())
    if path.suffix == ".py":
        chains = dict(NAMED_CHAIN.findall(text))
        for chain in FILE_CHAIN.findall(text):
            if steps(chain) > len(path.parts):
                found.append(chain)
        for name, chain in chains.items():
            for further in re.findall(rf"\b{name}((?:\.parents?(?:\[\d+\])?)+)", text):
                if steps(chain) + steps(further) > len(path.parts):
                    found.append(name + further)
    return found


def steps(chain: str) -> int:
    """How many folders up a chain of `.parent` and `.parents[i]` leads."""
    return chain.replace(".parents[", "").count(".parent") + sum(
        int(index) + 1 for index in re.findall(r"\.parents\[(\d+)\]", chain)
    )


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("a.md", "see [it](../shared/x.md)"),
        ("docs/a.md", "see [it](../../x.md)"),
        ("Makefile", "\tcp ../shared/golden ."),
        (".ci/run", 'cd "$(dirname "$0")/../.."'),
        (".ci/run", "cp $HERE/../../shared/x ."),
        ("tests/x/package.json", '"y": "file:../../../y"'),
        ("tests/a.py", 'ROOT = Path(__file__).resolve().parent.parent\nSHARED = ROOT.parent / "shared"'),
        ("tests/a.py", "SHARED = Path(__file__).resolve().parent.parent.parent"),
        ("tests/a.py", "SHARED = Path(__file__).parents[2]"),
        ("benchmarks/a.py", 'x = os.path.join(HERE, "../../shared")'),
        ("a.yaml", "path: .."),
    ],
)
def test_ways_out_are_found(path: str, text: str) -> None:
    assert ways_out(Path(path), text)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("docs/a.md", "see [it](../x.md)... or ..."),
        (".ci/run", 'cd "$(dirname "$0")/.."'),
        ("tests/x/a.py", 'ROOT = Path(__file__).resolve().parent.parent.parent\nx = "a/../b"; y = 0..1'),
        ("tests/a.py", "ROOT = Path(__file__).parents[1]"),
    ],
)
def test_what_stays_within_is_none(path: str, text: str) -> None:
    assert not ways_out(Path(path), text)


def test_nothing_tracked_leads_above_the_root() -> None:
    own = Path(__file__).resolve().relative_to(ROOT)
    found = {
        str(path): ways
        for path, text in texts()
        if path != own and not GENERATED.search(str(path)) and (ways := ways_out(WRITTEN_BELOW.get(path, path), text))
    }
    assert not found


def test_nothing_tracked_names_a_machine() -> None:
    own = Path(__file__).resolve().relative_to(ROOT)
    found = {str(path): names for path, text in texts() if path != own and (names := MACHINES.findall(text))}
    assert not found


def test_no_symlink_leads_out() -> None:
    for path in TRACKED:
        if (ROOT / path).is_symlink():
            assert (ROOT / path).resolve().is_relative_to(ROOT), path


def test_git_ignores_nothing_that_a_clone_would_lack() -> None:
    ignored = git("ls-files", "--others", "--ignored", "--exclude-standard", "--", *FOLDERS)
    made = re.compile(
        r"(^|/)(__pycache__|node_modules|build|[\w-]+\.egg-info|\.\w+_cache|\.hypothesis)/|/_kernels\.[\w.-]+\.so$"
    )
    assert not [name for name in ignored if not made.search(name.strip())]


def test_paths_that_texts_name_exist() -> None:
    """In comments, docstrings and pages, so that readers find it."""
    missing = set()
    pages = {path.name for path in TRACKED} | {Path(name).name for name in ELSEWHERE}
    for path, text in texts():
        if GENERATED.search(str(path)) or path == Path("tests/test_repository.py"):
            continue
        if path.parts[0] != "tests":
            missing |= {f"{path}: {name}" for name in PAGE.findall(text) if name not in pages}
        for match in PATH.finditer(text):
            name = match.group().rstrip(".")
            # `results/throughput_NAME.md`, `f"results/{name}.md"`
            pattern = re.sub("[A-Z]{3,}", "*", name) + (
                "*" if text[match.end() : match.end() + 1] in ("{", "<", "…") else ""
            )
            if name.startswith(ELSEWHERE) or ".*" in name:
                continue
            if not (ROOT / name).exists() and not list(ROOT.glob(pattern)):
                missing.add(f"{path}: {name}")
    assert not missing, "\n".join(sorted(missing))
