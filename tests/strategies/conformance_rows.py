"""One row per strategy and kind of option: what it promises, and which values of its keys are tried.

Read by test_conformance.py (promises) and test_options.py (every option: bits and memory).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedlab.lora.state import State, modules


@dataclass(frozen=True)
class Row:
    """What a strategy promises: see ``fedlab.lora.conformance.check``."""

    name: str
    promise: str
    options: tuple[tuple[str, str], ...] = ()
    ranks: str | None = None  # "changes" or "held": what clients of lower rank amount to
    rewrites: tuple[str, ...] = ()  # parts that the server changes although clients do not train them
    reweigh: Callable[[State, dict[str, State], dict[str, float]], dict[str, float]] | None = None

    @property
    def title(self) -> str:
        return " ".join([self.name, *(f"{k}={v}" for k, v in self.options)])


def by_norm(state: State, updates: dict[str, State], weights: dict[str, float]) -> dict[str, float]:
    """HetLoRA's weights, from dense products."""
    squares = dict.fromkeys(updates, 0.0)
    for client, update in updates.items():
        for module in modules(state):
            B, A = (update[f"{module}.{part}"].double() for part in ("lora_B", "lora_A"))
            held = (state[f"{module}.lora_B"].double()[:, : len(A)] + B) @ (
                state[f"{module}.lora_A"].double()[: len(A)] + A
            )
            squares[client] += float(held.square().sum())
    total = sum(s**0.5 for s in squares.values())
    return {client: s**0.5 / total for client, s in squares.items()} if total else weights


EXACT, FACTORS, BEST = "mean of products", "product of means", "best of rank r of the mean of products"
PROJECTED = "projected mean of products"
ROWS = [
    Row("fedavg", FACTORS, ranks="changes"),
    Row("ffa", EXACT, ranks="changes"),
    Row("fedsvd", EXACT, ranks="changes", rewrites=("lora_A",)),
    Row("fedsvd", EXACT, (("refresh", "{every=1, keep=1}"),), ranks="changes", rewrites=("lora_A",)),
    Row("fedex", EXACT),
    Row("flora", EXACT, ranks="held"),
    Row("flora", EXACT, (("train", "B"),), ranks="held", rewrites=("lora_A",)),
    Row("flexlora", BEST, ranks="held"),
    Row("flexlora", BEST, (("split", "left"),), ranks="held"),
    Row("hetlora", FACTORS, ranks="held", reweigh=by_norm),
    Row("hetlora", FACTORS, (("norm_weights", "false"),), ranks="held"),
    Row("lora-fair", PROJECTED),
    Row("rolora", EXACT, ranks="changes"),
    Row("fedsa", EXACT, ranks="changes"),  # of what is shared: B·(mean of A) for every B
    Row("fed-sb", EXACT),
    Row("head", "unchanged", ranks="changes"),
]

# --- own keys

# key → values in TOML that are tried, one at a time
VALUES: dict[str, list[str]] = {
    "robust": [
        "{rule='coordinate_median'}",
        "{rule='trimmed_mean', trim=0.34}",
        "{rule='krum', byzantine=0}",
        "{rule='multi_krum', byzantine=0, keep=2}",
        "{rule='bulyan', byzantine=0}",
        "{rule='geometric_median'}",
        "{rule='norm_bounded_mean', bound=2.0}",
    ],
    "server": [
        "{optimizer='momentum', lr=0.7, head_lr=1.4, beta1=0.5}",
        "{optimizer='adam', lr=0.1, beta2=0.9}",
        "{optimizer='yogi', lr=0.1, tau=0.01}",
    ],
    "period": ["2"],
    "warmup": ["1"],
    "refresh": ["{every=1, keep=1}", "{every=2, keep=2, source='weights'}", "{every=1, source='random'}"],
    "residual_rank": ["3"],
    "train": ["'B'"],
    "redraw": ["'kaiming'"],
    "split": ["'left'"],
    "mean": ["'robust'"],
    "fisher": ["'updates'"],
    "norm_weights": ["false"],
    "prune": ["0.5"],
    "min_rank": ["3"],
    "ridge": ["0.1"],
    "preserve": ["0.2"],
    "importance": ["true"],
    "energy": ["0.5"],
    "free": ["4"],
    "gram": ["{sigma=3.0, clip=0.5, min_clients=2}", "{clear=true}"],
}
TOGETHER = {  # what shows only with another key
    "min_rank": ", prune=0.5",
    "importance": "",
}
MORE = {  # pairs of keys that share what the server keeps
    "fedsvd": ["period=2, server={optimizer='momentum'}", "refresh={every=2, keep=2}, server={optimizer='momentum'}"],
    "ffa": ["robust={rule='coordinate_median'}, server={optimizer='adam'}"],
    "flora": ["residual_rank=3, train='B', redraw='kaiming'"],
    "flexlora": ["mean='robust', fisher='updates', split='left'"],
}
REFUSED = {  # with the reason in docs/strategies.md and docs/continual.md
    *(("fedsvd", f"server={value}") for value in VALUES["server"][1:]),
    *(("fedsvd-continual", f"server={value}") for value in VALUES["server"][1:]),
    *(("fedsvd-continual", f"refresh={value}") for value in VALUES["refresh"]),
}
