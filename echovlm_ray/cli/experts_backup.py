"""`echoray experts backup` and `restore`: the state of the rollouts in one file, and back."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from echovlm_ray.cli.control import SystemName
from echovlm_ray.cli.experts_targets import EXIT_INVALID, AsJSON
from echovlm_ray.cli.terminal import say, say_json
from echovlm_ray.cli.work import clear_errors, fail

if TYPE_CHECKING:
    from echovlm_ray.cli.state import LocalSystem
    from echovlm_ray.config import Config
    from echovlm_ray.serving.cluster.rollout_files import RolloutFiles

ConfigFile = Annotated[Path | None, typer.Option(help="The YAML file that the system is served with.")]
Checkpoint = Annotated[Path | None, typer.Option(help="The checkpoint that it serves; wins over the file.")]


def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to make; one that exists is never replaced.")],
    config: ConfigFile = None,
    checkpoint: Checkpoint = None,
    name: SystemName = None,
    as_json: AsJSON = False,
) -> None:
    """Copies the rollouts' database into one file, also while a system uses it.

    Without options it is that of the system that you run on this machine, and while none runs, that of the defaults.

    In it is which versions are live, every rollout, and the history, whose chain of hashes is checked. Copying
    rollouts.db by other means may leave out what was written last. The bundles are not in it: the registry is a folder
    of files that never change, which any other backup copies.

    A system on PostgreSQL is backed up with pg_dump.

    Exit status: 0 done; 1 the database is damaged or cannot be copied; 2 wrong options.

    Example: `echoray experts backup rollouts-monday.db --checkpoint checkpoints/demo`
    """
    with _failures():
        from echovlm_ray.serving.control.rollout_backup import back_up

        files = _files_of(config, checkpoint, name)
        found = back_up(files, file.absolute())
    shown: dict[str, Any] = {
        "file": str(file),
        "database": str(files.base),
        "entries": found.entries,
        "head": found.head,
        "bytes": found.size_bytes,
    }
    if as_json:
        say_json(shown, indent=2)
        return
    say(f"{file} has the whole state of {files.base}, in {found.size_bytes:,} bytes.")
    say(f"Its history is intact: {found.entries} entries, head {found.head}")


def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `echoray experts backup` made.")],
    config: ConfigFile = None,
    checkpoint: Checkpoint = None,
    as_json: AsJSON = False,
) -> None:
    """Puts a backup in the place of the rollouts' database; the system must be stopped.

    The file is checked first: that it is whole, that its history's chain of hashes holds, and that it belongs to this
    checkpoint. The database that was there is kept beside it. Bundles that the backup names must be in the registry.

    A system on PostgreSQL is restored with pg_restore.

    Exit status: 0 done; 1 the file is no sound backup, or a system is running; 2 wrong options.

    Example: `echoray experts restore rollouts-monday.db --checkpoint checkpoints/demo`
    """
    with _failures():
        from echovlm_ray.serving.cluster.rollout_files import RolloutFiles
        from echovlm_ray.serving.cluster.served import served_checkpoint
        from echovlm_ray.serving.control.rollout_backup import restore as put_back

        parsed = _load(config, checkpoint)
        served = served_checkpoint(parsed.model)
        files = RolloutFiles.of(parsed.rollouts, parsed.model.checkpoint)
        found, kept = put_back(file.absolute(), files, served.expert_set)
    if as_json:
        shown = {
            "database": str(found.path),
            "entries": found.entries,
            "head": found.head,
            "kept": None if kept is None else str(kept),
        }
        say_json(shown, indent=2)
        return
    say(f"{found.path} is what {file} has: {found.entries} entries of history, head {found.head}.")
    if kept is not None:
        say(f"What was there before is kept as {kept}.")
    say("Next: echoray serve, and then echoray experts list")


def _files_of(config: Path | None, checkpoint: Path | None, name: str | None) -> "RolloutFiles":
    """Where the state lies of the system that the options name, or else of the one that runs here."""
    from echovlm_ray.cli.state import running_systems, system_named
    from echovlm_ray.serving.cluster.rollout_files import RolloutFiles

    named = config is not None or checkpoint is not None
    if named and name is not None:
        fail("--name is the running system's: leave --config and --checkpoint away", EXIT_INVALID)
    try:
        running = [] if named else running_systems() if name is None else [system_named(name)]
    except ValueError as error:
        fail(str(error), EXIT_INVALID)
    if len(running) == 1:
        return _files_of_running(running[0])
    parsed = _load(config, checkpoint)
    files = RolloutFiles.of(parsed.rollouts, parsed.model.checkpoint)
    if running and all(system.database != str(files.base) for system in running):
        which = ", ".join(f"{system.name or system.pid} ({system.database or 'no file'})" for system in running)
        fail(
            f"several systems of yours run here, {which}: say which with --name, --config or --checkpoint",
            EXIT_INVALID,
        )
    return files


def _files_of_running(system: "LocalSystem") -> "RolloutFiles":
    from echovlm_ray.serving.cluster.rollout_files import SQLITE, RolloutFiles

    if not system.database:
        fail(
            f"the system that runs here as process {system.pid} keeps its state in PostgreSQL, or keeps none: with "
            "PostgreSQL use pg_dump"
        )
    return RolloutFiles(f"{SQLITE}{system.database}", Path(system.database))


def _load(config: Path | None, checkpoint: Path | None) -> "Config":
    from echovlm_ray.config_file import load_system_config
    from echovlm_ray.serving.deploy.preflight import resolve_paths

    try:
        return resolve_paths(load_system_config(config, checkpoint))
    except ValueError as error:
        fail(str(error), EXIT_INVALID)


@contextmanager
def _failures() -> Iterator[None]:
    from router.errors import RolloutDatabaseError, RolloutStateError

    with clear_errors():
        try:
            yield
        except (RolloutDatabaseError, RolloutStateError, ValueError) as error:
            fail(" ".join(str(error).split()))
