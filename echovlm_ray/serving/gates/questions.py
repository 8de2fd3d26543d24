"""Asks the serving routers a gate's questions, pinned to one version after another. Loaded for an evaluation alone."""

import asyncio
import tempfile
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from echovlm_ray.client import AsyncEchoVLMClient, DeadlineExceededError, EchoVLMError
from echovlm_ray.config import GatewaySection, RouterSection
from echovlm_ray.data.media import UnusableImageError
from echovlm_ray.errors import PartUnavailableError
from echovlm_ray.evaluation.answers import Answer, AnswerLog
from echovlm_ray.evaluation.asking import Asking, Outcome, ServiceLostError, Work, ask_all
from echovlm_ray.evaluation.settings import AskSettings, RequestLimits
from echovlm_ray.model.processing import EchoVLMProcessor
from echovlm_ray.serving.cluster.served import ServedCheckpoint
from echovlm_ray.serving.core.description import ModelDescription
from echovlm_ray.serving.gates.dataset import GateDataset
from echovlm_ray.serving.gates.figures import SEED
from echovlm_ray.serving.gates.pinned import Pace, PinnedRouterClient, answering_version
from echovlm_ray.vision.images import ImageLimits
from experts.transport.inner_channel import InnerChannels
from router.rollouts.gates import EvaluationInterruptedError, Gate, GateRun, UnusableGateError

# A report of the demo's model has some hundred tokens.
MAX_NEW_TOKENS = 256
CANCEL_POLL_S = 0.2
# A system that is busy for longer lets the evaluation begin again later.
REQUEST_LIMITS = RequestLimits(concurrency=1, timeout_s=120.0, retry_s=900.0)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Questioner:
    """Asks the questions of one dataset.

    Attributes:
        served: the checkpoint, whose tokenizer and image processor are used.
        routers: their addresses now.
        channels: opens channels to them.
        questions_per_s: that begin at most.
        gateway: the limits of images.
        limits: the limits of tokens.
        default_organ: of the model.
    """

    served: ServedCheckpoint
    routers: Callable[[], Sequence[str]]
    channels: InnerChannels
    questions_per_s: float
    gateway: GatewaySection
    limits: RouterSection
    default_organ: str

    def answers(self, run: GateRun, dataset: GateDataset, digests: Sequence[str]) -> list[list[str]]:
        """The answers of each version, one a record. Blocks; the answers are kept nowhere.

        Raises:
            UnusableGateError: a version does not answer, or refuses a question.
            EvaluationInterruptedError: the run was cancelled, or the system was away for long.
        """
        processor = EchoVLMProcessor.from_pretrained(self.served.directory)
        try:
            return asyncio.run(_cancellable(self._ask_all(run, dataset, processor, digests), run))
        except (ServiceLostError, PartUnavailableError) as error:
            raise EvaluationInterruptedError(str(error)) from None
        except UnusableImageError as error:
            raise UnusableGateError(f"the dataset {run.gate.dataset}: an image {error}") from None
        except EchoVLMError as error:
            raise UnusableGateError(f"the version cannot be asked: {error}") from None

    async def _ask_all(
        self, run: GateRun, dataset: GateDataset, processor: EchoVLMProcessor, digests: Sequence[str]
    ) -> list[list[str]]:
        """The answers of each version, one a record."""
        pace = Pace(self.questions_per_s)
        total = len(digests) * len(dataset.items)
        found: list[list[str]] = []
        for digest in digests:
            before = len(found) * len(dataset.items)
            run.progress(before, total)
            outcome = await self._ask(run, dataset, processor, digest, pace, before, total)
            if outcome.failed:
                reasons = ", ".join(f"{name} {count} times" for name, count in sorted(outcome.failed.items()))
                text = f"the version {digest[:12]}… did not answer every question: {reasons}; the routers' logs say why"
                if set(outcome.failed) == {DeadlineExceededError.__name__}:
                    # So it is where callers leave it no time, and a later try may find more.
                    raise EvaluationInterruptedError(text)
                raise UnusableGateError(text)
            said = outcome.answers["model"]
            if refused := next((answer.refused for answer in said.values() if answer.refused), ""):
                raise UnusableGateError(f"the service refuses a question of the dataset: {refused}")
            found.append(_texts(run.gate, [said[item.index] for item in dataset.items]))
        return found

    async def _ask(
        self,
        run: GateRun,
        dataset: GateDataset,
        processor: EchoVLMProcessor,
        digest: str,
        pace: Pace,
        before: int,
        total: int,
    ) -> Outcome:
        router = PinnedRouterClient(self.routers, self.channels, digest, pace)
        asking = AskSettings(max_new_tokens=min(MAX_NEW_TOKENS, self.limits.max_new_tokens), organs=run.gate.organs)
        answered = before

        def advance(count: int) -> None:
            nonlocal answered
            answered += count
            run.progress(answered, total)

        gateway = answering_version(router, processor, self._describe, self.gateway, self.limits)
        async with (
            gateway as address,
            AsyncEchoVLMClient(address, timeout_s=REQUEST_LIMITS.timeout_s, retry=False) as client,
        ):
            with _nameless_log() as log:
                work = [Work(item, item, "model") for item in dataset.items]
                limits = ImageLimits(
                    self.gateway.max_image_bytes,
                    self.gateway.max_image_pixels,
                    self.gateway.max_frames,
                    self.gateway.crop_to_regions,
                )
                asked = Asking(dataset.root, log, digest, asking, REQUEST_LIMITS, limits, SEED)
                return await ask_all(client, work, asked, advance)

    def _describe(self) -> ModelDescription:
        index = self.served.index
        return ModelDescription(
            index.name,
            index.version,
            index.description,
            index.backbone_digest,
            self.served.expert_set.id,
            (),
            self.default_organ,
        )


def _texts(gate: Gate, answers: Sequence[Answer]) -> list[str]:
    """The answers' texts; an empty one where experts of another organ answered.

    Raises:
        UnusableGateError: nothing tells the organ of any question.
    """
    own = [gate.organ in answer.organs for answer in answers]
    if not any(own) and all(answer.organ_source == "default" for answer in answers):
        raise UnusableGateError(
            f"nothing tells that the questions are about {gate.organ!r}, so other experts answered all of them: set "
            "`organs: given`, or give the bundle a prototype"
        )
    return [answer.text if answered else "" for answer, answered in zip(answers, own, strict=True)]


async def _cancellable(asked: Coroutine[Any, Any, T], run: GateRun) -> T:
    """The result of asking; ends it soon after the run is cancelled.

    Raises:
        EvaluationInterruptedError: the run was cancelled.
    """
    task = asyncio.ensure_future(asked)
    while not task.done():
        if run.cancelled.is_set():
            task.cancel()
            await asyncio.wait([task])
            raise EvaluationInterruptedError("it is not wanted any more")
        await asyncio.wait([task], timeout=CANCEL_POLL_S)
    return task.result()


def _nameless_log() -> AnswerLog:
    """A file of answers whose name is gone already: however this process ends, no answer stays on the disk."""
    with tempfile.TemporaryDirectory(prefix="echovlm-gate-answers-") as folder:
        return AnswerLog(Path(folder) / "answers.jsonl")
