"""Lines for machines: one object each; and of a trainer nothing leaves but what it tells."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedlab.run.monitor import logs
from fedlab.run.output import settle


@pytest.fixture
def as_json() -> Iterator[None]:
    settle()
    logs.configure("json")
    yield
    logs.configure("plain")


def printed(capsys: pytest.CaptureFixture[str]) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.usefixtures("as_json")
def test_a_line_is_one_object(capsys: pytest.CaptureFixture[str]):
    logging.getLogger("fedlab").warning("north\nis %s", "ε\u2028", extra={"round": 3, "client": "north"})
    logs.tell("superlink listens", process="superlink", round=None, ratio=float("nan"))
    logging.getLogger("uvicorn.error").error("of a library")
    logging.getLogger("httpx").info("too much")
    first, second, third = printed(capsys)
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "level": "warning",
        "logger": "fedlab",
        "message": "north\nis ε\u2028",
        "round": 3,
        "client": "north",
    }
    assert (second["logger"], second["message"], second["process"]) == (
        "fedlab.operations",
        "superlink listens",
        "superlink",
    )
    assert "round" not in second
    assert second["ratio"] is None
    assert (third["logger"], third["message"]) == ("uvicorn.error", "of a library")


@pytest.mark.usefixtures("as_json")
def test_an_exception_is_its_kind_alone(capsys: pytest.CaptureFixture[str]):
    try:
        raise ValueError("John Smith")
    except ValueError:
        logging.getLogger("fedlab").exception("a reply could not be read")
    (line,) = printed(capsys)
    assert (line["error"], line["level"]) == ("ValueError", "error")
    assert "John" not in json.dumps(line)


PLAIN = """
import logging
from fedlab.run import output
from fedlab.run.monitor import logs
output.settle()
for form in ("json", "plain", "plain"):
    logs.configure(form)
logs.tell("superlink listens", process="superlink")
logs.tell("superlink died", logging.WARNING)
logging.getLogger("fedlab").warning("slow")
logging.getLogger("fedlab").info("not said")
"""


def test_plain_is_as_it_was():
    done = subprocess.run([sys.executable, "-c", PLAIN], capture_output=True, text=True, timeout=60)
    assert done.stdout == "superlink listens\n"
    assert done.stderr == "fedlab: warning: superlink died\nfedlab: warning: slow\n"


TRAINER = """
import logging, os, subprocess, sys, warnings
from pathlib import Path
from fedlab.run import output
from fedlab.run.monitor import logs
output.settle()
logs.keep_at_home(Path(sys.argv[1]), sys.argv[2])
logs.tell("ready", client="north", round=2)
print("secret one")
os.write(1, b"secret two\\n")
logging.getLogger("fedlab").error("secret three")
warnings.warn("secret four")
logging.getLogger("transformers").error("secret five")
subprocess.run(["echo", "secret six"])
logs.tell("a request failed", logging.ERROR, code="failed")
raise ValueError("secret seven")
"""


@pytest.mark.parametrize("form", ["plain", "json"])
def test_of_a_trainer_nothing_leaves_but_what_it_tells(form: str, tmp_path: Path):
    home = tmp_path / "home" / "log.txt"
    done = subprocess.run([sys.executable, "-c", TRAINER, str(home), form], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "")
    told = done.stdout.splitlines()
    assert len(told) == 2
    assert "secret" not in done.stdout
    if form == "json":
        objects = [json.loads(line) for line in told]
        assert [(o["message"], o.get("client"), o.get("code")) for o in objects] == [
            ("ready", "north", None),
            ("a request failed", None, "failed"),
        ]
    else:
        assert told[0].endswith(" ready")
    kept = home.read_text()
    for number in ("one", "two", "three", "four", "five", "six", "seven"):
        assert kept.count(f"secret {number}") == 1 or number == "seven", number
    assert "ValueError: secret seven" in kept
    assert "ready" in kept, "the owner's log has everything"
    assert home.stat().st_mode & 0o777 == 0o600


def test_a_home_that_cannot_be_written_prints_nothing_either(tmp_path: Path):
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        [sys.executable, "-c", TRAINER, str(tmp_path / "file" / "log.txt"), "json"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr, len(done.stdout.splitlines())) == (1, "", 2)
