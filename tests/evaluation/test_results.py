"""From answers to result, page and plot: perfect and useless models, no text metrics alone, everything escaped."""

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from pydantic import ValidationError

from echovlm_ray.data.media import ImageRoot
from echovlm_ray.evaluation.answers import Answer
from echovlm_ray.evaluation.asking import Outcome
from echovlm_ray.evaluation.baselines import ASKED, blank_image, commonest_answers
from echovlm_ray.evaluation.items import Item
from echovlm_ray.evaluation.page import report_page
from echovlm_ray.evaluation.plots import draw_scores
from echovlm_ray.evaluation.result import WITHHELD, EvaluationResult, GroupScores, Score
from echovlm_ray.evaluation.run import Plan, load, score
from echovlm_ray.evaluation.settings import AskSettings, RequestLimits, ScoreSettings, Target
from echovlm_ray.vision.images import ImageLimits
from tests.data.records import png, record, turns, write_lines
from tests.evaluation.phantom_records import write_phantoms

LIMITS = ImageLimits(max_image_bytes=10**7, max_image_pixels=10**7, max_frames=8)
TARGET = Target(name="m", version="1.0.0", backbone_digest="b", expert_set_id="e", organs={"breast": "1.0.0"})
HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7 * 7 }}"


def plan_of(path: Path) -> Plan:
    return Plan(
        dataset=path,
        root=ImageRoot(path.parent),
        output=path.parent / "out",
        limits=LIMITS,
        asking=AskSettings(),
        scoring=ScoreSettings(draws=100),
        request_limits=RequestLimits(),
    )


def evaluate(path: Path, text_of: dict[str, object]) -> EvaluationResult:
    """The result of answers that are a function of the item, by variant; other variants answer nothing."""
    plan = plan_of(path)
    loaded = load(plan)
    outcome = Outcome()
    for variant in ASKED:
        for item in loaded.items:
            make = text_of.get(variant, lambda item: "")
            text = make(item)  # type: ignore[operator]
            outcome.answers[variant][item.index] = Answer(
                id=item.id,
                settings="s",
                variant=variant,
                question="q",
                text=text,
                finish_reason="stop",
                expert_set_id="e",
                organs={item.organ: 1.0},
                organ_source="prototype",
            )
    return score(plan, loaded, TARGET, outcome)


def right(item: Item) -> str:
    return item.references[0]


@pytest.fixture
def phantoms(tmp_path: Path) -> Path:
    return write_phantoms(tmp_path, 60)


def test_a_perfect_model_has_full_marks_and_a_silent_one_none(phantoms: Path) -> None:
    result = evaluate(phantoms, {"model": right})
    everything = result.group("model")
    assert everything is not None
    assert {name: found.value for name, found in everything.substance.items()} == dict.fromkeys(everything.substance, 1)
    assert len(everything.substance) == 9
    for name, found in everything.words.items():
        assert found.value == pytest.approx(100, abs=0.01), name
        assert found.signature
    silent = result.group("blank image")
    assert silent is not None
    for name, found in silent.substance.items():
        assert found.value == (1.0 if name == "organ gate" else 0.0)
    # Without a single word there is no n-gram to count, and that is said instead of 0.0.
    assert silent.words["BLEU-1 (words)"].value is None
    assert "no sequence of 1 tokens" in silent.words["BLEU-1 (words)"].error
    assert any("60 answers are empty" in notice or "120 answers are empty" in notice for notice in result.notices)


def test_groups_of_organ_task_language_and_class(phantoms: Path) -> None:
    result = evaluate(phantoms, {"model": lambda item: right(item) if item.organ == "breast" else ""})
    breast, kidney = result.group("model", "organ", "breast"), result.group("model", "organ", "kidney")
    assert breast is not None
    assert kidney is not None
    assert (breast.records, kidney.records) == (36, 24)
    assert (breast.substance["diagnosis accuracy"].value, kidney.substance["diagnosis accuracy"].value) == (1.0, 0.0)
    chinese = result.group("model", "language", "zh")
    assert chinese is not None
    assert not any("(words)" in name for name in chinese.words)
    assert chinese.substance["diagnosis accuracy"].value == pytest.approx(0.6)
    found = result.group("model", "class", "kidney: simple_cyst")
    assert found is not None
    assert found.substance["diagnosis accuracy"].value == 0.0
    questions = result.group("model", "task", "vqa")
    assert questions is not None
    assert questions.words == {}
    everything = result.group("model")
    assert everything is not None
    accuracy = everything.substance["diagnosis accuracy"]
    assert accuracy.low is not None
    assert accuracy.high is not None
    assert accuracy.value == pytest.approx(0.6)
    assert accuracy.low < 0.6 < accuracy.high


def test_the_commonest_report_is_a_baseline_of_every_result(phantoms: Path) -> None:
    result = evaluate(phantoms, {"model": right})
    commonest = result.group("commonest report")
    assert commonest is not None
    assert commonest.records == 60
    value = commonest.substance["diagnosis accuracy"].value
    # One class of each organ is always right: of three in breast, of two in kidney.
    assert value == pytest.approx(0.4)
    assert {found.variant for found in result.groups} == {*ASKED, "commonest report"}


def test_the_commonest_answer_goes_by_what_it_states(tmp_path: Path) -> None:
    texts = ["rare", "common", "common", "other"]
    records = [record(f"r{n}", organ="liver", conversations=turns("<image>What?", t)) for n, t in enumerate(texts)]
    records.append(record("r9", organ="heart", conversations=turns("<image>What?", "alone")))
    (tmp_path / "a.png").write_bytes(png())
    loaded = load(plan_of(write_lines(tmp_path / "data.jsonl", records)))
    assert commonest_answers(loaded.items) == ["common"] * 4 + ["alone"]


def test_words_are_withheld_where_nothing_says_what_is_right(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    records = [record(f"r{number}") for number in range(4)]
    result = evaluate(write_lines(tmp_path / "data.jsonl", records), {"model": right})
    for found in result.groups:
        assert all(value.value is None for value in found.words.values())
        assert all(value.error == WITHHELD for value in found.words.values())
    everything = result.group("model")
    assert everything is not None
    assert everything.substance["attribute F1"].value is None
    assert "carries attributes" in everything.substance["attribute F1"].error
    page = report_page(result)
    assert "BLEU-1 (words)</bdi>: <bdi>withheld" in page
    assert not draw_scores(result, tmp_path / "scores.png")


def test_no_result_can_show_words_alone() -> None:
    head = {"variant": "model", "by": "all", "name": "", "records": 1}
    words = {"BLEU-1": Score(value=80.0, records=1)}
    with pytest.raises(ValidationError, match="not shown without attribute F1"):
        GroupScores.model_validate(head | {"substance": {}, "words": words})
    unknown = {"attribute F1": Score(error="there are no attributes")}
    with pytest.raises(ValidationError, match="not shown without attribute F1"):
        GroupScores.model_validate(head | {"substance": unknown, "words": words})
    GroupScores.model_validate(head | {"substance": {"attribute F1": Score(value=0.0, records=1)}, "words": words})


def test_a_score_is_a_value_or_a_reason() -> None:
    for fields in ({}, {"value": 0.0, "error": "failed"}):
        with pytest.raises(ValidationError, match="either a value or the reason"):
            Score.model_validate(fields)


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_whatever_was_written_is_escaped(phantoms: Path) -> None:
    result = evaluate(phantoms, {"model": lambda item: HOSTILE})
    result = result.model_copy(
        update={
            "dataset": HOSTILE,
            "notices": [HOSTILE],
            "target": TARGET.model_copy(update={"name": HOSTILE, "organs": {HOSTILE: HOSTILE}}),
            "examples": [
                example.model_copy(update={"organ": HOSTILE, "question": HOSTILE, "reference": HOSTILE})
                for example in result.examples
            ],
            "groups": [
                found.model_copy(update={"name": HOSTILE}) if found.by == "organ" else found for found in result.groups
            ],
        }
    )
    page = report_page(result)
    parsed = _Tags()
    parsed.feed(page)
    names = {tag for tag, _ in parsed.tags}
    assert "script" not in names
    assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    sources = [attributes["src"] for tag, attributes in parsed.tags if tag == "img"]
    assert sources
    assert all(source is not None and source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"(?:href|src)=.?https?:", page)
    assert "49" not in "".join(parsed.text[:2])
    assert HOSTILE in "".join(parsed.text)
    assert html.escape("{{ 7 * 7 }}") in page
    assert "default-src 'none'" in page


def test_what_changes_the_direction_of_text_or_shows_nothing_is_seen_in_the_page(phantoms: Path) -> None:
    """Also in the title, which can hold no element that isolates it."""
    hostile = "a\u202eb\u2067c\u200b"
    result = evaluate(phantoms, {"model": lambda item: hostile})
    target = TARGET.model_copy(update={"name": hostile, "organs": {hostile: hostile}})
    page = report_page(result.model_copy(update={"dataset": hostile, "notices": [hostile], "target": target}))
    assert not set(page) & set("\u202e\u2067\u200b")
    assert page.count(r"a\u202eb\u2067c\u200b") > 12
    assert rf"<bdi>{hostile.encode('unicode_escape').decode()}</bdi>. Backbone" in page


def test_the_page_shows_images_side_by_side(phantoms: Path) -> None:
    result = evaluate(phantoms, {"model": right})
    assert len(result.examples) == 12
    assert {example.task for example in result.examples} == {"report", "diagnosis", "vqa"}
    assert {(example.right, example.verdict) for example in result.examples} == {
        (True, "everything right"),
        (True, "right"),
    }
    assert draw_scores(result, phantoms.parent / "scores.png")
    with Image.open(phantoms.parent / "scores.png") as figure:
        assert figure.width > 400
    page = report_page(result, phantoms.parent / "scores.png")
    assert page.count("data:image/png;base64,") == 13
    assert "attribute F1" in page
    assert "BLEU-1 (characters)" in page


def test_a_result_is_read_as_it_was_written(phantoms: Path) -> None:
    result = evaluate(phantoms, {"model": right})
    assert EvaluationResult.model_validate_json(result.model_dump_json()) == result
    assert "NaN" not in json.dumps(result.model_dump(mode="json"))


def test_a_blank_image_has_the_size_asked_for() -> None:
    import io

    with Image.open(io.BytesIO(blank_image(30, 20))) as image:
        assert (image.size, image.getextrema()) == ((30, 20), ((0, 0),) * 3)


def test_what_a_reader_must_know_is_said(phantoms: Path) -> None:
    plan = plan_of(phantoms)
    loaded = load(plan)
    outcome = Outcome(failed={"InternalServerError": 3})
    for item in loaded.items:
        outcome.answers["model"][item.index] = Answer(
            id=item.id,
            settings="s",
            variant="model",
            question="q",
            text="cut",
            finish_reason="length",
            expert_set_id="other",
            refused="InvalidRequestError: x" if item.index == 0 else "",
        )
    notices = " ".join(score(plan, loaded, TARGET, outcome).notices)
    for text in ("1 requests were refused", "60 answers were cut off", "60 answers came from other experts"):
        assert text in notices
    assert "not complete" in notices
    assert "each record says of itself: synthetic ultrasound phantom" in notices
    assert notices.count("says of itself") == 1
