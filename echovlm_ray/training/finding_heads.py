"""Auxiliary heads that predict findings from the visual tokens; they train the vision tower and are then discarded.

A language model learns the wording of reports long before their content, and then gains little from the picture. With
a loss on the visual tokens themselves the tower learns what tissue lies where, and what the lesion looks like, first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from echovlm_ray.data.phantom.attributes import Attributes
from echovlm_ray.data.phantom.catalogue import all_classes
from echovlm_ray.data.phantom.regions import REGIONS
from echovlm_ray.data.phantom.schema import ORGANS
from echovlm_ray.data.phantom.tissue import LABELS, LESION_LABELS

# A target that is not known; as torch's cross entropy has it.
UNKNOWN = -100
# How sharply the directions of the organs' pooled embeddings are distinguished; cosines lie between -1 and 1.
_ORGAN_SCALE = 16.0


@dataclass(frozen=True, slots=True, eq=False)
class FindingTargets:
    """The findings in the images of one example.

    Attributes:
        values_Q: int64, for each question of `question_slices` the place of the right value, or `UNKNOWN`.
        organ: the organ's number in `ORGANS`, or `UNKNOWN`.
        tissue: for each picture int64, for each of its visual tokens the number in `tissue.LABELS`, or `UNKNOWN`.
    """

    values_Q: torch.Tensor
    organ: int
    tissue: tuple[torch.Tensor, ...]


@lru_cache(maxsize=1)
def question_slices() -> tuple[tuple[str, int], ...]:
    """The questions that the heads answer, and how many values each has: the class, and each organ's attributes."""
    found = [("class", len(all_classes()))]
    for organ in ORGANS:
        found += [(f"{organ}/{attribute.name}", len(attribute.values)) for attribute in REGIONS[organ].attributes]
    return tuple(found)


def finding_targets(
    attributes: Attributes, tissue: npt.NDArray[np.uint8] | None, grids: Sequence[tuple[int, int, int]]
) -> FindingTargets:
    """The targets of one example.

    Args:
        attributes: what its pictures show; parts may be missing.
        tissue: rows × columns, the label of each part of a picture; scaled to each picture's grid of visual tokens.
        grids: of the pictures, in visual tokens: frames, rows, columns.
    """
    stated = {f"{attributes.organ}/{name}": value for name, value in attributes.pairs}
    values = []
    for name, _ in question_slices():
        organ, _, attribute = name.partition("/")
        if name == "class":
            pair = (attributes.organ, attributes.class_name)
            classes: tuple[tuple[str | None, str | None], ...] = all_classes()
            values.append(classes.index(pair) if pair in classes else UNKNOWN)
        elif name in stated:
            values.append(list(REGIONS[organ].attribute[attribute].values).index(stated[name]))  # type: ignore[index]
        else:
            values.append(UNKNOWN)
    organ_number = UNKNOWN if attributes.organ is None else ORGANS.index(attributes.organ)
    return FindingTargets(torch.tensor(values), organ_number, tuple(_tissue(tissue, grid) for grid in grids))


def _tissue(tissue: npt.NDArray[np.uint8] | None, grid: tuple[int, int, int]) -> torch.Tensor:
    frames, rows, columns = grid
    if tissue is None:
        return torch.full((frames * rows * columns,), UNKNOWN)
    row = np.arange(rows) * tissue.shape[0] // rows
    column = np.arange(columns) * tissue.shape[1] // columns
    return torch.from_numpy(tissue[row][:, column].astype(np.int64)).flatten().repeat(frames)


class FindingHeads(nn.Module):
    """Linear layers on visual tokens, and one direction for each organ.

    The directions are compared with pooled embeddings by cosine similarity, as the organ gate does, so that prototypes
    measured afterwards tell the organs apart.
    """

    starts: torch.Tensor
    membership: torch.Tensor
    lesions: torch.Tensor

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        widths = [width for _, width in question_slices()]
        self.norm = nn.LayerNorm(hidden_size)
        self.values = nn.Linear(hidden_size, sum(widths))
        self.tissue = nn.Linear(hidden_size, len(LABELS))
        self.organs = nn.Parameter(torch.randn(len(ORGANS), hidden_size) / hidden_size**0.5)
        starts = np.cumsum([0, *widths[:-1]])
        membership = torch.zeros(sum(widths), len(widths))
        for question, (start, width) in enumerate(zip(starts, widths, strict=True)):
            membership[start : start + width, question] = 1.0
        self.register_buffer("starts", torch.tensor(starts), persistent=False)
        self.register_buffer("membership", membership, persistent=False)
        lesions = torch.zeros(len(LABELS), dtype=torch.bool)
        lesions[list(LESION_LABELS)] = True
        self.register_buffer("lesions", lesions, persistent=False)

    def forward(
        self,
        embeddings_VD: torch.Tensor,
        example_V: torch.Tensor,
        tissue_V: torch.Tensor,
        values_BQ: torch.Tensor,
        organ_B: torch.Tensor,
    ) -> torch.Tensor:
        """The losses of tissue, pooled findings, findings of each lesion token, and organ, added; every example counts
        alike, so that micro-batches add up to a batch.

        Args:
            embeddings_VD: visual embeddings of all examples that have pictures.
            example_V: which of these examples each is of, int64.
            tissue_V: the number of each in `tissue.LABELS`, or `UNKNOWN`.
            values_BQ: see `FindingTargets`, one row for each example.
            organ_B: likewise.
        """
        embeddings_VD = embeddings_VD.float()
        examples = len(organ_B)
        count_B1 = torch.bincount(example_V, minlength=examples).clamp(min=1)[:, None]
        zeros_BD = embeddings_VD.new_zeros(examples, embeddings_VD.shape[1])
        pooled_BD = zeros_BD.index_add(0, example_V, embeddings_VD) / count_B1
        normed_VD = self.norm(embeddings_VD)
        loss_B = self._values_loss(self.norm(pooled_BD), values_BQ)
        tissue_loss_V = F.cross_entropy(
            self.tissue(normed_VD).float(), tissue_V, ignore_index=UNKNOWN, reduction="none"
        )
        loss_B = loss_B + _mean_of_each(tissue_loss_V, tissue_V != UNKNOWN, example_V, examples)
        of_lesion_V = (tissue_V != UNKNOWN) & self.lesions[tissue_V.clamp(min=0)]
        lesion_example = example_V[of_lesion_V]
        lesion_loss = self._values_loss(normed_VD[of_lesion_V], values_BQ[lesion_example])
        loss_B = loss_B + _mean_of_each(lesion_loss, torch.ones_like(lesion_example).bool(), lesion_example, examples)
        cosine_BO = F.normalize(pooled_BD, dim=-1) @ F.normalize(self.organs, dim=-1).T
        loss_B = loss_B + F.cross_entropy(_ORGAN_SCALE * cosine_BO, organ_B, ignore_index=UNKNOWN, reduction="none")
        return loss_B.mean()

    def _values_loss(self, features_ND: torch.Tensor, values_NQ: torch.Tensor) -> torch.Tensor:
        """Of each row the cross entropy of its class, and the mean of those of its attributes, added."""
        logits_NW = self.values(features_ND).float()
        shifted_NW = logits_NW - logits_NW.amax(dim=1, keepdim=True).detach()
        total_NQ = (shifted_NW.exp() @ self.membership).clamp(min=1e-30).log()
        known_NQ = values_NQ != UNKNOWN
        chosen_NQ = shifted_NW.gather(1, self.starts + values_NQ.clamp(min=0))
        loss_NQ = torch.where(known_NQ, total_NQ - chosen_NQ, 0.0)
        attributes = known_NQ[:, 1:].sum(dim=1).clamp(min=1)
        return loss_NQ[:, 0] + loss_NQ[:, 1:].sum(dim=1) / attributes


def _mean_of_each(value_N: torch.Tensor, known_N: torch.Tensor, example_N: torch.Tensor, count: int) -> torch.Tensor:
    """For each example the mean of its known values; 0 if it has none."""
    number_B = torch.bincount(example_N[known_N], minlength=count).clamp(min=1)
    total_B = value_N.new_zeros(count).index_add(0, example_N, torch.where(known_N, value_N, 0.0))
    return total_B / number_B
