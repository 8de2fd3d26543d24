"""The anatomy of a DICOM object, from coded attributes only, because free text may contain names (P12)."""

import re
from collections.abc import Iterator

from pydicom import Dataset
from pydicom.charset import decode_bytes, python_encoding
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import RawDataElement

from router.gating import anatomy

MAX_TERMS = 8
MAX_TERM_CHARACTERS = 64
MAX_ITEMS = 8
SEQUENCES = (
    "AnatomicRegionSequence",
    "AnatomicRegionModifierSequence",
    "PrimaryAnatomicStructureSequence",
    "PrimaryAnatomicStructureModifierSequence",
    # The standard views of echocardiography: PS3.16 CID 12226.
    "ViewCodeSequence",
)
# Where enhanced objects keep the sequences above: PS3.3 C.7.6.16.2.8.
NESTED = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "FrameAnatomySequence")
# What devices write that declare another character set, or none. A text in one of them counts only when the table
# has it: that bytes can be decoded is no evidence of their encoding.
UNDECLARED = ("utf-8", "gb18030", "big5", "shift_jis", "latin-1")
# An escape sequence of ISO 2022; pydicom leaves those of GB 2312 in the text.
ESCAPE_SEQUENCE = re.compile("\x1b(?:\\$[()]?|[()-])[@-~]")


def anatomy_terms(dataset: Dataset) -> tuple[str, ...]:
    """The names of what is shown: Body Part Examined, and the codes of region, structure and view.

    A code that `router.gating.anatomy` knows gives the table's English term, whatever its Code Meaning says and in
    which language; any other gives its Code Meaning. At most `MAX_TERMS`, each of at most `MAX_TERM_CHARACTERS`.
    """
    encodings = _encodings(dataset, ())
    terms = _text(dataset, "BodyPartExamined", encodings).split("\\")
    terms.extend(_coded_terms(dataset, encodings, depth=0))
    words = [re.sub(r"\s+", " ", term).strip() for term in terms]
    fitting = [word for word in words if word and word.isprintable() and len(word) <= MAX_TERM_CHARACTERS]
    return tuple(dict.fromkeys(fitting))[:MAX_TERMS]


def _coded_terms(dataset: Dataset, encodings: tuple[str, ...], depth: int) -> Iterator[str]:
    for keyword in SEQUENCES:
        for item in _items(dataset, keyword):
            own = _encodings(item, encodings)
            yield _coded_term(item, own)
            if depth < len(NESTED):
                yield from _coded_terms(item, own, depth + 1)
    if depth < len(NESTED):
        for keyword in NESTED:
            for item in _items(dataset, keyword):
                yield from _coded_terms(item, _encodings(item, encodings), depth + 1)


def _coded_term(item: Dataset, encodings: tuple[str, ...]) -> str:
    scheme = _text(item, "CodingSchemeDesignator", encodings)
    for keyword in ("CodeValue", "LongCodeValue", "URNCodeValue"):
        if term := anatomy.term_of_code(scheme, _text(item, keyword, encodings)):
            return term
    return _text(item, "CodeMeaning", encodings)


def _items(dataset: Dataset, keyword: str) -> list[Dataset]:
    try:
        return list(dataset.get(keyword) or ())[:MAX_ITEMS]
    except Exception:
        # Any exception: what pydicom raises on a broken sequence is not to be foreseen, and the picture is still good.
        return []


def _encodings(dataset: Dataset, inherited: tuple[str, ...]) -> tuple[str, ...]:
    """Python's names of the declared character sets; empty where none is declared that exists."""
    names = _text(dataset, "SpecificCharacterSet", ()).split("\\")
    known = tuple(python_encoding[name.strip()] for name in names if name.strip() in python_encoding)
    return known if any(name.strip() for name in names) else inherited


def _text(dataset: Dataset, keyword: str, encodings: tuple[str, ...]) -> str:
    """A value as text. It is read from its bytes: pydicom would decode them as they are declared, right or wrong."""
    tag = tag_for_keyword(keyword)
    assert tag is not None
    element = dataset.get_item(tag) if tag in dataset else None
    if element is None or element.value is None:
        return ""
    if isinstance(element, RawDataElement) and isinstance(element.value, bytes):
        return _decoded(element.value.strip(b" \0"), encodings)
    value = element.value
    return str(value) if isinstance(value, str | bytes) else "\\".join(str(part) for part in value)


def _decoded(value: bytes, encodings: tuple[str, ...]) -> str:
    """The text in the declared encoding, or in another one if that gives a known term; empty if none fits."""
    declared = _as_declared(value, encodings)
    if declared is not None and (value.isascii() or anatomy.is_known(declared)):
        return declared
    for encoding in UNDECLARED:
        try:
            text = value.decode(encoding)
        except UnicodeError:
            continue
        if anatomy.is_known(text, min_words=2) or (anatomy.is_known(text) and anatomy.is_familiar(text)):
            return text
    return declared or ""


def _as_declared(value: bytes, encodings: tuple[str, ...]) -> str | None:
    if b"\x1b" in value:
        # Escape sequences are self-describing, even if they are not declared.
        every = (*(encodings or ("ascii",)), *(name for name in python_encoding.values() if name not in encodings))
        try:
            text = ESCAPE_SEQUENCE.sub("", decode_bytes(value, every, set()))
        except (UnicodeError, LookupError):
            return None
    else:
        try:
            text = value.decode(encodings[0] if encodings else "ascii")
        except (UnicodeError, LookupError):
            return None
    return text if text.isprintable() and "\ufffd" not in text else None
