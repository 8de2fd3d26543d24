"""The steps of `echoray eval run`: plan, ask, score, write. Loaded by it alone."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from echovlm_ray.checkpoint.atomic import naming_file
from echovlm_ray.cli.data_sets import usable
from echovlm_ray.cli.work import fail
from echovlm_ray.client import (
    AsyncEchoVLMClient,
    EchoVLMError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
)
from echovlm_ray.client.connection import DEFAULT_ADDRESS
from echovlm_ray.config import GatewaySection
from echovlm_ray.data.media import ImageRoot
from echovlm_ray.evaluation.answers import AnswerLog
from echovlm_ray.evaluation.asking import Outcome, ServiceLostError
from echovlm_ray.evaluation.items import LoadedItems
from echovlm_ray.evaluation.page import report_page
from echovlm_ray.evaluation.plots import draw_scores
from echovlm_ray.evaluation.result import EvaluationResult
from echovlm_ray.evaluation.run import ANSWERS_FILE, RESULT_FILE, Plan, ask, score
from echovlm_ray.evaluation.run import Progress as ProgressCallbacks
from echovlm_ray.evaluation.settings import AskSettings, RequestLimits, ScoreSettings, Target
from echovlm_ray.vision.images import ImageLimits

EXIT_INCOMPLETE = 1
EXIT_UNAVAILABLE = 3
EXIT_CREDENTIALS = 5
EXIT_INTERRUPTED = 130


def plan_of(
    dataset: Path,
    output: Path,
    images: Path | None,
    asking: AskSettings,
    scoring: ScoreSettings,
    request_limits: RequestLimits,
    *,
    limit: int | None,
    examples: int,
    bert_model: Path | None,
) -> Plan:
    """The plan of a command line, with the image limits that a gateway has by default.

    Raises:
        ValueError: there is no folder of images.
    """
    gateway = GatewaySection()
    limits = ImageLimits(gateway.max_image_bytes, gateway.max_image_pixels, gateway.max_frames, gateway.crop_to_regions)
    root = ImageRoot(images or dataset.parent)
    return Plan(dataset, root, output, limits, asking, scoring, request_limits, limit, examples, bert_model)


def answers_of(
    plan: Plan,
    loaded: LoadedItems,
    server: str | None,
    checkpoint: Path | None,
    threads: int,
    connection: dict[str, Any],
    console: Console,
) -> tuple[Target, Outcome]:
    """Asks the unanswered questions; ends the command with its own exit status where that fails."""
    address = server or DEFAULT_ADDRESS
    with usable(), AnswerLog(plan.output / ANSWERS_FILE) as log:
        before = len(log)
        resumed = f"; {before} answers are there already" if before else ""
        goes_on = "the same command goes on from there"
        try:
            return asyncio.run(_ask(plan, loaded, log, address, checkpoint, threads, connection, console, resumed))
        except (KeyboardInterrupt, asyncio.CancelledError):
            fail(f"interrupted; {len(log)} answers are kept, and {goes_on}", code=EXIT_INTERRUPTED)
        except ServiceLostError as error:
            fail(f"{error}; {len(log)} answers are kept, and {goes_on}", code=EXIT_UNAVAILABLE)
        except UnavailableError as error:
            fail(
                f"no EchoVLM server answers at {address}: start one with `make serve` ({error})", code=EXIT_UNAVAILABLE
            )
        except (UnauthenticatedError, PermissionDeniedError) as error:
            fail(f"{error} (give the token's file with --token-file)", code=EXIT_CREDENTIALS)
        except EchoVLMError as error:
            fail(f"{error} (request {error.request_id})", code=EXIT_INCOMPLETE)


async def _ask(
    plan: Plan,
    loaded: LoadedItems,
    log: AnswerLog,
    address: str,
    checkpoint: Path | None,
    threads: int,
    connection: dict[str, Any],
    console: Console,
    resumed: str,
) -> tuple[Target, Outcome]:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        shown = bar.add_task(f"asking{resumed}", total=None)
        callbacks = ProgressCallbacks(
            lambda total: bar.update(shown, total=total), lambda count: bar.advance(shown, count)
        )
        async with _client(address, checkpoint, threads, plan.request_limits.timeout_s, connection) as client:
            return await ask(plan, loaded, client, log, callbacks)


@asynccontextmanager
async def _client(
    address: str, checkpoint: Path | None, threads: int, timeout_s: float, connection: dict[str, Any]
) -> AsyncIterator[AsyncEchoVLMClient]:
    if checkpoint is None:
        async with AsyncEchoVLMClient(address, timeout_s=timeout_s, retry=False, **connection) as client:
            yield client
        return
    from echovlm_ray.serving.deploy.in_process import answering_checkpoint

    async with (
        answering_checkpoint(checkpoint, threads=threads) as local,
        AsyncEchoVLMClient(local, timeout_s=timeout_s, retry=False) as client,
    ):
        yield client


def write_result(plan: Plan, loaded: LoadedItems, target: Target, outcome: Outcome) -> EvaluationResult:
    """Scores the answers, and writes result, picture and page, each whole or not at all."""
    result = score(plan, loaded, target, outcome)
    figure = plan.output / "scores.png"
    with _replacing(figure) as partial:
        drawn = draw_scores(result, partial)
    if not drawn:
        figure.unlink()
    with _replacing(plan.output / "report.html") as partial, naming_file(partial):
        partial.write_text(report_page(result, figure if drawn else None), encoding="utf-8")
    with _replacing(plan.output / RESULT_FILE) as partial, naming_file(partial):
        partial.write_text(result.model_dump_json(indent=2), encoding="utf-8")
    return result


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file to write that takes the place of another when the block ends; what it holds is this user's alone."""
    partial = path.with_name(f".partial-{path.name}")
    partial.touch(mode=0o600)
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
