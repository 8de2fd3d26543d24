"""Prompts equal the served ones, only answers are targets, and no picture is truncated."""

from pathlib import Path

import numpy as np
import pytest

from echovlm_ray.model.processing import EchoVLMProcessor
from echovlm_ray.training.encode import IGNORED, TooLongError
from echovlm_ray.training.examples import Example, ExampleError
from echovlm_ray.training.record_source import RecordSource
from tests.training.support import encoder_of


def test_the_prompt_is_what_is_served_and_the_answer_alone_is_learnt(start: Path, records: Path) -> None:
    processor = EchoVLMProcessor.from_pretrained(start)
    example = RecordSource(records).example(0, 0)
    encoded = encoder_of(start).encode(example)
    prompt = processor.encode_chat(example.messages[:-1], encoded.vision)
    learnt = encoded.target_T[encoded.target_T != IGNORED].tolist()
    assert encoded.input_ids_T[: len(prompt)].tolist() == prompt
    answer = "Ultrasound findings: a cyst; Ultrasound impression: cyst."
    assert processor.tokenizer.decode(learnt) == answer + "<|im_end|>"
    # A target stands where the token before it is read.
    first = len(prompt) - 1
    assert encoded.target_T[:first].eq(IGNORED).all()
    assert encoded.target_T[first] == learnt[0]
    assert encoded.input_ids_T[first + 1 :].tolist() == learnt[:-1]
    assert encoded.position_3T.shape == (3, len(encoded))


def test_every_answer_of_a_longer_chat_is_learnt_behind_the_prompt_that_is_served(start: Path) -> None:
    processor = EchoVLMProcessor.from_pretrained(start)
    chat = [("user", "Which organ?"), ("assistant", "liver"), ("user", "Normal?"), ("assistant", "no")]
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in chat]
    encoded = encoder_of(start).encode(Example(messages))  # type: ignore[arg-type]
    assert encoded.input_ids_T.tolist()[: -len(processor.encode_text("no"))] == processor.encode_chat(messages[:3], [])  # type: ignore[arg-type]
    learnt = encoded.target_T[encoded.target_T != IGNORED].tolist()
    assert processor.tokenizer.decode(learnt) == "liver<|im_end|>no<|im_end|>"


def test_emphasised_words_count_more_wherever_they_stand(start: Path, records: Path) -> None:
    example = RecordSource(records).example(0, 0)
    marked = Example(example.messages, example.pictures, emphasis=("cyst",))
    encoder = encoder_of(start, emphasis_weight=5.0)
    plain, weighted = encoder.encode(example), encoder.encode(marked)
    tokenizer = EchoVLMProcessor.from_pretrained(start).tokenizer
    heavy = weighted.weight_T == 5
    assert str(tokenizer.decode(weighted.target_T[heavy].tolist())).replace(" ", "") == "cystcyst"
    assert plain.weight_T.unique().tolist() == [0, 1]
    assert (weighted.weight_T[~heavy] == plain.weight_T[~heavy]).all()


def test_too_long_a_record_is_refused_and_not_cut(start: Path, records: Path) -> None:
    with pytest.raises(TooLongError, match=r"takes \d+ tokens, 9 of them visual, and data.max_tokens is 20"):
        encoder_of(start, max_tokens=20).encode(RecordSource(records).example(0, 0))


def test_what_is_no_training_example_is_refused(start: Path) -> None:
    encoder = encoder_of(start)
    question = {"role": "user", "content": [{"type": "text", "text": "?"}]}
    with pytest.raises(ExampleError, match="end in a turn of the assistant"):
        encoder.encode(Example([question]))  # type: ignore[list-item]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}
    with pytest.raises(ExampleError, match="end in a turn of the assistant"):
        encoder.encode(Example([question, answer], [np.zeros((56, 56, 3), np.uint8)]))  # type: ignore[list-item]
