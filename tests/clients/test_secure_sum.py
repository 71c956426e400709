"""A client in secure sums: what it does once it does once, whatever it is asked and whenever it died."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clients.node import Node
from clients.owner import Owner, SimulatedOwners
from clients.secure_sum import answer_confirm, answer_prepare, answer_unmask, forget, hide, sum_key
from fedlab.config import RunConfig
from fedlab.errors import SumRefused
from fedlab.privacy.secure_sum.coordinator import Coordinator
from fedlab.privacy.secure_sum.masking import add
from fedlab.protocol.fields import RunReference
from fedlab.protocol.sum_messages import (
    ConfirmRequest,
    PrepareReply,
    PrepareRequest,
    SumSetting,
    UnmaskReply,
    UnmaskRequest,
)

RUN = RunReference("a" * 32, "b" * 64, ("head",))
NAMES = ("client-0", "client-1", "client-2", "client-3", "client-4")
ROUND = ("round", 1)
SHARED = [
    "privacy={unit='example', sigma=1.0, clip=1.0, survivors=4, delta=1e-5}",
    "train.steps=1",
    "train.sampling_rate=0.5",
    "train.optimizer=sgd",
    "train.momentum=0.0",
    "data.clients=5",
    "run.rounds=3",
]


class Server:
    """Asks clients of one node."""

    def __init__(
        self, node: Node, name: str = "round-1-0", clients: tuple[str, ...] = NAMES, survivors: int = 4
    ) -> None:
        self.node, self.name, self.clients = node, name, clients
        keys = {client: sum_key(self.owner(client), RUN.run) for client in clients}
        setting = SumSetting(name, survivors, 0, {client: key.identity for client, key in keys.items()})
        self.coordinator = Coordinator(RUN.run, setting, keys)

    def owner(self, client: str) -> Owner:
        return self.node.owners.one(client)

    def prepare(self) -> PrepareReply:
        plan = self.coordinator.plan(self.clients)
        reply = answer_prepare(self.node, PrepareRequest(RUN, self.clients, plan))
        for preparation in reply.clients:
            if preparation.failure is None:
                assert self.coordinator.accept(preparation) is None
        return reply

    def hide(self, client: str, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return hide(self.owner(client), values, RUN.run, ROUND, self.coordinator.order([client]))  # type: ignore[arg-type]

    def confirm(self, clients: tuple[str, ...], dropped: tuple[str, ...]) -> dict[str, str]:
        reply = answer_confirm(self.node, ConfirmRequest(RUN, clients, self.name, dropped))
        return {mine.client: mine.signature for mine in reply.clients if mine.failure is None}

    def unmask(self, clients: tuple[str, ...], dropped: tuple[str, ...], confirmed: dict[str, str]) -> UnmaskReply:
        orders = tuple(self.coordinator.unmask_order(client) for client in clients)
        return answer_unmask(self.node, UnmaskRequest(RUN, self.name, orders, dropped, confirmed))


def values_of(client: str) -> dict[str, np.ndarray]:
    return {"x": np.arange(5) + 100 * int(client[-1])}


def shares_of(reply: UnmaskReply) -> dict[str, dict[str, str]]:
    return {mine.client: mine.shares for mine in reply.clients if mine.failure is None}


@pytest.fixture
def node(tiny_toml: str, tmp_path: Path, helpers: Any) -> Node:
    config = RunConfig.parse(tiny_toml, SHARED)
    places = helpers.places_at(tmp_path)
    places.ledgers.mkdir(exist_ok=True)
    return Node(config, SimulatedOwners(config, places), lambda: None)  # type: ignore[arg-type,return-value]


@pytest.fixture
def server(node: Node) -> Server:
    server = Server(node)
    assert all(mine.failure is None for mine in server.prepare().clients)
    return server


def test_a_sum_over_those_whose_values_came(server: Server):
    inside, dropped = NAMES[:4], NAMES[4:]
    total: dict[str, np.ndarray] = {}
    for client in inside:
        total = add(total, server.hide(client, values_of(client)))
    reply = server.unmask(inside, dropped, server.confirm(inside, dropped))
    found = server.coordinator.unmasked(total, inside, shares_of(reply))
    assert np.array_equal(found["x"], sum(values_of(client)["x"] for client in inside))


def test_a_repeat_gets_the_same_answer_and_any_other_question_none(server: Server):
    assert server.prepare() == server.prepare()
    first = server.hide("client-0", values_of("client-0"))
    again = server.hide("client-0", values_of("client-0"))
    assert np.array_equal(first["x"], again["x"])
    with pytest.raises(SumRefused, match="masked other values"):
        server.hide("client-0", values_of("client-1"))
    for client in NAMES[1:]:
        server.hide(client, values_of(client))
    signatures = server.confirm(NAMES[:4], NAMES[4:])
    assert server.confirm(NAMES[:4], NAMES[4:]) == signatures
    assert server.confirm(NAMES[1:], NAMES[:1]).keys() == {"client-4"}, "who signed one set signs no other"
    shares = server.unmask(NAMES[:4], NAMES[4:], signatures)
    assert server.unmask(NAMES[:4], NAMES[4:], signatures) == shares


def test_no_client_reveals_both_secrets_of_a_neighbour(server: Server):
    for client in NAMES:
        server.hide(client, values_of(client))
    assert len(shares_of(server.unmask(("client-0",), (), {}))) == 1
    signatures = server.confirm(NAMES[:4], NAMES[4:])
    assert len(signatures) == 4
    refused = server.unmask(("client-0",), NAMES[4:], signatures)
    assert [mine.failure.code for mine in refused.clients if mine.failure] == ["secure-sum"]
    assert len(shares_of(server.unmask(("client-1",), NAMES[4:], signatures))) == 1
    assert not shares_of(server.unmask(("client-1",), (), {}))
    assert not shares_of(server.unmask(("client-2",), (), {})), "it confirmed that somebody dropped out"


def test_fewer_shares_first_are_no_way_to_two_answers(server: Server):
    for client in NAMES:
        server.hide(client, values_of(client))
    order = server.coordinator.unmask_order("client-0")
    few = replace(order, sealed=dict(list(order.sealed.items())[:1]))
    request = UnmaskRequest(RUN, server.name, (few,), (), {})
    assert len(shares_of(answer_unmask(server.node, request))["client-0"]) == 2
    assert not shares_of(server.unmask(("client-0",), (), {}))


def test_who_masked_nothing_reveals_and_confirms_nothing(server: Server):
    assert not shares_of(server.unmask(("client-0",), (), {}))
    assert not server.confirm(("client-0",), NAMES[4:])


def test_of_two_attempts_at_a_sum_one_is_masked(server: Server):
    fewer = Server(server.node, "round-1-1", NAMES[:4])
    fewer.prepare()
    server.hide("client-0", values_of("client-0"))
    with pytest.raises(SumRefused, match="for another sum"):
        fewer.hide("client-0", values_of("client-0"))
    fewer.hide("client-1", values_of("client-1"))
    assert not shares_of(server.unmask(("client-1",), (), {}))


def test_another_sum_under_a_name_that_was_prepared_is_refused(server: Server):
    fewer = Server(server.node, "round-1-0", NAMES[:4])
    assert [mine.failure.code for mine in fewer.prepare().clients if mine.failure] == ["secure-sum"] * 4


@pytest.mark.parametrize(
    ("name", "survivors", "said"),
    [
        ("round-1-0", 3, "survivors and colluding"),
        ("round-1-0", 5, "survivors and colluding"),
        ("round-4-0", 4, "has no sum round-4"),
        ("round-0-0", 4, "has no sum round-0"),
        ("gram-0-0", 4, "no secure sum of gram"),
    ],
)
def test_what_the_configuration_does_not_say_is_not_prepared(node: Node, name: str, survivors: int, said: str):
    server = Server(node, name, survivors=survivors)
    assert all(mine.failure is not None for mine in server.prepare().clients)
    assert said in node.owners.log.read_text()


def test_a_value_of_another_round_is_not_masked(server: Server):
    with pytest.raises(SumRefused, match="round 2 was asked for under the name round-1-0"):
        hide(server.owner("client-0"), values_of("client-0"), RUN.run, ("round", 2), server.coordinator.order(NAMES))


def test_whoever_is_not_in_the_roster_is_refused(server: Server):
    node, known = server.node, dict(server.coordinator.setting.participants)
    for roster, said in (
        ({c: k for c, k in known.items() if c != "client-3"}, "client-3 is not in"),
        (known | {"client-3": "0" * 64}, "client-3 has another key in"),
        ({}, "is not in"),
    ):
        own = replace(server.owner("client-0"), roster=roster)
        held = Node(node.config, _Single(own), lambda: None)  # type: ignore[arg-type,return-value]
        plan = replace(server.coordinator.plan(["client-0"]))
        reply = answer_prepare(held, PrepareRequest(RUN, ("client-0",), plan))
        assert reply.clients[0].failure is not None
        assert said in own.places.log.read_text()
    own = replace(server.owner("client-0"), roster=known)
    held = Node(node.config, _Single(own), lambda: None)  # type: ignore[arg-type,return-value]
    assert answer_prepare(held, PrepareRequest(RUN, ("client-0",), plan)).clients[0].failure is None


class _Single:
    def __init__(self, owner: Owner) -> None:
        self._owner = owner

    def one(self, client: str) -> Owner:
        return self._owner


def test_the_next_sum_is_prepared_with_the_shares(server: Server):
    for client in NAMES:
        server.hide(client, values_of(client))
    following = Server(server.node, "round-2-0", NAMES[:4])
    orders = tuple(server.coordinator.unmask_order(client) for client in NAMES)
    plan = following.coordinator.plan(NAMES[:4])
    reply = answer_unmask(server.node, UnmaskRequest(RUN, server.name, orders, (), {}, plan))
    assert [mine.client for mine in reply.prepared] == list(NAMES[:4])
    assert all(following.coordinator.accept(mine) is None for mine in reply.prepared)


def test_keys_lie_where_only_their_owner_reads_and_go_in_time(server: Server):
    owner = server.owner("client-0")
    folder = owner.places.store / "keys" / f"client-0-{RUN.run}"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    for number in (1, 2, 3):
        current = Server(server.node, f"round-{number}-0")
        current.prepare()
        hidden = current.coordinator.order(NAMES)
        hide(owner, values_of("client-0"), RUN.run, ("round", number), hidden)
        assert shares_of(current.unmask(("client-0",), (), {}))
    assert not list(folder.glob("round-1*"))
    assert list(folder.glob("round-2*"))
    forget(owner, RUN.run)
    assert not folder.exists()


def test_secrets_go_before_what_was_said_of_them(server: Server, monkeypatch: pytest.MonkeyPatch):
    """Of a client that dies while it forgets, nothing is left that could be revealed a second time."""
    for number in (1, 2, 3):
        current = Server(server.node, f"round-{number}-0")
        current.prepare()
        hide(
            server.owner("client-0"),
            values_of("client-0"),
            RUN.run,
            ("round", number),
            current.coordinator.order(NAMES),
        )
        gone: list[str] = []
        unlink = Path.unlink

        def noted(path: Path, missing_ok: bool = False, unlink: Any = unlink, gone: list[str] = gone) -> None:
            gone.append(path.name)
            unlink(path, missing_ok)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", noted)
            current.unmask(("client-0",), (), {})
    old = [name for name in gone if name.startswith("round-1")]
    assert old[0] == "round-1-0.prepared"
    assert {*old[1:]} == {"round-1.masked", "round-1.revealed"}


def test_a_changed_file_is_no_preparation(server: Server):
    owner = server.owner("client-0")
    path = owner.places.store / "keys" / f"client-0-{RUN.run}" / "round-1-0.prepared"
    path.write_text(path.read_text()[:100])
    with pytest.raises(SumRefused, match="prepared nothing"):
        server.hide("client-0", values_of("client-0"))
