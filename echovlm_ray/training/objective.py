"""The loss of a training step, as a module that transformers' `Trainer` can train."""

# transformers leaves most of its methods untyped.
# mypy: disable-error-code="no-untyped-call"

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from echovlm_ray.model.modeling import EchoVLMForConditionalGeneration
from echovlm_ray.training.balancing import RoutingCounts, sequence_balancing_loss
from echovlm_ray.training.encode import IGNORED
from echovlm_ray.training.errors import MissingFindingsError
from echovlm_ray.training.finding_heads import FindingHeads
from echovlm_ray.training.packed_attention import attend_for_training
from echovlm_ray.training.picture_attention import look_for_training

_PICTURES = ("pixel_values", "pixel_values_videos")
_GRIDS = ("image_grid_thw", "video_grid_thw")
# What the names of all fields begin with that finding heads take.
_FINDINGS = "finding_"
Learn = Literal["answers", "findings", "both"]


@dataclass(frozen=True, slots=True)
class StepTotals:
    """Over all micro-batches and all workers of one optimizer step; a loss that is divided by them adds up.

    Attributes:
        target_weight: the sum of all targets' weights.
        sequences: how many examples there are.
    """

    target_weight: float
    sequences: int


class TrainingObjective(nn.Module):
    """Cross entropy of the answers' tokens and the load-balancing loss; or the loss of finding heads; or all of them.

    Its state has only the trained parameters, under the modules' names: frozen ones come from the start of the
    training.

    Attributes:
        model: what is trained; adapters may have been put into it.
        counts: the gates' statistics since the last log entry.
        heads: see `echovlm_ray.training.finding_heads`; None where a stage learns from answers alone.
    """

    # transformers' Trainer must not normalise the loss, which is done here.
    accepts_loss_kwargs = True

    def __init__(
        self,
        model: EchoVLMForConditionalGeneration,
        *,
        balancing: float,
        learn: Learn = "answers",
        findings: float = 1.0,
    ) -> None:
        """
        Args:
            model: the model to train.
            balancing: the coefficient of the load-balancing loss.
            learn: from what; see `echovlm_ray.training.recipe.Stage`.
            findings: with "both", the coefficient of the finding heads' loss.
        """
        super().__init__()
        self.model = model
        attend_for_training(model)
        look_for_training(model)
        self.balancing = balancing
        self.counts = RoutingCounts()
        self.learn = learn
        self.heads = None if learn == "answers" else FindingHeads(model.config.text_config.hidden_size)
        self.findings = 1.0 if learn == "findings" else findings

    def forward(
        self,
        input_ids: torch.Tensor,
        sequence_lengths: torch.Tensor,
        targets: torch.Tensor,
        target_weights: torch.Tensor,
        totals: StepTotals | None = None,
        picture_embeddings: torch.Tensor | None = None,
        **inputs: Any,
    ) -> dict[str, torch.Tensor]:
        """This micro-batch's part of the step's loss.

        Args:
            input_ids: 1 × tokens of all examples, see `echovlm_ray.training.batches.collate`.
            sequence_lengths: examples, int64.
            targets: 1 × tokens, see `EncodedExample`.
            target_weights: 1 × tokens.
            totals: of the whole step; None: this batch is the whole step.
            picture_embeddings: tokens of all pictures × hidden, what the vision tower made of them beforehand.
            inputs: positions, and pictures.

        Returns:
            `loss`; and without gradients its parts `answer_loss`, `balancing_loss` and `finding_loss`, as far as the
            stage has them, and `logits`, one row for each target.

        Raises:
            MissingFindingsError: finding heads learn, and what a picture shows is not known.
        """
        if totals is None:
            totals = StepTotals(float(target_weights.sum()), len(sequence_lengths))
        known = {name: inputs.pop(name) for name in list(inputs) if name.startswith(_FINDINGS)}
        parts: dict[str, torch.Tensor] = {}
        loss = input_ids.new_zeros((), dtype=torch.float32)
        if not any(name in inputs for name in _PICTURES) and self._learns_vision():
            loss = loss + self._blank_picture()
        if self.heads is not None and self.training:
            if not known:
                raise MissingFindingsError(
                    "an example does not say what its pictures show (attributes), and the stage learns from it: give "
                    "records that do, or set learn to answers"
                )
            picture_embeddings = self._look(inputs)
            found = self.heads(
                picture_embeddings,
                known["finding_examples"],
                known["finding_tissue"],
                known["finding_values"],
                known["finding_organs"],
            )
            found = found * (len(sequence_lengths) / totals.sequences)
            parts["finding_loss"] = found.detach()
            loss = loss + self.findings * found
        if self.learn != "findings":
            answers = self._answers(
                input_ids, sequence_lengths, targets, target_weights, totals, picture_embeddings, inputs
            )
            loss = loss + answers.pop("loss")
            parts |= answers
        return {"loss": loss, **parts}

    def _answers(
        self,
        input_ids: torch.Tensor,
        sequence_lengths: torch.Tensor,
        targets: torch.Tensor,
        target_weights: torch.Tensor,
        totals: StepTotals,
        picture_embeddings: torch.Tensor | None,
        inputs: dict[str, Any],
    ) -> dict[str, torch.Tensor]:
        if picture_embeddings is None:
            inputs["input_ids"] = input_ids
        else:
            inputs["inputs_embeds"] = self._with_pictures(input_ids, picture_embeddings)
        outputs = self.model.model(
            sequence_lengths=tuple(sequence_lengths.tolist()),
            use_cache=False,
            output_router_logits=True,
            **inputs,
        )
        wanted = targets != IGNORED
        # The head is computed where there is something to learn, not for prompts.
        logits_NV = self.model.lm_head(outputs.last_hidden_state[wanted])
        loss_N = F.cross_entropy(logits_NV.float(), targets[wanted], reduction="none")
        answer_loss = (loss_N * target_weights[wanted]).sum() / totals.target_weight
        top_k = self.model.config.text_config.num_experts_per_tok
        balancing_loss = sequence_balancing_loss(outputs.router_logits, top_k, sequence_lengths)
        balancing_loss = balancing_loss / totals.sequences
        if self.training:
            self.counts.add(outputs.router_logits, top_k)
        return {
            "loss": answer_loss + self.balancing * balancing_loss,
            "answer_loss": answer_loss.detach(),
            "balancing_loss": balancing_loss.detach(),
            "logits": logits_NV.detach(),
        }

    def _look(self, inputs: dict[str, Any]) -> torch.Tensor:
        """What the vision tower makes of the pictures, images before videos; they are taken out of the inputs."""
        visual = self.model.model.visual
        assert visual is not None
        found = [
            visual(inputs.pop(values), grid_thw=inputs.pop(grid)).pooler_output
            for values, grid in zip(_PICTURES, _GRIDS, strict=True)
            if values in inputs
        ]
        return torch.cat(found)

    def _with_pictures(self, input_ids: torch.Tensor, picture_embeddings: torch.Tensor) -> torch.Tensor:
        config = self.model.config
        embeddings: torch.Tensor = self.model.model.language_model.embed_tokens(input_ids)
        pictures = picture_embeddings.to(embeddings.dtype)
        images, videos = input_ids == config.image_token_id, input_ids == config.video_token_id
        if self.heads is None or not self.training:
            return embeddings.masked_scatter((images | videos)[..., None], pictures)
        count = int(images.sum())
        embeddings = embeddings.masked_scatter(images[..., None], pictures[:count])
        return embeddings.masked_scatter(videos[..., None], pictures[count:])

    def _learns_vision(self) -> bool:
        visual = self.model.model.visual
        return self.training and visual is not None and any(value.requires_grad for value in visual.parameters())

    def _blank_picture(self) -> torch.Tensor:
        """Zero, with (zero) gradients for the vision tower.

        A worker whose batch shows no picture takes part in the exchange of gradients like any other; otherwise the
        workers would wait for one another forever.
        """
        visual = self.model.model.visual
        assert visual is not None
        merge = visual.config.spatial_merge_size
        weight = visual.patch_embed.proj.weight
        patches = torch.zeros(merge * merge, weight[0].numel(), device=weight.device)
        grid = torch.tensor([[1, merge, merge]], device=weight.device)
        pooled: torch.Tensor = visual(patches, grid_thw=grid).pooler_output
        return pooled.float().sum() * 0.0

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The tensors that are trained, each once: tied weights have one name."""
        whole = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        trained = {prefix + name for name, value in self.named_parameters() if value.requires_grad}
        return type(whole)((name, value) for name, value in whole.items() if name in trained)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Takes a state that `state_dict` gave.

        Raises:
            ValueError: it has other tensors than those that are trained.
        """
        trained = {name for name, value in self.named_parameters() if value.requires_grad}
        if differing := sorted(trained ^ state_dict.keys()):
            raise ValueError(
                f"the saved state and the recipe do not train the same tensors; {len(differing)} differ, first "
                f"{differing[0]}: go on with the recipe and the start that the run began with"
            )
        return super().load_state_dict({**super().state_dict(), **state_dict}, strict, assign)
