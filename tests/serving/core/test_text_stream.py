"""Tokens to text: whole characters, the same text as without streaming, and no stop strings."""

import itertools

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from echovlm_ray.model.processing import EchoVLMProcessor
from echovlm_ray.serving.core.text_stream import Detokenizer, StopStrings
from tests.random_checkpoint import make_random

VOCABULARY = 1000


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> EchoVLMProcessor:
    directory = tmp_path_factory.mktemp("demo") / "demo"
    make_random(directory)
    return EchoVLMProcessor.from_pretrained(directory)


def pieces(processor: EchoVLMProcessor, token_ids: list[int], size: int = 1) -> list[str]:
    stream = Detokenizer(processor.decode)
    parts = [stream.push(token_ids[start : start + size]) for start in range(0, len(token_ids), size)]
    return [*parts, stream.finish()]


@given(token_ids=st.lists(st.integers(0, VOCABULARY - 1), max_size=60), size=st.integers(1, 4))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_all_pieces_together_are_the_text(processor: EchoVLMProcessor, token_ids: list[int], size: int) -> None:
    assert "".join(pieces(processor, token_ids, size)) == processor.decode(token_ids)


@given(text=st.text(alphabet=st.sampled_from("肝脏回声🫀é a\n"), max_size=20))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(text="🫀🫀")
def test_no_piece_holds_half_a_character(processor: EchoVLMProcessor, text: str) -> None:
    token_ids = [token for character in text for byte in character.encode() for token in one_byte(processor, byte)]
    parts = pieces(processor, token_ids)
    assert "\ufffd" not in "".join(parts)
    assert "".join(parts) == text


def one_byte(processor: EchoVLMProcessor, byte: int) -> list[int]:
    """The token of a lone byte, as byte-level BPE spells it (Radford et al. 2019)."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [code for code in range(256) if code not in visible]
    character = chr(byte) if byte in visible else chr(256 + hidden.index(byte))
    token = processor.tokenizer.convert_tokens_to_ids(character)
    assert isinstance(token, int)
    return [token]


def test_text_before_an_unfinished_character_is_not_held_back(processor: EchoVLMProcessor) -> None:
    liver = "肝".encode()
    ids = [one_byte(processor, byte)[0] for byte in b"ab" + liver[:2] + liver]
    assert pieces(processor, ids) == ["a", "b", "", "", "\ufffd", "", "肝", ""]
    assert pieces(processor, ids[:-1])[-1] == "\ufffd"


def test_special_tokens_are_left_out(processor: EchoVLMProcessor) -> None:
    end = processor.tokenizer.get_vocab()["<|im_end|>"]
    ids = [*processor.encode_text("liver"), end]
    assert "".join(pieces(processor, ids)) == "liver"


def stopped(stop: list[str], parts: list[str]) -> tuple[list[str], bool]:
    stream = StopStrings(stop)
    out = [stream.push(part) for part in parts]
    return [*out, stream.finish()], stream.stopped


STOPS = st.lists(st.text(alphabet="abc肝🫀", min_size=1, max_size=4), max_size=4)


@given(stop=STOPS, parts=st.lists(st.text(alphabet="abc肝🫀", max_size=4), max_size=12))
@settings(max_examples=600)
@example(stop=["aab"], parts=["aaa", "b"])
@example(stop=["abc", "b"], parts=["a", "b", "c"])
@example(stop=["abc", "b"], parts=["abc"])
@example(stop=["abc", "b"], parts=["a", "b"])
@example(stop=["abc", "b"], parts=["ab", "b"])
@example(stop=["ab", "abc"], parts=["ab", "c"])
@example(stop=["abca", "ca", "bcab"], parts=["abc", "ab"])
def test_the_answer_ends_before_the_stop_string_that_begins_first(stop: list[str], parts: list[str]) -> None:
    whole = "".join(parts)
    places = [place for string in stop if (place := whole.find(string)) >= 0]
    out, found = stopped(stop, parts)
    assert "".join(out) == whole[: min(places, default=len(whole))]
    assert found == bool(places)


@given(stop=STOPS, text=st.text(alphabet="abc肝🫀", max_size=16), cuts=st.lists(st.integers(0, 16), max_size=16))
@settings(max_examples=300)
def test_how_the_text_is_cut_changes_nothing(stop: list[str], text: str, cuts: list[int]) -> None:
    edges = [0, *sorted(cut for cut in cuts if cut <= len(text)), len(text)]
    parts = [text[start:end] for start, end in itertools.pairwise(edges)]
    out, found = stopped(stop, parts)
    at_once, found_at_once = stopped(stop, [text])
    assert ("".join(out), found) == ("".join(at_once), found_at_once)


def test_text_ends_as_soon_as_no_other_string_can_begin_before_it() -> None:
    assert stopped(["abc", "b"], ["xab", "d", "more"]) == (["x", "a", "", ""], True)
    assert stopped(["abc", "b"], ["xab"]) == (["x", "a"], True)
    assert stopped(["abc", "b"], ["b", "more"]) == (["", "", ""], True)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    assert stopped(["END"], ["the E", "cho", " EN", "D and more"]) == (["the ", "Echo", " ", "", ""], True)
    assert stopped(["END"], ["THE EN"]) == (["THE ", "EN"], False)
    assert stopped([], ["a", "b"]) == (["a", "b", ""], False)
