import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.sr.codedict import codes

from router.gating import anatomy

SEVEN = ("breast", "gynaecology", "heart", "kidney", "liver", "thyroid", "vessel")
TERMS = sorted({(term, concept.organ) for concept in anatomy.concepts() for term in concept.terms}, key=str)


def organs(text: str) -> list[str]:
    return anatomy.organs_in(text, {})


def test_every_term_of_the_table_means_its_organ_and_no_other() -> None:
    wrong = [(term, organs(term)) for term, organ in TERMS if organs(term) != ([organ] if organ else [])]
    assert wrong == []
    assert len(TERMS) > 2000
    assert {organ for _, organ in TERMS} == {*SEVEN, None}


def test_every_code_of_the_table_means_its_organ_and_no_other() -> None:
    for concept in anatomy.concepts():
        for scheme, listed in (("SCT", concept.sct), ("SRT", concept.srt)):
            for code in listed:
                term = anatomy.term_of_code(scheme, code)
                assert term is not None
                assert organs(term) == ([concept.organ] if concept.organ else []), code


def test_the_codes_are_those_of_the_standard() -> None:
    # SCT codes with a context group in DICOM PS3.16, as pydicom lists them.
    listed = [concept for concept in anatomy.concepts() if concept.sct and concept.source.startswith("PS3.16")]
    standard = {getattr(codes.SCT, keyword).value for keyword in codes.SCT.dir()}
    assert len(listed) > 600
    for concept in listed:
        assert standard.intersection(concept.sct), concept


def test_no_code_stands_in_two_lines() -> None:
    every = [code for concept in anatomy.concepts() for code in (*concept.sct, *concept.srt)]
    assert len(every) == len(set(every)) > 1500


def test_every_coded_concept_of_an_organ_has_a_name_in_both_languages() -> None:
    for concept in anatomy.concepts():
        assert concept.source
        if concept.organ and concept.sct:
            assert concept.terms[0].isascii(), concept
            assert any(re.search("[\u4e00-\u9fff]", term) for term in concept.terms), concept


@pytest.mark.parametrize(
    ("term", "right"),
    [
        # The examples of the reports.
        ("心脏彩超", "heart"),
        ("双肾", "kidney"),
        ("颈动脉", "vessel"),
        ("Renal pelvis", "kidney"),
        ("Coronary artery", "heart"),
        ("Mitral valve", "heart"),
        # The longest phrase decides.
        ("肾盂", "kidney"),
        ("肺动脉瓣", "heart"),
        ("子宫动脉", "gynaecology"),
        ("冠状动脉造影", "heart"),
        ("主动脉瓣狭窄", "heart"),
        ("腹主动脉瘤", "vessel"),
        ("颈部血管", "vessel"),
        ("Fetal heart", "gynaecology"),
        ("胎儿心脏", "gynaecology"),
        ("Hepatic vein", "liver"),
        ("Portal vein thrombosis", "liver"),
        ("Renal artery stenosis", "kidney"),
        ("Internal mammary artery", "vessel"),
        ("Infra-renal aorta", "vessel"),
        ("Superior thyroid artery", "thyroid"),
        ("乳头肌", "heart"),
        ("左乳外上象限", "breast"),
        ("甲状腺右叶结节", "thyroid"),
        ("双下肢深静脉", "vessel"),
        ("二尖瓣反流", "heart"),
        ("移植肾", "kidney"),
        ("肝血管瘤", "liver"),
        # Spelling, number, case, width, accents, other scripts and languages.
        ("OVARIES", "gynaecology"),
        ("Gynecological ultrasound", "gynaecology"),
        ("carotid arteries, bilateral", "vessel"),
        ("\uff34\uff48\uff59\uff52\uff4f\uff49\uff44", "thyroid"),
        ("LEFT_KIDNEY", "kidney"),
        ("甲狀腺", "thyroid"),
        ("頸動脈", "vessel"),
        ("心臓", "heart"),
        ("Glandula thyreoidea", "thyroid"),
        ("Hepar", "liver"),
        ("SCHILDDRÜSE", "thyroid"),
        ("Schilddru\u0308se", "thyroid"),
        ("Riñón derecho", "kidney"),
        ("Foie", "liver"),
        ("Structure of left ventricle (body structure)", "heart"),
        # DICOM's defined terms.
        ("CORONARYARTERY", "heart"),
        ("FEMORALV", "vessel"),
        ("RENALA", "kidney"),
        ("ABDOMINALAORTA", "vessel"),
        ("FALLOPIANTUBE", "gynaecology"),
    ],
)
def test_terms_of_one_organ(term: str, right: str) -> None:
    assert organs(term) == [right]


@pytest.mark.parametrize(
    "term",
    [
        *(
            "Abdomen",
            "腹部",
            "ABDOMENPELVIS",
            "Abdomen and Pelvis",
            "Testis",
            "睾丸",
            "Prostate",
            "前列腺",
            "Spleen",
            "脾",
        ),
        *("Pancreas", "Gallbladder", "胆囊", "Bladder", "膀胱", "Adrenal gland", "肾上腺", "甲状旁腺", "Parathyroid"),
        *("Thyroid cartilage", "甲状软骨", "Lateral ventricle", "侧脑室", "Nasal septum", "Cervical spine", "颈椎"),
        *(
            "Hepatic flexure",
            "Ileocecal valve",
            "男性盆腔",
            "Male pelvis",
            "骨盆",
            "精索静脉",
            "血管瘤",
            "心血管",
            "中心",
        ),
        *(
            "十二指肠乳头",
            "颈部淋巴结",
            "Jugular lymph node",
            "Femur",
            "Axilla",
            "腋窝",
            "Neck",
            "下肢",
            "贲门",
            "心",
            "",
            "!",
        ),
        *("脾", "中心", "心", "", "!", "hearty", "renaissance", "adrenal", "veinous", "\u7532\u72b6", "Ìå"),
    ],
)
def test_terms_of_no_organ(term: str) -> None:
    assert organs(term) == []


def test_a_text_may_name_several() -> None:
    assert set(organs("肝胆胰脾双肾")) == {"liver", "kidney"}
    assert set(organs("Thyroid and carotid arteries")) == {"thyroid", "vessel"}
    assert organs("Kidneys, ureters and bladder") == ["kidney"]


@pytest.mark.parametrize(
    ("scheme", "code", "right"),
    [
        ("SCT", "69748006", "Thyroid"),
        ("SRT", "T-B6000", "Thyroid"),
        ("SNM3", "t-b6000 ", "Thyroid"),
        ("99SDM", "T-B6000", "Thyroid"),
        ("SNOMED-CT", "69748006", "Thyroid"),
        ("", "69748006", "Thyroid"),
        ("", "http://snomed.info/id/69748006", "Thyroid"),
        ("SCT", "41216001", "Prostate"),
        ("DCM", "69748006", None),
        ("99LOCAL", "T-B6000", None),
        ("SCT", "", None),
        ("SCT", "1", None),
    ],
)
def test_codes(scheme: str, code: str, right: str | None) -> None:
    assert anatomy.term_of_code(scheme, code) == right


def test_words_of_the_callers_own_come_first() -> None:
    own = {anatomy.phrase("renal pelvis"): "lung", anatomy.phrase("pulmo"): "lung"}
    assert anatomy.organs_in("Pulmo", own) == ["lung"]
    assert anatomy.organs_in("renal pelvis", own) == ["lung"]
    assert anatomy.organs_in("kidney", own) == ["kidney"]


@given(
    st.sampled_from(TERMS), st.sampled_from([str.upper, str.title, lambda term: f"  {term} ", lambda term: f"({term})"])
)
def test_case_and_punctuation_change_nothing(line: tuple[str, str | None], change: object) -> None:
    term, organ = line
    assert callable(change)
    assert organs(change(term)) == ([organ] if organ else [])


@given(st.sampled_from(TERMS), st.sampled_from(TERMS))
def test_two_terms_apart_mean_what_each_means(first: tuple[str, str | None], second: tuple[str, str | None]) -> None:
    # A word between them, so that they cannot become one phrase.
    assert set(organs(f"{first[0]} zz {second[0]}")) == {organ for _, organ in (first, second) if organ}


@given(st.text(max_size=64))
def test_any_text_is_read(text: str) -> None:
    assert set(organs(text)) <= set(SEVEN)
    anatomy.is_known(text)
    anatomy.is_familiar(text)
