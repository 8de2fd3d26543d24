"""Reads a recipe: YAML in, `Recipe` out, and errors that name the file, the line and the fix."""

import difflib
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ValidationError

from echovlm_ray.config_checks import ContradictionError
from echovlm_ray.training.recipe import AdapterSection, Recipe, Stage
from echovlm_ray.yaml_document import (
    Document,
    DocumentError,
    NotYamlError,
    Problem,
    parse_yaml,
    read_document,
    write_yaml,
)

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

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
    try:
        return Recipe.model_validate(document.values)
    except ValidationError as error:
        details = error.errors(include_url=False)
        # A list whose only item is wrong counts as empty too, which is not what has to be mended.
        places = [detail["loc"] for detail in details]
        problems = {
            _problem(document, detail): None
            for detail, place in zip(details, places, strict=True)
            if not any(other[: len(place)] == place and other != place for other in places)
        }
        raise DocumentError(sorted(problems, key=lambda problem: document.order(problem.where))) from None


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


def _problem(document: Document, detail: "ErrorDetails") -> Problem:
    path = tuple(str(part) for part in detail["loc"])
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, ContradictionError):
        inner = tuple(cause.fields[0].split("."))
        return Problem(document.where((*path, *inner)), ".".join((*path, str(cause))) if path else str(cause))
    field = ".".join(path)
    if detail["type"] == "extra_forbidden":
        return Problem(document.where(path), f"{field} is unknown; {_suggestion(path)}")
    if detail["type"] == "missing":
        return Problem(document.where(path), f"{field} is missing: add it, or leave its section out")
    if detail["type"] in ("model_type", "dict_type"):
        return Problem(document.where(path), f"{field} is a section: write its fields below it, indented")
    message = detail["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return Problem(document.where(path), f"{field} is {detail['input']!r}; it must be {message}")


def _suggestion(path: tuple[str, ...]) -> str:
    known = list(_section(path[:-1]).model_fields)
    similar = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.6)
    return f"did you mean {similar[0]}?" if similar else f"there are {', '.join(known)}"


def _section(path: tuple[str, ...]) -> type[BaseModel]:
    if path[:1] == ("stages",):
        return AdapterSection if "adapters" in path else Stage
    section: type[BaseModel] = Recipe
    for name in path:
        field = section.model_fields.get(name)
        inner = [] if field is None else [field.annotation, *get_args(field.annotation)]
        section = next((each for each in inner if isinstance(each, type) and issubclass(each, BaseModel)), section)
    return section
