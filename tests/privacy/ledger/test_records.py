"""Who held which record under a shared ledger: what may change between runs, and what would spend unseen."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlab.errors import PrivacyError
from fedlab.privacy.ledger.records import RECORDS, Deal, Holdings, check_deal, moved_records, record_deal


def deal(*tasks: Holdings, seed: int = 3) -> Deal:
    return Deal(lambda salt: [{c: [salt.hex() + r for r in own] for c, own in t.items()} for t in tasks], "here", seed)


def test_the_same_deal_goes_on_and_clients_may_gain_and_lose(tmp_path: Path):
    folder = tmp_path / "a"
    record_deal(folder, deal({"c0": ["a", "b"], "c1": ["c"]}))
    record_deal(folder, deal({"c0": ["a", "b", "new"], "c1": ["c"], "c2": ["other"]}))
    record_deal(folder, deal({"c0": ["a"], "c1": ["c"]}))
    record_deal(folder, deal({"c0": ["a", "b"], "c1": ["c"]}))


@pytest.mark.parametrize(
    ("now", "moved"),
    [
        ({"c0": ["a", "c"], "c1": ["b"]}, 2),
        ({"c0": ["a"], "c1": ["b", "c"]}, 1),
        ({"x": ["a"], "c0": ["b"], "c1": ["c"]}, 1),
        ({"c1": ["a", "b", "c"]}, 2),
    ],
)
def test_a_record_that_moves_is_refused(now: Holdings, moved: int, tmp_path: Path):
    record_deal(tmp_path / "a", deal({"c0": ["a", "b"], "c1": ["c"]}))
    for act in (check_deal, record_deal):
        with pytest.raises(PrivacyError, match=rf"{moved} of 3 records would go to another client.*data\.seed = 3"):
            act(tmp_path / "a", deal(now, seed=9))


def test_what_left_long_ago_is_remembered(tmp_path: Path):
    for held in ({"c0": ["a", "b"]}, {"c0": ["a"]}):
        record_deal(tmp_path / "a", deal(held))
    with pytest.raises(PrivacyError, match="1 of 2 records"):
        check_deal(tmp_path / "a", deal({"c0": ["a"], "c1": ["b"]}))


def test_a_text_that_many_have_moves_only_when_one_loses_it(tmp_path: Path):
    record_deal(tmp_path / "a", deal({"c0": ["ok", "a"], "c1": ["b"]}))
    check_deal(tmp_path / "a", deal({"c0": ["ok", "a"], "c1": ["b", "ok"]}))
    with pytest.raises(PrivacyError, match="1 of 3 records"):
        check_deal(tmp_path / "a", deal({"c0": ["a"], "c1": ["b", "ok"]}))


def test_tasks_of_a_stream_share_a_ledger(tmp_path: Path):
    with pytest.raises(PrivacyError, match=r"1 of 2 records.*give the tasks texts of their own"):
        check_deal(tmp_path / "a", deal({"c0": ["a"], "c1": ["b"]}, {"c0": ["c"], "c1": ["a"]}))
    check_deal(tmp_path / "a", deal({"c0": ["a"], "c1": ["b"]}, {"c0": ["c"], "c1": ["d"]}))


def test_a_copy_in_another_place_has_no_budget_of_its_own(tmp_path: Path):
    record_deal(tmp_path / "a", deal({"c0": ["a", "b"], "c1": ["c"]}))
    with pytest.raises(PrivacyError, match="3 of 3 texts are in the ledgers of another place, here"):
        record_deal(tmp_path / "b", deal({"c0": ["b", "c"], "c1": ["a"]}))
    record_deal(tmp_path / "b", deal({"c0": [f"n{i}" for i in range(30)] + ["a"]}))


def test_the_file_is_its_owners_and_damage_is_no_fresh_start(tmp_path: Path):
    record_deal(tmp_path / "a", deal({"c0": ["a"]}))
    file = tmp_path / "a" / RECORDS
    assert file.stat().st_mode & 0o077 == 0
    file.write_text(file.read_text()[:-3])
    with pytest.raises(PrivacyError, match="put it back"):
        check_deal(tmp_path / "a", deal({"c0": ["a"]}))


RECORDS_OF = st.dictionaries(st.sampled_from("xyz"), st.lists(st.sampled_from("abcd"), max_size=5), min_size=1)


@given(RECORDS_OF, RECORDS_OF)
def test_what_is_not_refused_adds_up_in_no_ledger_but_the_clients_own(before: Holdings, now: Holdings):
    """If nothing moved, every copy of a record can be told to be at one client in both deals, or in one of them."""
    held, new = ({c: Counter(r) for c, r in one.items()} for one in (before, now))
    if moved_records(held, new):
        return
    for record in "abcd":
        gains = [c for c in new if new[c][record] > held.get(c, Counter())[record]]
        losses = [c for c in held if held[c][record] > new.get(c, Counter())[record]]
        assert not (set(losses) and set(gains) - set(losses)), record
