"""`echoray experts stage`, `canary`, `shadow`, `promote`, `rollback`, `retire` and `apply`, through Control."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from echovlm_ray.cli.control import EXIT_FAILED, EXIT_INVALID, Actor, DryRun, Reason, Wait, actor_of, with_control
from echovlm_ray.cli.experts_targets import AsJSON
from echovlm_ray.cli.gate_format import Gates, Override, check_override, gates_json
from echovlm_ray.cli.rollout_expected import RolloutId, candidate_seen, stable_seen
from echovlm_ray.cli.rollout_format import format_state, operation_as_dict, short
from echovlm_ray.cli.rollout_tables import memory_view
from echovlm_ray.cli.rollout_wait import Reached, has_taken_over, has_traffic, is_gone, is_loaded, wait_until
from echovlm_ray.cli.terminal import console_of, line, name_of, say, say_json, styled
from echovlm_ray.cli.work import fail
from echovlm_ray.client.control import ExpertControlClient

if TYPE_CHECKING:
    from protos.control_pb2 import OperationResponse, Rollout
    from router.rollouts.rollout_file import RolloutFile

_DIGEST_START = re.compile(r"[0-9a-f]{6,64}")
_WHOLE_DIGEST = 64

Organ = Annotated[str, typer.Argument(metavar="ORGAN", help="The organ, like heart.")]
Percent = Annotated[float, typer.Option(help="Percentage of the organ's requests: above 0, at most 100.")]
Digest = Annotated[
    str, typer.Option(help="Only if the candidate has this digest, or a digest with this prefix. [default: looked up]")
]


@with_control
def stage(
    control: ExpertControlClient,
    organ: Organ,
    bundle: Annotated[str, typer.Argument(metavar="VERSION|DIGEST", help="The bundle, by version or digest.")],
    reason: Reason = "",
    actor: Actor = None,
    dry_run: DryRun = False,
    wait: Wait = False,
    as_json: AsJSON = False,
) -> None:
    """Begins a rollout: a bundle of the registry is verified and loaded on every replica, without traffic.

    The organ may be a new one. With `--wait` the command ends when the candidate is loaded on every replica.

    Exit status of all these commands: 0 done, or nothing to do; 1 refused, failed, or in a dry run not enough memory; 2
    invalid options or an unknown organ or version; 3 Control does not answer; 5 credentials; 130 Ctrl-C.

    Example: `echoray experts stage heart 1.1.0 --reason "finer valves" --wait`
    """
    version, digest = _bundle(control, organ, bundle)
    response = control.stage(
        organ, version=version, digest=digest, actor=actor_of(actor), reason=reason, dry_run=dry_run
    )
    _finish(control, response, dry_run, as_json, is_loaded if wait else None)
    if response.HasField("rollout") and not (dry_run or as_json):
        say(
            f"Next: echoray experts canary {organ} --percent 5 --rollout {response.rollout.id}"
            if wait
            else _watch(organ)
        )


@with_control
def canary(
    control: ExpertControlClient,
    organ: Organ,
    percent: Percent,
    rollout: RolloutId = "",
    digest: Digest = "",
    reason: Reason = "",
    actor: Actor = None,
    gates: Gates = None,
    override: Override = False,
    dry_run: DryRun = False,
    wait: Wait = False,
    as_json: AsJSON = False,
) -> None:
    """Sends a share of the requests to the candidate. Requests of one session stay with one version.

    The candidate is rolled back automatically if it fails too often, is too slow or computes NaN or infinity. This
    command ends the automatic steps of a rollout file. With `--wait` it ends when the canary has begun.

    Example: `echoray experts canary heart --percent 5`
    """
    check_override(override, reason)
    digest = _whole(control, organ, digest)
    response = control.canary(
        organ,
        percent,
        digest=digest,
        actor=actor_of(actor),
        reason=reason,
        expected=candidate_seen(control, organ, rollout, digest),
        dry_run=dry_run,
        gates_json=gates_json(gates),
        override=override,
    )
    _finish(control, response, dry_run, as_json, has_traffic("canary", percent) if wait else None)


@with_control
def shadow(
    control: ExpertControlClient,
    organ: Organ,
    percent: Percent,
    rollout: RolloutId = "",
    digest: Digest = "",
    reason: Reason = "",
    actor: Actor = None,
    dry_run: DryRun = False,
    as_json: AsJSON = False,
) -> None:
    """Mirrors a share of the requests to the candidate; its answers are discarded.

    `echoray experts list` shows how much the answers of candidate and incumbent agree.

    Example: `echoray experts shadow heart --percent 20`
    """
    digest = _whole(control, organ, digest)
    response = control.shadow(
        organ,
        percent,
        digest=digest,
        actor=actor_of(actor),
        reason=reason,
        expected=candidate_seen(control, organ, rollout, digest),
        dry_run=dry_run,
    )
    _finish(control, response, dry_run, as_json)


@with_control
def promote(
    control: ExpertControlClient,
    organ: Organ,
    rollout: RolloutId = "",
    digest: Digest = "",
    reason: Reason = "",
    actor: Actor = None,
    gates: Gates = None,
    override: Override = False,
    dry_run: DryRun = False,
    wait: Wait = False,
    as_json: AsJSON = False,
) -> None:
    """Makes the candidate the organ's version for all new requests. Running requests keep their version.

    With `--wait` the command ends when no request uses the previous version any more.

    A candidate that did not pass its evaluations is refused, with the figures.

    Example: `echoray experts promote heart --reason "agrees with the board" --wait`
    """
    check_override(override, reason)
    digest = _whole(control, organ, digest)
    response = control.promote(
        organ,
        digest=digest,
        actor=actor_of(actor),
        reason=reason,
        expected=candidate_seen(control, organ, rollout, digest),
        dry_run=dry_run,
        gates_json=gates_json(gates),
        override=override,
    )
    _finish(control, response, dry_run, as_json, has_taken_over if wait else None)


@with_control
def rollback(
    control: ExpertControlClient,
    organ: Organ,
    rollout: RolloutId = "",
    stable: Annotated[
        str,
        typer.Option(
            metavar="VERSION|DIGEST",
            help="Roll back this version, which must be the stable one, to the previous one.",
        ),
    ] = "",
    digest: Digest = "",
    reason: Reason = "",
    actor: Actor = None,
    dry_run: DryRun = False,
    wait: Wait = False,
    as_json: AsJSON = False,
) -> None:
    """Rolls back the candidate, or with `--stable` the stable version.

    If nothing is in flight, nothing is changed, and the message has the last event. With `--wait` the command ends when
    no request uses the version any more and its memory is free.

    With `--stable` the previous version is verified and loaded first, and the stable one serves until then. If another
    version is stable now, nothing is changed.

    Example: `echoray experts rollback heart --reason "misses effusions" --wait`

    Example: `echoray experts rollback heart --stable 1.1.0 --reason "misses effusions" --wait`
    """
    if stable:
        if rollout or digest:
            fail("--stable names the stable version: leave out --rollout and --digest", EXIT_INVALID)
        version, named = _bundle(control, organ, stable)
        response = control.roll_back_stable(
            organ, version=version, digest=named, actor=actor_of(actor), reason=reason, dry_run=dry_run
        )
        _finish(control, response, dry_run, as_json, has_taken_over if wait else None)
        return
    digest = _whole(control, organ, digest)
    expected = candidate_seen(control, organ, rollout, digest)
    # An automatic step in between must not prevent the rollback.
    expected.ClearField("state")
    expected.ClearField("percent")
    if expected.nothing_in_flight:
        # Sent only as a dry run, to get the last event: an older Control would roll back the stable version.
        dry_run = True
    response = control.rollback(
        organ, digest=digest, actor=actor_of(actor), reason=reason, expected=expected, dry_run=dry_run
    )
    _finish(control, response, dry_run, as_json, is_gone if wait else None)


@with_control
def retire(
    control: ExpertControlClient,
    organ: Organ,
    version: Annotated[
        str,
        typer.Option(
            help="Only retire this version or digest, which then cannot be staged again. [default: the whole organ]"
        ),
    ] = "",
    reason: Reason = "",
    actor: Actor = None,
    dry_run: DryRun = False,
    as_json: AsJSON = False,
) -> None:
    """Retires an organ permanently, or with `--version` one of its versions.

    Example: `echoray experts retire heart --version 1.0.1 --reason "trained on the wrong labels"`
    """
    named, digest = _bundle(control, organ, version) if version else ("", "")
    response = control.retire(
        organ,
        version=named,
        digest=digest,
        actor=actor_of(actor),
        reason=reason,
        expected=None if version else stable_seen(control, organ),
        dry_run=dry_run,
    )
    _finish(control, response, dry_run, as_json)


@with_control
def apply(
    control: ExpertControlClient,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The rollout file, in YAML.")],
    actor: Actor = None,
    dry_run: DryRun = False,
    wait: Wait = False,
    as_json: AsJSON = False,
) -> None:
    """Begins the rollout that a file describes, with its steps and thresholds. Applying it again changes nothing.

    With `--wait` the command ends when the last step of the file has begun, or the candidate was promoted if the file
    says so.

    Example: `echoray experts apply rollout.yaml --wait`
    """
    from echovlm_ray.cli.rollout_yaml import read_rollout_file
    from echovlm_ray.yaml_document import DocumentError

    try:
        rollout_file = read_rollout_file(file)
    except DocumentError as error:
        fail(str(error), EXIT_INVALID)
    response = control.apply(rollout_file.model_dump_json(), actor=actor_of(actor), dry_run=dry_run)
    _finish(control, response, dry_run, as_json, _last_step(rollout_file) if wait else None)
    if response.changed and not (as_json or wait):
        say(_watch(rollout_file.organ))


def _last_step(file: "RolloutFile") -> Reached:
    if file.promote:
        return has_taken_over
    if not file.steps:
        return is_loaded
    last = file.steps[-1]
    return has_traffic(last.mode, last.percent)


def _finish(
    control: ExpertControlClient,
    response: "OperationResponse",
    dry_run: bool,
    as_json: bool,
    reached: Reached | None = None,
) -> None:
    """Prints the outcome, waits if requested, and sets the exit status."""
    if not as_json:
        _print(response, dry_run)
    if reached is not None and response.HasField("rollout") and not dry_run:
        rollout = wait_until(control, response.rollout, reached)
        response.rollout.CopyFrom(rollout)
        if not as_json:
            say(f"{_named(rollout)} is {name_of(format_state(rollout))}.")
    if as_json:
        say_json(operation_as_dict(response))
    if dry_run and any(not memory.fits for memory in response.memory):
        raise typer.Exit(EXIT_FAILED)


def _print(response: "OperationResponse", dry_run: bool) -> None:
    console = console_of()
    if dry_run:
        console.print("Nothing was done. This would happen:", style="bold")
    elif not response.changed:
        console.print("Nothing to do.", style="bold")
    elif response.HasField("rollout"):
        console.print(f"{_named(response.rollout)}, rollout {name_of(response.rollout.id)}:", style="bold")
    else:
        console.print("Done:", style="bold")
    for step in response.steps:
        console.print(f"  {line(step)}", soft_wrap=True)
    for missing in response.not_taken_up:
        console.print(styled(f"  still in effect as before: {line(missing)}", "yellow"), soft_wrap=True)
    if response.memory:
        console.print(memory_view(response.memory))


def _named(rollout: "Rollout") -> str:
    return f"{name_of(rollout.organ)} {name_of(rollout.version or short(rollout.digest))}"


def _watch(organ: str) -> str:
    return f"See how it goes: echoray experts watch {organ}"


def _bundle(control: ExpertControlClient, organ: str, text: str) -> tuple[str, str]:
    """Version and digest, of which one is given. No semantic version looks like the prefix of a digest."""
    if _DIGEST_START.fullmatch(text):
        return "", _whole(control, organ, text)
    return text, ""


def _whole(control: ExpertControlClient, organ: str, start: str) -> str:
    """The digest with this prefix among the organ's bundles and rollouts."""
    if not start or len(start) == _WHOLE_DIGEST:
        return start
    if not _DIGEST_START.fullmatch(start):
        fail(f"{start!r} is no digest: give its 64 hexadecimal digits, or at least the first 6", EXIT_INVALID)
    found = control.list(organ)
    known = {bundle.digest for bundle in found.bundles} | {rollout.digest for rollout in found.rollouts}
    matching = sorted(digest for digest in known if digest.startswith(start))
    if not matching:
        bundles = ", ".join(f"{bundle.version} ({short(bundle.digest)})" for bundle in found.bundles)
        fail(f"no bundle of {organ} begins with {start}; there are {bundles or 'none'}", EXIT_INVALID)
    if len(matching) > 1:
        fail(f"several bundles of {organ} begin with {start}: {', '.join(matching)}", EXIT_INVALID)
    return matching[0]
