"""Messages come back as they went, and nothing that comes instead raises anything but the protocol's own error."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlab.identifiers import PATTERN, is_identifier
from fedlab.protocol import Frame, ProtocolError, decode, encode, encode_all
from fedlab.protocol.failures import SENTENCES
from fedlab.protocol.fields import Failure, RunReference
from fedlab.protocol.messages import (
    REPLIES,
    REQUESTS,
    ClientOrder,
    ClientReply,
    DescribeReply,
    DescribeRequest,
    Enrolment,
    EvaluateReply,
    EvaluateRequest,
    EventFields,
    GramReply,
    GramRequest,
    ReceiptFor,
    ReceiptsReply,
    ReceiptsRequest,
    Release,
    TrainReply,
    TrainRequest,
)
from fedlab.protocol.sum_messages import (
    Confirmation,
    ConfirmReply,
    ConfirmRequest,
    MaskKey,
    Preparation,
    PrepareReply,
    PrepareRequest,
    Revealed,
    SumKey,
    SumOrder,
    SumPlan,
    SumSetting,
    UnmaskOrder,
    UnmaskReply,
    UnmaskRequest,
)
from fedlab.protocol.wire import DTYPES

KINDS = {f"{kind}?": cls for kind, cls in REQUESTS.items()} | {f"{kind}!": cls for kind, cls in REPLIES.items()}

clients = st.from_regex(PATTERN, fullmatch=True).filter(is_identifier)
hexes = {n: st.text("0123456789abcdef", min_size=n, max_size=n) for n in (32, 64, 96, 128)}
names = st.text(min_size=1, max_size=30)
once = st.lists(names, max_size=3, unique=True).map(tuple)
counts, positive = st.integers(0, 2**40), st.integers(1, 2**40)
numbers = st.floats(allow_nan=False, allow_infinity=False)
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
parts = st.lists(st.sampled_from(["lora_A", "lora_B", "head"]), max_size=3).map(tuple)


@st.composite
def an_array(draw: Any) -> np.ndarray:
    dtype, shape = DTYPES[draw(st.sampled_from(sorted(DTYPES)))], draw(shapes)
    data = draw(st.binary(min_size=dtype.itemsize * int(np.prod(shape)), max_size=dtype.itemsize * int(np.prod(shape))))
    return np.frombuffer(data, dtype).reshape(shape)


def tuples(inner: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(inner, max_size=3).map(tuple)


arrays = st.dictionaries(names, an_array(), max_size=4)
run = st.builds(RunReference, hexes[32], hexes[64], parts, st.just("") | hexes[64])
event = st.builds(
    EventFields, st.sampled_from(["poisson", "full"]), st.floats(0, 1), st.floats(0, 100, allow_nan=False), counts
)
release = st.builds(
    Release,
    st.from_regex(r"[a-z][a-z-]{0,20}", fullmatch=True),
    arrays,
    st.dictionaries(names, numbers, max_size=3),
    st.none() | event,
)
failure = st.none() | st.builds(Failure, st.sampled_from(list(SENTENCES)), st.booleans())
order = st.builds(ClientOrder, clients, counts, positive)
orders = st.lists(order, max_size=3, unique_by=lambda one: one.client).map(tuple)
reply = st.builds(ClientReply, clients, tuples(release), st.text(max_size=80), failure, st.booleans())
wire = st.sampled_from(["float32", "bfloat16"])
few = {n: st.dictionaries(clients, hexes[n], max_size=3) for n in (32, 64, 96, 128)}
sum_name = st.from_regex(r"(round|gram)-[0-9]{1,9}-[0-9]", fullmatch=True)
sum_key = st.builds(SumKey, hexes[64], hexes[64], hexes[128])
setting = st.builds(SumSetting, sum_name, positive, counts, few[64])
sum_plan = st.builds(SumPlan, setting, st.dictionaries(clients, sum_key, max_size=3))
mask_key = st.builds(MaskKey, hexes[64], hexes[64], hexes[128])
sum_order = st.none() | st.builds(SumOrder, sum_name, st.dictionaries(clients, mask_key, max_size=3))
preparation = st.builds(Preparation, clients, st.none() | mask_key, few[96], failure)
unmask_order = st.builds(UnmaskOrder, clients, few[96])
MESSAGES: dict[str, st.SearchStrategy] = {
    "describe?": st.builds(DescribeRequest, run, st.text(max_size=200), tuples(clients), st.text(max_size=30), arrays),
    "train?": st.builds(TrainRequest, run, positive, orders, tuples(positive), once, parts, wire, arrays),
    "evaluate?": st.builds(EvaluateRequest, run, counts, tuples(clients), parts, wire, arrays),
    "receipts?": st.builds(ReceiptsRequest, run, tuples(st.builds(ReceiptFor, clients, counts, st.text(max_size=99)))),
    "prepare?": st.builds(PrepareRequest, run, tuples(clients), sum_plan),
    "confirm?": st.builds(ConfirmRequest, run, tuples(clients), sum_name, tuples(clients)),
    "unmask?": st.builds(
        UnmaskRequest, run, sum_name, tuples(unmask_order), tuples(clients), few[128], st.none() | sum_plan
    ),
    "gram?": st.builds(GramRequest, run, orders, sum_order, arrays),
    "describe!": st.builds(
        DescribeReply,
        tuples(
            st.builds(
                Enrolment, reply, st.just("") | hexes[64], st.none() | numbers, st.none() | event, st.none() | sum_key
            )
        ),
        st.booleans(),
    ),
    "train!": st.builds(TrainReply, numbers, numbers, tuples(reply)),
    "evaluate!": st.builds(EvaluateReply, numbers, numbers, tuples(reply)),
    "receipts!": st.builds(ReceiptsReply, tuples(reply)),
    "prepare!": st.builds(PrepareReply, tuples(preparation)),
    "confirm!": st.builds(ConfirmReply, tuples(st.builds(Confirmation, clients, st.just("") | hexes[128], failure))),
    "unmask!": st.builds(UnmaskReply, tuples(st.builds(Revealed, clients, few[32], failure)), tuples(preparation)),
    "gram!": st.builds(GramReply, numbers, numbers, tuples(reply), st.none() | release),
}
messages = st.sampled_from(sorted(MESSAGES)).flatmap(lambda kind: st.tuples(st.just(kind), MESSAGES[kind]))
quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def same(a: Any, b: Any) -> bool:
    """Equality of messages: arrays by their bytes, types and shapes."""
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    if dataclasses.is_dataclass(a):
        fields = dataclasses.fields(a)
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_every_kind_of_message_is_tried():
    assert MESSAGES.keys() == KINDS.keys()


@quick
@given(messages)
def test_a_message_comes_back_as_it_went(kind_and_message: tuple[str, object]):
    kind, message = kind_and_message
    assert same(decode(encode(kind, message), KINDS), message)


def opens(frame: Frame) -> None:
    """Decode it; it may be refused, in the one way there is, or be a message."""
    try:
        message = decode(frame, KINDS)
    except ProtocolError as error:
        refusal = error
    else:
        refusal = None
        assert type(message) is KINDS[frame.kind]
    assert refusal is None or (refusal.field and refusal.problem)


@quick
@given(st.sampled_from(sorted(KINDS)) | st.text(max_size=10), st.binary(), st.binary(), st.binary())
def test_random_bytes_are_refused_in_one_way(kind: str, header: bytes, table: bytes, body: bytes):
    opens(Frame(kind, header, table, body))
    opens(Frame(kind, header, b"[]", b""))


@quick
@given(messages, st.data())
def test_mutated_bytes_are_refused_in_one_way(kind_and_message: tuple[str, object], data: st.DataObject):
    frame = encode(*kind_and_message)
    part = data.draw(st.sampled_from(["header", "table", "body"]))
    whole = bytearray(getattr(frame, part))
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, len(whole)))
        piece = data.draw(
            st.binary(max_size=4) | st.sampled_from([b"null", b"-1", b"1e999", b"[]", b"{}", b'"', b"NaN"])
        )
        whole[where : where + data.draw(st.integers(0, 4))] = piece
    opens(dataclasses.replace(frame, **{part: bytes(whole)}))


def leaves(value: Any, path: tuple = ()) -> list[tuple]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [path] if path else []
    for key, child in children:
        found += leaves(child, (*path, key))
    return found


@quick
@given(messages, st.data())
def test_another_value_anywhere_is_refused_in_one_way(kind_and_message: tuple[str, object], data: st.DataObject):
    frame = encode(*kind_and_message)
    tree = json.loads(frame.header)
    path = data.draw(st.sampled_from(leaves(tree)))
    holder = tree
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = data.draw(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.just([]) | st.just({}) | st.just([[[[]]]])
    )
    opens(dataclasses.replace(frame, header=json.dumps(tree).encode()))


RUN = RunReference("a" * 32, "b" * 64, ("head",))
UPDATE = TrainReply(1.0, 2.0, (ClientReply("client-0", (Release("update", {"x": np.ones((2, 3), "f4")}),)),))


def edited(frame: Frame, old: bytes, new: bytes) -> Frame:
    assert old in frame.header
    return dataclasses.replace(frame, header=frame.header.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        (b'"client-0"', b'"../../victim"', "clients.0.client"),
        (b'"client-0"', b'""', "clients.0.client"),
        (b'"update"', b'"Update!"', "clients.0.releases.0.name"),
        (b'"started":1.0', b'"started":NaN', "started"),
        (b'"started":1.0', b'"started":"1.0"', "started"),
        (b'"exhausted":false', b'"exhausted":0', "clients.0.exhausted"),
        (b'"exhausted":false', b'"exhausted":false,"loss":1.0', "clients.0.loss"),
        (b'{"x":0}', b'{"x":1}', "clients.0.releases.0.arrays"),
        (b'{"x":0}', b'{"x":0,"y":0}', "clients.0.releases.0.arrays"),
        (b'{"x":0}', b'{"x":true}', "clients.0.releases.0.arrays"),
        (b'{"x":0}', b"{}", "table"),
    ],
)
def test_the_error_names_the_field(old: bytes, new: bytes, field: str):
    with pytest.raises(ProtocolError) as caught:
        decode(edited(encode("train", UPDATE), old, new), REPLIES)
    assert caught.value.field == field


def test_a_tensor_is_trained_once():
    request = TrainRequest(RUN, 1, (), (), ("x", "y"), (), "float32", {})
    with pytest.raises(ProtocolError) as caught:
        decode(edited(encode("train", request), b'["x","y"]', b'["x","x"]'), REQUESTS)
    assert caught.value.field == "trained"


def test_a_client_is_asked_once():
    orders = (ClientOrder("north", 0, 1), ClientOrder("south", 0, 1))
    request = TrainRequest(RUN, 1, orders, (2,), ("x",), (), "float32", {})
    with pytest.raises(ProtocolError) as caught:
        decode(edited(encode("train", request), b'"south"', b'"north"'), REQUESTS)
    assert caught.value.field == "clients"


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        (b'[["float32",[2,4]]]', "the table describes more"),
        (b'[["float32",[2,2]]]', "the table describes 16"),
        (b'[["float32",[4611686018427387904,4]]]', "the table describes more"),
        (b'[["float32",[-2,-3]]]', "no shape"),
        (b'[["float32",[1,1,1,1,1,1,1,2,3]]]', "no shape"),
        (b'[["object",[2,3]]]', "no type of an array"),
        (b'[["float32",[2.0,3]]]', "integer"),
        (b"[]", "the table describes 0"),
        (b"{}", "array"),
    ],
)
def test_a_table_that_the_body_does_not_bear_out_is_refused_before_anything_is_read(table: bytes, problem: str):
    with pytest.raises(ProtocolError, match=problem):
        decode(dataclasses.replace(encode("train", UPDATE), table=table), REPLIES)


def test_a_reply_is_not_taken_for_a_request_and_an_unknown_kind_for_nothing():
    with pytest.raises(ProtocolError, match="is not expected here"):
        decode(encode("shutdown", UPDATE), REPLIES)
    with pytest.raises(ProtocolError):
        decode(encode("train", UPDATE), REQUESTS)


def test_more_bytes_than_were_asked_for_are_refused_before_they_are_looked_at():
    with pytest.raises(ProtocolError, match="body: 24 bytes, at most 8"):
        decode(encode("train", UPDATE), REPLIES, most_body=8)


def test_parts_that_are_no_bytes_are_refused():
    frame = encode("train", UPDATE)
    with pytest.raises(ProtocolError, match="must be bytes, got str"):
        decode(dataclasses.replace(frame, header=frame.header.decode()), REPLIES)


def test_arrays_that_do_not_travel_are_named():
    with pytest.raises(ValueError, match="float64 do not travel"):
        encode("train", TrainReply(1.0, 2.0, (ClientReply("a", (Release("update", {"x": np.ones(2)}),)),)))


def test_one_state_is_one_body_for_all_nodes():
    state = {"x": np.ones(3, "f4")}
    asked = [
        TrainRequest(RUN, 1, (ClientOrder(client, 0, 1),), (1,), ("x",), (), "float32", state) for client in ("a", "b")
    ]
    first, second = encode_all("train", asked)
    assert first.body is second.body
    assert first.header != second.header


def test_decoded_arrays_are_views_of_the_body():
    frame = encode("train", UPDATE)
    (release,) = decode(frame, REPLIES).clients[0].releases
    assert not release.arrays["x"].flags.owndata
    assert not release.arrays["x"].flags.writeable
