"""``fedlab client --check CLIENT.toml [RUN.toml]``: what a run would do here, before anything is started or charged."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from clients.own_session import own_config
from clients.owner import own_identity
from clients.policy import OwnPolicy
from fedlab.config import RunConfig
from fedlab.config.client import ClientFile
from fedlab.config.sections import ModelSection
from fedlab.data.opening import OwnRecords, own_records
from fedlab.data.sources import SOURCES
from fedlab.errors import ConfigError, FedlabError, PrivacyError
from fedlab.models.fingerprint import check_fingerprint, model_fingerprint
from fedlab.models.hub import check_model
from fedlab.privacy.accounting import Event, epsilon
from fedlab.privacy.ledger.guard import affordable, spent_of_budget
from fedlab.privacy.ledger.ledger import events, parse_lines
from fedlab.privacy.plan import DPPlan, plan_of
from fedlab.privacy.release import PUBLIC, public_names
from fedlab.privacy.scores_plan import beside_rounds
from fedlab.run.launch.reference import load_reference

Say = Callable[[str], object]


def show(path: Path, run: Path | None, say: Say, complain: Say) -> int:
    """Say it. Returns the exit code: 0, or 3 if the run would be refused.

    Raises ConfigError if a file cannot be read, or the client cannot work at all.
    """
    from fedlab.run.launch.deploy.client import check

    file = ClientFile.load(path)
    check_data(file)
    try:
        for warning in check(file, "trainer" if file.client.server is None else None):
            complain(f"fedlab: warning: {warning}")
    except ConfigError as error:  # what would be trained on can be known before there is a certificate
        complain(f"fedlab: warning: it cannot reach a server yet: {error}")
    for line in about(file):
        say(line)
    if run is None:
        return 0
    config = RunConfig.load(run)
    refusals: list[str] = []
    for line in of_run(file, config, refusals):
        say(line)
    for reason in dict.fromkeys(refusals):
        say(f"refused: {reason}")
    say("this run would be refused" if refusals else "this run would be taken part in")
    return PrivacyError.exit_code if refusals else 0


def check_data(file: ClientFile) -> None:
    """Raise ConfigError where the files of the client's data are not there, or may not be read."""
    section = file.data.section(64)
    if file.data.source == "files" and file.data.path is not None and not Path(file.data.path).exists():
        raise ConfigError(f"data.path = {file.data.path!r} is not there; name a file or directory that is")
    for _, place in SOURCES[section.source].files(section):
        if place.exists() and not os.access(place, os.R_OK):
            raise ConfigError(f"data.path: {str(place)!r} cannot be read by this user; change its permissions")


def about(file: ClientFile) -> Iterator[str]:
    """What the file says, and what is left of its budget."""
    yield f"client {file.client.id}; what is its own lies in {file.home}"
    yield f"data: {file.data.source} {file.data.path or ''}".rstrip()
    for name, copy in file.models.items():
        try:
            model = ModelSection(name=copy.path or name, revision=copy.revision)
            check_model(model)
            yield f"model {name}: {copy.path or 'by its name'}, sha256 {model_fingerprint(model)}"
        except ConfigError as error:
            yield f"model {name}: {error}"
    if file.policy.shared_noise:
        yield f'identity, for the [roster] of its peers: {file.client.id} = "{own_identity(file)}"'
        yield f"roster: {', '.join(sorted(file.roster)) or 'nobody, so no run under shared noise is taken part in'}"
    if (budget := file.counted_budget) is None:
        yield "no budget: under its policy nothing is charged"
        return
    assert budget.delta is not None
    spent = spent_before(file)
    used = spent_of_budget(spent, budget.delta) if spent else 0.0
    yield f"budget: ε = {budget.epsilon:g} at δ = {budget.delta:g}; spent so far {used:.4f}"


def of_run(file: ClientFile, config: RunConfig, refusals: list[str]) -> Iterator[str]:
    """What would be trained on, what it would cost, and, into ``refusals``, what would be refused."""
    policy = OwnPolicy.of(file)
    parts = load_reference("strategies:STRATEGIES")[config.strategy.name].trained_parts(config)
    if problem := policy.problem(config, list(parts)):
        refusals.append(problem)
    try:
        own = own_config(config, file)
        found = model_fingerprint(own.model)
        for names in (file.models[config.model.name].sha256, (config.model.sha256,)):
            if names and names[0] is not None:
                check_fingerprint(found, [name for name in names if name], "the model's sha256")
        records = own_records(file.data.section(config.data.max_length), file.client.id, own)
    except FedlabError as error:
        refusals.append(str(error))
        return
    yield from _of_records(file, config, records)
    yield f"trained: {', '.join(parts)} of {config.model.name}, by {config.strategy.name}, {config.run.rounds} rounds"
    for name in public_names(config):
        yield f"leaves without noise: {name} ({PUBLIC[name]})"
    if config.privacy.unit == "example":
        yield from _of_privacy(file, config, records, policy, refusals)


def _of_records(file: ClientFile, config: RunConfig, records: OwnRecords) -> Iterator[str]:
    client, corpus = file.client.id, records.corpus
    train, held = records.shards.train[client], records.shards.local_test[client]
    yield f"records: {len(train)} to train on, {len(held)} held out, cut at {config.data.max_length} tokens"
    if corpus.label_names:
        counts = corpus.label_counts(train)
        known = [f"{name} {count}" for name, count in zip(corpus.label_names, counts, strict=True)]
        yield f"labels: {', '.join(known)}"


def _of_privacy(
    file: ClientFile, config: RunConfig, records: OwnRecords, policy: OwnPolicy, refusals: list[str]
) -> Iterator[str]:
    try:
        plan: DPPlan = plan_of(config, len(records.shards.train[file.client.id]))
    except FedlabError as error:
        refusals.append(str(error))
        return
    beside = beside_rounds(config)
    yield (
        f"noise: σ = {plan.sigma:.4g}{_share(plan)}, clip {plan.clip:g}, {plan.normaliser:g} of {plan.n} expected per"
        f" step, {plan.steps} steps in each of at most {plan.participations} rounds"
    )
    cost = epsilon([plan.event(plan.participations), *beside], plan.delta)
    yield f"cost: ε = {cost:.4f} at δ = {plan.delta:g}, if it takes part to the end"
    if config.privacy.scores_sigma is not None:
        yield "leaves once with noise, within that cost: accuracy on the held-out records"
    if problem := policy.problem_of_plan(plan, beside):
        refusals.append(problem)
    if (budget := file.counted_budget) is not None:
        assert budget.delta is not None
        who, found = affordable([*spent_before(file), plan.event(), *beside], budget.epsilon, budget.delta)
        if who is None:
            refusals.append(f"the budget of ε = {budget.epsilon:g} does not cover one round: {found:.4f} in all")


def _share(plan: DPPlan) -> str:
    """Whose noise that is, where it is shared."""
    if (shared := plan.shared) is None:
        return ""
    return (
        f" of a sum of {shared.survivors} clients or more, of which this client adds 1/{shared.honest} of the variance"
    )


def spent_before(file: ClientFile) -> list[Event]:
    """What the client's ledger shows; nothing is made where there is none yet. Raises PrivacyError for no ledger."""
    path = file.home / "ledger" / f"{file.client.id}.jsonl"
    return events(parse_lines(path.read_text(encoding="utf-8"))) if path.is_file() else []
