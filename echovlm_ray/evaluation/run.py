"""One evaluation from the dataset to the result: questions, answers, scores, examples."""

import base64
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from echovlm_ray.client import AsyncEchoVLMClient
from echovlm_ray.data.dataset import RecordDataset
from echovlm_ray.data.draws import epoch_order
from echovlm_ray.data.media import ImageRoot
from echovlm_ray.evaluation.answers import Answer, AnswerLog
from echovlm_ray.evaluation.asking import Asking, Outcome, ask_all, target_of, work_of
from echovlm_ray.evaluation.baselines import ASKED, Variant, commonest_answers
from echovlm_ray.evaluation.items import Item, LoadedItems, load_items
from echovlm_ray.evaluation.judging import Judgement
from echovlm_ray.evaluation.result import EvaluationResult, Example
from echovlm_ray.evaluation.scoring import Answered, group_scores, metrics_of
from echovlm_ray.evaluation.settings import AskSettings, RequestLimits, ScoreSettings, Target, settings_digest
from echovlm_ray.vision.images import ImageLimits, decode_image_file

ANSWERS_FILE = "answers.jsonl"
RESULT_FILE = "result.json"
THUMBNAIL_PIXELS = 256


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of an evaluation.

    Attributes:
        dataset: a JSON or JSON Lines file.
        root: the folder of its images.
        output: the folder for answers and results.
        limit: only so many records, the first ones; None takes all.
        examples: how many records the report page shows.
        bert_model: the folder of a model for BERTScore.
    """

    dataset: Path
    root: ImageRoot
    output: Path
    limits: ImageLimits
    asking: AskSettings
    scoring: ScoreSettings
    request_limits: RequestLimits
    limit: int | None = None
    examples: int = 12
    bert_model: Path | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress for the caller: the total once, then each question that has ended."""

    start: Callable[[int], None]
    advance: Callable[[int], None]


async def ask(
    plan: Plan, loaded: LoadedItems, client: AsyncEchoVLMClient, log: AnswerLog, progress: Progress
) -> tuple[Target, Outcome]:
    """Sends all questions without an answer, including the baselines'.

    Raises:
        ServiceLostError: the service was unavailable or overloaded for too long.
        EchoVLMError: the service refuses every request, or does not answer.
        UnusableImageError: an image is missing.
        InvalidDataError: the images of the baseline cannot be exchanged.
    """
    target = target_of(await client.model_info(timeout_s=plan.request_limits.timeout_s))
    digest = settings_digest(target, plan.asking, plan.scoring.seed)
    work = work_of(loaded.items, plan.scoring.seed)
    progress.start(len(work))
    run = Asking(plan.root, log, digest, plan.asking, plan.request_limits, plan.limits, plan.scoring.seed)
    return target, await ask_all(client, work, run, progress.advance)


def score(plan: Plan, loaded: LoadedItems, target: Target, outcome: Outcome) -> EvaluationResult:
    """Scores the answers; a missing answer counts as empty."""
    items = loaded.items
    groups = []
    judgements: list[Judgement] = []
    for answered in variants_of(items, outcome.answers):
        metrics, judged = metrics_of(items, answered, plan.bert_model)
        if answered.variant == "model":
            judgements = judged
        groups += group_scores(items, answered.variant, metrics, plan.scoring)
    return EvaluationResult(
        dataset=str(plan.dataset),
        dataset_digest=dataset_digest(items),
        target=target,
        settings=settings_digest(target, plan.asking, plan.scoring.seed),
        asking=plan.asking,
        scoring=plan.scoring,
        records=len(items),
        notices=_notices(loaded, target, outcome),
        failed=outcome.failed,
        groups=groups,
        examples=_examples(plan, items, outcome.answers["model"], judgements),
    )


def variants_of(items: Sequence[Item], answers: dict[Variant, dict[int, Answer]]) -> list[Answered]:
    """The answers of the model and each baseline, in the order of the items."""
    variants = []
    for variant in ASKED:
        found = [answers[variant].get(item.index) for item in items]
        texts = ["" if answer is None else answer.text for answer in found]
        variants.append(Answered(variant, texts, [_chosen_organ(answer) for answer in found]))
    variants.append(Answered("commonest report", commonest_answers(items), [None] * len(items)))
    return variants


def _chosen_organ(answer: Answer | None) -> str | None:
    if answer is None or answer.organ_source in ("", "caller", "flat", "unspecified") or not answer.organs:
        return None
    # The default organ was used, so the gate determined nothing.
    return "" if answer.organ_source == "default" else max(answer.organs.items(), key=lambda entry: entry[1])[0]


def dataset_digest(items: Sequence[Item]) -> str:
    """The identity of the questions, right answers and their order; equal ones are comparable."""
    digest = hashlib.sha256()
    for item in items:
        content = [item.id, item.organ, item.task, item.language, item.request.prompt, item.references, item.answer]
        digest.update(json.dumps([*content, item.media, repr(item.attributes)], ensure_ascii=False).encode())
    return digest.hexdigest()


def load(plan: Plan) -> LoadedItems:
    """The dataset's items.

    Raises:
        InvalidDataError: see `items.load_items`.
        OSError: the file cannot be opened.
    """
    with RecordDataset(plan.dataset) as dataset:
        return load_items(dataset, plan.limit)


def _notices(loaded: LoadedItems, target: Target, outcome: Outcome) -> list[str]:
    notices = [f"each record says of itself: {remark}" for remark in loaded.remarks]
    if loaded.left_out:
        shown = "; ".join(loaded.left_out[:5])
        notices.append(
            f"{len(loaded.left_out)} records ask several questions, which a service cannot be asked, and are left out: "
            f"{shown}{' …' if len(loaded.left_out) > 5 else ''}"
        )
    said = [answer for answers in outcome.answers.values() for answer in answers.values()]
    if refused := sum(bool(answer.refused) for answer in said):
        notices.append(f"{refused} requests were refused by the service; they count as empty answers")
    if empty := sum(not answer.text.strip() and not answer.refused for answer in said):
        notices.append(f"{empty} answers are empty")
    if cut := sum(answer.finish_reason == "length" for answer in said):
        notices.append(f"{cut} answers were cut off at the limit of new tokens: raise --max-new-tokens")
    others = {answer.expert_set_id for answer in said if answer.expert_set_id} - {target.expert_set_id}
    if others:
        count = sum(answer.expert_set_id in others for answer in said)
        notices.append(
            f"{count} answers came from other experts than those that were live at the start: a version was promoted "
            "or tried meanwhile, and these scores mix them"
        )
    if outcome.failed:
        notices.append("some questions have no answer; they count as empty answers, and the evaluation is not complete")
    return notices


def _examples(
    plan: Plan, items: Sequence[Item], answers: dict[int, Answer], judgements: Sequence[Judgement]
) -> list[Example]:
    """Some records of all organs and tasks, drawn from the seed."""
    order = epoch_order(len(items), plan.scoring.seed, 1)
    groups: dict[tuple[str, str, str], list[int]] = {}
    for place in order:
        item = items[place]
        groups.setdefault((item.organ, item.task, item.language), []).append(int(place))
    rounds = [members[turn] for turn in range(len(items)) for members in groups.values() if turn < len(members)]
    return [
        _example(plan, items[place], answers.get(items[place].index), judgements[place])
        for place in rounds[: plan.examples]
    ]


def _example(plan: Plan, item: Item, answer: Answer | None, judgement: Judgement) -> Example:
    verdict, right = _verdict(judgement)
    return Example(
        organ=item.organ,
        task=item.task,
        language=item.language,
        question=item.request.prompt,
        image=_thumbnail(plan, item),
        reference=item.references[0],
        answer="" if answer is None else answer.text,
        verdict=verdict,
        right=right,
    )


def _verdict(judgement: Judgement) -> tuple[str, bool | None]:
    """What an answer is worth in a few words, and whether it is right where that is known."""
    if judgement.exact:
        return "everything right", True
    if judgement.exact is not None:
        return f"not right: {', '.join(judgement.missed) or 'it says more than is true'}", False
    pair = judgement.choice or judgement.diagnosis
    if pair is None:
        return "no truth to compare with", None
    return ("right" if pair[0] == pair[1] else "wrong"), pair[0] == pair[1]


def _thumbnail(plan: Plan, item: Item) -> str:
    if not item.media:
        return ""
    content = plan.root.read(item.media[0], plan.limits.max_image_bytes)
    try:
        frame = decode_image_file(content, limits=plan.limits, field="").frames[0]
    except ValueError:
        # The service refused it too, which is in the notices.
        return ""
    image = Image.fromarray(frame)
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
