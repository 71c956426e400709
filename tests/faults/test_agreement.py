"""Parties that do not agree: another version, model, data set, name, label or clock."""

from __future__ import annotations

import datetime
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fedlab.privacy.ledger.ledger as ledger
from fedlab.errors import PrivacyError, RunFailed
from fedlab.protocol import Frame
from fedlab.protocol.failures import explained


def test_another_version_is_told_to_both_sides_before_anything_is_parsed(sites: Callable[..., Any]):
    world = sites("north", "south")

    def fault(asked: Any) -> Frame:
        if asked.kind == "describe" and asked.site.name == "south":
            told = json.loads(asked.frame.header) | {"version": "9.9.9", "what_no_version_knows": 1}
            asked.frame = replace(asked.frame, header=json.dumps(told).encode())
        return asked.answer()

    world.fault = fault
    assert world.run().result["status"] == "completed"
    assert f"node 11 takes no part: {explained('version')}" in world.server_log
    assert "the server runs fedlab '9.9.9', and this is 0.1.0; install the same on both" in world["south"].log
    assert world["south"].kinds() == [], "it signed nothing"
    world.check_nothing_is_lost()


def test_a_run_all_of_whose_clients_have_another_version_fails(sites: Callable[..., Any]):
    world = sites("north")

    def fault(asked: Any) -> Frame:
        told = json.loads(asked.frame.header) | {"version": "9.9.9"}
        return replace(asked, frame=replace(asked.frame, header=json.dumps(told).encode())).answer()

    world.fault = fault
    with pytest.raises(RunFailed, match=r"node 10: version: it runs another version of fedlab than the server"):
        world.run()
    assert world.result["status"] == "failed"


def test_another_base_model_under_the_same_name_is_refused_before_a_plan_is_signed(
    sites: Callable[..., Any], tiny_bert: Path, tmp_path: Path
):
    import torch
    from safetensors.torch import load_file, save_file

    world, copy = sites("north", "south"), tmp_path / "other"
    shutil.copytree(tiny_bert, copy)
    weights = load_file(copy / "model.safetensors")
    name = next(iter(weights))
    save_file(
        {**weights, name: weights[name] + torch.ones_like(weights[name])},
        copy / "model.safetensors",
        metadata={"format": "pt"},
    )
    site = world["south"]
    models = {str(tiny_bert): site.file.models[str(tiny_bert)].model_copy(update={"path": str(copy)})}
    site.file = site.file.model_copy(update={"models": models})
    site.start_again()
    result = world.run().result
    assert result["status"] == "completed"
    assert result["clients"]["south"]["refused"] == explained("model")
    assert site.kinds() == [], "it signed nothing"
    world.check_nothing_is_lost()


def test_data_that_changed_since_the_plan_was_signed_are_not_trained_on(sites: Callable[..., Any]):
    world = sites()

    def fault(asked: Any) -> Frame:
        if (asked.site.name, asked.kind, asked.round) == ("south", "train", 2):
            data = Path(asked.site.file.data.path)
            data.write_text(data.read_text() + '{"text": "a new record of ore", "topic": "metal"}\n')
        return asked.answer()

    world.fault = fault
    result = world.run("run.rounds=3").result
    assert result["status"] == "completed"
    assert world.excluded() == [{}, {"south": explained("plan-mismatch")}, {}]
    assert result["clients"]["south"]["refused"] == explained("plan-mismatch")
    assert "was signed" in next(entry["reason"] for entry in world["south"].entries if entry["type"] == "REFUSE")
    assert world["south"].kinds().count("CHARGE") == 1
    world.check_nothing_is_lost()


def test_a_run_that_lacks_clients_because_their_data_changed_fails_and_is_not_called_exhausted(
    sites: Callable[..., Any],
):
    world = sites("north", "south")

    def fault(asked: Any) -> Frame:
        if (asked.site.name, asked.kind, asked.round) == ("south", "train", 2):
            data = Path(asked.site.file.data.path)
            data.write_text(data.read_text().replace("ore", "iron"))
        return asked.answer()

    world.fault = fault
    with pytest.raises(RunFailed, match=r"round 2: 1 usable updates, 2 needed \(south: plan-mismatch"):
        world.run("run.min_clients=2")
    assert world.result["status"] == "failed"
    world.check_nothing_is_lost()


def test_a_second_machine_under_the_same_name_gets_nothing_and_ends_nothing(sites: Callable[..., Any], tmp_path: Path):
    world = sites("north", "south", "twin")
    twin = world["twin"]
    twin.file = twin.file.model_copy(update={"client": twin.file.client.model_copy(update={"id": "north"})})
    twin.start_again()
    result = world.run("data.clients=2").result
    assert result["status"] == "completed"
    assert set(result["clients"]) == {"north", "south"}
    assert "says that it is north, and so does node" in world.server_log
    assert [entry["type"] for entry in twin.entries].count("CHARGE") == 0
    world.sites.remove(twin)
    world.check_nothing_is_lost()


def test_a_clock_that_jumps_changes_no_deadline_no_sum_and_no_charge(
    sites: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    world, real = sites("north", "south"), time.time
    days = 40 * 86400.0

    class Jumped(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return super().now(tz) - datetime.timedelta(seconds=days)

    def fault(asked: Any) -> Frame:
        if asked.site.name == "north" and asked.round == 2:
            with monkeypatch.context() as patch:  # back by 40 days while it trains
                patch.setattr(time, "time", lambda: real() - days)
                patch.setattr(ledger, "datetime", Jumped)
                return asked.answer()
        if asked.site.name == "south" and asked.kind == "train":
            with monkeypatch.context() as patch:  # ahead by ever more
                patch.setattr(time, "time", lambda: real() + days * (real() % 60))
                return asked.answer()
        return asked.answer()

    world.fault = fault
    result = world.run().result
    assert result["status"] == "completed"
    assert world.excluded() == [{}, {}]
    assert result["overhead_seconds_per_round"] <= result["seconds_per_round"]
    lines = [json.loads(line) for line in (world.path / "metrics.jsonl").read_text().splitlines()]
    assert all(line["train_seconds"] <= line["seconds"] for line in lines if line["phase"] == "train")
    world.check_nothing_is_lost()


def test_a_label_that_the_run_does_not_name_is_refused_and_the_run_goes_on(sites: Callable[..., Any]):
    world = sites("north", "south")
    data = Path(world["south"].file.data.path)
    data.write_text(data.read_text().replace('"metal"', '"glass"'))
    result = world.run().result
    assert result["status"] == "completed"
    assert result["clients"]["south"]["refused"] == explained("labels")
    world.check_nothing_is_lost()


def test_a_run_none_of_whose_clients_agree_ends_with_the_reason_and_not_with_0(sites: Callable[..., Any]):
    world = sites("north")
    data = Path(world["north"].file.data.path)
    data.write_text(data.read_text().replace('"metal"', '"glass"'))
    with pytest.raises(PrivacyError, match="0 clients can take part, 1 needed; north: labels") as caught:
        world.run()
    assert caught.value.exit_code == 3
