import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlab.privacy.secure_sum.shares import BYTES, PRIME, combine, new_secret, split


@settings(max_examples=50, deadline=None)
@given(st.integers(0, PRIME - 1), st.data())
def test_any_shares_of_the_threshold_give_the_secret(number: int, data: st.DataObject):
    secret, count = number.to_bytes(BYTES, "big"), data.draw(st.integers(1, 20))
    threshold = data.draw(st.integers(1, count))
    shares = dict(enumerate(split(secret, threshold, count), 1))
    chosen = data.draw(st.sets(st.sampled_from(sorted(shares)), min_size=threshold))
    assert combine({x: shares[x] for x in chosen}) == secret


def test_fewer_shares_say_nothing():
    """Whatever two of three shares are, every secret has one third share that goes with them."""
    shares = split(new_secret(), 3, 3)
    for other in (0, 1, PRIME - 1):
        secret = other.to_bytes(BYTES, "big")
        third = third_share(secret, shares)
        assert combine({1: shares[0], 2: shares[1], 3: third}) == secret


def third_share(secret: bytes, shares: list[bytes]) -> bytes:
    """The value at 3 of the parabola through (0, secret) and the first two shares: s − 3a + 3b, by differences."""
    s, a, b = (int.from_bytes(x, "big") for x in (secret, shares[0], shares[1]))
    return ((s - 3 * a + 3 * b) % PRIME).to_bytes(BYTES, "big")


def test_shares_are_fresh_and_spread():
    secret = new_secret()
    seen = [split(secret, 2, 3) for _ in range(200)]
    assert len(set(itertools.chain(*seen))) == 600
    high = sum(int.from_bytes(shares[0], "big") > PRIME // 2 for shares in seen)
    assert 60 < high < 140


@pytest.mark.parametrize(("threshold", "count"), [(0, 3), (4, 3), (1, 0)])
def test_a_threshold_outside_is_refused(threshold: int, count: int):
    with pytest.raises(ValueError, match="threshold"):
        split(new_secret(), threshold, count)


@pytest.mark.parametrize("shares", [{}, {0: bytes(16)}, {1: bytes(15)}, {1: b"\xff" * 16}])
def test_what_is_no_share_is_refused(shares: dict[int, bytes]):
    with pytest.raises(ValueError, match=r"share|bytes"):
        combine(shares)
