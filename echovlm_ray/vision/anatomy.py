"""What a DICOM object says about the anatomy shown, from coded attributes only: free text may hold names (P12)."""

import re

from pydicom import Dataset

MAX_TERMS = 8
MAX_TERM_CHARACTERS = 64


def anatomy_terms(dataset: Dataset) -> tuple[str, ...]:
    """The coded names of what is shown: Body Part Examined, Anatomic Region, Primary Anatomic Structure."""
    terms = [dataset.get("BodyPartExamined", "")]
    for keyword in ("AnatomicRegionSequence", "PrimaryAnatomicStructureSequence"):
        terms.extend(item.get("CodeMeaning", "") for item in dataset.get(keyword, None) or ())
    words = [re.sub(r"\s+", " ", str(term)).strip() for term in terms]
    fitting = [word for word in words if word and word.isprintable() and len(word) <= MAX_TERM_CHARACTERS]
    return tuple(dict.fromkeys(fitting))[:MAX_TERMS]
