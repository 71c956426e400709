"""Why a client gives nothing: a closed list of codes, and nothing else about it leaves the client.

The text of an error may quote data, so it stays in the client's own log. What a code says to people is in
``SENTENCES``, which the server prints; which error has which code is the error's own ``code``.
"""

from __future__ import annotations

from typing import Literal

from fedlab.files import disk_problem

FailureCode = Literal[
    "budget-exhausted",
    "participations",
    "plan-mismatch",
    "policy",
    "repeated",
    "configuration",
    "labels",
    "secure-sum",
    "model",
    "ledger",
    "request",
    "version",
    "memory",
    "storage",
    "diverged",
    "failed",
]

SENTENCES: dict[FailureCode, str] = {
    "budget-exhausted": "its budget cannot cover another round",
    "participations": "it took part as often as its plan allows",
    "plan-mismatch": "it was asked for something else than it signed",
    "policy": "its own policy does not allow what was asked; its log says which key",
    "repeated": "it gave an answer to this round before, and does not give another",
    "configuration": "the configuration does not work with its model and data; its log says why",
    "labels": "its data have other labels than the configuration names",
    "secure-sum": "it does not take part in this secure sum, or not as it was asked to; its log says why",
    "model": "its copy of the base model is another one than the run, or its owner, names",
    "ledger": "its ledger cannot be used; its log says why",
    "request": "the request does not fit the run; its log says why",
    "version": "it runs another version of fedlab than the server; install the same on both",
    "memory": "it ran out of memory; lower run.cohort or train.physical_batch",
    "storage": "its disk is full, or cannot be written; its log says where",
    "diverged": "its training diverged (NaN or infinite weights); lower train.lr",
    "failed": "it failed; its log says why",
}


def code_of(error: BaseException) -> FailureCode:
    """The code that an error leaves a client under; ``failed`` for whatever has none of its own."""
    own = getattr(error, "code", None)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, on a GPU
        return "memory"
    if disk_problem(error) is not None:
        return "storage"
    return next((code for code in SENTENCES if code == own), "failed")


def explained(code: FailureCode) -> str:
    """A code with its sentence, for people."""
    return f"{code}: {SENTENCES[code]}"
