"""A sentence encoder with its own pooling and one linear layer, for models that bring no head of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedlab.errors import ConfigError


class SentenceClassifier(nn.Module):
    """A sentence encoder with its own pooling (``1_Pooling/config.json``) and one linear layer: logits [N, width]."""

    def __init__(self, encoder: Any, pooling: str, width: int) -> None:
        super().__init__()
        self.encoder, self.pooling = encoder, pooling
        self.config: Any = encoder.config
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None  # never read by this pooling; an adapter there would train on nothing
        self.classifier = nn.Linear(self.config.hidden_size, width)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Any) -> Any:
        from transformers.modeling_outputs import SequenceClassifierOutput

        known = {k: v for k, v in inputs.items() if k in ("token_type_ids", "position_ids", "inputs_embeds")}
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **known).last_hidden_state
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            mask = attention_mask.unsqueeze(-1).to(hidden.dtype)  # [N, T, 1]
            pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        return SequenceClassifierOutput(logits=self.classifier(pooled))


def pooling_of(location: str, revision: str | None) -> str | None:
    """ "mean" or "cls" for a sentence encoder, None for a plain transformer (which brings its own
    classification head).
    """
    from transformers.utils import cached_file

    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    if cached_file(location, "modules.json", revision=revision, **quiet) is None:
        return None
    path = cached_file(location, "1_Pooling/config.json", revision=revision, **quiet)
    modes = (
        {k for k, v in json.loads(Path(path).read_text()).items() if k.startswith("pooling_mode_") and v is True}
        if path
        else set()
    )
    known = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(modes) != 1 or not modes <= set(known):
        raise ConfigError(f"the model pools by {sorted(modes) or 'nothing known'}; fedlab knows mean and cls pooling")
    return known[modes.pop()]
