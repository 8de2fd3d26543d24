"""Builds Chinese sentences in three styles."""

from collections.abc import Sequence

FINDINGS = "超声所见："
IMPRESSION = "超声提示："
BETWEEN_SECTIONS = "；"
END = "。"
BETWEEN_SENTENCES = "。"
# How the words for what is not there begin.
_NEGATIVE = "未无"


def subject_sentence(subject: str, clauses: Sequence[str], style: int) -> str:
    """What is looked at, without a full stop."""
    start = f"图示{subject}" if style == 1 else subject
    return _with_clauses(start, clauses, style)


def lead_sentence(lead: str, clauses: Sequence[str], style: int) -> str:
    """A finding and its features, without a full stop."""
    start = f"可见{lead}" if style == 1 and lead[0] not in _NEGATIVE else lead
    return _with_clauses(start, clauses, style)


def impression(diagnosis: str, category: str | None, style: int) -> str:
    """The diagnosis and its category."""
    start = ("", "考虑", "符合")[style] + diagnosis
    if category is None:
        return start
    return f"{start}（{category}）" if style == 1 else f"{start}，{category}"


def caption(subject: str, diagnosis: str) -> str:
    """One sentence on the whole picture."""
    return f"{subject}超声：{diagnosis}。"


def diagnosis_answer(diagnosis: str, signs: Sequence[str]) -> str:
    """A diagnosis and the signs that speak for it."""
    return f"{diagnosis}。征象：{'，'.join(signs)}。"


def _with_clauses(start: str, clauses: Sequence[str], style: int) -> str:
    if not clauses:
        return start
    return f"{start}，{'、'.join(clauses)}" if style == 2 else f"{start}：{'，'.join(clauses)}"
