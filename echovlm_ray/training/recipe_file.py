"""Reads a recipe: YAML in, `Recipe` out, and errors that name the file, the line and the fix."""

from importlib import resources
from pathlib import Path
from typing import Any

from echovlm_ray.document_validation import validated
from echovlm_ray.training.recipe import Recipe
from echovlm_ray.yaml_document import (
    Document,
    DocumentError,
    NotYamlError,
    Problem,
    parse_yaml,
    read_document,
    write_yaml,
)

_RECIPES = "echovlm_ray.training.recipes"


def recipe_names() -> list[str]:
    """The recipes that come with the project."""
    return sorted(path.name.removesuffix(".yaml") for path in resources.files(_RECIPES).iterdir() if _is_recipe(path))


def load_recipe(name: str, settings: list[str] | None = None) -> Recipe:
    """A recipe by its name, or out of a file.

    Args:
        name: one of `recipe_names()`, or the path of a YAML file.
        settings: fields to change, like `stages.0.steps=100`; a value is written as in YAML.

    Raises:
        DocumentError: there is no such recipe, or its contents cannot be used; a line for each problem.
    """
    document = read_document(_path(name), "fields such as `seed:` and `stages:`, one a line")
    for setting in settings or []:
        _set(document, setting)
    return validated(Recipe, document)


def write_recipe(path: Path, recipe: Recipe) -> None:
    """Writes what `load_recipe` reads back as the same recipe."""
    write_yaml(path, recipe.model_dump(mode="json"))


def _is_recipe(path: Any) -> bool:
    return bool(path.name.endswith(".yaml"))


def _path(name: str) -> Path:
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    if name not in recipe_names():
        raise DocumentError(
            [Problem(name, f"there is no such recipe: give a YAML file, or one of {', '.join(recipe_names())}")]
        )
    with resources.as_file(resources.files(_RECIPES) / f"{name}.yaml") as found:
        return found


def _set(document: Document, setting: str) -> None:
    field, separator, text = setting.partition("=")
    origin = f"--set {setting}"
    if not separator or not field:
        raise DocumentError([Problem(origin, "must be FIELD=VALUE, like stages.0.steps=100")])
    try:
        value = parse_yaml(text)
    except NotYamlError:
        raise DocumentError([Problem(origin, "the value is no YAML")]) from None
    *parents, last = field.split(".")
    place: Any = document.values
    for depth, name in enumerate(parents):
        if isinstance(place, dict):
            place = place.setdefault(name, {})
        elif isinstance(place, list) and name.isdecimal() and int(name) < len(place):
            place = place[int(name)]
        else:
            raise DocumentError([Problem(origin, f"{'.'.join(parents[: depth + 1])} is not in the recipe")])
    if isinstance(place, dict):
        place[last] = value
    elif isinstance(place, list) and last.isdecimal() and int(last) < len(place):
        place[int(last)] = value
    else:
        raise DocumentError([Problem(origin, f"{field} is not in the recipe")])
    document.lines[tuple(field.split("."))] = origin
