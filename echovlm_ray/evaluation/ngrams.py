"""BLEU, ROUGE, METEOR and BERTScore for each record, against one or several references.

They compare words, not findings: the report of a fibroadenoma has a BLEU-1 of about 80 against that of a cyst. They are
never shown without the clinical metrics (`result` enforces that).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import nltk
import numpy as np
from nltk.corpus import wordnet
from nltk.translate.meteor_score import meteor_score
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import BLEU

from echovlm_ray.evaluation.statistics import Array, NotComputableError, Statistic, mean_statistic
from echovlm_ray.evaluation.tokens import Tokenization, tokenizations
from echovlm_ray.tasks import Language

MAX_ORDER = 4
ROUGE_KINDS = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}


@dataclass(frozen=True, slots=True, eq=False)
class NgramMetric:
    """One metric on the texts of one language.

    Attributes:
        name: with its tokenization, as "BLEU-1 (characters)".
        signature: what another program needs to know to get the same number.
        statistic: from 0 to 100.
    """

    name: str
    signature: str
    statistic: Statistic


def ngram_metrics(answers: Sequence[str], references: Sequence[Sequence[str]], language: Language) -> list[NgramMetric]:
    """All metrics of words.

    Args:
        answers: one a record; an empty one shares no word with anything.
        references: the right wordings of each, none of them empty.
        language: of all of them.
    """
    metrics: list[NgramMetric] = []
    for tokenization in tokenizations(language):
        cut = [tokenization.cut(answer) for answer in answers]
        cut_references = [[tokenization.cut(text) for text in wordings] for wordings in references]
        metrics += bleu_metrics(cut, cut_references, tokenization)
        metrics += _rouge_metrics(answers, references, tokenization, language)
        metrics.append(_meteor_metric(cut, cut_references, tokenization, language))
    return metrics


def bleu_metrics(
    answers: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]], tokenization: Tokenization
) -> list[NgramMetric]:
    """BLEU-1 to BLEU-4 of texts that are cut into tokens, by sacrebleu, as for a corpus."""
    # sacrebleu advises against the score of a single sentence; of a sentence only its counts are taken here.
    scorer = BLEU(tokenize="none", max_ngram_order=MAX_ORDER, force=True, effective_order=True)
    rows = []
    for answer, wordings in zip(answers, references, strict=True):
        found = scorer.sentence_score(" ".join(answer), [" ".join(text) for text in wordings])
        rows.append([*found.counts, *found.totals, found.sys_len, found.ref_len])
    table = np.asarray(rows, dtype=np.float64).reshape(len(rows), 2 * MAX_ORDER + 2)
    most = max(map(len, references), default=1)
    least = min(map(len, references), default=1)
    count = str(most) if most == least else f"{least}-{most}"
    signature = (
        f"nrefs:{count}|case:mixed|eff:no|tok:{tokenization.signature}|smooth:exp|version:{version('sacrebleu')}"
    )
    return [
        NgramMetric(
            f"BLEU-{order} ({tokenization.name})",
            f"BLEU|order:{order}|{signature}",
            Statistic(table, _bleu_of(order), f"the answers hold no sequence of {order} tokens"),
        )
        for order in range(1, MAX_ORDER + 1)
    ]


def _bleu_of(order: int) -> Callable[[Array], Array]:
    """Corpus BLEU from summed counts, with sacrebleu's exponential smoothing; NaN where an order has no n-grams."""

    def reduce(sums: Array) -> Array:
        counts, totals = sums[:, :order], sums[:, MAX_ORDER : MAX_ORDER + order]
        length, reference = sums[:, 2 * MAX_ORDER], sums[:, 2 * MAX_ORDER + 1]
        # Each order without a match halves what it and the following orders without one get.
        halvings = np.cumsum(counts == 0, axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            precisions = np.where(counts > 0, counts, 0.5**halvings) / totals
            penalty = np.where(length < reference, np.exp(1 - reference / length), 1.0)
            score = 100 * penalty * np.exp(np.log(precisions).mean(axis=1))
        score = np.where(counts.any(axis=1), score, 0.0)
        return np.where((totals > 0).all(axis=1), score, np.nan)

    return reduce


class _Cut:
    """A tokenization in the form that rouge-score takes."""

    def __init__(self, tokenization: Tokenization) -> None:
        self._tokenization = tokenization

    def tokenize(self, text: str) -> list[str]:
        return self._tokenization.cut(text.lower())


def _rouge_metrics(
    answers: Sequence[str], references: Sequence[Sequence[str]], tokenization: Tokenization, language: Language
) -> list[NgramMetric]:
    # In English rouge-score's own tokens are what everyone reports.
    own = language == "en"
    scorer = RougeScorer(list(ROUGE_KINDS), tokenizer=None if own else _Cut(tokenization))
    scores: dict[str, list[float]] = {kind: [] for kind in ROUGE_KINDS}
    for answer, wordings in zip(answers, references, strict=True):
        found = scorer.score_multi(list(wordings), answer)
        for kind, values in scores.items():
            values.append(100 * float(found[kind].fmeasure))
    signature = f"tok:{'rouge-score' if own else tokenization.signature}|stem:no|f1|version:{version('rouge-score')}"
    return [
        NgramMetric(f"{ROUGE_KINDS[kind]} ({tokenization.name})", f"{kind}|{signature}", mean_statistic(values))
        for kind, values in scores.items()
    ]


class _NoWordNet:
    """A WordNet without synonyms."""

    def synsets(self, word: str) -> list[object]:
        return []


def _has_wordnet() -> bool:
    try:
        nltk.data.find("corpora/wordnet")
    except LookupError:
        return False
    return True


def _meteor_metric(
    answers: Sequence[Sequence[str]],
    references: Sequence[Sequence[Sequence[str]]],
    tokenization: Tokenization,
    language: Language,
) -> NgramMetric:
    """METEOR; without WordNet, or in Chinese, it has no synonyms, and its name says so."""
    synonyms = language == "en" and _has_wordnet()
    source = wordnet if synonyms else _NoWordNet()
    values = [
        100 * float(meteor_score(list(wordings), answer, wordnet=source))
        for answer, wordings in zip(answers, references, strict=True)
    ]
    kinds = "exact" if language == "zh" else "exact, stem, synonyms" if synonyms else "exact, stem"
    signature = f"METEOR|{kinds}|tok:{tokenization.signature}|version:{version('nltk')}"
    return NgramMetric(f"METEOR, {kinds} ({tokenization.name})", signature, mean_statistic(values))


def bert_score_metric(
    answers: Sequence[str], references: Sequence[Sequence[str]], model: Path, num_layers: int | None = None
) -> NgramMetric:
    """BERTScore's F1 by a model on this disk; nothing is downloaded.

    An empty answer has no token to compare, and bert-score fails on it: it counts 0, and the name says how many there
    are.

    Raises:
        NotComputableError: the package or the model is missing or does not fit; all answers are empty.
    """
    filled = [index for index, answer in enumerate(answers) if answer.strip()]
    if not filled:
        raise NotComputableError("every answer is empty")
    if not all((model / name).is_file() for name in ("config.json", "model.safetensors")):
        raise NotComputableError(f"{model} holds no model: give the folder of a BERT with model.safetensors")
    try:
        from bert_score import BERTScorer
    except ModuleNotFoundError:
        raise NotComputableError("bert-score is not installed: pip install 'echovlm-ray[bertscore]'") from None
    try:
        layers = num_layers or _last_layer(model)
        scorer = BERTScorer(model_type=str(model), num_layers=layers, device="cpu", rescale_with_baseline=False)
        _, _, found = scorer.score([answers[index] for index in filled], [list(references[index]) for index in filled])
    except OverflowError:
        raise NotComputableError(
            f"the tokenizer in {model} does not say how long a text may be: add model_max_length, which is often 512, "
            "to its tokenizer_config.json"
        ) from None
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise NotComputableError(f"bert-score failed with the model in {model}: {type(error).__name__}") from None
    values = [0.0] * len(answers)
    for index, value in zip(filled, found.tolist(), strict=True):
        values[index] = 100 * float(value)
    empty = len(answers) - len(filled)
    name = "BERTScore" if not empty else f"BERTScore ({empty} empty answers count 0)"
    signature = f"F1|model:{model.name}|layer:{layers}|idf:no|rescaled:no|version:{version('bert-score')}"
    return NgramMetric(name, signature, mean_statistic(values))


def _last_layer(model: Path) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(model, local_files_only=True).num_hidden_layers)
