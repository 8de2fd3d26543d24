"""How commands name a bundle and its registry: options and their meaning."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from echovlm_ray.cli.work import fail

if TYPE_CHECKING:
    from experts.registry.source import BundleSource, RegistryLocation

EXIT_INVALID = 2
DEFAULT_REGISTRY = "checkpoints/demo/registry"
_IN_REGISTRY = re.compile(r"([a-z][a-z0-9-]{0,39})@(.+)")

Target = Annotated[str, typer.Argument(metavar="BUNDLE", help="A bundle's folder, or ORGAN@VERSION in the registry.")]
RegistryURL = Annotated[
    str,
    typer.Option(
        "--registry",
        envvar="ECHORAY_REGISTRY",
        help="The registry: a folder, a split checkpoint's folder, or a URL like s3://bucket/experts.",
    ),
]
RegistryOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--registry-option",
        metavar="KEY=VALUE",
        help="For fsspec's file system of that URL, like endpoint_url=http://minio:9000. Repeatable.",
    ),
]
PublicKeys = Annotated[
    list[Path] | None,
    typer.Option("--key", help="A PEM public key by which the bundle must be signed. Repeatable: any of them will do."),
]
AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def registry_at(url: str, options: list[str] | None) -> "RegistryLocation":
    """The registry that the options name; of a split checkpoint its own."""
    from echovlm_ray.checkpoint.layout import is_split_folder, registry_root
    from experts.registry.source import RegistryLocation

    if "://" not in url and is_split_folder(Path(url)):
        url = str(registry_root(Path(url)))
    return RegistryLocation(root=url, options=_parse_options(options))


def in_registry(target: str) -> tuple[str, str] | None:
    """Organ and version of a target like `breast@1.2.0`; None if it names a folder."""
    match = _IN_REGISTRY.fullmatch(target)
    return None if match is None or Path(target).exists() else (match.group(1), match.group(2))


def source_of(target: str, registry: str, options: list[str] | None) -> "BundleSource":
    """The bundle that a target names.

    Raises:
        UnknownBundleError: the registry does not have it.
        InvalidBundleError: its manifest there is damaged.
    """
    from experts.registry.source import BundleSource

    version = in_registry(target)
    if version is None:
        folder = Path(target)
        if not folder.is_dir():
            fail(f"{target} is neither a bundle's folder nor ORGAN@VERSION, like breast@1.0.0", EXIT_INVALID)
        return BundleSource(folder=folder)
    location = registry_at(registry, options)
    return BundleSource(registry=location, digest=location.open().find(*version).digest)


def _parse_options(options: list[str] | None) -> dict[str, str | int | bool]:
    parsed: dict[str, str | int | bool] = {}
    for option in options or []:
        key, equals, value = option.partition("=")
        if not key or not equals:
            fail(f"--registry-option {option!r} must be KEY=VALUE, like endpoint_url=http://minio:9000", EXIT_INVALID)
        parsed[key] = {"true": True, "false": False}.get(value, int(value) if value.isdecimal() else value)
    return parsed
