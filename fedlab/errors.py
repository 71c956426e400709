"""Errors that fedlab raises on purpose, each with the exit code its command ends with.

A message is one or two lines: the argument, its value, the limit, the likely cause, the fix. ``code`` is all that
leaves a client of it (``fedlab.protocol.failures``).
The command line prints the message alone; a traceback is shown only with ``--debug``.
"""

from __future__ import annotations


class FedlabError(Exception):
    """Base of every error that fedlab raises on purpose."""

    exit_code = 4
    code = "failed"
    problems: tuple[FedlabError, ...] = ()  # those that it lists, where it lists several


class ConfigError(FedlabError):
    """Wrong usage or configuration: nothing was started, nothing was written."""

    exit_code = 2
    code = "configuration"


class LabelError(ConfigError):
    """Data have a label that was not agreed on."""

    code = "labels"


class PrivacyError(FedlabError):
    """A privacy promise would be broken, or cannot be proven."""

    exit_code = 3
    code = "ledger"


class Unreachable(PrivacyError):
    """No noise gives the ε that is asked for."""

    code = "configuration"


class NotPerExample(PrivacyError):
    """A model's per-example gradients are not per example, so that no clip would hold."""

    code = "configuration"


class SumRefused(PrivacyError):
    """A secure sum would not hide what it is to hide, or cannot be brought to an end."""

    code = "secure-sum"


class RunFailed(FedlabError):
    """The run started and could not be finished."""

    exit_code = 4


class Unwritable(RunFailed):
    """A file could not be written: a full disk, a quota, a file system that is read-only.

    Args:
        path: the file, or the folder that it is in.
        reason: what the system said.
        advice: what to do.
    """

    code = "storage"

    def __init__(self, path: object, reason: str, advice: str = "make room there") -> None:
        super().__init__(f"cannot write {path}: {reason}; {advice}")

    @classmethod
    def told(cls, text: str) -> Unwritable:
        """One with these words."""
        error = cls.__new__(cls)
        Exception.__init__(error, text)
        return error


class Diverged(RunFailed):
    """Training ended in NaN or infinite weights."""

    code = "diverged"


class Interrupted(FedlabError):
    """The user stopped the run; the run directory is valid."""

    exit_code = 130
