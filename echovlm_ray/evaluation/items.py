"""The items of an evaluation: the question and the reference of each record."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from echovlm_ray.data.dataset import RecordDataset
from echovlm_ray.data.phantom.attributes import Attributes
from echovlm_ray.data.phantom.catalogue import UNKNOWN_ATTRIBUTES, UnknownClassError, read_attributes
from echovlm_ray.data.phantom.questions import Question, questions
from echovlm_ray.data.phantom.wording.render import STYLES, all_wordings, render_findings, render_impression
from echovlm_ray.data.record import InvalidDataError, Record, Request, language_of, media_paths, request_of, task_of
from echovlm_ray.tasks import TASKS, AnswerKind, Language, Stated


@dataclass(frozen=True, slots=True)
class Item:
    """One question with its right answer.

    Attributes:
        index: the record's number in the dataset.
        id: the record's id.
        organ: the region, "unknown" where the record does not say.
        task: as the record or its question says.
        language: of the answer.
        cluster: the unit of the bootstrap: the patient, or else the record.
        request: the request of the question.
        media: paths of images and videos in order.
        references: right wordings of the answer, the record's own first; none is empty.
        attributes: the images' attributes, if the record has them.
        question: the phantom's question that the record asks, where it is one.
        options, answer: see `Record`.
    """

    index: int
    id: str
    organ: str
    task: str
    language: Language
    cluster: str
    request: Request
    media: tuple[str, ...]
    references: tuple[str, ...]
    attributes: Attributes | None = None
    question: Question | None = None
    options: tuple[str, ...] = ()
    answer: str | None = None

    @property
    def kind(self) -> AnswerKind | None:
        """The kind of answer, which determines the metrics; None for an unknown task."""
        return TASKS[self.task].answer if self.task in TASKS else None

    @property
    def states(self) -> tuple[Stated, ...]:
        """The attributes that the answer states; empty for an unknown task."""
        return TASKS[self.task].states if self.task in TASKS else ()


# Of texts that records carry about themselves: how many are shown, and how much of each.
MAX_REMARKS = 3
MAX_REMARK = 200


@dataclass(frozen=True, slots=True)
class LoadedItems:
    """A dataset's items.

    Attributes:
        items: the usable items.
        left_out: the positions of records that cannot be sent to a service.
        remarks: the texts of the records' `notice`, each once; for phantoms, that they are synthetic.
    """

    items: tuple[Item, ...]
    left_out: tuple[str, ...] = field(default=())
    remarks: tuple[str, ...] = field(default=())


def load_items(dataset: RecordDataset, limit: int | None = None) -> LoadedItems:
    """Loads all items of a dataset. Conversations with several questions are skipped, because a service cannot answer
    them.

    Raises:
        InvalidDataError: a record is broken, an id occurs twice, or attributes are none that a phantom has.
    """
    items: list[Item] = []
    left_out: list[str] = []
    remarks: dict[str, None] = {}
    seen: dict[str, str] = {}
    for index in range(len(dataset)):
        if limit is not None and len(items) >= limit:
            break
        record = dataset[index]
        place = dataset.place(index)
        if record.id in seen:
            raise InvalidDataError(f"{place} has the id of {seen[record.id]}: give each record an id of its own")
        seen[record.id] = place
        if sum(turn.role == "human" for turn in record.turns) > 1:
            left_out.append(place)
            continue
        try:
            items.append(item_of(record, index))
        except UnknownClassError:
            raise InvalidDataError(f"{place}: {UNKNOWN_ATTRIBUTES}") from None
        if isinstance(remark := record.extra.get("notice"), str) and len(remarks) < MAX_REMARKS:
            remarks[remark[:MAX_REMARK]] = None
    if not items:
        raise InvalidDataError("there is no record with a single question: nothing can be asked")
    return LoadedItems(tuple(items), tuple(left_out), tuple(remarks))


def item_of(record: Record, index: int) -> Item:
    """The item of one valid record.

    Raises:
        UnknownClassError: its attributes are none that a phantom has.
    """
    language = language_of(record)
    task = task_of(record)
    attributes = None if record.attributes is None else read_attributes(record.attributes)
    question = None
    if attributes is not None:
        question = next((found for found in questions(attributes, language) if found.text == record.question), None)
    organ = record.organ or (attributes.organ if attributes is not None else None)
    return Item(
        index=index,
        id=record.id,
        organ=organ or "unknown",
        task=task,
        language=language,
        cluster=f"patient {record.patient}" if record.patient is not None else f"record {record.id}",
        request=request_of(record),
        media=tuple(media_paths(record)),
        references=_references(record, task, language, attributes),
        attributes=attributes,
        question=question,
        options=record.options,
        answer=record.answer,
    )


def _references(record: Record, task: str, language: Language, attributes: Attributes | None) -> tuple[str, ...]:
    wordings: Sequence[str] = ()
    wording = TASKS[task].phantoms if task in TASKS else None
    if attributes is not None and wording == "report":
        wordings = all_wordings(attributes, language)
    elif attributes is not None and wording in ("findings", "impression"):
        render = render_findings if wording == "findings" else render_impression
        wordings = [render(attributes, language, style) for style in range(STYLES)]
    found = dict.fromkeys((record.target, *record.references, *wordings))
    return tuple(text for text in found if text.strip())


def attributes_key(attributes: Attributes) -> str:
    """The same text for the same attributes."""
    return json.dumps([attributes.organ, attributes.class_name, attributes.pairs])


def question_digest(request: Request, organs: Sequence[str], images: Sequence[bytes]) -> str:
    """The identity of a question: the text, the hint, and the images' content."""
    head = json.dumps([request.task, request.language, request.prompt, list(organs)], ensure_ascii=False)
    digest = hashlib.sha256(head.encode())
    for image in images:
        digest.update(hashlib.sha256(image).digest())
    return digest.hexdigest()
