"""Whether a text states a phrase, denies it, or leaves it open, by the words around it.

"No cyst" denies; "rule out cyst", "cyst cannot be excluded" and "cyst?" leave open. Neither is a statement. The rules
are those of NegEx and ConText (Chapman 2001, Harkema 2009) in short: words before a phrase count up to the last comma
or stop, words behind it up to the next one or the next phrase; phrases joined by "or" are treated alike.
"""

import re
from collections.abc import Sequence
from enum import Enum

from echovlm_ray.tasks import Language

Span = tuple[int, int]


class Polarity(Enum):
    """What a text does with a phrase."""

    STATED = "stated"
    DENIED = "denied"
    OPEN = "open"


_DENIED_BEFORE = {
    "en": re.compile(
        r"\b(?:no|not|without|nor|neither|never|none|absent|absence of|lacks?|lacking|free of|negative for|denie[sd]|"
        r"false|wrong|incorrect|untrue|"
        r"fails? to|unable to|instead of|rather than|resolved|\w+n't)\b"
    ),
    "zh": re.compile(r"无|未|没|不|非|否认|缺乏|缺如|阴性|并非"),
}
_OPEN_BEFORE = {
    "en": re.compile(
        r"\b(?:rul(?:e|es|ed|ing)[\s-]+out|r/o|exclu(?:de|des|ded|ding|sion of)|cannot|can't|"
        r"suspicio(?:us|n)\s+(?:for|of)|"
        r"suspect(?:s|ed|ing)?|possib(?:le|ly|ility)|probab(?:le|ly|ility)|(?:un)?likely|likelihood|perhaps|maybe|"
        r"(?:may|might|could|would|should)(?:\s+\w+)?\s+(?:be|represent|reflect|indicate|suggest|show|have)|"
        r"question(?:able|ed)?|query|concern(?:ing|ed)?\s+(?:for|about)|worr(?:isome|ying|ied)\s+(?:for|about)|"
        r"differentials?|versus|vs|either|if|whether|in case of|history of|h/o|prior|previous(?:ly)?|uncertain|unclear|"
        r"doubt(?:s|ful)?|equivocal|indeterminate|presum(?:ed|ably|ptive)|apparent(?:ly)?)(?!\w)"
    ),
    "zh": re.compile(r"排除|除外|疑|可能|待查|待排|鉴别|是否|有无|或许|也许|倾向|警惕|既往|病史|难以|似"),
}
# Directly behind a phrase, with at most a comma between: what is said of it and of nothing else.
_DENIED_BEHIND = {
    "en": re.compile(
        r"\s*(?:(?:is|are|was|were|has been|have been)\s+)?(?:not|absent|nowhere|gone|resolved|no longer)\b|"
        r"\s*[:=(-]+\s*(?:no\b(?!\s+\w)|none\b|negative\b|absent\b|not\b|false\b|-?\))"
    ),
    "zh": re.compile(r"(?:未见|未显示|未发现|未探及|未检出|不存在|不明显|缺如|消失|阴性)|[:(=](?:无|否|未见|阴性|-)"),
}
_OPEN_BEHIND = {
    "en": re.compile(
        r"[\s,:-]*\(?(?:\?|"
        r"(?:(?:is|are|was|were|which|that|remains?|has|have|needs?|should|must|been|still|to|be|also)\s+)*"
        r"(?:excluded|ruled out|rule out|r/o|"
        r"(?:can)?not(?:\s+(?:be|been|fully|completely|entirely|definitely|safely))*\s+"
        r"(?:excluded|ruled out|confirmed|exclude|rule out)|can't be|possible|probable|(?:un|less\s+)?likely|suspected|"
        r"questionable|questioned|uncertain|doubtful|equivocal|in the differential|to exclude)(?!\w))"
    ),
    "zh": re.compile(
        r"[,:(]*(?:\?|不能[^,.;]{0,2}(?:排除|除外)|不除外|未除外|待(?:排除?|查|除外|鉴别|定)|排除|除外|可能|可疑|疑|不考虑|依据不足|证据不足|与?[^,.;]{0,8}鉴别)"
    ),
}
# Anywhere behind a phrase, before the next phrase or the end of the clause.
_OPEN_LATER = {
    "en": re.compile(
        r"\b(?:can(?:not|\s+not|'t)|could\s+not|couldn't|not)\s+(?:be\s+)?(?:\w+ly\s+)?"
        r"(?:excluded|ruled out|confirmed)|"
        r"\b(?:to|should|must)\s+be\s+(?:excluded|ruled out|confirmed)|"
        r"\b(?:is|are|remains?)\s+(?:excluded|ruled out|possible|suspected|unlikely|uncertain|questionable)|\?"
    ),
    "zh": re.compile(r"不能\S{0,4}排除|不除外|待排|待查|待除外|待定|\?|可能"),
}
_DENIED_LATER = {
    "en": re.compile(
        r"\b(?:is|are|was|were|can|could)\s*not\s+(?:be\s+)?(?:seen|identified|visuali[sz]ed|visible|present|demonstrated|"
        r"detected|found|appreciated|shown)|\b(?:is|are|was|were|has|have)\s+(?:absent|gone|resolved|disappeared)"
    ),
    "zh": re.compile(r"(?:未见|未显示|未发现|未探及|未检出|不存在)$"),
}
_ALONE = re.compile(r"\s*(?:[,.;:!)]|$)")
_SURELY_BEHIND = re.compile(r"\?|待|不除外|未除外")
# What joins phrases that share their fate; in Chinese the mark of lists too.
_JOINED = {
    "en": re.compile(r"\s*,?\s*(?:or|nor|and/or)\s+(?:an?\s+|any\s+|the\s+)?$"),
    "zh": re.compile(r"[,、]?(?:或|或者|及|和|以及|与|、)$"),
}
_OPPOSED = re.compile(r"\s*(?:,?\s*and|/|,?\s*versus|,?\s*vs\.?)\s*(?:an?\s+)?")
_ALTERNATIVES = {"en": re.compile(r"\s*,?\s*(?:or|nor|and/or)\s+(?:an?\s+)?$"), "zh": re.compile(r"(?:或|或者)$")}
# A list whose end is "or": a comma joins, too.
_LIST = {"en": re.compile(r"\s*,\s*(?:an?\s+|any\s+)?$"), "zh": re.compile(r"(?!)")}
_ENDS_IN_OR = re.compile(r"[^.;:!?()]*?\b(?:or|nor)\b")
# "? cyst" as a sentence of its own; behind another sentence the mark belongs to that.
_ASKED = re.compile(r"(?:^|[.;:!,(\n])\s*\?$")
# In Chinese "、" joins what a negation before it denies.
_CLAUSE_END = {"en": re.compile(r"[,.;:!?()、\n]"), "zh": re.compile(r"[,.;:!()\n]")}
_SENTENCE_END = re.compile(r"[.;:!?()\n]")
_ENDS_AS_LIST = {"en": re.compile(r"\b(?:or|nor)(?:\s+an?)?$"), "zh": re.compile(r"(?:或|或者|及|和)$")}
_CLAUSE_END_BEHIND = re.compile(r"[,.;:!()、\n]")


def polarities(text: str, spans: Sequence[Span], language: Language) -> list[Polarity]:
    """What a text does with each of its phrases.

    Args:
        text: in lower case, with one kind of punctuation (NFKC).
        spans: where the phrases are, in order, none within another. A phrase that denies by itself ("no mass") is
            stated as it is.
        language: "en" or "zh".
    """
    found: list[Polarity] = []
    # Whether what came before denies by a word outside itself, or is a phrase that begins with one.
    lasting, own = Polarity.STATED, False
    begin = 0
    for number, (start, end) in enumerate(spans):
        between = text[begin:start]
        following = spans[number + 1][0] if number + 1 < len(spans) else len(text)
        polarity = _before(between, language)
        if polarity is Polarity.STATED and number and _goes_on(between, text[end:], lasting, own, language):
            polarity = Polarity.DENIED if lasting is Polarity.STATED else lasting
        lasting = polarity
        behind, used = _behind(text[end:following], following < len(text), language)
        if behind is not Polarity.STATED:
            polarity = behind
        found.append(polarity)
        own = polarity is Polarity.DENIED or bool(_DENIED_BEFORE[language].match(text[start:end]))
        begin = end + used
    _share_backwards(text, spans, found, language)
    return found


def without_doubt(text: str, language: Language) -> str:
    """A phrase without the words that would leave what follows them open: a diagnosis may have them within itself."""
    return _OPEN_BEFORE[language].sub(" ", text)


def _before(between: str, language: Language) -> Polarity:
    # "Rule out: cyst" is one clause.
    near = between.rstrip(" :(")
    # A list whose end is "or" is one clause, commas and all.
    ends = _SENTENCE_END if _ENDS_AS_LIST[language].search(near) else _CLAUSE_END[language]
    clause = ends.split(near)[-1]
    if _OPEN_BEFORE[language].search(clause) or _ASKED.search(near):
        return Polarity.OPEN
    return Polarity.DENIED if _DENIED_BEFORE[language].search(clause) else Polarity.STATED


def _goes_on(between: str, rest: str, lasting: Polarity, own: bool, language: Language) -> bool:
    if lasting is not Polarity.STATED:
        listed = _LIST[language].fullmatch(between) and _ENDS_IN_OR.match(rest)
        return bool(_JOINED[language].fullmatch(between) or listed)
    return own and bool(_ALTERNATIVES[language].fullmatch(between))


def _behind(rest: str, another: bool, language: Language) -> tuple[Polarity, int]:
    """What is said behind a phrase, and how much of it is used up by that."""
    for pattern, polarity in ((_OPEN_BEHIND, Polarity.OPEN), (_DENIED_BEHIND, Polarity.DENIED)):
        found = pattern[language].match(rest)
        # Where another phrase follows at once, it is that one which is meant; behind a comma the words stand alone.
        if found is None or (
            another and found.end() == len(rest.rstrip()) and not _SURELY_BEHIND.search(found.group())
        ):
            continue
        if not found.group().lstrip().startswith(",") or _ALONE.match(rest, found.end()):
            return polarity, found.end()
    clause = _CLAUSE_END_BEHIND.split(rest, maxsplit=1)[0]
    for pattern, polarity in ((_OPEN_LATER, Polarity.OPEN), (_DENIED_LATER, Polarity.DENIED)):
        later = pattern[language].search(clause)
        if later is not None and not (another and later.end() == len(rest.rstrip())):
            return polarity, later.end()
    return Polarity.STATED, 0


def _share_backwards(text: str, spans: Sequence[Span], found: list[Polarity], language: Language) -> None:
    """ "A or B cannot be excluded" leaves A open too."""
    for number in range(len(spans) - 1, 0, -1):
        between = text[spans[number - 1][1] : spans[number][0]]
        if found[number] is Polarity.OPEN and found[number - 1] is Polarity.STATED:
            joined = _JOINED[language].fullmatch(between) or (language == "en" and _OPPOSED.fullmatch(between))
            if joined:
                found[number - 1] = Polarity.OPEN
