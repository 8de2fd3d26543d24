import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from experts.bundles.manifest import Manifest, check_file_path, check_organ, check_version, version_key
from experts.errors import InvalidBundleError
from tests.experts.manifest_fields import FIELDS


def parse(**changes: Any) -> Manifest:
    return Manifest.from_json(json.dumps({**FIELDS, **changes}).encode(), "manifest.json")


def test_round_trip() -> None:
    manifest = parse(
        changelog={"1.0.0": "first"},
        eval_metrics={"bleu1": 0.25},
        organ_synonyms=["mamma", "乳腺"],
        source_experts=[3, 1],
    )
    again = Manifest.from_json(manifest.to_json(), "x")
    assert again == manifest
    assert again.digest == manifest.digest


def test_the_digest_is_the_sha256_of_the_canonical_file() -> None:
    """Anyone can compute it from manifest.json, in any language."""
    manifest = parse(organ_synonyms=["乳腺"])
    content = json.loads(manifest.to_json())
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert manifest.digest == hashlib.sha256(canonical).hexdigest()


def test_the_digest_does_not_hang_on_formatting_or_defaults_spelled_out() -> None:
    spelled_out = {**dict(reversed(FIELDS.items())), "copyright": "", "references": [], "has_prototype": False}
    assert Manifest.from_json(json.dumps(spelled_out, indent=7).encode(), "x").digest == parse().digest


@pytest.mark.parametrize(
    "change",
    [
        {"version": "1.0.1"},
        {"organ": "liver"},
        {"backbone_digest": "3" * 64},
        {"description": "x"},
        {"has_prototype": True},
    ],
)
def test_every_field_is_part_of_the_identity(change: dict[str, Any]) -> None:
    assert parse(**change).digest != parse().digest


def test_a_manifest_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        parse().version = "2.0.0"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/etc/passwd.safetensors", "absolute"),
        ("C:x.safetensors", "absolute"),
        ("c:/x.safetensors", "absolute"),
        ("..\\x.safetensors", "backslash"),
        ("../x.safetensors", "leaves the bundle"),
        ("a/../../x.safetensors", "leaves the bundle"),
        ("..", "leaves the bundle"),
        ("a/x.safetensors", "subfolder"),
        (".x.safetensors", "hidden"),
        ("", "must be letters"),
        ("x y.safetensors", "must be letters"),
        ("x\n.safetensors", "must be letters"),
        ("x.safetensors\n", "must be letters"),
        ("x\0.safetensors", "must be letters"),
        ("é.safetensors", "must be letters"),
        ("x" * 150 + ".safetensors", "must be letters"),
        ("weights.pkl", "not a .safetensors file"),
        ("manifest.json", "not a .safetensors file"),
    ],
)
def test_paths_cannot_leave_the_bundle(path: str, reason: str) -> None:
    with pytest.raises(InvalidBundleError, match=f"files.0.path: .*{reason}"):
        parse(files=[{**FIELDS["files"][0], "path": path}, FIELDS["files"][1]])


@given(st.text(max_size=30) | st.from_regex(r"[./\\a-z]{0,20}\.safetensors", fullmatch=True))
def test_an_accepted_path_is_one_plain_name(path: str) -> None:
    try:
        check_file_path(path)
    except ValueError:
        return
    assert "/" not in path
    assert "\\" not in path
    assert not path.startswith(".")
    assert path.isprintable()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": "1.0"}, "version.*no semantic version"),
        ({"version": "01.0.0"}, "version.*no semantic version"),
        ({"version": "1.0.0\n"}, "version.*no semantic version"),
        ({"version": "../1.0.0"}, "version.*no semantic version"),
        ({"changelog": {"one": "x"}}, "changelog.*no semantic version"),
        ({"organ": "../x"}, "organ"),
        ({"organ": "Breast"}, "organ.*lower-case"),
        ({"backbone_digest": "xyz"}, "backbone_digest"),
        ({"num_experts": 0, "source_experts": None}, "num_experts"),
        ({"hidden_size": 2**40}, "hidden_size"),
        ({"dtype": "float8"}, "dtype"),
        ({"format": "other"}, "format"),
        ({"surprise": 1}, "surprise"),
        ({"eval_metrics": {"x": float("nan")}}, "manifest.json"),
        ({"source_experts": [1]}, "names 1 experts, but num_experts is 2"),
        ({"source_experts": [1, 1]}, "names an expert twice"),
        ({"files": []}, "files"),
        ({"files": [FIELDS["files"][0], FIELDS["files"][0]]}, "experts.safetensors twice"),
        ({"files": [FIELDS["files"][0], {**FIELDS["files"][1], "path": "EXPERTS.safetensors"}]}, "twice"),
        ({"files": [FIELDS["files"][0], {**FIELDS["files"][1], "size": -1}]}, "files.1.size"),
        ({"files": [FIELDS["files"][0], {**FIELDS["files"][1], "sha256": "../x"}]}, "files.1.sha256"),
    ],
)
def test_wrong_manifests_are_refused_with_the_field(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidBundleError, match=reason):
        parse(**change)


def test_what_is_no_manifest_is_refused() -> None:
    for content in (b"", b"[]", b"\x80\x04\x95", b"{", b"\xff"):
        with pytest.raises(InvalidBundleError, match=r"manifest.json"):
            Manifest.from_json(content, "manifest.json")
    with pytest.raises(InvalidBundleError, match="larger than"):
        Manifest.from_json(b" " * (5 * 1024 * 1024), "manifest.json")


def test_versions_sort_as_semver_says() -> None:
    ordered = [
        "0.9.0",
        "1.0.0-alpha",
        "1.0.0-alpha.1",
        "1.0.0-alpha.beta",
        "1.0.0-beta",
        "1.0.0-beta.2",
        "1.0.0-beta.11",
        "1.0.0-rc.1",
        "1.0.0",
        "1.2.0",
        "1.10.0",
    ]
    shuffled = ordered[1::2] + ordered[::2]
    assert sorted(shuffled, key=version_key) == ordered


def test_names_that_are_fine_stay_as_they_are() -> None:
    assert check_version("1.2.3-rc.1+build.5") == "1.2.3-rc.1+build.5"
    assert check_organ("upper-abdomen2") == "upper-abdomen2"
    assert check_file_path("experts-00001-of-00003.safetensors") == "experts-00001-of-00003.safetensors"
