"""Hostile clients: held-out accuracy of the mean and of the rules of ``fedlab.lora.robust`` under the attacks of
``fedlab.lora.attacks``.

    python simulations/benchmarks/robust.py --seeds 2         # the first table of docs/benchmarks.md, "Hostile clients"
    python simulations/benchmarks/robust.py --partition 0.5   # the second: Dirichlet(0.5)
    python simulations/benchmarks/robust.py --rules mean krum --attacks none sign_flip --json FILE

Clients train B and the head (FFA-LoRA), without DP, in this one process; the rule is applied to the updates, all of one
weight. Three of ten clients are hostile in every round. They work from their own honest updates and know neither the
others' nor the rule. An update that is not finite is excluded before the rule, as fedlab's server does. Rules are told
how many clients may be hostile: the number that is (less those already excluded), or the largest that their condition
on n allows.

What saves work and changes nothing but rounding: an update is trained once, and runs that reach the same state share
it; below the first adapted layer a BERT encoder gives the same for the same text, so it runs once per text.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from common import PRESETS, header, line, mean_and_deviation, parser, write_json
from torch import Tensor, nn

from fedlab.config import RunConfig
from fedlab.data import FederatedData
from fedlab.errors import RunFailed
from fedlab.evaluate import primary_score
from fedlab.lora.attacks import ATTACKS, attack, flip_labels
from fedlab.lora.average import weighted_mean
from fedlab.lora.robust import RULES
from fedlab.lora.state import State, check_update, digest, select
from fedlab.models.adapters import initial_state
from fedlab.models.encoder import SentenceClassifier
from fedlab.models.loaded import LoadedModel
from fedlab.seeds import client_order, random_stream, stream_seed
from fedlab.session import Session, open_session, torch_threads
from fedlab.train.trainer import train_client

# WordNet's nouns, small enough for a table in a few minutes: 10 clients, 4 rounds of 2 steps of 24 glosses, MiniLM's
# last layer.
WORDNET = [
    "run.rounds=4",
    "data.clients=10",
    "data.limit=12000",
    "data.test_fraction=0.05",
    "data.max_length=16",
    "lora.layers_to_transform=[5]",
    "train.steps=2",
    "train.batch_size=24",
    "train.head_lr=4.5",
]
OPTIONS: dict[str, dict[str, float]] = {
    "sign_flip": {"scale": 3.0},  # beyond n/f − 1 = 2.3, which would turn the mean to zero: the mean goes backwards
    "scaling": {"factor": 10.0},
    "gaussian": {"std": 1.0},
    "little_is_enough": {"z": 1.5},  # Baruch et al.'s formula gives 0.18 for three of ten
    "nan": {},
}
ALL_RULES = ("mean", *RULES)
ALL_ATTACKS = ("none", *OPTIONS, "label_flip")


class Below(nn.Module):
    """In the place of BERT's embeddings: what comes out of the frozen layers under the first adapted one, remembered by
    text.
    """

    def __init__(self, embeddings: nn.Module, layers: Sequence[nn.Module], pad_id: int) -> None:
        super().__init__()
        self._below, self._pad_id = (embeddings, *layers), pad_id  # a tuple is not registered: peft's names stay
        self._known: dict[tuple[int, ...], Tensor] = {}  # tokens of a text without padding → [T, n]

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        """Hidden states [N, T, n], zero where there is padding, which no attention mask lets through."""
        rows = [tuple(token for token in row if token != self._pad_id) for row in input_ids.tolist()]
        missing = {row for row in rows if row not in self._known}
        for length in {len(row) for row in missing}:
            alike = sorted(row for row in missing if len(row) == length)  # of one length: there is no padding to mask
            with torch.no_grad():
                hidden = self._below[0](input_ids=torch.tensor(alike, device=input_ids.device))
                for layer in self._below[1:]:
                    hidden = layer(hidden)
            self._known.update(zip(alike, hidden, strict=True))
        return nn.utils.rnn.pad_sequence([self._known[row] for row in rows], batch_first=True)


class Passed(nn.Module):
    """In the place of a layer that ``Below`` has run already."""

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden


@contextmanager
def frozen_layers_once(model: LoadedModel) -> Iterator[None]:
    """Within the context, a BERT sentence encoder runs the layers below its first adapted one once per text."""
    classifier: Any = model.module.base_model.model
    layers = [int(found[1]) for name in model.scale if (found := re.match(r"encoder\.encoder\.layer\.(\d+)\.", name))]
    if not isinstance(classifier, SentenceClassifier) or len(layers) < len(model.scale) or min(layers) == 0:
        yield
        return
    encoder, first = classifier.encoder, min(layers)
    embeddings, below = encoder.embeddings, list(encoder.encoder.layer[:first])
    encoder.embeddings = Below(embeddings, below, model.tokenizer.pad_token_id)
    for i in range(first):
        encoder.encoder.layer[i] = Passed()
    try:
        yield
    finally:
        encoder.embeddings = embeddings
        for i, layer in enumerate(below):
            encoder.encoder.layer[i] = layer


@dataclass
class Setting:
    """One partition and seed: what every cell of the table starts from, and the updates trained so far."""

    session: Session
    hostile: list[str]
    flipped: FederatedData  # the same examples with y → classes − 1 − y, for attackers that poison their data
    start: State
    names: list[str]
    trained: dict[tuple[str, int, str, bool], State | None] = field(default_factory=dict)

    def update(self, state: State, client: str, number: int, poisoned: bool) -> State | None:
        """What a client sends in a round; None if its training diverged."""
        key = (digest(state), number, client, poisoned)
        if key not in self.trained:
            data = self.flipped if poisoned else self.session.data
            try:
                done = train_client(
                    self.session.model, data, client, state, self.names, self.session.config, number, None
                )
                self.trained[key] = done.update
            except RunFailed:
                self.trained[key] = None
        return self.trained[key]


def open_setting(config: RunConfig, hostile: int) -> Setting:
    """Model, data, attackers (drawn by the run's seed) and round 0."""
    session = open_session(config.to_toml())
    data = session.data
    labels = flip_labels(torch.from_numpy(data.tokens.labels.copy()), len(session.model.objective.labels)).numpy()
    start = initial_state(session.model, config.lora, config.run.seed)
    drawn = random_stream(config.run.seed, "hostile").choice(data.clients, hostile, replace=False)
    chosen = sorted(map(str, drawn), key=client_order)
    return Setting(
        session,
        chosen,
        replace(data, tokens=replace(data.tokens, labels=labels)),
        start,
        list(select(start, ("lora_B", "head"))),
    )


def received(setting: Setting, name: str, state: State, number: int) -> dict[str, State]:
    """What reaches the server in one round, hostile updates included."""
    silent = name in (
        "gaussian",
        "nan",
    )  # these send the same whatever they would have trained: any update of the right shapes serves
    updates: dict[str, State] = {}
    for client in setting.session.data.clients:
        hostile = client in setting.hostile
        if hostile and silent:
            updates[client] = {n: torch.zeros_like(state[n]) for n in setting.names}
        elif (update := setting.update(state, client, number, hostile and name == "label_flip")) is not None:
            updates[client] = update
    attackers = [client for client in setting.hostile if client in updates]
    seed = stream_seed(setting.session.config.run.seed, "attack", number)
    return attack(name, updates, attackers, seed, **OPTIONS[name]) if name in ATTACKS else updates


def aggregate(rule: str, updates: dict[str, State], hostile: int) -> State:
    """The rule on the updates, all of one weight, told that ``hostile`` of them may be anything or as many as it can
    stand.
    """
    weights, n = dict.fromkeys(updates, 1.0), len(updates)
    if rule == "mean":
        return weighted_mean(updates, weights)
    options: dict[str, Any] = {}
    if rule == "trimmed_mean":
        options = {"trim": min(hostile, (n - 1) // 2) / n}
    elif rule in ("krum", "multi_krum", "bulyan"):
        options = {"byzantine": max(0, min(hostile, (n - 3) // (4 if rule == "bulyan" else 2)))}
    return RULES[rule](updates, weights, **options)


def run(setting: Setting, rule: str, name: str) -> dict[str, Any]:
    """All rounds of one cell: accuracy at the end, exclusions, and the round in which no usable update was left (None:
    never).
    """
    state, excluded, ended = dict(setting.start), 0, None
    config = setting.session.config
    for number in range(1, config.run.rounds + 1):
        arrived = received(setting, name, state, number)
        usable = {c: u for c, u in arrived.items() if check_update(u, state, setting.names) is None}
        excluded += len(setting.session.data.clients) - len(usable)
        if len(usable) < 3:
            ended = number
            break
        change = aggregate(rule, usable, sum(client in usable for client in setting.hostile))
        state = {n: value + change[n] if n in change else value for n, value in state.items()}
    setting.session.model.load(state)
    accuracy = primary_score(setting.session.model, setting.session.data, setting.session.data.test, config)
    return {"rule": rule, "attack": name, "accuracy": accuracy, "excluded": excluded, "ended": ended}


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run, print the table, and return one object per cell and seed."""
    options = parser(__doc__, "")  # its default is WordNet, made small; a preset is taken as it is but for privacy
    options.add_argument("--rules", nargs="+", default=list(ALL_RULES), choices=ALL_RULES)
    options.add_argument("--attacks", nargs="+", default=list(ALL_ATTACKS), choices=ALL_ATTACKS)
    options.add_argument("--partition", default="iid", help='"iid", or the α of a Dirichlet partition')
    options.add_argument("--hostile", type=float, default=0.3, help="share of the clients")
    options.add_argument("--seeds", type=int, default=1)
    args = options.parse_args(argv)
    partition = "{kind='iid'}" if args.partition == "iid" else f"{{kind='dirichlet', alpha={float(args.partition)}}}"
    settings = [
        f"data.partition={partition}",
        "privacy={unit='none'}",
        *([] if args.config else WORDNET),
        *args.overrides,
    ]
    cells: list[dict[str, Any]] = []
    for seed in range(1, args.seeds + 1):
        config = RunConfig.load(args.config or PRESETS / "wordnet.toml", [*settings, f"run.seed={seed}"])
        with torch_threads(config.run.threads):
            setting = open_setting(config, max(1, round(args.hostile * config.population)))
            with frozen_layers_once(setting.session.model):
                for name in args.attacks:
                    for rule in args.rules:
                        cells.append({"partition": args.partition, "seed": seed, **run(setting, rule, name)})
                        print(cells[-1], file=sys.stderr, flush=True)
    write_json(args.json, cells)
    print_table(cells, args.rules, args.attacks)
    return cells


def print_table(cells: list[dict[str, Any]], rules: Sequence[str], attacks: Sequence[str]) -> None:
    """Rule × attack: mean accuracy over seeds in %, ± standard deviation where there are several; † where a run ended
    early.
    """
    print(header("rule", *attacks))
    for rule in rules:
        row = []
        for name in attacks:
            own = [cell for cell in cells if (cell["rule"], cell["attack"]) == (rule, name)]
            values = [100 * cell["accuracy"] for cell in own]
            row.append(mean_and_deviation(values, 1) + (" †" if any(cell["ended"] for cell in own) else ""))
        print(line(rule, *row))


if __name__ == "__main__":
    main()
