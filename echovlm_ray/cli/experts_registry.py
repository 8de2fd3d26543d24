"""`echoray experts list`, `push` and `pull`: the bundles of a system or a registry."""

from pathlib import Path
from typing import Annotated

import typer

from echovlm_ray.cli.control import with_control, with_named_control
from echovlm_ray.cli.experts_targets import (
    DEFAULT_REGISTRY,
    EXIT_INVALID,
    AsJSON,
    RegistryOptions,
    RegistryURL,
    in_registry,
    registry_at,
)
from echovlm_ray.cli.experts_watch import watch_state
from echovlm_ray.cli.messages import message_as_dict
from echovlm_ray.cli.organ_problem import format_problem, problem_as_dict
from echovlm_ray.cli.rollout_format import state_as_dict, versions_of
from echovlm_ray.cli.rollout_tables import bundles_view, state_view
from echovlm_ray.cli.terminal import console_of, line, say, say_json, styled
from echovlm_ray.cli.work import byte_progress, clear_errors, fail
from echovlm_ray.client.control import ExpertControlClient


@with_control
def list_command(
    control: ExpertControlClient,
    registry: Annotated[
        str | None,
        typer.Option(help="List this registry instead: a folder, a split checkpoint's folder, or a URL."),
    ] = None,
    registry_option: RegistryOptions = None,
    organ: Annotated[str, typer.Option(help="Only this organ.")] = "",
    watch: Annotated[bool, typer.Option("--watch", help="Show changes until Ctrl-C.")] = False,
    as_json: AsJSON = False,
) -> None:
    """Lists a running system's live versions, rollouts, loaded bundles of every replica, and registry.

    With `--registry` it lists a registry's bundles without a system, sorted by organ and version.

    Example: `echoray experts list`

    Example: `echoray experts list --registry checkpoints/echovlm`
    """
    if registry is not None:
        if watch:
            fail("--watch shows a running system: leave --registry out", EXIT_INVALID)
        _list_registry(registry, registry_option, organ, as_json)
    elif watch:
        watch_state(control, organ, as_json)
    else:
        _list_system(control, organ, as_json)


@with_named_control
def push(
    control: ExpertControlClient | None,
    context: typer.Context,
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder.")],
    registry: RegistryURL = DEFAULT_REGISTRY,
    registry_option: RegistryOptions = None,
) -> None:
    """Checks a bundle and adds it, with its signature, to a registry.

    With `--control` it is sent to a running system, which adds it to its registry.

    A push is atomic and idempotent. Versions are immutable: another bundle of the same organ and version is refused.

    Example: `echoray experts push breast-1.1.0 --registry s3://models/experts`

    Example: `echoray experts push breast-1.1.0 --control 127.0.0.1:50052`
    """
    if control is None:
        with clear_errors():
            manifest = registry_at(registry, registry_option).open().push(bundle)
        say(f"{manifest.organ}@{manifest.version} is in {registry}: {manifest.digest}")
        return
    source = context.get_parameter_source("registry")
    if registry_option or (source is not None and source.name == "COMMANDLINE"):
        fail("give --registry or --control, not both: Control uses its own registry", EXIT_INVALID)
    with byte_progress("sending") as (start, advance):
        info = control.push(bundle, start=start, progress=advance)
    say(f"{info.organ}@{info.version} is in the registry of {control.address}: {info.digest}")
    say(f"Next: echoray experts stage {info.organ} {info.version}")


def pull(
    version: Annotated[str, typer.Argument(metavar="ORGAN@VERSION", help="The bundle.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to create.")],
    registry: RegistryURL = DEFAULT_REGISTRY,
    registry_option: RegistryOptions = None,
) -> None:
    """Copies a bundle from a registry to a new folder and checks it.

    Example: `echoray experts pull breast@1.1.0 breast-1.1.0 --registry s3://models/experts`
    """
    named = in_registry(version)
    if named is None:
        fail(f"{version} is not ORGAN@VERSION, like breast@1.0.0", EXIT_INVALID)
    with clear_errors():
        opened = registry_at(registry, registry_option).open()
        directory.absolute().parent.mkdir(parents=True, exist_ok=True)
        manifest = opened.pull(opened.find(*named).digest, directory)
    say(f"{manifest.organ}@{manifest.version} is in {directory}: {manifest.digest}")


def _list_registry(registry: str, options: list[str] | None, organ: str, as_json: bool) -> None:
    with clear_errors():
        from echovlm_ray.cli.experts_tables import print_versions
        from experts.errors import InvalidBundleError

        opened = registry_at(registry, options).open()
        # A damaged manifest must not hide the other bundles.
        passed_over: list[InvalidBundleError] = []
        listed = opened.list(organ or None, damaged=passed_over.append)
        if organ and not listed and not passed_over:
            known = ", ".join(dict.fromkeys(manifest.organ for manifest in opened.list(damaged=str))) or "none"
            fail(f"there is no organ {organ!r} in the registry {registry}: there are {known}", EXIT_INVALID)
        found = [(manifest, opened.is_signed(manifest)) for manifest in listed]
    if as_json:
        rows = [
            {
                "organ": manifest.organ,
                "version": manifest.version,
                "name": manifest.name,
                "digest": manifest.digest,
                "backbone_digest": manifest.backbone_digest,
                "num_experts": manifest.num_experts,
                "size_bytes": manifest.size_bytes,
                "signed": signed,
            }
            for manifest, signed in found
        ]
        say_json(rows, indent=2)
    else:
        print_versions(found)
    for error in passed_over:
        say(f"passed over: {line(str(error))}", err=True)


def _list_system(control: ExpertControlClient, organ: str, as_json: bool) -> None:
    found = control.list(organ)
    versions = versions_of(found.bundles, found.rollouts)
    if as_json:
        state = state_as_dict(found.live, found.rollouts, found.replicas, versions, organ)
        state["problems"] = [problem_as_dict(problem) for problem in found.problems]
        state["bundles"] = [message_as_dict(bundle) for bundle in found.bundles]
        state["registry_problem"] = found.registry_problem
        state["notices"] = list(found.notices)
        say_json(state, indent=2)
        return
    console = console_of()
    for notice in found.notices:
        console.print(styled(line(notice), "red"), soft_wrap=True)
    console.print(state_view(found.live, found.rollouts, found.replicas, versions, organ))
    for problem in found.problems:
        console.print(format_problem(problem), soft_wrap=True)
    if found.registry_problem:
        console.print(styled(line(found.registry_problem), "red"), soft_wrap=True)
    else:
        console.print(bundles_view(found.bundles))
