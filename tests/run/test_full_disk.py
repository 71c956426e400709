"""A disk that is full: one sentence with the path and what to do, exit code 4, and afterwards the run goes on."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fedlab
from fedlab.config import RunConfig
from fedlab.errors import Unwritable
from fedlab.files import disk_problem, naming, write
from fedlab.protocol.failures import code_of
from fedlab.report.html import write_report
from fedlab.run.directory import RunDirectory
from fedlab.run.metrics import MetricsLog

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ["run.rounds=2", "evaluate.clients=never"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory):
    """Adapter's digest of the run that nothing disturbed, made once."""
    found: dict[str, str] = {}

    def digest(toml: str) -> str:
        if not found:
            run = fedlab.simulate(RunConfig.parse(toml, OPTIONS), tmp_path_factory.mktemp("whole") / "run", quiet=True)
            found["digest"] = run.result["adapter_digest"]
        return found["digest"]

    return digest


def resumed(path: Path) -> dict[str, Any]:
    return fedlab.resume(path, quiet=True).result


def full_for(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No byte of a file whose path has this pattern reaches the disk."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if pattern in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize(
    "pattern",
    ["ledger/client-", "receipts.jsonl", "round-1.safetensors", "latest.json", "PRIVACY.md", "result.json", "report"],
)
def test_a_full_disk_is_told_in_one_sentence_and_the_run_resumes(
    pattern: str, tiny_toml: str, tmp_path: Path, whole, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        full_for(pattern, patch)
        with pytest.raises(Unwritable) as caught:
            fedlab.simulate(RunConfig.parse(tiny_toml, OPTIONS), path, quiet=True)
    said = str(caught.value)
    assert said.startswith(f"cannot write {path}")
    done = RunDirectory(path).finished is not None  # only the report is missing
    assert said.endswith(f"make room there, then continue with: fedlab {'report' if done else 'resume'} {path}")
    assert "\n" not in said
    assert caught.value.exit_code == 4
    result = json.loads(write_report(path).with_name("result.json").read_text()) if done else resumed(path)
    assert (result["status"], result["adapter_digest"]) == ("completed", whole(tiny_toml))
    assert not list(path.rglob("*.tmp"))


def test_half_a_line_is_not_left_in_the_metrics(tiny_toml: str, tmp_path: Path):
    directory = RunDirectory.create(RunConfig.parse(tiny_toml), tmp_path / "run")
    file = directory.path / "metrics.jsonl"
    file.write_text('{"phase": "event"}\n{"torn')
    events = MetricsLog(directory)
    events.write("train", 1, loss=1.0)

    class Full:
        def __init__(self, real) -> None:
            self.real = real

        def write(self, data: bytes) -> int:
            return self.real.write(data[:10])

        def __getattr__(self, name: str):
            return getattr(self.real, name)

    events._file = Full(events._file)
    with pytest.raises(Unwritable, match=r"metrics\.jsonl: No space left"):
        events.write("train", 2, loss=1.0)
    events.close()
    assert [json.loads(line)["phase"] for line in file.read_text().splitlines()] == ["event", "train"]


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.ENOSPC, "x"), errno.ENOSPC),
        (OSError(errno.EDQUOT, "x"), errno.EDQUOT),
        (RuntimeError("I/O error: No space left on device (os error 28)"), errno.ENOSPC),
        (OSError(errno.ENOENT, "x"), None),
        (ValueError("space"), None),
    ],
)
def test_what_a_full_disk_raises_is_known_in_whatever_library(error: Exception, number: int | None, tmp_path: Path):
    assert disk_problem(error) == number
    assert (code_of(error) == "storage") == (number is not None)
    with pytest.raises(Unwritable if number else type(error)), naming(tmp_path / "f"):
        raise error


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "gone" / "f", "x")


MOUNT = ["unshare", "-rm", "sh", "-c"]
CAN_MOUNT = (
    shutil.which("unshare") and not subprocess.run([*MOUNT, "mount -t tmpfs t /mnt"], capture_output=True).returncode
)
SCRIPT = """
mount -t tmpfs -o size=$SIZE tmpfs "$DIR" || exit 99
"$PY" -m fedlab.cli simulate "$CONFIG" --out "$DIR/run" --quiet; echo "first $?"
mount -o remount,size=64m "$DIR"
if [ -f "$DIR/run/run.toml" ]; then "$PY" -m fedlab.cli resume "$DIR/run" --quiet
else "$PY" -m fedlab.cli simulate "$CONFIG" --out "$DIR/run" --quiet; fi; echo "second $?"
"$PY" -m fedlab.cli audit "$DIR/run" > /dev/null; echo "audit $?"
"""


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.skipif(not CAN_MOUNT, reason="no file system of its own can be made here")
@pytest.mark.parametrize("kilobytes", [8, 24, 40, 56, 80, 104, 128])
def test_a_small_file_system_at_whatever_moment(kilobytes: int, tiny_toml: str, tmp_path: Path):
    (tmp_path / "tiny.toml").write_text(tiny_toml)
    (tmp_path / "disk").mkdir()
    environment = {"SIZE": f"{kilobytes}k", "DIR": str(tmp_path / "disk"), "PY": sys.executable}
    environment |= {"CONFIG": str(tmp_path / "tiny.toml"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*MOUNT, SCRIPT], env=os.environ | environment, capture_output=True, text=True, timeout=280)
    assert done.stdout.splitlines()[-2:] == ["second 0", "audit 0"], done.stdout + done.stderr
    if "first 4" in done.stdout:
        (said,) = done.stderr.splitlines()
        assert said.startswith(f"fedlab: error: cannot write {tmp_path / 'disk'}")
        assert "fedlab resume" in said or kilobytes < 30
    else:
        assert "first 0" in done.stdout, "it was large enough"
