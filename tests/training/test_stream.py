"""Every place of a run's stream is a function of the seed, the epoch and the index."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from echovlm_ray.training.batches import UNUSABLE, collate
from echovlm_ray.training.encode import FreshlyEncoded
from echovlm_ray.training.record_source import RecordSource
from echovlm_ray.training.stream import ExampleStream, UnusableExample, epoch_order
from tests.data.records import record, turns, write_lines
from tests.training.support import encoder_of, write_records


def stream_of(start: Path, records: Path, **options: object) -> ExampleStream:
    source = RecordSource(records)
    encoded = FreshlyEncoded(source, encoder_of(start))
    return ExampleStream(encoded, seed=3, length=3 * len(source), **options)  # type: ignore[arg-type]


def test_each_epoch_has_every_example_once_in_an_order_of_its_own() -> None:
    orders = [epoch_order(3, epoch, 50).tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert epoch_order(4, 0, 50).tolist() != orders[0]


def test_neither_workers_nor_global_generators_change_what_comes(start: Path, records: Path) -> None:
    def batches(workers: int, seed: int) -> list[torch.Tensor]:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        loader = DataLoader(stream_of(start, records), batch_size=3, collate_fn=collate, num_workers=workers)
        return [batch["input_ids"] for batch in loader]

    alone = batches(0, 1)
    for left, right in zip(alone, batches(2, 2), strict=True):
        assert torch.equal(left, right)


def test_an_unusable_example_is_named_or_replaced_by_the_next(start: Path, tmp_path: Path) -> None:
    records = write_records(tmp_path, 3)
    (tmp_path / "train.json-1.png").unlink()
    stream = stream_of(start, records)
    found = [each for place in range(9) if isinstance(each := stream[place], UnusableExample)]
    place = f"{records}, line 1"
    assert [each.reason for each in found] == [f"{place}: image 1 of 1 does not exist below the image root"] * 3
    assert UNUSABLE in collate([found[0]])
    replaced = stream_of(start, records, skip_unusable=True)
    order = epoch_order(3, 0, 3).tolist()
    expected = stream[order.index(2)]
    substitute = replaced[order.index(1)]
    assert not isinstance(expected, UnusableExample)
    assert not isinstance(substitute, UnusableExample)
    assert torch.equal(substitute.input_ids_T, expected.input_ids_T)


def test_what_is_left_out_is_counted_and_named_once(
    start: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chats = [turns("What?", "A cyst."), turns("What?", "A cyst. " * 100), turns("What?", "A mass."), None]
    paths = [
        write_lines(tmp_path / f"{number}.jsonl", [record(f"r{number}", image=[], conversations=chat)])
        for number, chat in enumerate(chats)
    ]
    source = FreshlyEncoded(RecordSource(paths), encoder_of(start, max_tokens=60))
    stream = ExampleStream(source, seed=3, length=12, skip_unusable=True)
    for place in range(12):
        example = stream[place]
        # Whole, and of those that fit: nothing is cut.
        assert not isinstance(example, UnusableExample)
        assert torch.equal(example.input_ids_T, source.encoded(0, 0).input_ids_T) or torch.equal(
            example.input_ids_T, source.encoded(2, 0).input_ids_T
        )
    messages = sorted(message.getMessage() for message in caplog.records)
    assert len(messages) == 2
    assert {message.split(":")[0] for message in messages} == {"skipped, 1 so far", "skipped, 2 so far"}
    reasons = sorted(message.split(": ", 1)[1] for message in messages)
    assert re.match(rf"{paths[1]}, line 1: takes \d+ tokens, 0 of them visual, and data.max_tokens is 60", reasons[0])
    assert reasons[1].startswith(f"{paths[3]}, line 1: conversations must be a list")


def test_a_batch_is_one_row_without_padding_with_its_pictures_in_order(start: Path, records: Path) -> None:
    stream = stream_of(start, records)
    rows = [row for place in range(3) if not isinstance(row := stream[place], UnusableExample)]
    batch = collate(rows)
    assert batch["sequence_lengths"].tolist() == [len(row) for row in rows]
    assert torch.equal(batch["input_ids"][0], torch.cat([row.input_ids_T for row in rows]))
    assert torch.equal(batch["position_ids"][:, 0], torch.cat([row.position_3T for row in rows], dim=1))
    patches = [torch.from_numpy(item.patches) for row in rows for item in row.vision]
    assert torch.equal(batch["pixel_values"], torch.cat(patches))
