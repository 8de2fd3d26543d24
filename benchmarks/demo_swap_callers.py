"""The clients of `benchmarks.demo_swap`: pictures with known truth, and the service's answers."""

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Final

from echovlm_ray.client import EchoVLMClient, EchoVLMError, Text
from echovlm_ray.data.phantom.catalogue import all_classes
from echovlm_ray.data.phantom.corpus import Corpus, png_bytes
from echovlm_ray.data.phantom.parsing import parse_diagnosis
from echovlm_ray.data.phantom.schema import Organ
from echovlm_ray.tasks import LANGUAGES, Language

ORGAN: Final = "breast"
LEFT_OUT: Final = "simple_cyst"
TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Question:
    """A report about one picture, in one language; greedy, so that the same experts always write the same.

    Attributes:
        number: its place among all questions.
        class_name: what the picture shows.
    """

    number: int
    organ: Organ
    class_name: str
    language: Language
    png: bytes = field(repr=False)

    @property
    def is_left_out(self) -> bool:
        """Whether it is of the class that the old version was not trained on."""
        return (self.organ, self.class_name) == (ORGAN, LEFT_OUT)


@dataclass(frozen=True, slots=True)
class Answered:
    """One answer.

    Attributes:
        version: of the breast's experts if they made it, else "".
        organs: of the experts in the answer's provenance.
        tokens: how many the model made.
        began: when it was sent, on the monotonic clock.
        times: when its pieces of text arrived.
    """

    question: Question
    text: str
    finish_reason: str
    tokens: int
    version: str
    organs: tuple[str, ...]
    began: float
    times: tuple[float, ...]

    @property
    def output(self) -> tuple[str, str, int]:
        """All that the model decided: text, why it ended, number of tokens."""
        return self.text, self.finish_reason, self.tokens

    @property
    def is_found(self) -> bool:
        """Whether the report's impression names exactly the picture's finding."""
        question = self.question
        return parse_diagnosis(self.text, question.language, question.organ) == question.class_name


def draw_questions(seed: int, left_out: int, organ: int, others: int) -> list[Question]:
    """Pictures with their questions, half of them in each language.

    Args:
        seed: of the phantoms; one that training did not use.
        left_out: pictures of the class that was left out.
        organ: pictures of the same organ's other classes, which take turns.
        others: pictures of all other organs' classes, which take turns.
    """
    known = [pair for pair in all_classes() if pair != (ORGAN, LEFT_OUT)]
    corpora = (
        Corpus(seed, range(left_out), ((ORGAN, LEFT_OUT),)),
        Corpus(seed + 1, range(organ), tuple(pair for pair in known if pair[0] == ORGAN)),
        Corpus(seed + 2, range(others), tuple(pair for pair in known if pair[0] != ORGAN)),
    )
    numbers = count()
    questions = []
    for corpus in corpora:
        for index in corpus.indices:
            phantom = corpus.picture(index)
            language = tuple(LANGUAGES)[index % len(LANGUAGES)]
            picture = png_bytes(phantom.image)
            questions.append(Question(next(numbers), phantom.organ, phantom.class_name, language, picture))
    return questions


def ask(client: EchoVLMClient, question: Question) -> Answered:
    """Requests one report and waits for it.

    Raises:
        EchoVLMError: it failed.
    """
    began = time.monotonic()
    times, text = [], ""
    with client.stream(question.png, task="report", language=question.language, timeout_s=TIMEOUT_S) as stream:
        for event in stream:
            if isinstance(event, Text):
                times.append(time.monotonic())
                text += event.text
        summary = stream.summary
    assert summary is not None
    shares = summary.provenance.organs
    version = next((share.bundle_version for share in shares if share.organ == ORGAN), "")
    organs = tuple(share.organ for share in shares)
    return Answered(
        question, text, summary.finish_reason, summary.completion_tokens, version, organs, began, tuple(times)
    )


def ask_all(address: str, questions: Sequence[Question], at_once: int) -> list[Answered]:
    """Asks every question once.

    Raises:
        EchoVLMError: one of them failed.
    """
    with EchoVLMClient(address, retry=False) as client, ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda question: ask(client, question), questions))


@dataclass(frozen=True, slots=True)
class Heard:
    """The clients' results.

    Attributes:
        answers: in the order in which they were complete.
        failures: the errors of the other requests.
    """

    answers: list[Answered] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@contextmanager
def callers(address: str, questions: Sequence[Question], at_once: int) -> Iterator[Heard]:
    """So many callers that ask the questions in turn, without pause, until the block ends.

    Every running answer is awaited at the end. A request that fails is counted, and not sent again.
    """
    heard, stopping = Heard(), threading.Event()

    def run(place: int) -> None:
        with EchoVLMClient(address, retry=False) as client:
            while not stopping.is_set():
                question = questions[place % len(questions)]
                place += at_once
                try:
                    heard.answers.append(ask(client, question))
                except EchoVLMError as error:
                    heard.failures.append(f"{question.organ}/{question.class_name}: {error}")

    threads = [threading.Thread(target=run, args=(place,), daemon=True) for place in range(at_once)]
    for thread in threads:
        thread.start()
    try:
        yield heard
    finally:
        stopping.set()
        for thread in threads:
            thread.join()
