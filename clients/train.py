"""One message of training: the clients of the cohort in groups that share a pass, on the process's one model."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict

from clients.account import ClientAccount
from fedlab.errors import FedlabError, PrivacyError
from fedlab.lora.ranks import widen
from fedlab.lora.state import BASIS, PAST, State, digest, from_wire, part_of, select, to_wire
from fedlab.privacy.ledger.guard import Refusal, public_reason
from fedlab.run.personal import load_personal, save_personal
from fedlab.session import Session
from fedlab.train.cohort import supports_fused, train_cohort
from fedlab.train.dp import PerExampleGradients
from fedlab.train.local import LocalTraining, Trained
from fedlab.train.opacus import OpacusGradients
from fedlab.train.trainer import train_client

logger = logging.getLogger("fedlab")
EXPECTED = (FedlabError, RuntimeError, ValueError)  # what may fail for one client and leave the others alone


@dataclass
class Job:
    """One client's part in a message.

    Its charge stays open from before its data is touched until its update is committed.
    """

    client: str
    known: int
    rank: int
    guarded: bool  # under example-level DP: a charge comes first, and a failure's reason gives no data away
    account: ClientAccount | None = None
    training: LocalTraining | None = None
    result: Trained | None = None
    wire: dict[str, np.ndarray] = field(default_factory=dict)
    failure: str | None = None
    refused: bool = False
    charge: ExitStack = field(default_factory=ExitStack)
    commit: Callable[[int, str], None] | None = None

    def fail(self, error: BaseException) -> None:
        """Close the charge, which then counts in full, and keep the reason."""
        self.charge.__exit__(type(error), error, error.__traceback__)
        self.refused = isinstance(error, Refusal)
        public = public_reason(error) if self.guarded else f"{type(error).__name__}: {error}"
        self.failure = str(error) if self.refused else public
        self.result, self.training = None, None


def train_message(session: Session, cohort: list[str], content: RecordDict, context: Context) -> RecordDict:
    """Reply to a train message: ``updates`` (per client and name), ``metrics`` (per-client lists), ``charges``,
    ``failures``.

    Under DP every charge is signed and on the disk before the client's data is touched, and the update is committed
    before it leaves.
    """
    started = time.time()
    order = content.config_records["round"]
    received = received_state(content, cast(str, order["wire_dtype"]))
    state = received | session.basis
    sent = digest(received) if session.config.private else ""
    known, ranks, groups = (cast(list[int], order[key]) for key in ("known", "ranks", "groups"))
    if min(groups) < 1 or sum(groups) != len(cohort):
        raise FedlabError(f"groups {groups} do not add up to the {len(cohort)} clients of this message")
    guarded = session.config.privacy.unit == "example"
    jobs = [Job(client, k, rank, guarded) for client, k, rank in zip(cohort, known, ranks, strict=True)]
    rest = iter(jobs)
    lines: dict[str, str] = {}
    exhausted: list[str] = []
    for size in groups:
        group = [next(rest) for _ in range(size)]
        _train_group(session, group, state, sent, order, context)
        for job in group:
            _after(job, cast(int, order["round"]), lines, exhausted)
    done = {job.client: job.result for job in jobs if job.result is not None}
    wires = {job.client: job.wire for job in jobs}
    failed = [job for job in jobs if job.failure is not None]
    hide = session.config.private and not session.config.privacy.share_metrics
    return RecordDict(
        {
            "updates": ArrayRecord(
                {f"{client}/{name}": Array(v) for client in done for name, v in wires[client].items()}
            ),
            "clients": ConfigRecord({"ids": list(done)}),
            "metrics": MetricRecord(
                {
                    "examples": [r.examples for r in done.values()],
                    "steps": [r.steps for r in done.values()],
                    "loss": [math.nan if hide else r.loss for r in done.values()],
                    "clip_fraction": [math.nan if hide else r.clip_fraction for r in done.values()],
                    "seconds": [r.seconds for r in done.values()],
                    "started": started,
                    "ended": time.time(),
                }
            ),
            "charges": ConfigRecord({"ids": list(lines), "lines": list(lines.values()), "exhausted": exhausted}),
            "failures": ConfigRecord(
                {
                    "ids": [job.client for job in failed],
                    "reasons": [str(job.failure) for job in failed],
                    "refused": [job.client for job in failed if job.refused],
                }
            ),
        }
    )


def _train_group(
    session: Session, group: list[Job], state: State, received: str, order: ConfigRecord, context: Context
) -> None:
    """Charge every client of a group, train them together, commit each.

    What fails for one is its own failure; else it is everybody's.
    """
    home = personal_directory(order, context)
    try:
        for job in group:
            try:
                _begin(session, job, state, received, order, context, home)
            except EXPECTED as error:
                job.fail(error)
        ready = [job for job in group if job.training is not None]
        results = _results(session, [job.training for job in ready if job.training], order)
        for job in ready:
            try:
                if isinstance(found := results[job.client], Exception):
                    raise found
                _end(job, found, order, home)
            except EXPECTED as error:
                logger.warning("%s failed in round %d: %s", job.client, order["round"], error)
                job.fail(error)
    except BaseException as error:
        for job in group:
            if job.result is None and job.failure is None:
                job.fail(error)
        if not isinstance(error, EXPECTED):
            raise
        logger.warning("%d clients failed in round %d: %s", len(group), order["round"], error)


def _begin(
    session: Session, job: Job, state: State, received: str, order: ConfigRecord, context: Context, home: Path
) -> None:
    """Everything before the client's data is touched: its start and its scope, and last its charge."""
    number, keep = cast(int, order["round"]), cast(list[str], order["keep"])
    highest = max(len(value) for name, value in state.items() if name.endswith(".lora_A"))
    if not 1 <= job.rank <= highest:
        raise FedlabError(f"rank {job.rank} was asked for, outside [1, {highest}]")
    start = state | (load_personal(home, job.client, number) if keep else {})
    if job.guarded:
        job.account = ClientAccount(session, job.client, order, context)
        job.account.check_scope(cast(list[str], order["trained"]))
        job.commit = job.charge.enter_context(job.account.guard.charge(job.account.terms, number, received))
    job.training = LocalTraining(
        job.client, start, job.account.plan if job.account else None, job.rank if job.rank < highest else None
    )


def _results(
    session: Session, trainings: list[LocalTraining], order: ConfigRecord
) -> Mapping[str, Trained | Exception]:
    """The clients' results; a group that does not fit into a GPU's memory is halved, one whose head is not linear goes
    one by one.
    """
    trained, number = cast(list[str], order["trained"]), cast(int, order["round"])
    if not trainings:
        return {}
    if session.config.train.gradients != "fused" or not supports_fused(session.model, trained):
        return _one_by_one(session, trainings, trained, number)
    try:
        return train_cohort(session.model, session.data, trainings, trained, session.config, number)
    except torch.cuda.OutOfMemoryError:
        if len(trainings) == 1:
            raise
        logger.warning(
            "%d clients in one pass do not fit into the GPU's memory; going on with half as many", len(trainings)
        )
    torch.cuda.empty_cache()
    half = len(trainings) // 2
    return {**_results(session, trainings[:half], order), **_results(session, trainings[half:], order)}


def _one_by_one(
    session: Session, trainings: list[LocalTraining], trained: list[str], number: int
) -> Mapping[str, Trained | Exception]:
    """The clients' results without fused layers; what fails for one is its own failure."""
    if any(part_of(name) in (BASIS, PAST) for name in trainings[0].state):
        raise FedlabError(
            f'strategy.name = "{session.config.strategy.name}" needs a linear head and train.gradients = "fused"'
        )
    results: dict[str, Trained | Exception] = {}
    hooks = OpacusGradients if session.config.train.gradients == "opacus" else PerExampleGradients
    for t in trainings:
        try:
            results[t.client] = train_client(
                session.model, session.data, t.client, t.state, trained, session.config, number, t.plan, t.rank, hooks
            )
        except EXPECTED as error:
            results[t.client] = error
    return results


def _end(job: Job, result: Trained, order: ConfigRecord, home: Path) -> None:
    """What the client keeps goes to its disk, what it sends is committed."""
    wire_dtype, number = cast(str, order["wire_dtype"]), cast(int, order["round"])
    assert job.training is not None
    start = job.training.state
    if own := select(result.update, cast(list[str], order["keep"])):
        save_personal(
            home, job.client, number, {name: start[name] + value for name, value in widen(own, start).items()}
        )
    job.wire = to_wire({name: value for name, value in result.update.items() if name not in own}, wire_dtype)
    if job.commit is not None:
        job.commit(result.steps, digest(from_wire(job.wire, wire_dtype)))
    job.charge.close()
    job.result = result


def _after(job: Job, number: int, lines: dict[str, str], exhausted: list[str]) -> None:
    """The ledger's new lines, and whether another round would be within the budget."""
    try:
        if job.account and job.result is not None and job.account.exhausted(number + 1):
            exhausted.append(job.client)
        if job.account:
            lines[job.client] = job.account.lines_after(job.known)
    except PrivacyError as error:
        job.failure = job.failure or str(error)


def personal_directory(order: ConfigRecord, context: Context) -> Path:
    """Where this node's clients keep what is theirs alone: as the run says, or, on a node of one client, as its owner
    says.
    """
    if "client" not in context.node_config:
        return Path(str(order["personal"]))
    return Path(str(context.node_config.get("personal", Path.home() / ".fedlab" / "personal"))) / str(order["run"])


def received_state(content: RecordDict, wire_dtype: str) -> State:
    """The global state that a message carries, in float32."""
    return from_wire({name: array.numpy() for name, array in content.array_records["state"].items()}, wire_dtype)
