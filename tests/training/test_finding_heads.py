"""Finding heads: their targets are what the lexicon says, micro-batches add up, and they teach the vision tower."""

from pathlib import Path

import numpy as np
import pytest
import torch

from echovlm_ray.data.phantom.attributes import Attributes
from echovlm_ray.data.phantom.catalogue import all_classes, attribute_sets
from echovlm_ray.data.phantom.regions import REGIONS
from echovlm_ray.data.phantom.schema import ORGANS
from echovlm_ray.data.phantom.tissue import LABELS, LESION_LABELS
from echovlm_ray.training.batches import collate
from echovlm_ray.training.encode import EncodedExample
from echovlm_ray.training.errors import MissingFindingsError
from echovlm_ray.training.examples import Example
from echovlm_ray.training.finding_heads import UNKNOWN, FindingHeads, finding_targets, question_slices
from echovlm_ray.training.objective import StepTotals, TrainingObjective
from tests.training.support import encoded, encoder_of, tiny_model

CYST = next(iter(attribute_sets("breast", "simple_cyst")))
LESION = min(LESION_LABELS)


def examples(start: Path) -> list[EncodedExample]:
    """Of several sizes and organs, one without tissue, one a loop."""
    encoder, made = encoder_of(start), []
    for number, (organ, name) in enumerate(all_classes()[::9]):
        rng = np.random.default_rng(number)
        picture = rng.integers(0, 255, (56, 56 + 28 * (number % 2), 3), dtype=np.uint8)
        tissue = np.full((4, 4), LESION if number else 0, dtype=np.uint8)
        made.append(
            encoder.encode(
                Example(
                    [
                        {
                            "role": "user",
                            "content": [
                                {"type": "video" if number == 1 else "image"},
                                {"type": "text", "text": "What is shown?"},
                            ],
                        },
                        {"role": "assistant", "content": [{"type": "text", "text": name}]},
                    ],
                    [[picture, picture]] if number == 1 else [picture],
                    attributes=next(iter(attribute_sets(organ, name))),
                    tissue=None if number == 2 else tissue,
                )
            )
        )
    return made


def test_targets_are_the_places_of_the_values_in_the_lexicon() -> None:
    targets = finding_targets(CYST, np.array([[0, LESION], [1, 2]], dtype=np.uint8), [(1, 2, 4)])
    names = [name for name, _ in question_slices()]
    assert all_classes()[targets.values_Q[0]] == ("breast", "simple_cyst")
    assert ORGANS[targets.organ] == "breast"
    for name, value in CYST.pairs:
        place = int(targets.values_Q[names.index(f"breast/{name}")])
        assert list(REGIONS["breast"].attribute[name].values)[place] == value
    stated = {f"breast/{name}" for name, _ in CYST.pairs} | {"class"}
    assert {name for name, value in zip(names, targets.values_Q, strict=True) if value != UNKNOWN} == stated
    assert targets.tissue[0].tolist() == [0, 0, LESION, LESION, 1, 1, 2, 2]


def test_what_is_not_stated_is_unknown() -> None:
    targets = finding_targets(Attributes(None, None, ()), None, [(1, 2, 2)])
    assert targets.organ == UNKNOWN
    assert set(targets.values_Q.tolist()) == {UNKNOWN}
    assert set(targets.tissue[0].tolist()) == {UNKNOWN}


def test_the_loss_is_that_of_torch_question_by_question() -> None:
    torch.manual_seed(0)
    heads = FindingHeads(16)
    embeddings = torch.randn(6, 16)
    targets = finding_targets(CYST, None, [(1, 1, 6)])
    found = heads(
        embeddings,
        torch.zeros(6, dtype=torch.int64),
        targets.tissue[0],
        targets.values_Q[None],
        torch.tensor([UNKNOWN]),
    )
    logits = heads.values(heads.norm(embeddings.mean(dim=0)))
    parts = logits.split([width for _, width in question_slices()])
    losses = [
        torch.nn.functional.cross_entropy(part[None], value[None]) if value != UNKNOWN else None
        for part, value in zip(parts, targets.values_Q, strict=True)
    ]
    attributes = [loss for loss in losses[1:] if loss is not None]
    assert losses[0] is not None
    torch.testing.assert_close(found, losses[0] + torch.stack(attributes).mean())


@pytest.mark.parametrize("learn", ["findings", "both"])
def test_micro_batches_have_the_gradients_of_the_batch(start: Path, learn: str) -> None:
    made = examples(start)
    objective = TrainingObjective(tiny_model(start), balancing=0.1, learn=learn, findings=0.5)  # type: ignore[arg-type]
    objective.train()
    whole = collate(made)
    loss = objective(**dict(whole))["loss"]
    loss.backward()
    expected = {name: value.grad.clone() for name, value in objective.named_parameters() if value.grad is not None}
    objective.zero_grad()
    totals = StepTotals(float(whole["target_weights"].sum()), len(made))
    for example in made:
        objective(**collate([example]), totals=totals)["loss"].backward()
    for name, value in objective.named_parameters():
        if value.grad is not None:
            torch.testing.assert_close(value.grad, expected[name], rtol=1e-3, atol=1e-5, msg=name)
    assert any(name.startswith("model.model.visual") for name in expected)
    assert any("language_model" in name for name in expected) == (learn == "both")


def test_heads_change_nothing_of_the_answers_loss(start: Path) -> None:
    """Pictures are embedded beforehand and put in their places, images and loops mixed, as the model does itself."""
    batch = collate(examples(start))
    model = tiny_model(start)
    both = TrainingObjective(model, balancing=0.0, learn="both").train()
    answers = TrainingObjective(model, balancing=0.0).train()
    torch.testing.assert_close(both(**dict(batch))["answer_loss"], answers(**dict(batch))["answer_loss"])


def test_records_that_do_not_say_what_is_shown_are_refused(start: Path, records: Path) -> None:
    objective = TrainingObjective(tiny_model(start), balancing=0.0, learn="findings").train()
    with pytest.raises(MissingFindingsError, match="set learn to answers"):
        objective(**collate(encoded(start, records)[:2]))


def test_every_label_is_known_to_the_heads() -> None:
    assert FindingHeads(8).tissue.out_features == len(LABELS)
