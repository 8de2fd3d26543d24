"""`echoray experts watch`, and the output of commands that wait: a live table, lines for a pipe, or JSON."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from echovlm_ray.cli.control import with_control
from echovlm_ray.cli.experts_targets import AsJSON
from echovlm_ray.cli.interruptible import interruptible
from echovlm_ray.cli.organ_problem import problem_as_dict
from echovlm_ray.cli.rollout_changes import changes
from echovlm_ray.cli.rollout_format import state_as_dict, versions_of
from echovlm_ray.cli.rollout_tables import state_view
from echovlm_ray.cli.terminal import console_of, say, say_json
from echovlm_ray.client.control import ExpertControlClient
from echovlm_ray.client.errors import CallCancelledError, EchoVLMError, InternalServerError, UnavailableError

if TYPE_CHECKING:
    from protos.control_pb2 import ControlState

# How long Control may be unavailable, for example during a restart, before watching ends.
TIMEOUT_S = 60.0
RECONNECT_S = 0.5
REDRAW_PER_SECOND = 4

Show = Callable[["ControlState"], None]


@with_control
def watch(
    control: ExpertControlClient,
    organ: Annotated[str, typer.Argument(metavar="[ORGAN]", help="Only this organ.")] = "",
    as_json: AsJSON = False,
) -> None:
    """Shows live versions, rollouts, and loaded bundles of every replica until Ctrl-C.

    On a terminal it is a live table, otherwise a line for every change; with `--json` one object per line.

    Example: `echoray experts watch heart`
    """
    watch_state(control, organ, as_json)


def watch_state(control: ExpertControlClient, organ: str, as_json: bool) -> None:
    """Shows every state until Ctrl-C."""
    names = Versions(control)
    names.check_organ(organ)
    try:
        with (
            _json_lines(names, organ) if as_json else display(names, organ, console_of()) as show,
            states(control) as shown,
        ):
            for state in shown:
                show(state)
    except KeyboardInterrupt:
        return


class Versions:
    """The versions of the shown digests; looked up for new digests."""

    def __init__(self, control: ExpertControlClient) -> None:
        self._control = control
        self._known: dict[str, str] = {}

    def check_organ(self, organ: str) -> None:
        """Checks with Control that an organ exists.

        Raises:
            NotFoundError: there is no such organ; the text lists the existing ones.
        """
        if organ:
            self._control.list(organ)

    def of(self, state: "ControlState") -> dict[str, str]:
        """Digest → version of all bundles in a state, if the registry has them."""
        digests = {member.bundle_digest for member in state.live.members}
        digests |= {share.digest for replica in state.replicas for share in replica.bundles}
        self._known |= versions_of((), state.rollouts)
        if digests - set(self._known):
            try:
                self._known |= versions_of(self._control.list().bundles)
            except EchoVLMError:
                # Digests identify the bundles, too.
                return self._known
            self._known |= dict.fromkeys(digests - set(self._known), "")
        return self._known


@contextmanager
def states(control: ExpertControlClient) -> Iterator[Iterator["ControlState"]]:
    """Yields every state until Ctrl-C, also across restarts of Control, which are reported on stderr.

    Args:
        control: the client; retried for a minute when Control is unavailable.

    The iterator raises:
        EchoVLMError: Control is unavailable.
        KeyboardInterrupt: after Ctrl-C.
    """
    with interruptible(_states(control)) as found:
        yield _with_absences_shown(found)


def _with_absences_shown(found: Iterator["ControlState | None"]) -> Iterator["ControlState"]:
    for state in found:
        if state is None:
            say("Control does not answer; trying again …", err=True)
        else:
            yield state


def _states(control: ExpertControlClient) -> Iterator["ControlState | None"]:
    """Yields the states, and None once when Control becomes unavailable."""
    seen = False
    lost_at: float | None = None
    while True:
        try:
            with closing(control.watch()) as watching:  # type: ignore[type-var] # it is a generator
                for state in watching:
                    seen, lost_at = True, None
                    yield state
            raise UnavailableError("Control ended the watch")
        except (UnavailableError, CallCancelledError, InternalServerError):
            now = time.monotonic()
            if not seen or (lost_at is not None and now - lost_at > TIMEOUT_S):
                raise
        if lost_at is None:
            lost_at = now
            yield None
        time.sleep(RECONNECT_S)


@contextmanager
def display(names: Versions, organ: str, console: Console, note: str = "") -> Iterator[Show]:
    """Shows states: on a terminal in a live table, otherwise in lines.

    Args:
        names: the versions.
        organ: only this organ, if given.
        console: the output.
        note: shown below the table.
    """
    if console.is_terminal:
        with _live_table(names, organ, console, note) as show:
            yield show
    else:
        yield _lines(names, organ, console)


@contextmanager
def _live_table(names: Versions, organ: str, console: Console, note: str) -> Iterator[Show]:
    latest: list[tuple[ControlState, dict[str, str]]] = []

    def draw() -> RenderableType:
        if not latest:
            return Text("waiting for Control …", style="dim")
        state, versions = latest[0]
        # Redrawn regularly, because times change.
        table = state_view(state.live, state.rollouts, state.replicas, versions, organ)
        return Group(table, Text(note, style="dim")) if note else table

    def show(state: "ControlState") -> None:
        latest[:] = [(state, dict(names.of(state)))]

    with Live(get_renderable=draw, console=console, refresh_per_second=REDRAW_PER_SECOND):
        yield show


def _lines(names: Versions, organ: str, console: Console) -> Show:
    before: list[ControlState] = []

    def show(state: "ControlState") -> None:
        now = datetime.now().astimezone().strftime("%H:%M:%S")
        for change in changes(before[0] if before else None, state, names.of(state), organ):
            console.print(f"{now} {change}", soft_wrap=True)
        before[:] = [state]

    return show


@contextmanager
def _json_lines(names: Versions, organ: str) -> Iterator[Show]:
    def show(state: "ControlState") -> None:
        shown = state_as_dict(state.live, state.rollouts, state.replicas, names.of(state), organ)
        problems = [problem_as_dict(problem) for problem in state.problems]
        rest = {"problems": problems, "not_taken_up": list(state.not_taken_up)}
        say_json({"version": state.version, **shown, **rest})

    yield show
