"""Draws are functions of (seed, epoch, index)."""

import random
import subprocess
import sys

import numpy as np

from echovlm_ray.data.draws import draws_of, epoch_order, hash_draw


def test_a_draw_depends_on_its_three_numbers_alone() -> None:
    first = draws_of(1, 2, 3).random(4)
    np.random.seed(9)
    random.seed(9)
    draws_of(1, 2, 4).random(100)
    assert (draws_of(1, 2, 3).random(4) == first).all()
    others = [draws_of(*numbers).random(4) for numbers in ((0, 2, 3), (1, 0, 3), (1, 2, 0), (3, 2, 1), (1, 3, 2))]
    assert all((other != first).all() for other in others)


def test_no_global_generator_moves() -> None:
    np.random.seed(0)
    random.seed(0)
    before = repr(np.random.get_state()), random.getstate()
    draws_of(1, 2, 3).random()
    epoch_order(10, 1, 2)
    assert (repr(np.random.get_state()), random.getstate()) == before


def test_an_epoch_s_order_is_a_permutation_of_its_own() -> None:
    orders = [epoch_order(100, 5, epoch) for epoch in (0, 1, 0)]
    assert sorted(orders[0]) == list(range(100))
    assert (orders[0] == orders[2]).all()
    assert (orders[0] != orders[1]).any()


def test_another_process_draws_the_same() -> None:
    code = (
        "from echovlm_ray.data.draws import *; "
        "print(draws_of(7, 1, 2).integers(2**40), list(epoch_order(5, 7, 1)), hash_draw(7, 'a'))"
    )
    here = f"{draws_of(7, 1, 2).integers(2**40)} {list(epoch_order(5, 7, 1))} {hash_draw(7, 'a')}"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == here
