"""Maps anatomical terms and codes to the seven organs, or to None.

The table is `anatomy.csv`; docs/anatomy.md describes its columns and choices. The longest phrases of a term are matched
first, and each consumes its words, so that "renal pelvis" is not a pelvis and "coronary artery" not an artery. Phrases
of other anatomy (prostate, lymph node) are in the table too and consume their words.
"""

import csv
import functools
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

Phrase = tuple[str, ...]

# Chinese and Japanese text has no spaces: each character is a word of its own.
_WORD = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]|[^\W_\u3400-\u9fff\uf900-\ufaff]+")
# Variants of Taiwan, Hong Kong and Japan of the characters in the table.
_SIMPLIFIED = str.maketrans(
    "臟臓腎頸頚動脈靜狀宮體雙兩側內兒盤總門葉隱頭橈貴腦腳竇實質臍陰產産婦臨聲檢經導膽腸閉間達鎖無顱膕脛關節腫結彎漿額顳攝護輸懷環縱氣髖後爾脫積壓斷頜頷維異連続續穩圍範顏區",
    "脏脏肾颈颈动脉静状宫体双两侧内儿盘总门叶隐头桡贵脑脚窦实质脐阴产产妇临声检经导胆肠闭间达锁无颅腘胫关节肿结弯浆额颞摄护输怀环纵气髋后尔脱积压断颌颌维异连续续稳围范颜区",
)
# Below this, a concatenated phrase could be another word.
_MIN_JOINED = 6
# DICOM's defined terms abbreviate the last word of a vessel: RENALA, FEMORALV (PS3.16 Annex L).
_VESSEL_LETTERS = {"artery": "a", "vein": "v"}


@dataclass(frozen=True, slots=True)
class Concept:
    """A line of the table.

    Attributes:
        organ: one of the seven organs; None for other anatomy.
        terms: all its names; the first one is for display.
        sct: SNOMED CT codes.
        srt: SNOMED RT codes, as DICOM used them until 2017.
        source: the source of the codes and the first term.
    """

    organ: str | None
    terms: tuple[str, ...]
    sct: tuple[str, ...]
    srt: tuple[str, ...]
    source: str


@functools.cache
def concepts() -> tuple[Concept, ...]:
    """The table, read once."""
    text = resources.files("router.gating").joinpath("anatomy.csv").read_text(encoding="utf-8")
    return tuple(
        Concept(
            row["organ"] or None,
            (*_items(row["english"]), *_items(row["chinese"])),
            _items(row["sct"]),
            _items(row["srt"]),
            row["source"],
        )
        for row in csv.DictReader(text.splitlines())
    )


def term_of_code(scheme: str, code: str) -> str | None:
    """The table's term for a code, or None when it is not in the table.

    Args:
        scheme: DICOM's Coding Scheme Designator: SCT and its older names for SNOMED CT; SRT, SNM3 and 99SDM for
            SNOMED RT; empty if it is missing. Codes of other schemes are unknown.
        code: the code, or a URN or URL that ends in it.
    """
    scheme, code = scheme.strip().upper(), re.split(r"[:/]", code.strip())[-1]
    if scheme and scheme not in ("SCT", "SCT2", "SRT", "SNM3", "99SDM") and not scheme.startswith("SNOMED"):
        return None
    return _terms_of_codes().get(code.upper())


def phrase(text: str) -> Phrase:
    """The words of a text, normalised for comparison: without case, accents, plural and spelling variants."""
    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).casefold())
    text = "".join(character for character in text if not unicodedata.combining(character))
    text = unicodedata.normalize("NFKC", text).translate(_SIMPLIFIED)
    return tuple(_folded(word) for word in _WORD.findall(text))


@functools.cache
def phrases(term: str) -> frozenset[Phrase]:
    """The variants of a term: its words, and its words joined as in DICOM's defined terms.

    Cached, so use it for terms of the table and of bundles only. `organs_in` reads the text of requests.
    """
    words = phrase(term)
    if not words:
        return frozenset()
    ways = {words}
    if len(words) > 1 and term.isascii():
        ways.add((_folded("".join(words)),))
        if words[-1] in _VESSEL_LETTERS:
            ways.add(("".join(words[:-1]) + _VESSEL_LETTERS[words[-1]],))
    return frozenset(way for way in ways if way == words or len(way[0]) >= _MIN_JOINED)


def organs_in(text: str, own: Mapping[Phrase, str]) -> list[str]:
    """The organs that a term names, each once, in the order of the phrases' lengths.

    Args:
        text: a term in any of the table's languages, or several in one text.
        own: further phrases, from bundles; they take precedence over the table's.
    """
    words, table = phrase(text), _table()
    longest = max((len(way) for way in own), default=1)
    free = [True] * len(words)
    found: list[str] = []
    for width in range(min(len(words), max(longest, _longest())), 0, -1):
        for start in range(len(words) - width + 1):
            way = words[start : start + width]
            if all(free[start : start + width]) and (way in own or way in table):
                free[start : start + width] = [False] * width
                organ = own.get(way) or table.get(way)
                if organ is not None and organ not in found:
                    found.append(organ)
    return found


def is_known(text: str, *, min_words: int = 1) -> bool:
    """Whether a phrase of the table with at least `min_words` words occurs in the text."""
    words, table = phrase(text), _table()
    return any(
        words[start : start + width] in table
        for width in range(min_words, _longest() + 1)
        for start in range(len(words) - width + 1)
    )


def is_familiar(text: str) -> bool:
    """Whether the table has every Chinese character of the text. Wrongly decoded bytes give rare characters."""
    return _characters().issuperset(character for word in phrase(text) for character in word if not character.isascii())


@functools.cache
def _characters() -> frozenset[str]:
    return frozenset(character for way in _table() for word in way for character in word if not character.isascii())


@functools.cache
def _table() -> Mapping[Phrase, str | None]:
    table: dict[Phrase, str | None] = {}
    for concept in concepts():
        for term in concept.terms:
            for way in phrases(term):
                assert table.setdefault(way, concept.organ) == concept.organ, f"{term} means two organs"
    return table


@functools.cache
def _longest() -> int:
    return max(len(way) for way in _table())


@functools.cache
def _terms_of_codes() -> Mapping[str, str]:
    return {code: concept.terms[0] for concept in concepts() for code in (*concept.sct, *concept.srt)}


def _folded(word: str) -> str:
    word = word.replace("œ", "e").replace("æ", "e").replace("ae", "e").replace("oe", "e")
    if len(word) > 3 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def _items(cell: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in cell.split(";") if item.strip())
