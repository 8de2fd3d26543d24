"""What is installed: pinned, with hashes, whole, and under licences that the project's own allows."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution, distributions, version
from pathlib import Path

from packaging.requirements import Requirement

from requirements import licences
from requirements.licences import pins

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
LISTS = sorted((ROOT / "requirements").glob("*.txt"))
GPL = re.compile(r"(?<!L)(?<!Lesser )(GPL|General Public License)", re.IGNORECASE)


def entries(path: Path) -> list[str]:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return re.split(r"(?<!\\)\n", "\n".join(lines).strip())


def normalized(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def test_every_line_of_the_lists_has_hashes() -> None:
    assert {path.name for path in LISTS} >= {"dev.txt", "serve.txt", "torch-cpu.txt", "torch-cuda.txt"}
    for path in LISTS:
        for entry in entries(path):
            assert re.match(r"[\w.-]+==\S+( ; [^\\]+)?( \\\n    --hash=sha256:[0-9a-f]{64})+$", entry), (
                f"{path}: {entry}"
            )


def test_make_installs_from_the_lists_alone() -> None:
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    for line in re.findall(r"^.*pip install.*$", makefile, re.MULTILINE):
        assert "--require-hashes" in line or line.endswith("--no-deps --no-build-isolation --editable ."), line


def test_the_lists_and_the_constraints_name_the_same_versions() -> None:
    constraints = set(entries(ROOT / "constraints.txt"))
    listed = {
        entry.split(" ")[0]
        for path in LISTS
        if path.stem in ("dev", "serve", "torch-cuda")
        for entry in entries(path)
        if not entry.startswith("grpcio-tools==")
    }
    assert listed == constraints
    pinned = dict(entry.split("==") for entry in constraints)
    for extra in ("serve", "video", "s3", "postgres", "plots", "dev"):
        for text in EXTRAS[extra]:
            wanted = Requirement(text)
            if wanted.name != "echovlm-ray":
                assert str(wanted.specifier) == f"=={pinned[normalized(wanted.name)]}", text
    for text in PROJECT["dependencies"]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(pinned[normalized(wanted.name)]), text


def test_what_is_installed_is_what_is_listed() -> None:
    """The lists are installed without resolving, so nothing else would notice a package that lacks."""
    wanted = {name for path in LISTS if path.stem in ("dev", "serve") for name in pins(path.stem)} | {"torch"}
    for name in wanted:
        for text in distribution(name).requires or ():
            requirement = Requirement(text)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            if (name, requirement.name) == ("grpcio-tools", "protobuf"):
                continue
            try:
                found = version(requirement.name)
            except PackageNotFoundError:
                found = "missing"
            assert found != "missing", f"{name} needs {text}: run `make lock`"
            assert requirement.specifier.contains(found, prereleases=True), f"{name} needs {text}, not {found}"


def test_the_list_of_licences_is_current() -> None:
    assert licences.PAGE.read_text() == licences.page(), "run `make licences`"
    assert "unknown" not in licences.page()
    named = set(re.findall(r"^\| ([\w.-]+) \|", licences.PAGE.read_text(), re.MULTILINE))
    assert {entry.split("==")[0] for entry in entries(ROOT / "constraints.txt")} <= named


def test_nothing_under_the_gpl_is_served_with() -> None:
    """av, in the extra `video`, is the one exception, and NOTICE names it."""
    video = {Requirement(text).name for text in EXTRAS["video"]}
    assert video == {"av"}
    assert re.search(r"^- av .*`video`", (ROOT / "NOTICE").read_text(), re.MULTILINE)
    for name in {*pins("serve"), *pins("torch-cpu"), *pins("torch-cuda")} - video:
        assert not GPL.search(licences.licence_of(name)), name
    for installed in distributions():
        fields = installed.metadata
        name = normalized(fields["Name"])
        if name in pins("serve") and name not in video:
            said = [
                text for key in ("License-Expression", "License", "Classifier") for text in fields.get_all(key) or ()
            ]
            # A long text is the licence itself, which may name others.
            assert not any(GPL.search(text) for text in said if "\n" not in text), f"{name}: {said}"
