"""Assignment of routed experts to organs: copies of all, or a partition read from a file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from echovlm_ray.checkpoint.layout import InvalidCheckpointError
from echovlm_ray.yaml_document import NotYamlError, parse_yaml
from experts.bundles.manifest import check_organ

# Organ → the experts' indices in the source checkpoint, ascending; in set order.
Groups = dict[str, tuple[int, ...]]

_MAX_FILE_BYTES = 1_000_000


def clone_groups(organs: Sequence[str], num_experts: int) -> Groups:
    """Assigns all experts to every organ.

    Raises:
        InvalidCheckpointError: there is no organ, a duplicate, or an invalid name.
    """
    if not organs:
        raise InvalidCheckpointError("no organs: name at least one, for example --organs breast,liver")
    for organ in organs:
        _check_organ(organ)
    if repeated := sorted({organ for organ in organs if organs.count(organ) > 1}):
        raise InvalidCheckpointError(f"organ {', '.join(repeated)} is named twice; name each organ once")
    return {organ: tuple(range(num_experts)) for organ in organs}


def partition_groups(groups: Mapping[str, Any], num_experts: int) -> Groups:
    """Checks a partition: every expert must be in exactly one group.

    Args:
        groups: organ → list of expert indices, from 0.
        num_experts: how many the checkpoint has.

    Raises:
        InvalidCheckpointError: it is empty, overlapping, incomplete, or has an unknown expert.
    """
    if not groups:
        raise InvalidCheckpointError("the groups file names no organ; write one organ a line, like `breast: [0, 1]`")
    owner: dict[int, str] = {}
    for organ, experts in groups.items():
        _check_organ(organ)
        for expert in _indices(organ, experts, num_experts):
            if owner.get(expert) == organ:
                raise InvalidCheckpointError(f"group {organ} names expert {expert} twice; name it once")
            if expert in owner:
                raise InvalidCheckpointError(
                    f"expert {expert} is in the groups {owner[expert]} and {organ}; an expert belongs to one group"
                )
            owner[expert] = organ
    if gaps := [str(expert) for expert in range(num_experts) if expert not in owner]:
        raise InvalidCheckpointError(f"no group has expert {', '.join(gaps)}; every expert belongs to one group")
    return {organ: tuple(sorted(experts)) for organ, experts in groups.items()}


def read_groups(path: Path) -> dict[str, Any]:
    """Reads a groups file, YAML or JSON (which is YAML).

    Raises:
        InvalidCheckpointError: it is unreadable, not YAML, or not a mapping with distinct organs.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidCheckpointError(f"{path}: {error.strerror or error}") from None
    if len(content) > _MAX_FILE_BYTES:
        raise InvalidCheckpointError(f"{path}: larger than {_MAX_FILE_BYTES} bytes; this is no groups file")
    try:
        groups = parse_yaml(content.decode())
    except UnicodeDecodeError:
        raise InvalidCheckpointError(f"{path}: not UTF-8 text") from None
    except NotYamlError as error:
        raise InvalidCheckpointError(f"{path}: not YAML or JSON: {error}") from None
    if not isinstance(groups, dict):
        raise InvalidCheckpointError(f"{path}: must map organs to lists of experts, one a line, like `breast: [0, 1]`")
    return groups


def _indices(organ: str, experts: Any, num_experts: int) -> list[int]:
    if not isinstance(experts, list) or not all(type(expert) is int for expert in experts):
        raise InvalidCheckpointError(f"group {organ} must be a list of expert indices, like [0, 1]")
    if not experts:
        raise InvalidCheckpointError(f"group {organ} is empty; give it an expert or leave the organ out")
    for expert in experts:
        if not 0 <= expert < num_experts:
            raise InvalidCheckpointError(
                f"group {organ} names expert {expert}, but the checkpoint has experts 0 to {num_experts - 1}"
            )
    return experts


def _check_organ(organ: object) -> None:
    try:
        check_organ(str(organ))
    except ValueError as error:
        raise InvalidCheckpointError(str(error)) from None
