"""The dataset of a gate: read within bounds, with a digest over its records and images."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from echovlm_ray.data.dataset import RecordDataset
from echovlm_ray.data.media import ImageRoot, UnusableImageError
from echovlm_ray.data.record import InvalidDataError
from echovlm_ray.evaluation.items import Item, load_items
from router.rollouts.gates import Gate, UnusableGateError

PIECE_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class GateDataset:
    """A gate's dataset.

    Attributes:
        items: of the gate's organ.
        root: the folder of their images.
        digest: SHA-256 over the file of the records and all images.
    """

    items: tuple[Item, ...]
    root: ImageRoot
    digest: str


def read_dataset(
    gate: Gate, max_records: int, max_image_bytes: int, is_cancelled: Callable[[], bool] = lambda: False
) -> GateDataset:
    """Reads a gate's dataset and all of its images.

    Args:
        gate: names the file and the organ.
        max_records: of the organ.
        max_image_bytes: of one image.
        is_cancelled: asked before every image; ends the reading.

    Raises:
        UnusableGateError: it is missing, changed, empty, invalid, too large, or has no record of the organ.
        InterruptedError: it was cancelled.
    """
    path = Path(gate.dataset)
    if not path.is_absolute():
        raise UnusableGateError(f"the dataset {gate.dataset} is no absolute path on Control's machine: give one")
    if not path.is_file():
        raise UnusableGateError(
            f"the dataset {gate.dataset} is no file on Control's machine: put it there, or name another"
        )
    try:
        records_digest = _file_digest(path)
        with RecordDataset(path) as dataset:
            loaded = load_items(dataset)
        root = ImageRoot(path.parent)
        items = tuple(item for item in loaded.items if item.organ == gate.organ)
        _check_size(gate, items, len(loaded.items), max_records)
        digest = hashlib.sha256(records_digest)
        for item in items:
            for medium in item.media:
                if is_cancelled():
                    raise InterruptedError("the evaluation is not wanted any more")
                digest.update(hashlib.sha256(root.read(medium, max_image_bytes)).digest())
    except UnusableImageError as error:
        raise UnusableGateError(f"the dataset {gate.dataset}: an image {error}") from None
    except InvalidDataError as error:
        raise UnusableGateError(f"the dataset cannot be used: {error}") from None
    except InterruptedError:
        raise
    except OSError as error:
        raise UnusableGateError(f"the dataset {gate.dataset} cannot be read: {error.strerror}") from None
    found = digest.hexdigest()
    if gate.dataset_digest not in (None, found):
        raise UnusableGateError(
            f"the dataset {gate.dataset} has changed: its records and images have the digest {found[:12]}…, and the "
            f"gate was declared for {str(gate.dataset_digest)[:12]}…; bring it back, or stage again with the new one"
        )
    return GateDataset(items, root, found)


def _check_size(gate: Gate, items: tuple[Item, ...], total: int, max_records: int) -> None:
    if not items:
        raise UnusableGateError(
            f"the dataset {gate.dataset} has {total} records and none of {gate.organ!r}: name one that has"
        )
    if len(items) > max_records:
        raise UnusableGateError(
            f"the dataset {gate.dataset} has {len(items)} records of {gate.organ!r}, and the limit is {max_records} "
            "(rollouts.max_gate_records): take fewer, or raise it"
        )


def _file_digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
    return digest.digest()
