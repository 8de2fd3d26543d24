import io
import warnings
from pathlib import Path

import pytest
from pydicom import Dataset, Sequence, dcmread, dcmwrite
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, UltrasoundImageStorage

from echovlm_ray.vision.anatomy import MAX_TERM_CHARACTERS, MAX_TERMS, anatomy_terms
from router.gating.anatomy import organs_in

CASES = Path(__file__).parents[1] / "cases"


def coded(meaning: str = "", code: str = "1", scheme: str = "99LOCAL", keyword: str = "CodeValue") -> Dataset:
    item = Dataset()
    setattr(item, keyword, code)
    item.CodingSchemeDesignator = scheme
    item.CodeMeaning = meaning
    return item


def written(dataset: Dataset) -> bytes:
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = UltrasoundImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = UltrasoundImageStorage
    buffer = io.BytesIO()
    dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


def read(dataset: Dataset) -> Dataset:
    return dcmread(io.BytesIO(written(dataset)))


def with_bytes(meaning: bytes, charset: str | None) -> Dataset:
    """A dataset whose Code Meaning has these bytes, whatever the character set says."""
    meaning += b" " * (len(meaning) % 2)
    dataset = Dataset()
    if charset is not None:
        dataset.SpecificCharacterSet = charset
    dataset.AnatomicRegionSequence = [coded("@" * len(meaning))]
    return dcmread(io.BytesIO(written(dataset).replace(b"@" * len(meaning), meaning)))


def organs(dataset: Dataset) -> list[str]:
    return sorted({organ for term in anatomy_terms(dataset) for organ in organs_in(term, {})})


@pytest.mark.parametrize("name", ["anatomy_code_only_latin.dcm", "charset_empty.dcm"])
def test_the_cases_that_failed(name: str) -> None:
    assert anatomy_terms(dcmread(CASES / name)) == ("Thyroid",)


@pytest.mark.parametrize(
    ("item", "terms"),
    [
        (coded("Glandula thyroidea", "69748006", "SCT"), ("Thyroid",)),
        (coded("Prostate", "T-B6000", "SRT"), ("Thyroid",)),
        (coded("Herz", "302509004", "SCT"), ("Heart",)),
        (coded("", "urn:lex:snomed.info:69748006", "SCT", "URNCodeValue"), ("Thyroid",)),
        (coded("", "69748006", "SCT", "LongCodeValue"), ("Thyroid",)),
        (coded("Liver structure", "17", "99LOCAL"), ("Liver structure",)),
        (coded("Liver", "T-B6000", "99LOCAL"), ("Liver",)),
        (coded("whatever", "41216001", "SCT"), ("Prostate",)),
    ],
)
def test_a_known_code_decides_over_its_meaning(item: Dataset, terms: tuple[str, ...]) -> None:
    for keyword in ("AnatomicRegionSequence", "PrimaryAnatomicStructureSequence"):
        dataset = Dataset()
        setattr(dataset, keyword, [item])
        assert anatomy_terms(read(dataset)) == terms
        assert anatomy_terms(dataset) == terms


def test_the_sequences_are_found_where_enhanced_objects_have_them() -> None:
    anatomy, shared, dataset = Dataset(), Dataset(), Dataset()
    anatomy.AnatomicRegionSequence = [coded(code="10200004", scheme="SCT")]
    shared.FrameAnatomySequence = [anatomy]
    dataset.SharedFunctionalGroupsSequence = [shared]
    assert anatomy_terms(read(dataset)) == ("Liver",)


def test_views_and_modifiers_count() -> None:
    region, dataset = coded("Neck", "45048000", "SCT"), Dataset()
    region.AnatomicRegionModifierSequence = [coded("Isthmus", "40867004", "SCT")]
    dataset.AnatomicRegionSequence = [region]
    assert organs(read(dataset)) == ["thyroid"]
    view = Dataset()
    view.ViewCodeSequence = [coded("A4C", "399214001", "SCT")]
    assert organs(read(view)) == ["heart"]


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
@pytest.mark.parametrize("charset", [None, "", "ISO_IR 100", "ISO_IR 192", "GB18030", "GBK", "ISO_IR 144", "nonsense"])
@pytest.mark.parametrize("encoding", ["gb18030", "utf-8", "gbk"])
@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("甲状腺", ["thyroid"]),
        ("心脏彩超", ["heart"]),
        ("双肾", ["kidney"]),
        ("肝", ["liver"]),
        ("颈动脉 carotid", ["vessel"]),
        ("前列腺", []),
    ],
)
def test_chinese_is_read_whatever_is_declared(text: str, right: list[str], encoding: str, charset: str | None) -> None:
    assert organs(with_bytes(text.encode(encoding), charset)) == right


@pytest.mark.parametrize(
    ("meaning", "charset", "right"),
    [
        ("Schilddrüse".encode("latin-1"), "ISO_IR 100", ["thyroid"]),
        ("Schilddrüse".encode("latin-1"), None, ["thyroid"]),
        ("甲狀腺".encode("big5"), None, ["thyroid"]),
        ("甲状腺".encode("shift_jis"), "ISO_IR 13", ["thyroid"]),
        (b"\x1b$B9CAE\x1b(B", "ISO 2022 IR 87", []),
        (b"\x1b$)A" + "心脏".encode("gb2312"), "\\ISO 2022 IR 58", ["heart"]),
        (b"\x1b$)A" + "心脏".encode("gb2312"), None, ["heart"]),
        # Text that is no Chinese anatomy in any encoding stays what it is, or is left out.
        ("Müller".encode("latin-1"), "ISO_IR 100", []),
        ("Рентген печени".encode("iso8859-5"), None, []),
        (bytes(range(0x80, 0x100)), None, []),
        (b"\x81\x30", "ISO_IR 192", []),
    ],
)
def test_other_bytes(meaning: bytes, charset: str | None, right: list[str]) -> None:
    assert organs(with_bytes(meaning, charset)) == right


def test_text_that_does_not_fit_its_character_set_is_left_out() -> None:
    assert anatomy_terms(with_bytes("Müller".encode("latin-1"), "ISO_IR 192")) == ()


def test_body_part_may_have_several_values_and_chinese() -> None:
    dataset = Dataset()
    dataset.BodyPartExamined = "HEART"
    assert anatomy_terms(read(dataset)) == ("HEART",)
    dataset.BodyPartExamined = "A" * 10
    content = written(dataset)
    for raw, right in ((b"HEART\\LIVE", ["heart"]), ("甲状腺".encode("gb18030") + b"    ", ["thyroid"])):
        assert organs(dcmread(io.BytesIO(content.replace(b"A" * 10, raw)))) == right


def test_broken_and_hostile_attributes_say_nothing() -> None:
    dataset = Dataset()
    dataset.add_new(0x00082219, "UN", b"\x00\x01\x02\x03")
    dataset.PrimaryAnatomicStructureSequence = Sequence([Dataset() for _ in range(1000)])
    dataset.BodyPartExamined = "X" * (MAX_TERM_CHARACTERS + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Anatomic Region Sequence in the place of a private attribute that holds no sequence.
        content = written(dataset).replace(b"\x08\x00\x19\x22UN", b"\x08\x00\x18\x22UN")
        assert anatomy_terms(dcmread(io.BytesIO(content))) == ()
    many = Dataset()
    many.AnatomicRegionSequence = [coded(f"term {index}") for index in range(50)]
    assert len(anatomy_terms(read(many))) == MAX_TERMS


def test_nothing_is_said_where_nothing_stands() -> None:
    assert anatomy_terms(Dataset()) == ()
