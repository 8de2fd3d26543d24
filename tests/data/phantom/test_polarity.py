"""What a text denies or leaves open is no statement, whichever diagnosis or attribute it is about."""

import pytest

from echovlm_ray.data.phantom.parsing import parse, parse_diagnosis, parse_values
from echovlm_ray.data.phantom.polarity import Polarity, polarities
from echovlm_ray.data.phantom.regions import REGIONS
from echovlm_ray.data.phantom.schema import ORGANS, Organ
from echovlm_ray.tasks import Language

STATED = {
    "en": ("{}.", "There is {}.", "Consistent with {}.", "Suggests {}, BI-RADS 2", "Yes, {}.", "No doubt? No. {}"),
    "zh": ("{}。", "考虑{}。", "符合{}，建议随访", "可见{}", "是，{}。"),
}
NOT_STATED = {
    "en": (
        "Rule out {}.",
        "Rule out: {}",
        "r/o {}",
        "To exclude {}, follow-up is advised.",
        "{} cannot be excluded.",
        "{} cannot be ruled out",
        "{} can not be fully excluded.",
        "Cannot exclude {}.",
        "We can't exclude a {} here.",
        "{}, to be excluded",
        "{} should be excluded.",
        "{} of the upper part cannot be excluded.",
        "No evidence of {}.",
        "No sign of any {}",
        "There is no {}.",
        "Suspicious for {}.",
        "Suspicious for {}?",
        "{}?",
        "{} (?)",
        "? {}",
        "Possible {}.",
        "Probably {}",
        "May represent {}.",
        "{} is possible.",
        "{} is unlikely.",
        "{}, less likely",
        "Differential diagnosis: {}.",
        "History of {}.",
        "Negative for {}.",
        "{} is not seen.",
        "{} was not identified.",
        "{} absent.",
        "This isn't {}.",
        "Instead of {}, nothing is seen.",
        "Not {}.",
        "Whether this is {} is unclear.",
        "No calculus, gas or {}.",
        "{} or abscess cannot be excluded.",
        "{}: no",
        "{} - negative.",
        "{} (absent)",
        "There is doubt about {}",
        "It is wrong to say {}",
    ),
    "zh": (
        "不能排除{}。",
        "不除外{}",
        "{}不能排除。",
        "{}不能完全排除。",
        "{}待排除。",
        "{}待排",
        "{}，待查。",
        "{}？",
        "排除{}。",
        "未见{}。",
        "未见明显{}",
        "未见：{}",
        "未见钙化、{}。",
        "无{}。",
        "没有{}",
        "未发现{}征象",
        "疑似{}。",
        "？{}",
        "怀疑{}",
        "可能{}。",
        "{}可能。",
        "{}可能性大。",
        "考虑{}可能",
        "是否{}",
        "有无{}请结合临床",
        "{}与脓肿鉴别",
        "既往{}",
        "不考虑{}",
        "{}未见。",
        "{}阴性。",
        "{}：无",
        "{}（-）",
    ),
}


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("organ", ORGANS)
def test_only_a_stated_diagnosis_counts(organ: Organ, language: Language) -> None:
    for phantom_class in REGIONS[organ].classes:
        for phrase in phantom_class.diagnosis.read(language):
            for form in STATED[language]:
                text = form.format(phrase)
                assert parse_diagnosis(text, language, organ) == phantom_class.name, text
            for form in NOT_STATED[language]:
                text = form.format(phrase)
                assert parse_diagnosis(text, language, organ) is None, text
                marked = f"Impression: {text}" if language == "en" else f"超声提示：{text}"
                assert parse(marked, language, organ).class_name is None, marked


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("organ", ORGANS)
def test_only_a_stated_value_counts(organ: Organ, language: Language) -> None:
    for attribute in REGIONS[organ].attributes:
        for value, value_words in attribute.values.items():
            for phrase in value_words.read(language):
                assert parse_values(f"{phrase}.", language, organ).get(attribute.name) == value
                for form in NOT_STATED[language]:
                    text = form.format(phrase)
                    # "no focal lesion" is a phrase of its own, and so is "not parallel".
                    assert parse_values(text, language, organ).get(attribute.name) != value, text


@pytest.mark.parametrize(
    ("text", "phrases", "language", "expected"),
    [
        ("no cyst, stone or mass.", ("cyst", "stone", "mass"), "en", "DDD"),
        ("no cyst, oval mass.", ("cyst", "mass"), "en", "DS"),
        ("cyst or stone cannot be excluded; mass", ("cyst", "stone", "mass"), "en", "OOS"),
        ("cyst absent and oval mass", ("cyst", "mass"), "en", "DS"),
        ("a cyst. rule out stone. mass", ("cyst", "stone", "mass"), "en", "SOS"),
        ("未见囊肿、结石及肿块.", ("囊肿", "结石", "肿块"), "zh", "DDD"),
        ("囊肿,排除结石", ("囊肿", "结石"), "zh", "SO"),
        ("囊肿,不考虑结石.", ("囊肿", "结石"), "zh", "SD"),
        ("cyst, possible stone", ("cyst", "stone"), "en", "SO"),
        ("cyst, possible left-sided stone", ("cyst", "stone"), "en", "SO"),
        ("cyst versus stone", ("cyst", "stone"), "en", "OO"),
        ("cyst, stone excluded", ("cyst", "stone"), "en", "SO"),
        ("囊肿未见结石", ("囊肿", "结石"), "zh", "SD"),
        ("囊肿或结石待排,肿块", ("囊肿", "结石", "肿块"), "zh", "OOS"),
    ],
)
def test_what_is_joined_shares_its_fate(text: str, phrases: tuple[str, ...], language: Language, expected: str) -> None:
    spans = [(text.index(phrase), text.index(phrase) + len(phrase)) for phrase in phrases]
    letters = {Polarity.STATED: "S", Polarity.DENIED: "D", Polarity.OPEN: "O"}
    assert "".join(letters[each] for each in polarities(text, spans, language)) == expected
