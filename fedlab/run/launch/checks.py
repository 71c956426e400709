"""Everything that can be known to be wrong before a run directory is made: names and files first, then keys, the data,
the model without its weights, and whether ε can be reached. All of it is told at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import pydantic

from fedlab.config import RunConfig
from fedlab.config.load import read_text, unknown_key
from fedlab.config.partial import partial
from fedlab.errors import ConfigError
from fedlab.run.directory import RunDirectory
from fedlab.run.launch.problems import Problems
from fedlab.run.launch.reference import STRATEGIES, load_reference


def load(path: str | Path, overrides: Sequence[str] = (), out: Path | None = None) -> RunConfig:
    """``RunConfig.load``; where keys are wrong, its error lists also what else is wrong: with the rest of the
    configuration, and with the directory ``out`` where it is to run.

    Raises ConfigError.
    """
    try:
        return RunConfig.load(path, list(overrides))
    except ConfigError as error:
        found = Problems()
        found.add(error, lines=True)
        if (rest := partial(read_text(path), overrides)) is not None:
            look(found, *rest)
            if out is not None:
                found.of(lambda: RunDirectory.check_place(out))
        found.raise_all()
        raise


def check(config: RunConfig) -> RunConfig:
    """The configuration with its number of clients, after everything was looked at that can be known to be wrong before
    a process is started. Raises one error that lists whatever is.
    """
    found = Problems()
    config = look(found, config)
    found.raise_all()
    return config


def look(found: Problems, config: RunConfig, broken: Collection[str] = (), texts: bool = False) -> RunConfig:
    """Note what is wrong with a configuration, and return it with its number of clients where that is known.

    Args:
        found: gets the problems.
        config: to be looked at.
        broken: keys and sections that are wrong by themselves; what depends on them is passed over.
        texts: also look at the texts, as tokens, and at who holds what of them.
    """
    from fedlab.models.outline import check_outline

    whole = _whole(broken)
    there = whole("data", "tasks") and found.fine(lambda: _check_sources(config))
    model, objective = _look_at_names(found, config, whole, there)
    clients: dict[str, list[int]] | None = None
    if there and objective and whole("run.seed", "stream"):
        clients = found.of(lambda: _clients(config))
        if clients is not None and not config.population_known:
            config = found.of(lambda: config.with_population(len(clients or ())), lines=True) or config
    if whole("strategy"):
        known = found.of(lambda: check_options(config), lines=True)
        if known is not None and config.population_known and not broken:
            found.of(lambda: known.check(config))
    if model and objective and whole("lora.rank", "lora.target_modules", "lora.layers_to_transform"):
        found.of(lambda: check_outline(config), lines=True)
    if clients is not None and config.population_known:
        _look_at_clients(found, config, clients, whole)
        if texts and model and not broken:
            _look_at_texts(found, config)
    return config


def look_at_deployed(found: Problems, config: RunConfig) -> None:
    """Note what is wrong with a configuration whose clients are on machines of their own; no data are looked at."""
    from fedlab.models.outline import check_outline
    from fedlab.objectives import objective_class

    model, objective = _look_at_names(found, config, lambda *names: True, True, columns=False)
    if objective and objective_class(config.objective.name).named and not config.objective.labels:
        found.add(
            ConfigError(
                "objective.labels is empty: name the labels, in one order for all; clients that number their own labels"
                " number them differently"
            )
        )
    if not config.population_known:
        found.add(ConfigError("data.clients is not given: say how many clients are expected"))
    if config.tasks:
        found.add(ConfigError("[[tasks]]: a stream is for simulations until now; deploy one task as a run of its own"))
    known = found.of(lambda: check_options(config), lines=True)
    if known is not None and config.population_known:
        found.of(lambda: known.check(config))
    if model and objective:
        found.of(lambda: check_outline(config), lines=True)
    if config.privacy.unit == "client":
        from fedlab.privacy.client_level import make_client_plan

        found.of(lambda: make_client_plan(config))


Whole = Callable[..., bool]  # whether sections, or ``section.key``, are as the file has them


def _whole(broken: Collection[str]) -> Whole:
    def whole(*names: str) -> bool:
        return not any(
            one == name or one == name.partition(".")[0] or one.startswith(f"{name}.")
            for one in broken
            for name in names
        )

    return whole


def _look_at_names(
    found: Problems, config: RunConfig, whole: Whole, there: bool, columns: bool = True
) -> tuple[bool, bool]:
    """What can be told without reading much. Returns whether there are such a model and such an objective.

    ``columns``: whether the data are this configuration's to name.
    """
    from fedlab.data.public import check_public
    from fedlab.evaluate import evaluators_of, primary_name
    from fedlab.evaluate.public import check_measures
    from fedlab.models.fingerprint import check_fingerprint, model_fingerprint
    from fedlab.models.hub import check_model
    from fedlab.models.loading import device_of
    from fedlab.privacy.scores_plan import check_scores

    if there and whole("lora", "evaluate"):
        found.of(lambda: check_public(config))
    model = whole("model") and found.fine(lambda: check_model(config.model))
    if model and config.model.sha256 is not None:
        found.of(
            lambda: check_fingerprint(model_fingerprint(config.model), [config.model.sha256 or ""], "model.sha256")
        )
    objective = whole("objective", "data", "tasks") and found.fine(lambda: _check_objective(config, columns))
    if whole("run.device"):
        found.of(lambda: device_of(config.run.device))
    if whole("run.backend", "run.ray_address", "run.cpus_per_node", "run.gpus_per_node"):
        found.of(lambda: _check_backend(config))
    if objective and whole("evaluate"):
        found.of(lambda: evaluators_of(config))
        purged = columns and config.data.duplicates == "purge"
        found.of(lambda: check_scores(config, primary_name(config), purged))
        found.of(lambda: check_measures(config))
    return model, objective


def _check_objective(config: RunConfig, columns: bool) -> None:
    """There is such an objective, with such settings, and the data name the columns that it reads."""
    from fedlab.data.opening import sections
    from fedlab.objectives import objective_class

    objective = objective_class(config.objective.name)
    objective.of(config.objective, config.objective.labels, ())
    for data in sections(config) if columns else []:
        objective.columns(data)


def _look_at_texts(found: Problems, config: RunConfig) -> None:
    """The data report, which the run begins with, and whether its ledgers' records stay with their clients."""
    from fedlab.run.data import check_data
    from fedlab.run.deals import check_deals

    found.of(lambda: check_data(with_labels(config)))
    found.of(lambda: check_deals(config, Path()))


def with_labels(config: RunConfig) -> RunConfig:
    """The same run with the names of its labels, for clients to agree on; they are those of the data."""
    from fedlab.data import corpus_and_shards

    names = corpus_and_shards(config)[0].label_names
    objective = config.objective.model_copy(update={"labels": names})
    return config.model_copy(update={"objective": objective})


def _check_sources(config: RunConfig) -> None:
    from fedlab.data.opening import section_of
    from fedlab.data.sources import check_source

    found = Problems()
    for data in [section_of(config.data, task) for task in config.tasks] or [config.data]:
        found.of(lambda data=data: check_source(data))  # type: ignore[misc]
    found.raise_all()


def _check_backend(config: RunConfig) -> None:
    """What Ray would refuse, before it is started."""
    run = config.run
    if run.backend != "ray":
        return
    if run.ray_address is not None:
        from fedlab.run.launch.ray import check_reachable

        check_reachable(run.ray_address)
        return
    import torch

    cores, gpus = os.cpu_count() or 1, torch.cuda.device_count()
    for key, asked, there in (("cpus_per_node", run.cpus_per_node, cores), ("gpus_per_node", run.gpus_per_node, gpus)):
        if asked > there:
            raise ConfigError(f"run.{key} = {asked:g}, but this machine has {there}; lower it, or join a cluster")


def _check_names(config: RunConfig, clients: Sequence[str]) -> None:
    from fedlab.config.clients import check_names

    check_names(config, clients)


def _clients(config: RunConfig) -> dict[str, list[int]]:
    """Client id → its training examples, in each task of a stream."""
    from fedlab.data import corpus_and_shards
    from fedlab.data.opening import task_data

    shards = corpus_and_shards(config)[1]
    if not config.tasks or config.stream.joint:
        return {client: [len(positions)] for client, positions in shards.train.items()}
    tasks = task_data(config)[1]
    numbers = range(len(tasks.shards))
    return {client: [tasks.size(client, task, config.stream.replay) for task in numbers] for client in shards.train}


def _look_at_clients(found: Problems, config: RunConfig, clients: dict[str, list[int]], whole: Whole) -> None:
    """What depends on how many examples clients have: the batch, δ, and whether ε can be reached."""
    from fedlab.privacy.client_level import make_client_plan
    from fedlab.privacy.plan import delta_of, plan_of

    least = {client: min(sizes) for client, sizes in clients.items()}
    smallest = min(least, key=lambda client: least[client])
    if whole("clients"):
        found.of(lambda: _check_names(config, list(clients)))
    if whole("train.batch_size"):
        found.of(lambda: _check_batch(config, smallest, least[smallest]))
    if not whole("train", "privacy", "run"):
        return
    if config.privacy.unit == "client":
        found.of(lambda: make_client_plan(config))
    if config.privacy.unit != "example":
        return
    largest = max(clients, key=lambda client: max(clients[client]))
    if found.fine(lambda: delta_of(config.privacy, max(clients[largest]))):
        for client in dict.fromkeys((smallest, largest)):  # the highest rate, and the most steps of an epoch
            sizes = clients[client]
            found.of(lambda sizes=sizes: plan_of(config, sizes[0], sizes))  # type: ignore[misc]


def _check_batch(config: RunConfig, client: str, examples: int) -> None:
    if config.train.sampling_rate is None and config.train.batch_size > examples:
        raise ConfigError(
            f"train.batch_size = {config.train.batch_size}, but {client} has {examples} training examples; at most"
            f" {examples}, or raise data.min_client_size or lower data.clients"
        )


def check_strategy(config: RunConfig) -> None:
    """The strategy exists, its own keys are its own, and it can work with the others. Raises ConfigError."""
    check_options(config).check(config)


def check_options(config: RunConfig) -> Any:
    """The strategy's class, if there is one of that name and its own keys are its own.

    Raises ConfigError that names the nearest ones.
    """
    known = load_reference(STRATEGIES)
    name = config.strategy.name
    if name not in known:
        raise ConfigError(
            unknown_key(f"strategy.name = {name}", name, sorted(known))
            .replace("unknown key", "unknown")
            .replace("did you mean strategy.name = ", "did you mean ")
        )
    try:
        known[name].Options(**config.strategy.options)
    except pydantic.ValidationError as error:
        fields = ["name", "weights", *known[name].Options.model_fields]
        raise ConfigError("\n".join(_option(detail, name, fields) for detail in error.errors())) from None
    return known[name]


def _option(detail: Any, strategy: str, fields: list[str]) -> str:
    key = str(detail["loc"][-1])
    if detail["type"] == "extra_forbidden":
        return f'{unknown_key(f"strategy.{key}", key, fields)} (strategy "{strategy}")'
    return f"strategy.{key}: {detail['msg'].replace('Input should', 'must')}, got {detail['input']!r}"
