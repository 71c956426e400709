import numpy as np
import pytest

from fedlab.errors import PrivacyError
from fedlab.privacy.secure_sum.masking import add, masked, new_key, public_of


def setup(count: int) -> tuple[dict[str, bytes], dict[str, str], dict[str, dict[str, np.ndarray]]]:
    keys = {f"client-{i}": new_key() for i in range(count)}
    rng = np.random.default_rng(0)
    values = {c: {"a": rng.integers(-(2**52), 2**52, (3, 4)), "b": rng.integers(-5, 5, 7)} for c in keys}
    return keys, {c: public_of(k) for c, k in keys.items()}, values


@pytest.mark.parametrize("count", [2, 3, 12])
def test_masks_cancel_in_the_sum_exactly(count):
    keys, public, values = setup(count)
    total: dict[str, np.ndarray] = {}
    for client in keys:
        total = add(total, masked(values[client], keys[client], client, public, "run-1", 2))
    for name in ("a", "b"):
        assert np.array_equal(total[name], sum(v[name] for v in values.values()))


def test_one_masked_value_and_any_sum_without_somebody_look_like_noise():
    keys, public, _ = setup(4)
    zeros = {"a": np.zeros(20_000, dtype=np.int64)}
    sent = {client: masked(zeros, keys[client], client, public, "run-1", 2) for client in keys}
    three = add(add(sent["client-0"], sent["client-1"]), sent["client-2"])
    for value in (sent["client-0"]["a"], three["a"]):
        bits = np.unpackbits(value.view(np.uint8))
        assert abs(bits.mean() - 0.5) < 0.005
        assert len(np.unique(value)) == len(value)


def test_another_sum_another_mask():
    keys, public, _ = setup(2)
    zeros = {"a": np.zeros(8, dtype=np.int64), "b": np.zeros(8, dtype=np.int64)}
    first = masked(zeros, keys["client-0"], "client-0", public, "run-1", 2)
    second = masked(zeros, keys["client-0"], "client-0", public, "run-2", 2)
    assert not np.array_equal(first["a"], second["a"])
    assert not np.array_equal(first["a"], first["b"])


def test_a_sum_that_would_hide_nobody_is_refused():
    keys, public, values = setup(3)
    one = {c: public[c] for c in ("client-0", "client-1")}
    with pytest.raises(PrivacyError, match="at least 3"):
        masked(values["client-0"], keys["client-0"], "client-0", one, "run", 3)
    with pytest.raises(PrivacyError, match="same key"):
        masked(values["client-0"], keys["client-0"], "client-0", public | {"client-1": public["client-0"]}, "run", 2)
    with pytest.raises(PrivacyError, match="another key of client-0"):
        masked(values["client-0"], keys["client-0"], "client-0", public | {"client-0": public_of(new_key())}, "run", 2)
    with pytest.raises(PrivacyError, match="no X25519"):
        masked(values["client-0"], keys["client-0"], "client-0", public | {"client-1": "00"}, "run", 2)
