import ast
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from echovlm_ray import config as config_module
from echovlm_ray.checkpoint.layout import ORGANS
from echovlm_ray.config import Config
from echovlm_ray.config_file import ConfigError, load_config
from router.rollouts import settings as rollout_settings

CLUSTER = Path(__file__).parent.parent / "cluster"


def errors_of(directory: Path, text: str) -> list[str]:
    path = directory / "own.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    prefix = f"{path}:"
    lines = str(caught.value).splitlines()
    assert all(line.startswith(prefix) for line in lines), lines
    return [line.removeprefix(prefix) for line in lines]


def test_no_file_and_an_empty_file_are_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_config(None) == load_config(tmp_path / "empty.yaml") == Config()


def test_what_a_file_says_counts_and_the_rest_keeps_its_default(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("router:\n  max_batch_size: 3\nexperts:\n  organs:\n    heart: {replicas: 2}\n")
    found = load_config(tmp_path / "own.yaml")
    assert found.router.max_batch_size == 3
    assert found.experts.resources_of("heart").replicas == 2
    assert found.experts.resources_of("liver") == Config().experts.resources
    assert found.gateway == Config().gateway


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("router:\n\n  max_batch: 4\n", "3: router.max_batch is unknown; did you mean max_batch_size?"),
        ("rooter:\n  x: 1\n", "1: rooter is unknown; did you mean router?"),
        (
            "gateway:\n  kv_cache_tokens: 1\n",
            "2: gateway.kv_cache_tokens is unknown; did you mean router.kv_cache_tokens?",
        ),
        (
            "experts:\n  organs:\n    heart:\n      num_gpu: 1\n",
            "4: experts.organs.heart.num_gpu is unknown; did you mean num_gpus?",
        ),
        (
            "vision:\n  xyzzy: 1\n",
            "2: vision.xyzzy is unknown; there are cache_bytes, max_batch_patches, max_queue, resources",
        ),
        ("vision: 3\n", "1: vision is a section: write its fields below it, indented"),
        ("gateway:\n  tls:\n    key: a\n", "2: gateway.tls.certificate is missing: add it, or leave its section out"),
        ("model:\n  dtype: float64\n", "2: model.dtype is 'float64'; it must be 'auto', 'float32' or 'bfloat16'"),
        ("router:\n  max_queue: 0\n", "2: router.max_queue is 0; it must be greater than or equal to 1"),
        ("rollouts:\n  status_timeout_s: .inf\n", "2: rollouts.status_timeout_s is inf; it must be a finite number"),
        (
            "rollouts:\n  thresholds:\n    max_latency_ratio: .nan\n",
            "3: rollouts.thresholds.max_latency_ratio is nan; it must be a finite number",
        ),
        ("control:\n  port: 70000\n", "2: control.port is 70000; it must be less than or equal to 65535"),
    ],
)
def test_a_wrong_field_is_named_with_its_line_and_the_fix(tmp_path: Path, text: str, expected: str) -> None:
    assert errors_of(tmp_path, text) == [expected]


def test_all_errors_are_told_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    found = errors_of(tmp_path, "vision: 3\nrouter:\n  max_queue: 0\n  max_batch: 1\n")
    assert [line.split(":")[0] for line in found] == ["1", "3", "4"]


@pytest.mark.parametrize(
    ("text", "line", "names"),
    [
        ("router:\n  max_new_tokens: 9\n", 2, ("gateway.default_new_tokens", "router.max_new_tokens")),
        ("router:\n  kv_cache_tokens: 16\n", 2, ("router.kv_cache_tokens", "max_prompt_tokens")),
        ("router:\n  max_prompt_tokens: 6799\n", 2, ("router.max_prompt_tokens", "gateway.max_images")),
        ("gateway:\n  max_images: 11\n", 2, ("router.max_prompt_tokens", "gateway.max_images")),
        ("gateway:\n  max_frames: 12\n", 2, ("router.max_prompt_tokens", "gateway.max_frames")),
        ("gateway:\n  max_visual_tokens: 256\n", 2, ("router.max_prompt_tokens", "gateway.max_visual_tokens")),
        ("vision:\n  max_batch_patches: 3135\n", 2, ("vision.max_batch_patches", "gateway.max_frames")),
        ("vision:\n  max_queue: 7\n", 2, ("vision.max_queue", "gateway.max_images")),
        ("gateway:\n  max_image_bytes: 300000000\n", 2, ("gateway.max_image_bytes", "gateway.max_request_bytes")),
        ("gateway:\n  max_received_bytes: 1000\n", 2, ("gateway.max_received_bytes", "gateway.max_request_bytes")),
        (
            "gateway:\n  max_images: 20\nrouter:\n  max_prompt_tokens: 30000\n",
            2,
            ("gateway.max_images", "a message between two parts holds"),
        ),
        ("control:\n  num_cpus: 1\n  host: 10.0.0.1\n", 3, ("control.host", "control.tls")),
        ("gateway:\n  port: 50052\n", 2, ("gateway.port", "control.port")),
        ("# my file\nmodel:\n  device: cuda\n", 3, ("model.device", "num_gpus")),
        (
            "model:\n  dtype: bfloat16\nexperts:\n  other_dtype: refuse\n",
            4,
            ("model.dtype", "experts.other_dtype"),
        ),
    ],
)
def test_contradictions_name_both_fields_and_the_line(
    tmp_path: Path, text: str, line: int, names: tuple[str, str]
) -> None:
    (found,) = errors_of(tmp_path, text)
    assert found.startswith(f"{line}: ")
    assert all(name in found for name in names)


def test_what_the_default_limits_allow_fits_into_one_prompt() -> None:
    config = Config()
    gateway = config.gateway
    loops = gateway.max_images * (gateway.max_frames // 2) * gateway.max_visual_tokens
    assert loops + 1024 <= config.router.max_prompt_tokens
    assert config.router.max_prompt_tokens + config.router.max_new_tokens <= config.router.kv_cache_tokens
    Config.model_validate({"router": {"max_prompt_tokens": 6800}})
    Config.model_validate({"vision": {"max_batch_patches": 3136, "max_queue": 8}})


def test_experts_in_the_router_need_no_gpu_of_their_own() -> None:
    data: dict[str, dict[str, Any]] = {
        "model": {"device": "cuda"},
        "vision": {"resources": {"num_gpus": 0.5}},
        "router": {"experts": "local", "resources": {"num_gpus": 1}},
    }
    assert Config.model_validate(data).model.device == "cuda"
    data["router"]["experts"] = "remote"
    with pytest.raises(ValidationError, match=r"experts\.resources\.num_gpus is 0"):
        Config.model_validate(data)


def test_a_field_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    found = errors_of(tmp_path, "gateway:\n  port: 1\n  host: 127.0.0.1\n  port: 2\n")
    assert found == ["4: is no YAML here: port occurs twice: keep one of them"]


@pytest.mark.parametrize(("text", "line"), [("gateway: [\n", 2), ("a: b: c\n", 1), ("- 1\n", 1)])
def test_what_is_no_yaml_or_no_mapping_is_refused_with_its_line(tmp_path: Path, text: str, line: int) -> None:
    (found,) = errors_of(tmp_path, text)
    assert found.startswith(f"{line}: ")


def test_yaml_cannot_run_code(tmp_path: Path) -> None:
    (found,) = errors_of(tmp_path, "gateway:\n  host: !!python/object/apply:os.getcwd []\n")
    assert found.startswith("2: ")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read: No such file"):
        load_config(tmp_path / "absent.yaml")


def test_an_override_wins_and_is_blamed_for_what_it_breaks(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("model:\n  checkpoint: a\n")
    assert load_config(path, {"model.checkpoint": ("b", "--checkpoint")}).model.checkpoint == Path("b")
    with pytest.raises(ConfigError, match=r"--queue: router\.max_queue is 'x'"):
        load_config(path, {"router.max_queue": ("x", "--queue")})


FieldPath = tuple[str, ...]


def fields(section: type[BaseModel], prefix: FieldPath = ()) -> Iterator[tuple[FieldPath, type[BaseModel], str]]:
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from fields(inner, (*prefix, name))
        else:
            owner = next(base for base in section.__mro__ if name in base.__annotations__)
            yield (*prefix, name), owner, name


def comment_above(lines: list[str], number: int) -> str:
    """The comment that ends right above line `number`, from 1."""
    above = itertools.takewhile(lambda line: line.strip().startswith("#"), reversed(lines[: number - 1]))
    return " ".join(line.strip().removeprefix("#").strip() for line in reversed(list(above)))


def comments_of_config() -> dict[tuple[str, str], str]:
    return comments_of(config_module) | comments_of(rollout_settings)


def comments_of(module: ModuleType) -> dict[tuple[str, str], str]:
    source = Path(str(module.__file__)).read_text()
    lines = source.splitlines()
    return {
        (definition.name, field.target.id): comment_above(lines, field.lineno)
        for definition in ast.parse(source).body
        if isinstance(definition, ast.ClassDef)
        for field in definition.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    }


def lines_of_keys(node: yaml.Node | None, prefix: FieldPath = ()) -> Iterator[tuple[FieldPath, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = (*prefix, key.value)
            yield path, key.start_mark.line + 1
            yield from lines_of_keys(value, path)


def test_every_field_says_when_to_do_what() -> None:
    comments = comments_of_config()
    for _, section, name in fields(Config):
        assert comments[section.__name__, name].startswith("When "), f"{section.__name__}.{name}"


class TestLocalYaml:
    path = CLUSTER / "local.yaml"

    def test_it_is_the_defaults(self) -> None:
        assert load_config(self.path) == Config()

    def test_it_has_every_field_with_the_comment_of_the_configuration(self) -> None:
        text = self.path.read_text()
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        numbers = dict(lines_of_keys(root))
        lines = text.splitlines()
        comments = comments_of_config()
        for path, section, name in fields(Config):
            assert path in numbers, f"{'.'.join(path)} is not in local.yaml"
            expected = comments[section.__name__, name]
            # What stands between, an example of a section, may come before it.
            assert comment_above(lines, numbers[path]).endswith(expected), ".".join(path)

    def test_what_it_shows_as_an_example_can_be_switched_on(self, tmp_path: Path) -> None:
        lines = self.path.read_text().splitlines()
        shown = [line for line in lines if line.strip() not in ("tls: null", "organs: {}")]
        switched = [
            line.replace("# ", "", 1) if line.strip().startswith(("# tls:", "#   ", "# organs:")) else line
            for line in shown
        ]
        (tmp_path / "own.yaml").write_text("\n".join(switched))
        found = load_config(tmp_path / "own.yaml")
        assert found.gateway.tls is not None
        assert found.control.tls is not None
        assert found.experts.resources_of("heart").replicas == 2


def test_the_gpu_node_fits_on_eight_gpus() -> None:
    found = load_config(CLUSTER / "gpu-node.yaml")
    parts = [found.gateway.resources, found.vision.resources, found.router.resources]
    parts += [found.experts.resources_of(organ) for organ in ORGANS]
    assert sum(part.num_gpus * part.replicas for part in parts) <= 8
    # A part of a replica's GPU may not be divided over two.
    assert all(part.num_gpus in (0, 0.5, 1) for part in parts)
