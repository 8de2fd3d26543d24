"""Tokenization of texts for n-gram metrics.

Scores of different tokenizations are different metrics, so each has the tokenization in its name. The defaults of
sacrebleu and rouge-score find no words in Chinese and score identical texts 0.0; here Chinese is split into characters,
and into words by jieba.
"""

import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import jieba
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

from echovlm_ray.tasks import Language

jieba.setLogLevel(logging.WARNING)


@dataclass(frozen=True, slots=True)
class Tokenization:
    """One way to cut texts.

    Attributes:
        name: shown behind the name of a metric.
        signature: what sacrebleu's signature has behind `tok:`.
        cut: text → tokens.
    """

    name: str
    signature: str
    cut: Callable[[str], list[str]]


def tokenizations(language: Language) -> tuple[Tokenization, ...]:
    """The ways in which a language's texts are cut, the usual one first."""
    if language == "en":
        return (Tokenization("words", "13a", _english),)
    return (
        Tokenization("characters", "zh", _characters),
        Tokenization("jieba words", f"jieba-{jieba.__version__}", _words),
    )


def _english(text: str) -> list[str]:
    return str(Tokenizer13a()(text)).split()


def _characters(text: str) -> list[str]:
    return str(TokenizerZh()(text)).split()


def _words(text: str) -> list[str]:
    return [word for word in _jieba().cut(text) if word.strip()]


@cache
def _jieba() -> jieba.Tokenizer:
    """A separate tokenizer, because jieba loads by default a cache from /tmp, which other users can write."""
    tokenizer = jieba.Tokenizer()
    with tempfile.TemporaryDirectory(prefix="echovlm-jieba-") as private:
        tokenizer.tmp_dir = private
        tokenizer.initialize()
    return tokenizer
