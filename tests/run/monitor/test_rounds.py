"""A real run, scraped over HTTP while it trains, and after it ended in each of its ways."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from flwr.app import Context, Message, RecordDict
from prometheus_client.parser import text_string_to_metric_families

from fedlab.config import RunConfig
from fedlab.errors import Diverged, FedlabError, RunFailed
from fedlab.run.directory import RunDirectory
from fedlab.run.launch import CLIENT_APP, SERVER_APP, load_reference, prepared
from fedlab.run.launch.local import LocalGrid
from fedlab.run.monitor import logs
from fedlab.run.monitor.endpoints import STATUSES, run_values
from fedlab.run.monitor.exporter import Exporter
from fedlab.run.monitor.metrics import RUN, Figures
from fedlab.run.output import settle

Sample = tuple[str, tuple[tuple[str, str], ...]]


def scrape(address: str) -> dict[Sample, float]:
    """Name and labels → value of all that ``/metrics`` shows."""
    with urlopen(f"http://{address}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def value(scraped: dict[Sample, float], name: str, **labels: str) -> float | None:
    return scraped.get((f"fedlab_run_{name}", tuple(sorted(labels.items()))))


def status(scraped: dict[Sample, float]) -> str:
    (found,) = [labels[0][1] for (name, labels), one in scraped.items() if name == "fedlab_run_status" and one == 1]
    return found


def run(config: RunConfig, out: Path, settings: dict[str, Any], on_train: Any = lambda: None) -> RunDirectory:
    """As the launchers do it, in this process; ``on_train`` is called when a client is asked to train."""
    directory, client_app = RunDirectory.create(prepared(config), out), load_reference(CLIENT_APP)

    def answer(message: Message, context: Context) -> Message:
        if "train" in str(message.metadata.message_type):
            on_train()
        return client_app(message, context)

    grid = LocalGrid(answer, config.run.nodes)
    told = {"run-dir": str(directory.path), **settings}
    load_reference(SERVER_APP)(grid, Context(1, 1, {}, RecordDict(), told))
    return directory


def test_a_run_is_seen_while_it_trains_and_when_it_is_over(tiny_toml: str, tmp_path: Path):
    file = tmp_path / "state" / "run.json"
    seen: list[dict[Sample, float]] = []
    with Exporter("127.0.0.1:0", [Figures(RUN, lambda: run_values(file))]) as exporter:
        assert status(scrape(exporter.address)) == "none"
        config = RunConfig.parse(tiny_toml, ["run.rounds=2"])
        directory = run(
            config,
            tmp_path / "run",
            {"quiet": True, "monitor": str(file)},
            lambda: seen.append(scrape(exporter.address)),
        )
        last = scrape(exporter.address)
    lines = [json.loads(line) for line in (directory.path / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["phase"] == "train"]
    second = seen[-1]
    assert (status(seen[0]), value(seen[0], "round"), value(seen[0], "clients_asked")) == ("running", None, 3)
    assert (value(second, "round"), value(second, "rounds_planned"), value(second, "nodes_live")) == (1, 2, 1)
    assert value(second, "epsilon_max") == pytest.approx(trained[0]["epsilon"])
    assert (status(last), value(last, "round"), value(last, "clients_used")) == ("completed", 2, 3)
    assert value(last, "clients_excluded") == value(last, "exclusions_total", code="other") == 0
    assert value(last, "bytes_total", direction="up") == sum(line["bytes_up"] for line in trained) > 0
    assert value(last, "bytes_total", direction="down") == sum(line["bytes_down"] for line in trained) > 0
    for phase in ("train", "evaluate", "overhead"):
        assert value(last, "seconds_total", phase=phase) == pytest.approx(sum(x[f"{phase}_seconds"] for x in trained))
        assert value(last, "round_seconds", phase=phase) == trained[-1][f"{phase}_seconds"]
    assert value(last, "info", run=directory.run_id) == 1
    assert value(last, "epsilon_max") == pytest.approx(trained[-1]["epsilon"])
    labels = {pair for _, pairs in last for pair in pairs}
    assert not any(re.search("client-", text) for pair in labels for text in pair), "no client is named"


def test_what_a_run_leaves_out_is_counted_by_its_code(tiny_toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    answers = load_reference("clients.answer:ANSWERS")
    train, left = answers["train"], []

    def diverges(node: Any, request: Any) -> object:
        if request.round == 2 and not left:
            left.append(request.clients[0].client)
            raise Diverged("the loss of the record of John Smith is nan")
        return train(node, request)

    monkeypatch.setitem(answers, "train", diverges)
    file = tmp_path / "run.json"
    config = RunConfig.parse(tiny_toml, ["run.nodes=3", "run.cohort=1", "run.rounds=3"])
    run(config, tmp_path / "run", {"quiet": True, "monitor": str(file)})
    values = run_values(file)
    assert {code: n for code, n in values["exclusions"].items() if n} == {"diverged": 1}
    assert (values["used"], values["excluded"], values["events"]["warning"]) == (3, 0, 1)
    assert not {"John", left[0]} & set(file.read_text().replace('"', " ").split())


def test_a_round_with_too_few_is_a_failed_run(tiny_toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def diverges(node: Any, request: Any) -> object:
        raise Diverged("all of them")

    monkeypatch.setitem(load_reference("clients.answer:ANSWERS"), "train", diverges)
    file = tmp_path / "run.json"
    with pytest.raises(RunFailed, match="0 usable updates"):
        run(RunConfig.parse(tiny_toml), tmp_path / "run", {"quiet": True, "monitor": str(file)})
    values = run_values(file)
    assert (values["status"]["failed"], sum(values["status"].values())) == (1, 1)
    assert "round" not in values


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), FedlabError("no"), ValueError("secret")])
def test_however_it_ends_its_state_says_so(error: BaseException, tiny_toml: str, tmp_path: Path):
    def breaks() -> None:
        raise error

    file = tmp_path / "run.json"
    config = RunConfig.parse(tiny_toml, ["run.rounds=1"])
    expected = "interrupted" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed"
    with pytest.raises(FedlabError):
        run(config, tmp_path / "run", {"quiet": True, "monitor": str(file)}, breaks)
    assert run_values(file)["status"] == {name: int(name == expected) for name in STATUSES}
    assert "secret" not in file.read_text()


def test_a_run_that_is_killed_is_no_running_one(tmp_path: Path):
    for told in ("starting", "running"):
        (tmp_path / "run.json").write_text(json.dumps({"status": told, "round": 7}))  # and nobody holds its lock
        values = run_values(tmp_path / "run.json")
        assert (values["status"]["killed"], values["status"][told], values["round"]) == (1, 0, 7)
    (tmp_path / "run.json").write_text(json.dumps({"status": "completed"}))
    assert run_values(tmp_path / "run.json")["status"]["completed"] == 1


def test_without_dp_there_is_no_epsilon_and_as_json_every_line_is_an_object(
    learnable_toml: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "run.json"
    config = RunConfig.parse(learnable_toml, ["run.rounds=1"])
    try:
        logs.configure("json")
        run(config, tmp_path / "run", {"log-json": True, "monitor": str(file)})
    finally:
        logs.configure("plain")
        settle()
    assert run_values(file)["epsilon"] is None
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in printed)
    (done,) = [line for line in printed if line["message"] == "round 1 of 1 is complete"]
    assert (done["round"], done["clients"], done["epsilon"]) == (1, 3, "no DP")
    assert done["scores"]["accuracy"] <= 1
    assert printed[-1]["message"] == "the run is completed"
    assert len({json.dumps(line) for line in printed}) == len(printed), "each line once"


def test_without_being_asked_nothing_is_written(tiny_toml: str, tmp_path: Path):
    run(RunConfig.parse(tiny_toml, ["run.rounds=1"]), tmp_path / "run", {"quiet": True})
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]
