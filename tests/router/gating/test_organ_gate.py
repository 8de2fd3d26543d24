import pytest
import torch

from protos import router_pb2
from router.errors import TooManyOrgansError, UnknownOrganError
from router.gating.expert_set import ExpertSet, ExpertSetMember, Routing
from router.gating.organ_gate import OrganGate, OrganProfile

ORGANS = ("breast", "gynaecology", "heart", "thyroid", "vessel")


def expert_set(routing: Routing = "organs", organs: tuple[str, ...] = ORGANS) -> ExpertSet:
    members = tuple(ExpertSetMember(organ=organ, bundle_digest=organ) for organ in organs)
    return ExpertSet(backbone_digest="b", routing=routing, members=members)


@pytest.fixture
def gate() -> OrganGate:
    profiles = [
        OrganProfile("breast", ("mamma",), torch.tensor([1.0, 0.0, 0.0])),
        OrganProfile("gynaecology", ("obstetric", "uterus")),
        OrganProfile("heart", ("cardiac", "left ventricle"), torch.tensor([0.0, 1.0, 0.0])),
        OrganProfile("thyroid", ("thyroid gland",)),
        OrganProfile("vessel", ("artery",)),
    ]
    return OrganGate(profiles, default_organ="thyroid", max_organs=2)


def test_the_caller_comes_first(gate: OrganGate) -> None:
    choice = gate.choose(["Heart "], ["Breast"], torch.tensor([1.0, 0, 0]), expert_set())
    assert choice.shares == (("heart", 1.0),)
    assert choice.source == router_pb2.ORGAN_SOURCE_CALLER


def test_the_callers_organs_have_equal_shares_in_the_order_of_the_set(gate: OrganGate) -> None:
    choice = gate.choose(["vessel", "MAMMA", "breast"], [], None, expert_set())
    assert choice.shares == (("breast", 0.5), ("vessel", 0.5))


@pytest.mark.parametrize(
    ("term", "organ"),
    [
        ("Thyroid gland", "thyroid"),
        ("HEART", "heart"),
        ("Structure of left ventricle", "heart"),
        ("Obstetric ultrasound", "gynaecology"),
        ("Carotid artery", "vessel"),
    ],
)
def test_dicom_terms_are_matched_word_by_word(gate: OrganGate, term: str, organ: str) -> None:
    choice = gate.choose([], [term], torch.tensor([1.0, 0, 0]), expert_set())
    assert choice.shares == ((organ, 1.0),)
    assert choice.source == router_pb2.ORGAN_SOURCE_DICOM


@pytest.mark.parametrize("term", ["", "hearty meal", "lateral ventricle", "abdomen", "kidney", "!"])
def test_other_terms_say_nothing(gate: OrganGate, term: str) -> None:
    assert gate.choose([], [term], None, expert_set()).source == router_pb2.ORGAN_SOURCE_DEFAULT


@pytest.mark.parametrize(
    ("hint", "organ"),
    [("心脏", "heart"), ("Thyroid Gland", "thyroid"), ("左乳", "breast"), ("common carotids", "vessel")],
)
def test_a_caller_may_use_any_term_of_the_table(gate: OrganGate, hint: str, organ: str) -> None:
    choice = gate.choose([hint], [], None, expert_set())
    assert (choice.shares, choice.source) == (((organ, 1.0),), router_pb2.ORGAN_SOURCE_CALLER)


@pytest.mark.parametrize("hint", ["kidney", "renal pelvis", "前列腺", "abdomen", "heartx"])
def test_a_hint_that_means_no_organ_of_the_set_is_refused(gate: OrganGate, hint: str) -> None:
    with pytest.raises(UnknownOrganError, match="there is no organ"):
        gate.choose([hint], [], None, expert_set())


def test_a_bundle_may_bring_terms_of_its_own_and_they_come_first() -> None:
    profiles = [OrganProfile("lung", ("pulmo", "coronary artery"))]
    gate = OrganGate(profiles, default_organ="heart", max_organs=2)
    with_lung = expert_set(organs=("heart", "lung"))
    for term, organ in [("Lung", "lung"), ("PULMO", "lung"), ("Coronary artery", "lung"), ("Mitral valve", "heart")]:
        assert gate.choose([], [term], None, with_lung).shares == ((organ, 1.0),)


def test_of_many_organs_in_the_terms_the_most_frequent_remain(gate: OrganGate) -> None:
    terms = ["thyroid", "artery", "artery", "heart", "heart"]
    assert gate.choose([], terms, None, expert_set()).shares == (("heart", 0.5), ("vessel", 0.5))


def test_the_nearest_prototype_decides_when_nothing_else_does(gate: OrganGate) -> None:
    choice = gate.choose([], ["abdomen"], torch.tensor([0.1, 3.0, 0.5], dtype=torch.bfloat16), expert_set())
    assert choice.shares == (("heart", 1.0),)
    assert choice.source == router_pb2.ORGAN_SOURCE_PROTOTYPE


def test_an_unreadable_picture_leaves_the_default(gate: OrganGate) -> None:
    choice = gate.choose([], [], torch.full((3,), torch.nan), expert_set())
    assert choice.shares == (("thyroid", 1.0),)
    assert choice.source == router_pb2.ORGAN_SOURCE_DEFAULT


def test_an_unknown_organ_is_refused_and_the_known_ones_are_named(gate: OrganGate) -> None:
    with pytest.raises(UnknownOrganError, match=r"'spleen'.*breast, gynaecology, heart, thyroid, vessel"):
        gate.choose(["spleen"], [], None, expert_set())


def test_too_many_organs_are_refused_with_the_limit(gate: OrganGate) -> None:
    with pytest.raises(TooManyOrgansError, match=r"3 organs .* may use 2"):
        gate.choose(["breast", "heart", "vessel"], [], None, expert_set())


def test_a_flat_set_needs_no_organ_but_still_checks_names(gate: OrganGate) -> None:
    choice = gate.choose(["heart"], ["breast"], None, expert_set("flat"))
    assert choice.shares == ()
    assert choice.source == router_pb2.ORGAN_SOURCE_FLAT
    with pytest.raises(UnknownOrganError):
        gate.choose(["spleen"], [], None, expert_set("flat"))


def test_a_default_that_the_set_lacks_is_found_at_start(gate: OrganGate) -> None:
    gate.check(expert_set())
    gate.check(expert_set("flat", ("breast",)))
    with pytest.raises(ValueError, match=r"default_organ.*choose one of breast"):
        gate.check(expert_set("organs", ("breast",)))
