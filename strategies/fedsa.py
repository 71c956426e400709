"""FedSA-LoRA (arXiv 2410.01463): clients train A and B, share A, and keep B and the head for themselves.

There is no global model, so accuracy is that of each client's own model on its own held-out examples. Under DP all that
a client trains is clipped and noised together, also what it keeps: A's gradient depends on B. A simulation writes every
client's adapter at the end.
"""

from __future__ import annotations

from typing import ClassVar

from fedlab.config import RunConfig
from fedlab.errors import ConfigError
from strategies.base import Strategy


class FedSA(Strategy):
    """A_t+1 = Σ p_k A_k; B_k and head_k stay where they are."""

    linear: ClassVar[bool] = True
    effective: ClassVar[str] = "per client: B_k·(mean of A)"
    personal: ClassVar[frozenset[str]] = frozenset({"lora_B", "head"})

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """There must be an accuracy to report, and no promise about what the server never sees."""
        super().check(config)
        if config.evaluate.clients == "never":
            raise ConfigError(
                'evaluate.clients = "never" with fedsa: there is no global model to score; use "last" or "always"'
            )
        if config.privacy.unit == "client":
            raise ConfigError(
                'privacy.unit = "client" with fedsa: noise of the server does not cover what clients keep; use unit ='
                ' "example"'
            )
