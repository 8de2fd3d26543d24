"""Sends a dataset's questions to a service concurrently, and records every answer."""

import asyncio
import io
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from PIL import Image

from echovlm_ray.client import (
    Answer as ClientAnswer,
)
from echovlm_ray.client import (
    AsyncEchoVLMClient,
    CallCancelledError,
    DeadlineExceededError,
    EchoVLMError,
    GenerateOptions,
    InternalServerError,
    InvalidRequestError,
    ModelInfo,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)
from echovlm_ray.data.media import ImageRoot
from echovlm_ray.evaluation.answers import Answer, AnswerLog
from echovlm_ray.evaluation.baselines import ASKED, Variant, blank_image, shuffled
from echovlm_ray.evaluation.items import Item, question_digest
from echovlm_ray.evaluation.settings import AskSettings, RequestLimits, Target
from echovlm_ray.vision.images import ImageLimits, decode_image_file

# Errors that may be temporary, after which a question is retried.
TRIES = 3
# The default delay before a retry.
RETRY_S = 1.0


class ServiceLostError(RuntimeError):
    """The service is unavailable; earlier answers are stored."""


@dataclass(frozen=True, slots=True)
class Work:
    """One question of one variant: the item, and the item whose images are sent."""

    item: Item
    shown: Item
    variant: Variant


@dataclass(slots=True)
class Outcome:
    """The result of a run of questions.

    Attributes:
        answers: variant → item index → answer.
        failed: name of the error → number of questions without an answer.
    """

    answers: dict[Variant, dict[int, Answer]] = field(default_factory=lambda: {variant: {} for variant in ASKED})
    failed: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Asking:
    """The constant parameters of a run of questions.

    Attributes:
        root: the folder of the images.
        log: the file of answers.
        settings: their digest.
        asking: how questions are asked.
        request_limits: concurrency, and how long to wait for an unavailable service.
        limits: of an image, where a blank one of its size is made.
        seed: decides which images are exchanged.
    """

    root: ImageRoot
    log: AnswerLog
    settings: str
    asking: AskSettings
    request_limits: RequestLimits
    limits: ImageLimits
    seed: int


def work_of(items: Sequence[Item], seed: int) -> list[Work]:
    """All questions of a run, the model's own first.

    Raises:
        InvalidDataError: all records have the same images, so that none can be exchanged.
    """
    partners = shuffled(items, seed)
    work = [Work(item, item, "model") for item in items]
    work += [Work(item, item, "blank image") for item in items]
    work += [Work(item, items[partner], "shuffled images") for item, partner in zip(items, partners, strict=True)]
    return work


def target_of(info: ModelInfo) -> Target:
    """The identity of a served model."""
    return Target(
        name=info.name,
        version=info.version,
        backbone_digest=info.backbone_digest,
        expert_set_id=info.expert_set_id,
        organs={organ.organ: organ.bundle_version for organ in info.organs},
    )


async def ask_all(
    client: AsyncEchoVLMClient, work: Sequence[Work], run: Asking, progress: Callable[[int], None] = lambda count: None
) -> Outcome:
    """Sends the questions without an answer.

    Args:
        client: of the service; made with `retry=False`, since waiting is done here.
        work: see `work_of`.
        run: see `Asking`.
        progress: called with how many questions have been dealt with since the call before.

    Raises:
        ServiceLostError: the service was unavailable or overloaded for too long.
        EchoVLMError: the service refuses every request, for example because of a wrong token.
        UnusableImageError: an image is missing.
    """
    outcome = Outcome()
    questions: Iterator[Work] = iter(work)
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(run.request_limits.concurrency, len(work))):
                group.create_task(_worker(client, questions, run, outcome, progress))
    except BaseExceptionGroup as several:
        # They all end for one reason, and the others were cancelled.
        raise several.exceptions[0] from None
    return outcome


async def _worker(
    client: AsyncEchoVLMClient,
    questions: Iterator[Work],
    run: Asking,
    outcome: Outcome,
    progress: Callable[[int], None],
) -> None:
    for work in questions:
        images = await asyncio.to_thread(_images, work, run)
        organs = [work.item.organ] if run.asking.organs == "given" and work.item.organ != "unknown" else []
        question = question_digest(work.item.request, organs, images)
        answer = run.log.get((work.item.id, run.settings, work.variant, question))
        if answer is None:
            started = time.monotonic()
            found = await _ask_with_retries(client, work, images, organs, run)
            if isinstance(found, ClientAnswer | InvalidRequestError | NotFoundError):
                answer = _kept(work, run.settings, question, found, time.monotonic() - started)
                run.log.add(answer)
            else:
                name = type(found).__name__
                outcome.failed[name] = outcome.failed.get(name, 0) + 1
        if answer is not None:
            outcome.answers[work.variant][work.item.index] = answer
        progress(1)


def _images(work: Work, run: Asking) -> list[bytes]:
    contents = [run.root.read(path, run.limits.max_image_bytes) for path in work.shown.media]
    if work.variant != "blank image":
        return contents
    return [blank_image(*_size(content, run.limits)) for content in contents]


def _size(content: bytes, limits: ImageLimits) -> tuple[int, int]:
    """Width and height of an image as the model's input."""
    if content[128:132] != b"DICM":
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
            return image.width, image.height
    height, width, _ = decode_image_file(content, limits=limits, field="").frames[0].shape
    return width, height


async def _ask_with_retries(
    client: AsyncEchoVLMClient, work: Work, images: Sequence[bytes], organs: Sequence[str], run: Asking
) -> ClientAnswer | EchoVLMError:
    """The answer or the last error; waits as long as an overloaded service requests."""
    request = work.item.request
    options: GenerateOptions = {
        "task": request.task,
        "language": request.language,
        "prompt": request.prompt,
        "organs": organs,
        "max_new_tokens": run.asking.max_new_tokens,
    }
    waiting_since: float | None = None
    failures = 0
    while True:
        try:
            return await client.generate(images, timeout_s=run.request_limits.timeout_s, **options)
        except (OverloadedError, UnavailableError) as error:
            now = time.monotonic()
            waiting_since = waiting_since or now
            if now - waiting_since > run.request_limits.retry_s:
                raise ServiceLostError(
                    f"the service was away or full for {run.request_limits.retry_s:g} s: {error}"
                ) from None
            await asyncio.sleep(error.retry_after_s or RETRY_S)
        except (InvalidRequestError, NotFoundError) as error:
            return error
        except (DeadlineExceededError, InternalServerError, CallCancelledError) as error:
            failures += 1
            if failures == TRIES:
                return error
            await asyncio.sleep(RETRY_S)


def _kept(work: Work, settings: str, question: str, found: ClientAnswer | EchoVLMError, seconds: float) -> Answer:
    head = {"id": work.item.id, "settings": settings, "variant": work.variant, "question": question}
    if isinstance(found, EchoVLMError):
        return Answer.model_validate(head | {"text": "", "refused": f"{type(found).__name__}: {found}"})
    summary = found.summary
    return Answer.model_validate(
        head
        | {
            "text": found.text,
            "finish_reason": summary.finish_reason,
            "completion_tokens": summary.completion_tokens,
            "expert_set_id": summary.provenance.expert_set_id,
            "organs": {organ.organ: organ.routed_share for organ in summary.provenance.organs},
            "organ_source": summary.provenance.organ_source,
            "seconds": round(seconds, 4),
        }
    )
