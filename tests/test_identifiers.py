"""Identifiers: readable, safe as file names, and one to one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlab.errors import ConfigError
from fedlab.identifiers import LONGEST, checked_identifier, identifier, identifiers, is_identifier


@pytest.mark.parametrize("name", ["hospA", "client-0", "01", "1", "a.b_c-d", "x" * LONGEST, "a--b"])
def test_a_name_that_is_an_identifier_stays_as_it_is(name: str):
    assert identifier(name) == name


@pytest.mark.parametrize(
    ("name", "begins"),
    [
        ("St. Mary's", "St.-Mary-s--"),
        ("São Paulo", "Sao-Paulo--"),
        ("../../etc/passwd", "etc-passwd--"),
        (".hidden", "hidden--"),
        ("server", "server--"),
        ("Server", "Server--"),
        ("北京", "x--"),
        ("ends.", "ends--"),
        ("line\n", "line--"),
        ("y" * 500, "y" * 50 + "--"),
    ],
)
def test_other_names_stay_readable(name: str, begins: str):
    found = identifier(name)
    assert found.startswith(begins)
    assert is_identifier(found)
    assert found == identifier(name)


@given(st.text(min_size=1), st.text(min_size=1))
def test_different_names_have_different_identifiers(a: str, b: str):
    assert is_identifier(identifier(a))
    assert (identifier(a) == identifier(b)) == (a == b)


@given(st.text(min_size=1))
def test_nobody_can_take_another_name_by_writing_its_identifier(name: str):
    if identifier(name) != name:
        assert identifier(identifier(name)) != identifier(name)


def test_names_that_differ_only_in_case_are_refused_with_both_spellings():
    with pytest.raises(ConfigError, match=r"'hospa' and 'HospA'"):
        identifiers(["hospa", "other", "HospA"], "column 'site'")
    assert identifiers(["b", "a", "b"], "x") == {"b": "b", "a": "a"}


def test_an_empty_name_is_refused():
    with pytest.raises(ConfigError, match="column 'site' has an empty name"):
        identifiers(["a", ""], "column 'site'")


@pytest.mark.parametrize(
    "text", ["", "..", ".", "a/b", "x/../../victim", "server", "SERVER", "a b", "a\n", "-a", "é", "a\0", "a" * 65, "a."]
)
def test_what_comes_from_outside_and_is_none_is_refused(text: str):
    with pytest.raises(ConfigError, match="client = "):
        checked_identifier(text, "client")
