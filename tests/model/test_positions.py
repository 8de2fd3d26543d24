from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

from echovlm_ray.model.positions import Grid, PlaceholderMismatchError, batch_positions, mrope_positions
from tests.model.support import END, IMAGE, PAD, START, VIDEO, small_config

CONFIG = small_config()
# A piece of a prompt: how many words, or a picture.
Piece = int | tuple[int, Grid]

heights = st.integers(1, 4).map(lambda size: 2 * size)
pictures = st.tuples(st.sampled_from([IMAGE, VIDEO]), st.tuples(st.integers(1, 5), heights, heights))
prompts = st.lists(st.one_of(st.integers(1, 4), pictures), min_size=1, max_size=6)


def tokens_of(pieces: list[Piece]) -> tuple[list[int], list[Grid], list[Grid]]:
    tokens: list[int] = []
    grids: dict[int, list[Grid]] = {IMAGE: [], VIDEO: []}
    for piece in pieces:
        if isinstance(piece, int):
            tokens += range(1, piece + 1)
        else:
            kind, grid = piece
            grids[kind].append(grid)
            tokens += [START, *[kind] * (grid[0] * grid[1] * grid[2] // 4), END]
    return tokens, grids[IMAGE], grids[VIDEO]


@given(prompts)
@settings(max_examples=60, deadline=None)
def test_every_token_stands_where_the_rule_puts_it(pieces: list[Piece]) -> None:
    tokens, images, videos = tokens_of(pieces)
    positions, delta = mrope_positions(torch.tensor(tokens), images, videos, CONFIG)
    expected: list[tuple[int, int, int]] = []
    following = 0
    for piece in pieces:
        if isinstance(piece, int):
            expected += [(following + i,) * 3 for i in range(piece)]
            following += piece
            continue
        _, (t, h, w) = piece
        expected.append((following,) * 3)
        first = following + 1
        expected += [(first + i, first + j, first + k) for i in range(t) for j in range(h // 2) for k in range(w // 2)]
        following = first + max(t, h // 2, w // 2)
        expected.append((following,) * 3)
        following += 1
    assert positions.T.tolist() == [list(row) for row in expected]
    assert positions.dtype == torch.int64
    assert delta == following - len(tokens)


@given(st.lists(prompts, min_size=1, max_size=3), st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_padded_batch_is_its_rows(rows: list[list[Piece]], left: bool) -> None:
    parts = [tokens_of(pieces) for pieces in rows]
    length = max(len(tokens) for tokens, _, _ in parts)
    ids = torch.full((len(parts), length), PAD)
    mask = torch.zeros_like(ids)
    for row, (tokens, _, _) in enumerate(parts):
        place = slice(length - len(tokens), None) if left else slice(len(tokens))
        ids[row, place], mask[row, place] = torch.tensor(tokens), 1
    images = [grid for _, grids, _ in parts for grid in grids]
    videos = [grid for _, _, grids in parts for grid in grids]
    positions, deltas = batch_positions(
        ids, mask, torch.tensor(images) if images else None, torch.tensor(videos) if videos else None, CONFIG
    )
    for row, (tokens, row_images, row_videos) in enumerate(parts):
        alone, delta = mrope_positions(torch.tensor(tokens), row_images, row_videos, CONFIG)
        assert torch.equal(positions[:, row, mask[row].bool()], alone)
        assert deltas[row].item() == delta + len(tokens) - length


@given(prompts.filter(lambda pieces: any(not isinstance(piece, int) for piece in pieces)))
@settings(max_examples=40, deadline=None)
def test_transformers_agrees_unless_a_video_is_longer_than_wide(pieces: list[Piece]) -> None:
    tokens, images, videos = tokens_of(pieces)
    if any(2 * t > max(h, w) for t, h, w in images + videos):
        return
    ids = torch.tensor([tokens])
    kinds = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    stock: Any = SimpleNamespace(config=CONFIG)
    rule: Any = Qwen2VLModel.get_rope_index
    stock.get_vision_position_ids = Qwen2VLModel.get_vision_position_ids.__get__(stock)
    expected, _ = rule(stock, ids, kinds, torch.tensor(images), torch.tensor(videos))
    assert torch.equal(mrope_positions(ids[0], images, videos, CONFIG)[0], expected[:, 0])


def test_pictures_may_touch() -> None:
    tokens = torch.tensor([START] + [IMAGE] * 2 + [IMAGE] * 1 + [END])
    positions, _ = mrope_positions(tokens, [(1, 2, 4), (1, 2, 2)], [], CONFIG)
    assert positions.tolist() == [[0, 1, 1, 3, 4], [0, 1, 1, 3, 4], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize(("found", "kind", "token"), [(5, "image", IMAGE), (7, "image", IMAGE), (5, "video", VIDEO)])
def test_a_wrong_number_of_placeholders_names_both_counts(found: int, kind: str, token: int) -> None:
    grids = {"image": [(1, 4, 6)] if kind == "image" else [], "video": [(1, 4, 6)] if kind == "video" else []}
    tokens = torch.tensor([START, *[token] * found, END])
    with pytest.raises(PlaceholderMismatchError, match=rf"{found} {kind} placeholder tokens.*1 {kind}\(s\).*fill 6"):
        mrope_positions(tokens, grids["image"], grids["video"], CONFIG)


def test_placeholders_without_a_picture_are_refused() -> None:
    with pytest.raises(PlaceholderMismatchError, match=r"3 image placeholder tokens.*the 0 image"):
        mrope_positions(torch.tensor([1, IMAGE, IMAGE, IMAGE]), [], [], CONFIG)


def test_pictures_in_another_order_than_the_prompts_are_refused() -> None:
    tokens = torch.tensor([IMAGE] * 6 + [1] + [IMAGE] * 2)
    mrope_positions(tokens, [(1, 4, 6), (1, 2, 4)], [], CONFIG)
    with pytest.raises(PlaceholderMismatchError, match="image 1 fills 6 placeholder tokens, but the prompt has 5"):
        mrope_positions(tokens, [(1, 2, 4), (1, 4, 6)], [], CONFIG)
