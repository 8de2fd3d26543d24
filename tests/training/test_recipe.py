"""Recipes: the ready ones are sound, and what is wrong with another is said with its line."""

from pathlib import Path

import pytest

from echovlm_ray.training.recipe_file import load_recipe, recipe_names, write_recipe
from echovlm_ray.yaml_document import DocumentError


@pytest.mark.parametrize("name", recipe_names())
def test_ready_recipes_are_read_and_written_back(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    write_recipe(tmp_path / "recipe.yaml", recipe)
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe


def test_there_are_recipes_for_each_command() -> None:
    assert {"paper", "scratch", "expert"} <= set(recipe_names())
    assert load_recipe("expert").stages[0].train == ("gates", "experts")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("seeed: 1\n", r"recipe\.yaml:1: seeed is unknown; did you mean seed\?"),
        (
            "seed: 1\nstages:\n  - name: one\n    lerning_rate: 1\n",
            r"recipe\.yaml:4: stages\.0\.lerning_rate is unknown",
        ),
        ("stages:\n  - steps: 0\n", r"recipe\.yaml:2: stages\.0\.steps is 0; it must be greater than or equal to 1"),
        (
            "stages:\n  - batch_size: 5\n    micro_batch_size: 2\n",
            r"recipe\.yaml:3: .*no multiple of micro_batch_size 2",
        ),
        ("stages:\n  - train: []\n", r"a stage must train something"),
        ("stages:\n  - train: [vision]\n    adapters:\n      parts: [vision]\n", r"vision cannot both be trained"),
        ("stages:\n  - {name: a}\n  - {name: a}\n", "two stages have the same name"),
        ("stages: []\n", "stages is .*at least 1 item"),
        ("precision: float16\n", r"recipe\.yaml:1: precision is 'float16'; it must be"),
        ("data: 3\n", "data is a section"),
        ("seed: 1\nseed: 2\n", "seed occurs twice"),
        ("upcycling: {num_experts: 2, num_experts_per_tok: 3}\n", "more than upcycling.num_experts"),
        ("- 1\n", "must hold fields"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(DocumentError, match=problem):
        load_recipe(str(path))


def test_settings_win_and_are_named_when_wrong() -> None:
    recipe = load_recipe("paper", ["seed=7", "stages.1.steps=3", "loss.balancing=0.5"])
    assert (recipe.seed, recipe.stages[1].steps, recipe.loss.balancing) == (7, 3, 0.5)
    for setting, problem in (
        ("seed", "must be FIELD=VALUE"),
        ("stages.9.steps=3", "stages.9 is not in the recipe"),
        ("seed=x", "--set seed=x: seed is 'x'"),
        ("sed=1", "--set sed=1: sed is unknown"),
    ):
        with pytest.raises(DocumentError, match=problem):
            load_recipe("paper", [setting])


def test_a_wrong_stage_is_not_also_said_to_be_missing() -> None:
    with pytest.raises(DocumentError) as refused:
        load_recipe("scratch", ["stages.0.steps=abc"])
    assert "stages.0.steps is 'abc'" in str(refused.value)
    assert "at least 1 item" not in str(refused.value)
    with pytest.raises(DocumentError, match="at least 1 item"):
        load_recipe("scratch", ["stages=[]"])


def test_an_unknown_recipe_is_told_which_there_are() -> None:
    with pytest.raises(DocumentError, match=r"there is no such recipe.*expert, paper, scratch"):
        load_recipe("papre")
    with pytest.raises(DocumentError, match=r"absent\.yaml: cannot be read"):
        load_recipe("absent.yaml")
