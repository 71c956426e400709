"""A stream end to end: ``fedlab simulate`` on a configuration with [[tasks]]."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

import fedlab
from fedlab.config import RunConfig
from fedlab.continual.metrics import average_score, backward_transfer
from fedlab.errors import ConfigError, FedlabError

PLAIN = {"osft", "o-lora", "full", "fedavg"}  # strategies without the keys of osft-data
DP = ["privacy={unit='example', sigma=1.0, clip=1.0}"]


def run(toml: str, out: Path, *settings: str, name: str = "osft-data"):
    chosen = [f"strategy={{name='{name}'}}"] if name in PLAIN else [f"strategy.name={name}"]
    return fedlab.simulate(RunConfig.parse(toml, [*chosen, *settings]), out, quiet=True)


def matrix(result: dict) -> np.ndarray:
    return np.array([[np.nan if v is None else v for v in row] for row in result["matrix"]])


@pytest.mark.parametrize(
    "name",
    [
        "osft-data",
        "osft",
        "fedsvd-continual",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("o-lora", "full", "fedavg")),
    ],
)
def test_every_strategy_runs_a_stream_and_reports_the_matrix(name: str, stream_toml: str, tmp_path: Path):
    result = run(stream_toml, tmp_path / "run", name=name).result
    assert result["status"] == "completed"
    R = matrix(result)
    assert np.isnan(R[0, 1])
    assert not np.isnan(R[[0, 1, 1], [0, 0, 1]]).any()
    assert result["average_score"] == pytest.approx(average_score(R))
    assert result["backward_transfer"] == pytest.approx(backward_transfer(R))
    if name in ("osft", "osft-data", "fedsvd-continual"):
        assert result["leak"] < 1e-5
    assert "<svg" in (tmp_path / "run" / "report.html").read_text()
    first, second = (load_file(str(tmp_path / "run" / t / "memory.safetensors")) for t in ("task-0-wet", "task-1-hard"))
    assert not np.array_equal(*(m["head.classifier.weight"] for m in (first, second)))
    assert (first["head.classifier.weight"][:2] == second["head.classifier.weight"][:2]).all(), (
        "rows of the other task's labels stay"
    )


def test_one_label_space_for_all_tasks_has_a_forward_transfer(stream_toml: str, tmp_path: Path):
    toml = (
        stream_toml.partition("[[tasks]]")[0]
        + """
[[tasks]]
name = "early"
data = {limit = 200}
[[tasks]]
name = "late"
"""
    )
    result = run(toml, tmp_path / "run", "stream.heads=shared", "run.rounds=5", name="fedavg").result
    before = json.loads((tmp_path / "run" / "task-0-early" / "task.json").read_text())["before"]
    R = matrix(result)
    assert not np.isnan(R).any(), "a shared head scores every task at any time"
    assert result["forward_transfer"] == pytest.approx(R[0, 1] - before[1])
    assert result["forward_transfer"] > 0, "the second task has the first one's labels"


def test_the_protected_basis_grows_by_what_the_first_task_used_and_keeps_it(stream_toml: str, tmp_path: Path):
    out = tmp_path / "run"
    toml = stream_toml + '[[tasks]]\nname = "again"\nlabels = ["fruit", "ocean"]\n'
    result = run(toml, out, "strategy.energy=0.8").result
    memories = [load_file(str(path / "memory.safetensors")) for path in sorted(out.glob("task-*"))]
    for name in (n for n in memories[0] if n.endswith(".protected")):
        sizes = [len(m[name]) for m in memories]
        assert 0 < sizes[0] <= sizes[1] == sizes[2]
        assert (memories[1][name][: sizes[0]] == memories[0][name]).all()
    assert result["leak"] < 1e-5


def test_the_masked_sum_is_the_clear_sum_and_leaves_no_key(stream_toml: str, tmp_path: Path):
    hidden, clear = (
        run(stream_toml, tmp_path / n, *s) for n, s in (("hidden", []), ("clear", ["strategy.gram={clear=true}"]))
    )
    assert hidden.result["matrix"] == clear.result["matrix"]
    same = [load_file(str(r.path / "task-0-wet" / "memory.safetensors")) for r in (hidden, clear)]
    assert same[0].keys() == same[1].keys()
    assert all((same[0][n] == same[1][n]).all() for n in same[0])
    assert not list(hidden.path.rglob("*.prepared")) + list(hidden.path.rglob("cipher"))


def test_any_number_of_nodes_gives_the_same_bits(stream_toml: str, tmp_path: Path):
    one, two = (run(stream_toml, tmp_path / str(n), f"run.nodes={n}") for n in (1, 2))
    ends = [json.loads((r.path / "task-1-hard" / "result.json").read_text())["adapter_digest"] for r in (one, two)]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("name", ["osft-data", "fedsvd-continual"])
def test_under_dp_the_release_is_charged_to_one_ledger_for_all_tasks(name: str, stream_toml: str, tmp_path: Path):
    from fedlab.privacy.audit.run import audit_run

    run_ = run(stream_toml, tmp_path / "run", *DP, name=name)
    lines = [json.loads(line) for line in next((run_.path / "ledger").rglob("client-0.jsonl")).read_text().splitlines()]
    charges = [line["event"] for line in lines if line["type"] == "CHARGE"]
    assert [event["sampler"] for event in charges] == ["poisson"] * 3 + ["full"] + ["poisson"] * 3
    per_task = run_.result["epsilon_per_task"]
    assert per_task[0] < per_task[1] == run_.result["epsilon"]
    for path in sorted(run_.path.glob("task-*")):
        assert not audit_run(path).findings


def test_an_epsilon_is_for_the_whole_stream(stream_toml: str, tmp_path: Path):
    result = run(stream_toml, tmp_path / "run", "privacy={unit='example', epsilon=8.0, clip=1.0}").result
    assert 7.0 < result["epsilon"] <= 8.0


def test_an_epsilon_is_for_the_whole_stream_also_where_tasks_differ_in_size(stream_toml: str, tmp_path: Path):
    toml = stream_toml.replace('name = "hard"\n', 'name = "hard"\nrounds = 1\ndata = {limit = 120}\n')
    run_ = run(toml, tmp_path / "run", "privacy={unit='example', epsilon=8.0, clip=1.0}", name="fedavg")
    sigmas, rates, deltas = set(), set(), set()
    for line in next((run_.path / "ledger").rglob("client-0.jsonl")).read_text().splitlines():
        entry = json.loads(line)
        if entry["type"] == "CHARGE":
            sigmas.add(entry["event"]["sigma"])
            rates.add(entry["event"]["q"])
        if entry["type"] == "PLAN":
            deltas.add(entry["delta"])
    assert len(sigmas) == len(deltas) == 1, "one σ and δ for all tasks"
    assert len(rates) == 2, "the tasks' sizes differ"
    assert 6.0 < run_.result["epsilon"] <= 8.0


def test_a_clients_privacy_is_for_the_whole_stream_too(stream_toml: str, tmp_path: Path):
    from fedlab.privacy.audit.run import audit_run

    settings = ["privacy={unit='client', epsilon=8.0, clip=1.0}", "run.sampling='poisson'"]
    chosen = "strategy={name='osft', weights='uniform'}"
    run_ = fedlab.simulate(RunConfig.parse(stream_toml, [chosen, *settings]), tmp_path / "run", quiet=True)
    per_task = run_.result["epsilon_per_task"]
    assert per_task[0] < per_task[1] == run_.result["epsilon"]
    assert 7.0 < run_.result["epsilon"] <= 8.0
    for path in sorted(run_.path.glob("task-*")):
        assert not audit_run(path).findings


def test_releases_that_leave_nothing_of_epsilon_are_named(stream_toml: str, tmp_path: Path):
    with pytest.raises(FedlabError, match=r"alone spend .*; raise strategy\.gram\.sigma"):
        run(stream_toml, tmp_path / "run", "privacy={unit='example', epsilon=0.5, clip=1.0}")


def test_tasks_draw_their_own_batches_and_noise(stream_toml: str):
    first, second = (RunConfig.parse(stream_toml).at_stage(task, None) for task in (0, 1))
    assert len({first.sampling_seed, second.sampling_seed, first.run.seed}) == 3
    assert first.run.seed == second.run.seed, "who holds what stays"


def test_a_budget_that_ends_in_a_task_ends_the_stream_with_what_there_is(stream_toml: str, tmp_path: Path):
    budget = "privacy={unit='example', sigma=1.0, clip=1.0, budget={epsilon=9.0}}"
    result = run(stream_toml, tmp_path / "run", budget).result
    assert result["status"] == "budget-exhausted"
    assert len(result["matrix"]) < 2 or None in json.loads((tmp_path / "run" / "result.json").read_text())["matrix"][0]
    assert result["epsilon"] <= 9.0
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_release_is_made_once_however_often_the_run_is_cut_off(
    stream_toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from fedlab.run.launch import resume
    from strategies import app

    real = app._finish
    settings = ["privacy={unit='example', sigma=1.0, clip=1.0, noise='secure'}"]
    for broken in ("strategies.server.task_boundary.write_state", "strategies.app._finish"):
        out = tmp_path / broken.rpartition(".")[2]
        with monkeypatch.context() as patch:
            patch.setattr(broken, lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
            for _ in range(4):  # more often than a client may be asked
                with pytest.raises((KeyboardInterrupt, FedlabError)):
                    run(stream_toml, out, *settings) if not out.exists() else resume(out, quiet=True)
        result = resume(out, quiet=True).result
        assert result["status"] == "completed"
        lines = [json.loads(line) for line in next((out / "ledger").rglob("client-0.jsonl")).read_text().splitlines()]
        assert sum(line["type"] == "CHARGE" and line["event"]["sampler"] == "full" for line in lines) == 1
    assert app._finish is real


def test_a_masked_sum_of_too_few_is_none(stream_toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One that fails is asked again; if it stays away, and too few are left, the run ends, and can be resumed."""
    from clients import gram
    from fedlab.run.launch import resume

    real, failures = gram.input_grams, []

    def broken(model, data, positions, *args):
        if np.array_equal(positions, data.train("client-1")) and len(failures) < limit:
            failures.append("client-1")
            raise RuntimeError("away")
        return real(model, data, positions, *args)

    whole = run(stream_toml, tmp_path / "whole").result
    monkeypatch.setattr(gram, "input_grams", broken)
    limit = 1
    assert run(stream_toml, tmp_path / "once", "run.nodes=2").result["matrix"] == whole["matrix"]
    limit = 1 + 3
    with pytest.raises(FedlabError, match="2 clients released what inputs they used, at least 3 must"):
        run(stream_toml, tmp_path / "away")
    assert len(failures) == limit
    assert resume(tmp_path / "away", quiet=True).result["matrix"] == whole["matrix"]
    monkeypatch.undo()
    fewer = run(stream_toml, tmp_path / "fewer", "strategy.gram={min_clients=2}").result
    assert fewer["matrix"] == whole["matrix"]


def test_what_a_release_costs_to_send_is_counted(stream_toml: str, tmp_path: Path):
    out = tmp_path / "run"
    run(stream_toml, out)
    sums = load_file(str(out / "task-0-wet" / "released.safetensors"))
    up, down = int(sums["bytes_up"]), int(sums["bytes_down"])
    task = json.loads((out / "task-0-wet" / "result.json").read_text())
    lines = [json.loads(line) for line in (out / "task-0-wet" / "metrics.jsonl").read_text().splitlines()]
    trained = sum(line["bytes_up"] for line in lines if line["phase"] == "train")
    assert task["bytes_up"] == trained + up
    width = 32
    assert up % (3 * 8 * width * (width + 1) // 2) == 0
    assert up > 0
    assert down > 0


def test_replay_and_joint_training_see_earlier_texts(stream_toml: str, tmp_path: Path):
    from fedlab.data import task_data

    config = RunConfig.parse(stream_toml, ["strategy={name='fedavg'}"])
    _, tasks = task_data(config)
    alone = tasks.training(1, 0.0, False, 3)
    replayed = tasks.training(1, 0.5, False, 3)
    for client, own in alone.train.items():
        extra = np.setdiff1d(replayed.train[client], own)
        assert set(own) <= set(replayed.train[client])
        assert set(extra) <= set(tasks.shards[0].train[client])
        assert len(extra) == round(0.5 * len(tasks.shards[0].train[client]))
    joint = run(stream_toml, tmp_path / "joint", "stream.joint=true", name="fedavg").result
    assert len(joint["matrix"]) == 1
    assert None not in joint["matrix"][0]
    again = run(stream_toml, tmp_path / "replay", "stream.replay=0.5", name="fedavg").result
    assert again["status"] == "completed"


def test_a_stream_that_was_cut_off_goes_on_with_the_same_bits(
    stream_toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from fedlab.run.launch import resume
    from strategies.server import loop

    whole = run(stream_toml, tmp_path / "whole")
    calls, real = [], loop.Rounds._round

    def broken(self, number):
        calls.append(number)
        if len(calls) == 5:  # the second task's second round
            raise KeyboardInterrupt
        return real(self, number)

    monkeypatch.setattr(loop.Rounds, "_round", broken)
    with pytest.raises((KeyboardInterrupt, FedlabError)):
        run(stream_toml, tmp_path / "cut")
    monkeypatch.setattr(loop.Rounds, "_round", real)
    assert resume(tmp_path / "cut", quiet=True).result["matrix"] == whole.result["matrix"]
    ends = [
        json.loads((tmp_path / n / "task-1-hard" / "result.json").read_text())["adapter_digest"]
        for n in ("whole", "cut")
    ]
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["train.gradients=hooks"], "needs train.gradients"),
        (["data.clients=2"], "sums would be of too few"),
        (["strategy.energy=0"], "energy"),
        (
            ["privacy={unit='client', sigma=1.0, clip=1.0}", "run.sampling=poisson", "strategy.weights=uniform"],
            "noised per example",
        ),
        (["clients.rank={'50%' = 2}"], "equal ranks"),
        (["strategy={name='fedsa'}"], "clients keep head, lora_B"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    settings: list[str], reason: str, stream_toml: str, tmp_path: Path
):
    with pytest.raises(ConfigError, match=reason):
        run(stream_toml, tmp_path / "run", *settings)
    assert not (tmp_path / "run").exists()


def test_a_pattern_that_matches_no_label_names_those_there_are(stream_toml: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"'wood' matches no label; .*dry, fruit"):
        run(stream_toml.replace('"metal", "dry"', '"wood", "dry"'), tmp_path / "run")


def test_capacity_that_runs_out_ends_the_run_with_its_reason(stream_toml: str, tmp_path: Path):
    with pytest.raises(FedlabError, match="input directions would be protected"):
        run(stream_toml, tmp_path / "run", "strategy.energy=0.9999")
    result = json.loads((tmp_path / "run" / "task-0-wet" / "result.json").read_text())
    assert result["status"] == "failed"


def test_the_command_line_runs_audits_and_reports_a_stream(
    stream_toml: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from typer.testing import CliRunner

    from fedlab.cli import app

    file, out = tmp_path / "stream.toml", tmp_path / "run"
    file.write_text(stream_toml)
    settings = ["--set", "strategy.name=fedsvd-continual", "--set", DP[0]]
    done = CliRunner().invoke(app, ["simulate", str(file), "--out", str(out), *settings])
    assert done.exit_code == 0, done.output
    assert "average score" in done.output
    audited = CliRunner().invoke(app, ["audit", str(out)])
    assert audited.exit_code == 0, audited.output
    assert "task-0-wet" in audited.output
    assert "task-1-hard" in audited.output
    (out / "report.html").unlink()
    assert CliRunner().invoke(app, ["report", str(out)]).exit_code == 0
    assert (out / "report.html").is_file()
    again = CliRunner().invoke(app, ["resume", str(out)])
    assert again.exit_code == 2
    ledger = next((out / "task-0-wet" / "ledger").glob("client-0.jsonl"))
    ledger.write_text(ledger.read_text().replace('"steps":3', '"steps":2', 1))
    assert CliRunner().invoke(app, ["audit", str(out)]).exit_code == 3


def test_a_stream_has_no_single_server_app(stream_toml: str, tmp_path: Path):
    from fedlab.run.directory import RunDirectory
    from fedlab.run.launch import _launch

    directory = RunDirectory.create(RunConfig.parse(stream_toml), tmp_path / "run")
    with pytest.raises(FedlabError, match="chain of runs"):
        _launch(directory, True)
