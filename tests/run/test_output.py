"""What is printed may be cut off, or meet a terminal without ε: nobody else notices."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fedlab
from fedlab.config import RunConfig
from fedlab.run import output


def command(text: str) -> list[str]:
    return [sys.executable, "-c", text]


class Broken(io.StringIO):
    """A stream whose reader is gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_a_closed_output_swallows_what_is_said(monkeypatch: pytest.MonkeyPatch):
    for stream in (Broken(), None):
        monkeypatch.setattr(sys, "stdout", stream)
        output.say("round 1")
        output.console().print("round 2")
        assert not output.is_live()
    shut = io.StringIO()
    shut.close()
    monkeypatch.setattr(sys, "stderr", shut)
    output.complain("error")


def test_what_a_terminal_lacks_is_spelt(monkeypatch: pytest.MonkeyPatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    output.say("ε ≤ 2 – σ × √π, \udcff")
    assert raw.getvalue() == b"epsilon <= 2 - sigma x sqrt \\u03c0, \\udcff\n"


def test_brackets_and_colons_stand_as_they_are(capsys: pytest.CaptureFixture[str]):
    output.console().print("runs/[bold]x[/bold] [[tasks]] :smile:")
    assert capsys.readouterr().out == "runs/[bold]x[/bold] [[tasks]] :smile:\n"


PRINTS = "from fedlab.run import output as o; o.settle()\nfor i in range(20000): o.say('ε ' * 40)\nprint('more')\n"
PRINTS += "import sys; sys.stderr.write('done'); sys.exit(7)"


def test_a_reader_that_leaves_ends_nothing():
    process = subprocess.Popen(command(PRINTS), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read() if process.stderr else b""
    assert (process.wait(60), errors) == (7, b"done")


def test_descriptors_that_are_closed_do_not_catch_the_files_of_a_run(tmp_path: Path):
    text = f"from fedlab.run import output as o; o.settle(); f = open({str(tmp_path / 'f')!r}, 'w')\n"
    text += "import os; o.say('said'); f.write('kept'); f.close(); os.write(2, b'lost')"
    subprocess.run(["sh", "-c", f'exec "{sys.executable}" -c "$1" >&- 2>&- <&-', "sh", text], timeout=60, check=True)
    assert (tmp_path / "f").read_text() == "kept"


def test_a_full_output_is_given_up_like_a_closed_one():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command(PRINTS), stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert (done.returncode, done.stderr) == (7, b"done")


def test_a_warning_before_a_run_is_said_once_and_not_when_quiet():
    text = "import logging; logging.basicConfig(); from fedlab.run import output as o; o.settle({})\n"
    text += "logging.getLogger('fedlab').warning('slow'); import warnings; warnings.warn('foreign')"
    for quiet, said in ((False, b"fedlab: warning: slow\n"), (True, b"")):
        done = subprocess.run(command(text.format(quiet)), capture_output=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", said)


def test_counting_epsilon_configures_no_logging():
    from fedlab.privacy.accounting import Event, epsilon
    from fedlab.privacy.audit import recompute

    root, absl = logging.getLogger(), logging.getLogger("absl")
    handlers, before = list(root.handlers), absl.level
    root.handlers.clear()
    try:
        for accountant in ("rdp", "pld"):
            epsilon([Event("poisson", 0.5, 0.7, 31)], 1e-5, accountant)
        recompute._rdp(recompute._Spent(((0.5, 0.7, 31),), 0.0), 1e-5)
        assert root.handlers == [], "absl has called logging.basicConfig()"
        assert absl.level == before
    finally:
        root.handlers[:] = handlers


def test_a_quiet_run_in_python_says_nothing_whoever_configured_logging(
    tiny_toml: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    root, loud = logging.getLogger(), logging.StreamHandler(sys.stderr)
    before = logging.getLogger("fedlab").propagate
    root.addHandler(loud)  # as absl, or any library, may have done
    try:
        fedlab.simulate(RunConfig.parse(tiny_toml, ["run.rounds=1"]), tmp_path / "run", quiet=True)
    finally:
        root.removeHandler(loud)
    assert capfd.readouterr() == ("", "")
    assert "memory per node" in (tmp_path / "run" / "log.txt").read_text()
    assert logging.getLogger("fedlab").propagate == before


def test_a_dumb_terminal_is_not_live(monkeypatch: pytest.MonkeyPatch):
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        for kind, live in (("xterm", True), ("dumb", False)):
            monkeypatch.setenv("TERM", kind)
            assert output.is_live() == live
    os.close(master)
