"""Who says what before the first round, and what is believed of it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedlab.config import RunConfig
from fedlab.errors import PrivacyError, RunFailed
from fedlab.privacy.release import SIZE, public
from fedlab.protocol import encode
from fedlab.protocol.failures import explained
from fedlab.protocol.fields import Failure
from fedlab.protocol.messages import NODE_FAILURE, ClientReply, DescribeReply, Enrolment, EventFields, NodeFailure
from fedlab.run.deployment import Deployment
from fedlab.run.directory import RunDirectory
from fedlab.run.launch.local import LocalGrid
from strategies.server.discovery import Discovery, run_reference
from strategies.server.exchange import RECORD
from strategies.server.federation import Federation
from strategies.server.server_data import DeployedData, SimulatedData


def enrolment(client: str, examples: float = 10, **changes: object) -> Enrolment:
    reply = ClientReply(client, (public(SIZE, {"examples": examples}),))
    return replace(Enrolment(reply, event=EventFields("poisson", 0.1, 1.0, 3), delta=1e-5), **changes)


@pytest.fixture
def found(tiny_toml: str, tmp_path: Path) -> Callable[..., Federation]:
    """The federation of nodes that answer like this, whatever they are asked."""

    def run(
        *replies: DescribeReply | NodeFailure | Exception, noise: str = "seeded", deployed: bool = False
    ) -> Federation:
        def app(message: Message, context: Context) -> Message:
            reply = replies[context.node_config["partition-id"]]
            if isinstance(reply, Exception):
                raise reply
            kind = NODE_FAILURE if isinstance(reply, NodeFailure) else "describe"
            record = ConfigRecord(vars(encode(kind, reply)))
            return Message(RecordDict({RECORD: record}), reply_to=message)

        config = RunConfig.parse(tiny_toml, [f"privacy.noise={noise}"])
        directory = RunDirectory.create(config, Path(tempfile.mkdtemp(dir=tmp_path)))
        reference = run_reference(directory, config, ("head",), {})
        data = DeployedData(config, Deployment(server="here", wait=0.0)) if deployed else SimulatedData(config)
        return Discovery(LocalGrid(app, len(replies)), directory, config, reference, data, None, {}).begin()

    return run


def test_clients_of_a_node_of_their_own_stay_there(found: Callable[..., Federation]):
    north, south = (DescribeReply((enrolment(name),), exclusive=True) for name in ("north", "south"))
    federation = found(south, north, noise="secure", deployed=True)
    assert list(federation.clients) == ["north", "south"]
    assert federation.hosts == {"south": 10, "north": 11}
    assert federation.clients["north"].examples == 10
    assert federation.clients["north"].event is not None
    assert federation.clients["north"].event.sigma == 1.0


def test_two_nodes_that_say_they_are_one_client_end_the_run(found: Callable[..., Federation]):
    reply = DescribeReply((enrolment("client-0"),))
    with pytest.raises(RunFailed, match="two nodes say that they are client-0"):
        found(reply, reply)


def test_in_a_deployment_a_name_that_is_claimed_twice_is_the_first_ones(
    found: Callable[..., Federation], caplog: pytest.LogCaptureFixture
):
    north, south = (DescribeReply((enrolment(name),), exclusive=True) for name in ("north", "south"))
    federation = found(north, north, south, noise="secure", deployed=True)
    assert federation.hosts == {"north": 10, "south": 12}
    assert "node 11 takes no part: it says that it is north, and so does node 10" in caplog.text


def test_a_node_of_the_other_kind_takes_no_part(found: Callable[..., Federation]):
    own, played = DescribeReply((enrolment("north"),), exclusive=True), DescribeReply((enrolment("client-0"),))
    assert list(found(own, played, noise="secure", deployed=True).clients) == ["north"]
    assert list(found(own, played).clients) == ["client-0"]


@pytest.mark.parametrize("examples", [0, -3, 2.5])
def test_a_size_that_is_none_is_no_weight(examples: float, found: Callable[..., Federation]):
    federation = found(DescribeReply((enrolment("a", examples), enrolment("b"))))
    assert list(federation.refused) == ["a"]
    assert federation.eligible == ["b"]


def test_a_client_that_refuses_is_known_and_never_drawn(found: Callable[..., Federation]):
    refusing = enrolment("a")
    refusing = replace(refusing, reply=replace(refusing.reply, failure=Failure("budget-exhausted", refused=True)))
    federation = found(DescribeReply((refusing, enrolment("b"))))
    assert federation.refused == {"a": explained("budget-exhausted")}
    assert federation.eligible == ["b"]


def test_outside_a_simulation_seeded_noise_ends_the_run(found: Callable[..., Federation]):
    with pytest.raises(PrivacyError, match=r"clients are on machines of their own; set privacy\.noise"):
        found(DescribeReply((enrolment("north"),), exclusive=True), deployed=True)


def test_a_client_that_refuses_before_it_opens_its_data_is_named(found: Callable[..., Federation]):
    refusing = Enrolment(ClientReply("a", failure=Failure("policy", refused=True)))
    federation = found(DescribeReply((refusing, enrolment("b"))))
    assert federation.refused == {"a": explained("policy")}
    assert federation.eligible == ["b"]


def test_of_a_deployment_a_node_that_cannot_take_part_is_left_out(found: Callable[..., Federation]):
    north = DescribeReply((enrolment("north"),), exclusive=True)
    federation = found(north, NodeFailure("configuration"), noise="secure", deployed=True)
    assert list(federation.clients) == ["north"]
    with pytest.raises(RunFailed, match=r"a node could not prepare the run: configuration: .*log\.txt"):
        found(DescribeReply((enrolment("b"),)), NodeFailure("configuration"))


def test_a_node_that_fails_ends_the_run_with_its_reason(found: Callable[..., Federation]):
    with pytest.raises(RunFailed, match="a node could not prepare the run: ValueError: no disk"):
        found(DescribeReply((enrolment("b"),)), ValueError("no disk"))
