"""Builds English sentences in three styles."""

from collections.abc import Sequence

FINDINGS = "Ultrasound findings: "
IMPRESSION = "Ultrasound impression: "
BETWEEN_SECTIONS = "; "
END = "."
BETWEEN_SENTENCES = ". "


def subject_sentence(subject: str, clauses: Sequence[str], style: int) -> str:
    """What is looked at, as "Left breast: fatty tissue"; without a full stop."""
    if not clauses:
        return (_capital(subject), f"Image of the {subject}", f"{_capital(subject)} in view")[style]
    return (
        f"{_capital(subject)}: {', '.join(clauses)}",
        f"Image of the {subject}: {', '.join(clauses)}",
        f"{_capital(subject)} with {_joined(clauses)}",
    )[style]


def lead_sentence(lead: str, clauses: Sequence[str], style: int) -> str:
    """A finding and its features, as "Mass: small, oval"; without a full stop."""
    start = f"There is {lead}" if style == 1 else _capital(lead)
    if not clauses:
        return start
    return f"{start}{', ' if style == 2 else ': '}{', '.join(clauses)}"


def impression(diagnosis: str, category: str | None, style: int) -> str:
    """The diagnosis and its category."""
    start = ("", "consistent with ", "suggests ")[style] + diagnosis
    if category is None:
        return start
    return f"{start} ({category})" if style == 1 else f"{start}, {category}"


def caption(subject: str, diagnosis: str) -> str:
    """One sentence on the whole picture."""
    return f"Ultrasound of the {subject}: {diagnosis}."


def diagnosis_answer(diagnosis: str, signs: Sequence[str]) -> str:
    """A diagnosis and the signs that speak for it."""
    return f"{_capital(diagnosis)}. Signs: {', '.join(signs)}."


def _joined(clauses: Sequence[str]) -> str:
    return f"{', '.join(clauses[:-1])} and {clauses[-1]}" if len(clauses) > 1 else clauses[0]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
