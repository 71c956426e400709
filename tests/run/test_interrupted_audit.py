"""An honest run that is cut off at any line of the code that charges, counts, signs and saves is never "failed"."""

from __future__ import annotations

import contextlib
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import fedlab
from fedlab.config import RunConfig
from fedlab.errors import Interrupted
from fedlab.privacy.audit.run import audit_run
from fedlab.run.launch import resume
from fedlab.run.regenerate import regenerate
from strategies.server.loop import Rounds

WATCHED = ("fedlab/privacy/ledger/", "strategies/app.py", "strategies/server/", "clients/", "fedlab/run/")
SETTINGS = ["run.rounds=2", "train.steps=1", "strategy.name=fedavg", "data.clients=4"]


class Moment:
    """Raises KeyboardInterrupt at the n-th line that is executed in the files of ``WATCHED``; counts them."""

    def __init__(self, at: int | None) -> None:
        self.at, self.seen, self.where = at, 0, ""

    def __enter__(self) -> Moment:
        self._root, self._before = str(Path(fedlab.__file__).parents[1]) + "/", sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(self._before)

    def _call(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        name = frame.f_code.co_filename.removeprefix(self._root)
        return self._line if name.startswith(WATCHED) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        if event == "line":
            self.seen += 1
            if self.seen == self.at:
                self.where = f"{frame.f_code.co_filename.removeprefix(self._root)}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self._line


def whole(config: RunConfig, path: Path) -> int:
    """Lines of a run that nobody interrupts."""
    with Moment(None) as moment:
        fedlab.simulate(config, path, quiet=True)
    assert audit_run(path, regenerate=regenerate).verdict == "consistent"
    return moment.seen


def cut_off(config: RunConfig, path: Path, at: int) -> str:
    """Interrupt a run at a moment; where that was. Empty if it was before there was a run."""
    with Moment(at) as moment, contextlib.suppress(KeyboardInterrupt, Interrupted):
        fedlab.simulate(config, path, quiet=True)
    return moment.where if (path / "run.toml").is_file() else ""


def moments(total: int, count: int) -> Iterator[int]:
    """One at random in each of ``count`` equal parts."""
    rng = random.Random(17)
    for part in range(count):
        yield rng.randint(1 + part * total // count, (part + 1) * total // count)


@pytest.mark.parametrize(("rounds", "lost"), [(2, 1), (2, 2), (1, 1)])
def test_a_round_that_is_lost_and_cannot_be_afforded_again(
    tiny_toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: int, lost: int
):
    """Cut off between the seal of a round and its checkpoint. With secure noise it is charged anew when it is repeated,
    and at the end a round is missing to its owners: the run ends earlier, with the state that it went on from.
    """
    config = RunConfig.parse(tiny_toml, [*SETTINGS, "privacy.noise=secure", f"run.rounds={rounds}"])
    checkpoint = Rounds._checkpoint

    def interrupted(self: Rounds) -> None:
        if self.done == lost:
            raise KeyboardInterrupt
        checkpoint(self)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt, Interrupted):
        patch.setattr(Rounds, "_checkpoint", interrupted)
        fedlab.simulate(config, tmp_path / "run", quiet=True)
    assert audit_run(tmp_path / "run", regenerate=regenerate).verdict == "incomplete"
    result = resume(tmp_path / "run", quiet=True).result
    assert (result["status"], result["rounds"]) == ("budget-exhausted", rounds - 1)
    audit = audit_run(tmp_path / "run", regenerate=regenerate)
    assert (audit.verdict, audit.findings) == ("consistent", ())


@pytest.mark.timeout(1800)  # 60 runs, and half as many resumed
@pytest.mark.parametrize("count", [5, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("unit", ["example", pytest.param("client", marks=pytest.mark.slow)])
def test_interrupted_at_any_moment_never_failed(tiny_toml: str, tmp_path: Path, count: int, unit: str):
    more = ["privacy.noise=secure"] if unit == "example" else ["privacy.unit=client", "strategy.weights=uniform"]
    config = RunConfig.parse(tiny_toml, [*SETTINGS, *more])
    total, verdicts = whole(config, tmp_path / "whole"), []
    for number, at in enumerate(moments(total, count)):
        path = tmp_path / f"cut-{at}"
        where = cut_off(config, path, at)
        if not where:
            continue
        audit = audit_run(path, regenerate=regenerate)
        verdicts.append(audit.verdict)
        assert audit.verdict in ("incomplete", "consistent"), (at, where, audit.findings)
        if number % 2 == 0 and audit.verdict == "incomplete":
            resume(path, quiet=True)
            audit = audit_run(path, regenerate=regenerate)
            assert audit.verdict == "consistent", (at, where, audit.findings)
        shutil.rmtree(path)
    print(f"{len(verdicts)} of {count} moments among {total} lines: {verdicts.count('incomplete')} incomplete")
    assert len(verdicts) >= count // 2
