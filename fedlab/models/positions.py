"""How many tokens a model has positions for, from its configuration alone: no weight is loaded."""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from fedlab.config.sections import ModelSection
from fedlab.models.hub import locate

logger = logging.getLogger("fedlab")
TABLE = re.compile(r"(^|\.)(\w*position_embeddings?|embed_positions|wpe)$")  # names of tables of positions


def position_limit(model: ModelSection) -> int | None:
    """Most tokens that the model's table of positions has room for; None where there is no table, as with relative and
    rotary positions, or where nothing can be known.

    RoBERTa and its kin count positions from beyond the padding id; BART and OPT have two rows more than positions.
    """
    return _limit(locate(model), model.revision)


@lru_cache(maxsize=8)
def _limit(location: str, revision: str | None) -> int | None:
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging as hf_logging

    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        config: Any = AutoConfig.from_pretrained(location, revision=revision)
        with torch.device("meta"):
            module = AutoModel.from_config(config)
    except Exception as error:  # a model that loads some other way is judged when it is loaded
        logger.debug("positions of %s are not known: %s", location, error)
        return None
    finally:
        hf_logging.set_verbosity(level)
    return table_rows(module)


def table_rows(module: nn.Module) -> int | None:
    """Positions of the smallest table of positions in a model; None without one."""
    found = []
    for name, table in module.named_modules():
        if TABLE.search(name) and isinstance(table, nn.Embedding):
            offset = getattr(table, "offset", 0)
            beyond = table.padding_idx + 1 if table.padding_idx is not None and not offset else 0
            found.append(table.num_embeddings - int(offset) - beyond)
    return min(found, default=None)
