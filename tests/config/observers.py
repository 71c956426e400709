"""What a configuration key can be seen to change: cheap looks at a plan, a partition, a model, a training, a run.

Each observer takes a configuration and a directory of its own, and returns something that can be compared.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fedlab
from fedlab.config import RunConfig
from fedlab.data import corpus_and_shards
from fedlab.data.partition import describe
from fedlab.data.report import content_digest
from fedlab.errors import ConfigError
from fedlab.evaluate import evaluate
from fedlab.evaluate.memorisation import memorisation
from fedlab.evaluate.public import drift, sample_answers
from fedlab.lora.state import digest
from fedlab.models.adapters import initial_state
from fedlab.privacy.client_level import make_client_plan
from fedlab.privacy.plan import plan_of
from fedlab.run.directory import RunDirectory
from fedlab.run.launch.local import run_local
from fedlab.run.launch.stream import stages
from fedlab.run.metrics import MetricsLog
from fedlab.run.progress import Progress
from fedlab.session import Session, open_session
from fedlab.train.memory import plan_memory
from fedlab.train.trainer import train_client
from strategies import STRATEGIES
from strategies.base import Strategy
from strategies.server.federation import ClientInfo, Federation

__all__ = ["MetricsLog", "Progress", "RunDirectory", "corpus_and_shards"]


def plan(config: RunConfig, path: Path) -> Any:
    """The privacy plan of a client of 90 examples, or the server's, and what a run of it may cost."""
    made = make_client_plan(config) if config.privacy.unit == "client" else plan_of(config, 90)
    return made, config.privacy.unit


def partition(config: RunConfig, path: Path) -> Any:
    """Texts, labels, and who holds what."""
    corpus, shards = corpus_and_shards(config)
    return corpus.texts, corpus.pairs, describe(shards, corpus)


def content(config: RunConfig, path: Path) -> Any:
    """Texts and labels by their hash."""
    return content_digest(corpus_and_shards(config)[0])


def session(config: RunConfig) -> Session:
    return open_session(config.to_toml())


def lengths(config: RunConfig, path: Path) -> Any:
    """Tokens of every text."""
    return session(config).data.tokens.offsets.tolist()


def adapters(config: RunConfig, path: Path) -> Any:
    """The first state, where adapters are and how they are scaled, the base's types, and what batches carry."""
    own = session(config)
    state = initial_state(own.model, config.lora, config.run.seed)
    types = {str(parameter.dtype) for parameter in own.model.module.parameters()}
    batch = own.data.batch(own.data.test[:2], 0)
    return digest(state), own.model.scale, types, sorted(batch), own.model.objective


def update(config: RunConfig, path: Path) -> Any:
    """What one client makes of round 2, by itself."""
    own = session(config)
    client, state = own.data.clients[0], initial_state(own.model, config.lora, config.run.seed)
    names = strategy_of(config).sent_names(state, 2)
    found = train_client(own.model, own.data, client, state, names, config, 2, own.plan(client))
    return digest(found.update)


def chosen(config: RunConfig, path: Path) -> Any:
    """What the evaluators say of some examples; with choices the one that reads them is among them."""
    wanted = ("language", "choice") if config.evaluate.choices else ("language",)
    judged = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"evaluators": wanted})})
    return evaluate(session(config).model, session(config).data, session(config).data.test[:6], judged)


def drifted(config: RunConfig, path: Path) -> Any:
    """What the model makes of public text."""
    return drift(session(config).model, config) if config.evaluate.drift else None


def asked(config: RunConfig, path: Path) -> Any:
    """What it answers to public prompts."""
    return sample_answers(session(config).model, config) if config.evaluate.prompts else None


def answered(config: RunConfig, path: Path) -> Any:
    """How many prompts a model answers in an evaluation, and in how many tokens at most."""
    own, asked = session(config), []
    module: Any = own.model.module
    known = module.generate

    def note(**options: Any) -> Any:
        asked.append((len(options["input_ids"]), options["max_new_tokens"]))
        return known(**options)

    module.generate = note
    try:
        evaluate(own.model, own.data, own.data.test[:12], config)
    finally:
        del module.generate
    return asked


def memorised(config: RunConfig, path: Path) -> Any:
    """What a model that learnt nothing knows by heart."""
    own = session(config)
    state = initial_state(own.model, config.lora, config.run.seed)
    return memorisation(own, state, state, lambda _: strategy_of(config).trained_names(state), None)


def strategy_of(config: RunConfig) -> Strategy:
    return STRATEGIES[config.strategy.name](config, session(config).model)


def federation(config: RunConfig) -> Federation:
    clients = {client: ClientInfo(examples=90) for client in corpus_and_shards(config)[1].clients}
    return Federation(config, clients, {}, [10])


def drawn(config: RunConfig, path: Path) -> Any:
    """Who takes part in which of eight rounds."""
    own = federation(config)
    return [own.draw(number) for number in range(1, 9)]


def passes(config: RunConfig, path: Path) -> Any:
    """Who trains in one pass with whom."""
    own = federation(config)
    return own.groups(list(own.clients))


def memory(config: RunConfig, path: Path) -> Any:
    """How many of eight clients fit into memory together."""
    own = session(config)
    state = initial_state(own.model, config.lora, config.run.seed)
    return plan_memory(own, state, strategy_of(config).sent_names(state), 8).clients


def nodes(config: RunConfig, path: Path) -> Any:
    """How many nodes there are."""
    seen: list[int] = []
    run_local(lambda grid, context: seen.extend(grid.get_node_ids()), None, config, {})
    return seen


@lru_cache
def _ray(toml: str) -> str:
    from fedlab.run.launch.ray import run_ray

    try:
        run_ray(lambda grid, context: None, None, RunConfig.parse(toml), {})
    except ConfigError as error:
        return str(error)
    return "started"


def ray(config: RunConfig, path: Path) -> Any:
    """Whether Ray starts nodes like that, or what it says."""
    return _ray(config.to_toml())


def folders(config: RunConfig, path: Path) -> Any:
    """Directories and rounds of a stream's runs."""
    return [(folder.name, one.run.rounds) for folder, one in stages(config, path)]


def directory(config: RunConfig, path: Path) -> Any:
    """The name of the run's directory if none is given, without the time."""
    return RunDirectory.create(config, None).path.name[:-16]


_runs: dict[str, tuple[fedlab.Run, list[tuple[int, int, bool]]]] = {}  # of this process, by configuration


def _run(config: RunConfig, path: Path) -> tuple[fedlab.Run, list[tuple[int, int, bool]]]:
    """A run of the configuration, made once, and every pass through a normalisation layer in it."""
    toml = config.to_toml()
    if toml not in _runs:
        calls: list[tuple[int, int, bool]] = []

        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(module, nn.LayerNorm):
                calls.append((torch.get_num_threads(), len(output), torch.is_grad_enabled()))

        handle = nn.modules.module.register_module_forward_hook(note)
        try:
            _runs[toml] = fedlab.simulate(config, path / "run", quiet=True), calls
        finally:
            handle.remove()
    return _runs[toml]


def result(config: RunConfig, path: Path) -> Any:
    """What a run came to: status, bits, scores, bytes and ε."""
    found = _run(config, path)[0].result
    return {key: value for key, value in found.items() if "seconds" not in key}


def bits(config: RunConfig, path: Path) -> Any:
    """The adapters of every run of a stream."""
    root = _run(config, path)[0].path
    return [json.loads(file.read_text())["adapter_digest"] for file in sorted(root.glob("*/result.json"))]


def forward_passes(config: RunConfig, path: Path) -> Any:
    """Threads, rows, and whether gradients were on, of every pass through a normalisation layer of a run."""
    return _run(config, path)[1]


def lines(config: RunConfig, path: Path) -> Any:
    """What a run wrote to metrics.jsonl, less what it measured of itself."""
    text = (_run(config, path)[0].path / "metrics.jsonl").read_text(encoding="utf-8")
    found = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in line.items() if "seconds" not in k and k != "time"} for line in found]


def files(config: RunConfig, path: Path) -> Any:
    """Names of the files in a run's directory and beside it, where a ledger may be."""
    root = _run(config, path)[0].path.parent
    return sorted({f.relative_to(root).parts[:3] for f in root.rglob("*") if "events" not in f.name})
