"""The order of a record's media, and where unmarked ones are shown."""

from echovlm_ray.data.record import Record, Turn, mark_media, media_paths


def record_of(*texts: str, images: tuple[str, ...] = (), videos: tuple[str, ...] = ()) -> Record:
    turns = tuple(Turn(("human", "gpt")[index % 2], text) for index, text in enumerate(texts))
    return Record("r", images, videos, turns)


def test_media_come_in_the_order_of_their_marks() -> None:
    marked = record_of("<video>A <image>?", "<image>", "<image><video>", "b", images=("1", "2"), videos=("a", "b"))
    assert media_paths(marked) == ["a", "1", "2", "b"]
    assert mark_media(marked) is marked


def test_unmarked_media_are_shown_in_the_first_question() -> None:
    bare = record_of("What?", "A.", "And?", "B.", images=("1", "2"), videos=("a",))
    shown = mark_media(bare)
    assert [turn.text for turn in shown.turns] == ["<image><image><video>What?", "A.", "And?", "B."]
    assert media_paths(shown) == ["1", "2", "a"]
    # One mark is enough to say that marks were meant.
    half = record_of("What?", "A.", "<image>?", "B.", images=("1", "2"))
    assert mark_media(half) is half
    answer_alone = Record("r", ("1",), (), (Turn("gpt", "A."),))
    assert mark_media(answer_alone) is answer_alone
