"""The load-balancing loss of the Switch Transformer (Fedus 2021, arXiv 2101.03961, equations 4 to 6)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def load_balancing_loss(
    router_logits: Sequence[torch.Tensor], top_k: int, attention_mask_BT: torch.Tensor | None = None
) -> torch.Tensor:
    """The loss grows with the imbalance of the experts; it is `top_k` if tokens are spread evenly.

    `E · Σ_e f_e · p_e`, where f is the share of tokens that chose expert e and p its mean probability, both over the
    tokens of all layers together.

    Args:
        router_logits: per layer batch·tokens × experts, before the softmax.
        top_k: experts per token.
        attention_mask_BT: batch × tokens, 0 at padding, which does not count; None if there is no padding.

    Returns:
        a scalar in float32, with gradients through p.

    Raises:
        ValueError: there is no layer, or the mask's size differs from the logits'.
    """
    if not router_logits:
        raise ValueError("no router logits: the load-balancing loss needs at least one layer with a gate")
    logits_LTE = torch.stack([logits.to(router_logits[0].device) for logits in router_logits])
    if attention_mask_BT is not None:
        kept = attention_mask_BT.reshape(-1).to(device=logits_LTE.device, dtype=torch.bool)
        if kept.shape[0] != logits_LTE.shape[1]:
            raise ValueError(
                f"the attention mask covers {kept.shape[0]} tokens and the router logits {logits_LTE.shape[1]}: "
                "they must be of the same forward pass"
            )
        logits_LTE = logits_LTE[:, kept]
    num_experts = logits_LTE.shape[-1]
    probability_NE = F.softmax(logits_LTE, dim=-1, dtype=torch.float32).reshape(-1, num_experts)
    index_NK = probability_NE.topk(top_k, dim=-1).indices
    chosen_E = torch.bincount(index_NK.reshape(-1), minlength=num_experts) / probability_NE.shape[0]
    return num_experts * (chosen_E * probability_NE.mean(dim=0)).sum()
