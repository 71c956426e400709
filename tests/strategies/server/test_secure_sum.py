"""The server brings a secure sum to an end with whoever answers, in as few exchanges as there can be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clients.node import Node
from clients.owner import SimulatedOwners
from clients.secure_sum import answer_confirm, answer_prepare, answer_unmask, hide, sum_key
from fedlab.config import RunConfig
from fedlab.privacy.secure_sum.masking import add
from fedlab.protocol.fields import Failure, RunReference
from fedlab.protocol.sum_messages import Confirmation, ConfirmReply, Preparation, PrepareReply, Revealed, UnmaskReply
from fedlab.run.places import Places
from strategies.server import secure_sum
from strategies.server.exchange import Answers
from strategies.server.federation import ClientInfo, Federation
from strategies.server.secure_sum import SecureSum, destroy_keys

NAMES = [f"client-{i}" for i in range(6)]
SHARED = [
    "privacy={unit='example', sigma=1.0, clip=1.0, survivors=4, delta=1e-5}",
    "train={steps=1, sampling_rate=0.5, optimizer='sgd', lr=0.1, momentum=0.0}",
    "data.clients=6",
    "run.rounds=3",
]
ANSWERS: dict[str, Callable[[Node, Any], Any]] = {
    "prepare": answer_prepare,
    "confirm": answer_confirm,
    "unmask": answer_unmask,
}


class House:
    """Two nodes of a simulation, that answer as ``change`` makes them."""

    def __init__(self, config: RunConfig, path: Path) -> None:
        places = Places(path / "ledger", path / "personal", path / "bases", path / "log.txt")
        places.ledgers.mkdir()
        self.node = Node(config, SimulatedOwners(config, places), lambda: None)  # type: ignore[arg-type,return-value]
        infos = {name: ClientInfo(10) for name in NAMES}
        self.federation = Federation(config, infos, {}, [1, 2], RunReference("a" * 32, "b" * 64, ()))
        self.federation.sum_keys = {name: sum_key(self.node.owners.one(name), "a" * 32) for name in NAMES}
        self.sums = SecureSum(None, config, self.federation)  # type: ignore[arg-type]
        self.asked: list[str] = []
        self.change: Callable[[str, Any], Any] = lambda kind, reply: reply

    def ask(self, grid: Any, kind: str, requests: Mapping[int, Any], *_: Any) -> Answers[Any]:
        self.asked.append(kind)
        answers: Answers[Any] = Answers()
        for node, request in requests.items():
            reply = self.change(kind, ANSWERS[kind](self.node, request))
            if reply is None:
                answers.failed[node] = "no reply"
            else:
                answers.replies[node] = reply
        return answers

    def masked(self, clients: list[str], number: int = 1) -> dict[str, np.ndarray]:
        total: dict[str, np.ndarray] = {}
        for client in clients:
            order = self.sums.order([client])
            total = add(total, hide(self.node.owners.one(client), value(client), "a" * 32, ("round", number), order))
        return total


def value(client: str) -> dict[str, np.ndarray]:
    return {"x": np.arange(3) * (1 + int(client[-1]))}


def plain(clients: list[str]) -> np.ndarray:
    return np.sum([value(client)["x"] for client in clients], axis=0)


@pytest.fixture
def house(tiny_toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    house = House(RunConfig.parse(tiny_toml, SHARED), tmp_path)
    monkeypatch.setattr(secure_sum, "ask", house.ask)
    return house


def without(kind: str, *clients: str) -> Callable[[str, Any], Any]:
    """Replies of one kind in which these clients are missing."""

    def change(found: str, reply: Any) -> Any:
        return type(reply)(tuple(m for m in reply.clients if m.client not in clients)) if found == kind else reply

    return change


def test_two_exchanges_a_round_where_nobody_drops_out(house: House):
    for number in (1, 2, 3):
        assert house.sums.prepare("round", number, NAMES) == NAMES
        following = ("round", number + 1, NAMES) if number < 3 else None
        found = house.sums.unmask(house.masked(NAMES, number), NAMES, following)  # type: ignore[arg-type]
        assert found is not None
        assert np.array_equal(found["x"], plain(NAMES))
    assert house.asked == ["prepare", "unmask", "unmask", "unmask"]


def test_the_next_sum_of_other_clients_than_were_foreseen_is_prepared_anew(house: House):
    house.sums.prepare("round", 1, NAMES)
    house.sums.unmask(house.masked(NAMES), NAMES, ("round", 2, NAMES))
    assert house.sums.prepare("round", 2, NAMES[:5]) == NAMES[:5]
    found = house.sums.unmask(house.masked(NAMES[:5], 2), NAMES[:5])
    assert found is not None
    assert np.array_equal(found["x"], plain(NAMES[:5]))


def test_who_comes_back_beside_those_that_were_foreseen_is_in_the_next_sum(house: House):
    """They prepared it without the one that came back, who would else be left alone in it."""
    house.sums.prepare("round", 1, NAMES[:5])
    house.sums.unmask(house.masked(NAMES[:5]), NAMES[:5], ("round", 2, NAMES[:5]))
    assert house.sums.prepare("round", 2, NAMES) == NAMES
    found = house.sums.unmask(house.masked(NAMES, 2), NAMES)
    assert found is not None
    assert np.array_equal(found["x"], plain(NAMES))


def test_a_sum_that_some_prepared_otherwise_before_a_crash_is_prepared_by_all_under_another_name(house: House):
    house.sums.prepare("round", 1, NAMES[:4])
    other = SecureSum(None, house.sums._config, house.federation)  # type: ignore[arg-type]
    assert other.prepare("round", 1, NAMES) == NAMES
    house.sums = other
    found = other.unmask(house.masked(NAMES), NAMES)
    assert found is not None
    assert np.array_equal(found["x"], plain(NAMES))


def test_who_prepares_nothing_under_any_name_is_left_out(house: House):
    def refuse(kind: str, reply: Any) -> Any:
        failed = (Preparation("client-5", failure=Failure("secure-sum")),)
        kept = tuple(mine for mine in reply.clients if mine.client != "client-5")
        return PrepareReply((*kept, *failed)) if kind == "prepare" and len(kept) < len(reply.clients) else reply

    house.change = refuse
    assert house.sums.prepare("round", 1, NAMES) == NAMES[:5]
    assert house.asked == ["prepare"] * 3


def test_who_drops_out_where(house: House):
    house.change = without("prepare", "client-5")
    clients = house.sums.prepare("round", 1, NAMES)
    assert clients == NAMES[:5]
    house.change = without("unmask", "client-0")
    inside = clients[:4]
    found = house.sums.unmask(house.masked(inside), inside)
    assert found is not None
    assert np.array_equal(found["x"], plain(inside))
    assert house.asked == ["prepare", "prepare", "confirm", "unmask"]


@pytest.mark.parametrize(
    ("kind", "gone", "told"),
    [
        ("confirm", NAMES[:2], "3 clients confirmed who dropped out, 4 are needed"),
        ("unmask", NAMES[:3], "shares of a secret of"),
    ],
)
def test_with_too_few_there_is_nothing(
    kind: str, gone: list[str], told: str, house: House, caplog: pytest.LogCaptureFixture
):
    house.sums.prepare("round", 1, NAMES)
    house.change = without(kind, *gone)
    assert house.sums.unmask(house.masked(NAMES[:5]), NAMES[:5]) is None
    assert told in caplog.text


def test_of_too_few_nothing_is_prepared_or_unmasked(house: House, caplog: pytest.LogCaptureFixture):
    house.sums.prepare("round", 1, NAMES)
    assert house.sums.unmask(house.masked(NAMES[:3]), NAMES[:3]) is None
    assert house.asked == ["prepare"]
    assert house.sums.prepare("round", 2, NAMES[:3]) == []
    house.change = lambda kind, reply: None
    assert house.sums.prepare("round", 2, NAMES) == []
    assert "no reply" in caplog.text


def test_what_clients_make_up_is_left(house: House):
    """A failed node, a signature of another, somebody nobody asked, wrong shares: the others suffice."""
    house.sums.prepare("round", 1, NAMES)

    def lies(kind: str, reply: Any) -> Any:
        clients = list(reply.clients)
        if kind == "confirm":
            clients = [Confirmation("nobody", "00" * 64), *clients]
            clients = [Confirmation(m.client, "00" * 64) if m.client == "client-1" else m for m in clients]
            return ConfirmReply(tuple(clients))
        if kind == "unmask":
            wrong = dict.fromkeys(NAMES, "01" * 16)
            clients = [Revealed(m.client, wrong) if m.client == "client-2" else m for m in clients]
            return UnmaskReply((Revealed("nobody", wrong), *clients))
        return reply

    house.change = lies
    found = house.sums.unmask(house.masked(NAMES[:5]), NAMES[:5])
    assert found is not None
    assert np.array_equal(found["x"], plain(NAMES[:5]))


def test_a_preparation_that_is_not_signed_is_none(house: House, caplog: pytest.LogCaptureFixture):
    def exchanged(kind: str, reply: Any) -> Any:
        first, *rest = reply.clients
        return PrepareReply((type(first)(first.client, rest[0].key, first.sealed), *rest))

    house.change = exchanged
    left = house.sums.prepare("round", 1, NAMES)
    assert len(left) < 6
    assert "its mask key is not signed for this sum" in caplog.text


def test_after_a_crash_the_same_sum_can_be_ended(house: House):
    house.sums.prepare("round", 1, NAMES)
    total = house.masked(NAMES)
    house.sums = SecureSum(None, house.node.config, house.federation)  # type: ignore[arg-type]
    assert house.sums.prepare("round", 1, NAMES) == NAMES
    found = house.sums.unmask(total, NAMES)
    assert found is not None
    assert np.array_equal(found["x"], plain(NAMES))


def test_after_a_crash_before_masks_other_clients_prepare_under_another_name(house: House):
    house.sums.prepare("round", 1, NAMES)
    house.sums = SecureSum(None, house.node.config, house.federation)  # type: ignore[arg-type]
    assert house.sums.prepare("round", 1, NAMES[:5]) == NAMES[:5]
    assert house.sums.order(NAMES[:5]).name == "round-1-1"


def test_keys_go_with_a_simulation(house: House, tmp_path: Path):
    house.sums.prepare("round", 1, NAMES)
    assert list((tmp_path / "bases" / "keys").iterdir())
    destroy_keys(house.node.config, tmp_path)
    assert not (tmp_path / "bases" / "keys").exists()
