"""Attention in float32 for a 16-bit base on a CPU: its backward pass in bfloat16 takes five times as long there
(docs/performance.md).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

NAME = "sdpa_float32"


def attend_in_float32(base: nn.Module) -> None:
    """Models in ``base`` that use torch's scaled-dot-product attention compute it in float32;
    others stay as they are.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    for model in base.modules():
        if isinstance(model, PreTrainedModel) and model.config._attn_implementation == "sdpa":
            model.set_attn_implementation(NAME)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **options: Any,
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    if options.get("position_bias") is not None:  # T5's, which is added to the scores
        options["position_bias"] = options["position_bias"].float()
    output, _ = sdpa_attention_forward(
        module, query.float(), key.float(), value.float(), attention_mask, *args, **options
    )
    attended: Tensor = output
    return attended.to(query.dtype), None
