"""Metrics of words against values computed by hand, and what their libraries get wrong by default."""

import math
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu import BLEU

from echovlm_ray.data.phantom.catalogue import attributes_of
from echovlm_ray.data.phantom.wording.render import render
from echovlm_ray.evaluation import tokens
from echovlm_ray.evaluation.ngrams import bleu_metrics, ngram_metrics
from echovlm_ray.evaluation.statistics import NotComputableError
from echovlm_ray.evaluation.tokens import tokenizations
from echovlm_ray.tasks import Language

VALUES = {
    "tissue": "fatty",
    "lesion": "mass",
    "size": "small",
    "depth": "deep",
    "shape": "oval",
    "orientation": "parallel",
    "margin": "circumscribed",
}
CYST = attributes_of("breast", "simple_cyst", VALUES | {"echo": "anechoic", "posterior": "enhancement"})
FIBROADENOMA = attributes_of("breast", "circumscribed_mass", VALUES | {"echo": "hypoechoic", "posterior": "none"})


def scores(answers: list[str], references: list[list[str]], language: Language) -> dict[str, float]:
    """The scores that can be computed."""
    found = {}
    for metric in ngram_metrics(answers, references, language):
        with suppress(NotComputableError):
            found[metric.name] = metric.statistic.value()
    return found


def test_english_by_hand() -> None:
    # Six tokens each; "the cat", "cat sat", "sat on" and "on the" match, "the rug" does not.
    found = scores(["the cat sat on the rug"], [["the cat sat on the mat"]], "en")
    assert found["BLEU-1 (words)"] == pytest.approx(100 * 5 / 6)
    assert found["BLEU-2 (words)"] == pytest.approx(100 * math.sqrt(5 / 6 * 4 / 5))
    assert found["BLEU-4 (words)"] == pytest.approx(100 * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)
    assert found["ROUGE-1 (words)"] == pytest.approx(100 * 5 / 6)
    assert found["ROUGE-2 (words)"] == pytest.approx(100 * 4 / 5)
    assert found["ROUGE-L (words)"] == pytest.approx(100 * 5 / 6)
    # Five matches in one chunk: F = 5/6, penalty 0.5 · (1/5)³.
    assert found["METEOR, exact, stem (words)"] == pytest.approx(100 * 5 / 6 * (1 - 0.5 * (1 / 5) ** 3))


def test_a_short_answer_is_penalised() -> None:
    # Three of six tokens, all right: precision 1, brevity penalty exp(1 - 6/3).
    found = scores(["the cat sat"], [["the cat sat on the mat"]], "en")
    assert found["BLEU-1 (words)"] == pytest.approx(100 * math.exp(-1))
    assert found["ROUGE-1 (words)"] == pytest.approx(100 * 2 * 0.5 / 1.5)


def test_chinese_by_hand() -> None:
    # 左侧乳腺囊肿 / 右侧乳腺囊肿: five of six characters; 侧乳, 乳腺, 腺囊, 囊肿 of five pairs.
    found = scores(["右侧乳腺囊肿"], [["左侧乳腺囊肿"]], "zh")
    assert found["BLEU-1 (characters)"] == pytest.approx(100 * 5 / 6)
    assert found["BLEU-2 (characters)"] == pytest.approx(100 * math.sqrt(5 / 6 * 4 / 5))
    assert found["ROUGE-L (characters)"] == pytest.approx(100 * 5 / 6)
    # jieba: 右侧 | 乳腺 | 囊肿, two of three words.
    assert found["BLEU-1 (jieba words)"] == pytest.approx(100 * 2 / 3)
    assert found["ROUGE-1 (jieba words)"] == pytest.approx(100 * 2 / 3)
    assert found["METEOR, exact (jieba words)"] == pytest.approx(100 * 2 / 3 * (1 - 0.5 * (1 / 2) ** 3))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_identical_texts_have_full_marks(language: Language) -> None:
    text = render(CYST, language)
    assert BLEU().corpus_score([render(CYST, "zh")], [[render(CYST, "zh")]]).score < 100 or language == "en"
    found = scores([text], [[text]], language)
    assert len(found) == (8 if language == "en" else 16)
    for name, value in found.items():
        assert value == pytest.approx(100, abs=0.01), name


def test_the_defaults_of_the_libraries_see_nothing_in_chinese() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    assert BLEU().corpus_score(["左侧乳腺囊肿"], [["左侧乳腺囊肿"]]).score == 0.0
    assert RougeScorer(["rouge1"]).score("左侧乳腺囊肿", "左侧乳腺囊肿")["rouge1"].fmeasure == 0.0


@pytest.mark.parametrize(("language", "name"), [("en", "BLEU-1 (words)"), ("zh", "BLEU-1 (characters)")])
def test_a_wrong_report_scores_high(language: Language, name: str) -> None:
    """The reason why these numbers never stand alone."""
    found = scores([render(FIBROADENOMA, language)], [[render(CYST, language)]], language)
    assert found[name] > 70


@given(
    texts=st.lists(
        st.tuples(*[st.text(alphabet="左右乳腺囊肿 3", min_size=low, max_size=9) for low in (0, 1, 1)]),
        min_size=1,
        max_size=5,
    )
)
@settings(max_examples=150, deadline=None)
def test_corpus_bleu_is_sacrebleu_s(texts: list[tuple[str, str, str]]) -> None:
    """From summed counts the same as from the texts, whatever the texts; where sacrebleu says 0.0 without any n-gram,
    there is no score."""
    cut = tokenizations("zh")[0]
    answers, first, second = (list(column) for column in zip(*texts, strict=True))
    references = [[cut.cut(text) for text in pair] for pair in zip(first, second, strict=True)]
    metrics = bleu_metrics([cut.cut(text) for text in answers], references, cut)
    for order, metric in enumerate(metrics, 1):
        expected = BLEU(tokenize="zh", max_ngram_order=order).corpus_score(answers, [first, second]).score
        if metric.statistic.rows[:, 3 + order].sum() == 0:
            assert expected == 0.0
            with pytest.raises(NotComputableError, match=f"no sequence of {order} tokens"):
                metric.statistic.value()
        else:
            assert metric.statistic.value() == pytest.approx(expected)


def test_signatures_are_what_sacrebleu_reports() -> None:
    cut = tokenizations("zh")[0]
    scorer = BLEU(tokenize="zh")
    scorer.corpus_score(["左侧"], [["左侧"], ["右侧"]])
    (metric, *_) = bleu_metrics([["左", "侧"]], [[["左", "侧"], ["右", "侧"]]], cut)
    assert metric.signature == f"BLEU|order:1|{scorer.get_signature()}"
    words = ngram_metrics(["左侧"], [["左侧"]], "zh")
    assert any("tok:jieba-0.42.1" in metric.signature for metric in words)


def test_several_wordings_count_as_right() -> None:
    alone = scores(["a simple cyst"], [["an uncomplicated cyst"]], "en")
    both = scores(["a simple cyst"], [["an uncomplicated cyst", "a simple cyst"]], "en")
    assert alone["BLEU-1 (words)"] < both["BLEU-1 (words)"] == pytest.approx(100)
    assert both["ROUGE-L (words)"] == pytest.approx(100)


def test_empty_answers_share_nothing_and_stop_nothing() -> None:
    found = scores(["", "左侧乳腺囊肿"], [["左侧乳腺囊肿"], ["左侧乳腺囊肿"]], "zh")
    # Half of the reference's length: precision 1, penalty exp(1 - 12/6).
    assert found["BLEU-1 (characters)"] == pytest.approx(100 * math.exp(-1))
    assert found["ROUGE-1 (characters)"] == pytest.approx(50)
    for metric in ngram_metrics(["", " "], [["左侧"], ["右侧"]], "zh"):
        if metric.name.startswith("BLEU"):
            with pytest.raises(NotComputableError):
                metric.statistic.value()
        else:
            assert metric.statistic.value() == 0.0


def test_no_cache_of_others_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """jieba would read /tmp/jieba.cache, which anyone may have written, with marshal."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "jieba.cache").write_bytes(b"not what it should be")
    tokens._jieba.cache_clear()
    assert tokenizations("zh")[1].cut("左侧乳腺囊肿") == ["左侧", "乳腺", "囊肿"]
    assert (tmp_path / "jieba.cache").read_bytes() == b"not what it should be"
    assert [entry.name for entry in tmp_path.iterdir()] == ["jieba.cache"]
