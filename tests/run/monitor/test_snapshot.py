"""What one process says of itself, another one reads, and knows whether the first is still there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedlab.run.monitor import snapshot
from fedlab.run.monitor.snapshot import SnapshotFile, read

WRITES = "from fedlab.run.monitor.snapshot import SnapshotFile; from pathlib import Path; import sys\n"
WRITES += "SnapshotFile(Path(sys.argv[1])).write({'round': 3}); print('there', flush=True); sys.stdin.read()"


def test_what_is_written_is_read_and_its_writer_known(tmp_path: Path):
    path = tmp_path / "state" / "run.json"
    assert read(path) is None
    file = SnapshotFile(path)
    file.write({"epsilon": float("inf")})
    found = read(path)
    assert found is not None
    assert (found.values, found.alive) == ({"epsilon": float("inf")}, True)
    assert path.stat().st_mode & 0o777 == 0o600
    file.close()
    file.close()
    file.write({"epsilon": 1.0})
    found = read(path)
    assert found is not None
    assert (found.values, found.alive) == ({"epsilon": float("inf")}, False)


def test_a_killed_writer_is_gone(tmp_path: Path):
    path = tmp_path / "run.json"
    process = subprocess.Popen(
        [sys.executable, "-c", WRITES, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    found = read(path)
    assert found is not None
    assert found.alive
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    found = read(path)
    assert found is not None
    assert (found.values, found.alive) == ({"round": 3}, False)


def test_a_second_writer_leaves_the_first_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(snapshot, "PATIENCE", 0.0)
    first, second = SnapshotFile(tmp_path / "run.json"), SnapshotFile(tmp_path / "run.json")
    assert (first.held, second.held) == (True, False)
    first.write({"round": 1})
    second.write({"round": 2})
    found = read(tmp_path / "run.json")
    assert found is not None
    assert found.values == {"round": 1}
    first.close()


def test_a_shared_one_may_be_read_whatever_the_umask(tmp_path: Path):
    before = os.umask(0o077)
    try:
        file = SnapshotFile(tmp_path / "run.json", shared=True)
        file.write({"round": 1})
    finally:
        os.umask(before)
    assert [entry.stat().st_mode & 0o777 for entry in sorted(tmp_path.iterdir())] == [0o644, 0o644]
    file.close()


def test_no_place_to_write_is_no_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "run.json", Path("/proc/run.json")):
        file = SnapshotFile(path)
        assert not file.held
        file.write({"round": 1})
        file.close()


def test_what_is_no_snapshot_is_none(tmp_path: Path):
    for text in ("", "[1]", "{", "\x00"):
        (tmp_path / "run.json").write_text(text)
        assert read(tmp_path / "run.json") is None
