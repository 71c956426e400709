"""A coordinator's own file: defaults, paths, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlab.config.server import ServerFile, is_loopback, split_address
from fedlab.errors import ConfigError

FULL = """
[server]
address = "[::]:9000"
inner_port = 9001
keys = "k"
state = "/var/lib/fedlab"
runs = "../runs"
insecure = true

[rounds]
wait = 10
retries = 0

[test]
path = "public.csv"
text = "question"
label = "answer"

[metrics]
address = "127.0.0.1:9464"

[log]
format = "json"
"""


def test_paths_are_relative_to_the_file(tmp_path: Path):
    path = tmp_path / "site" / "server.toml"
    path.parent.mkdir()
    path.write_text(FULL, encoding="utf-8")
    found = ServerFile.load(path)
    assert found.keys == path.parent / "k"
    assert found.state == Path("/var/lib/fedlab")
    assert found.runs.resolve() == tmp_path / "runs"
    assert found.test is not None
    assert found.test.path == str(path.parent / "public.csv")
    assert (found.server.host, found.server.port, found.inner_address) == ("::", 9000, "127.0.0.1:9001")


def test_an_empty_file_is_a_server_with_tls(tmp_path: Path):
    found = ServerFile.parse("", tmp_path)
    assert (found.server.address, found.server.insecure) == ("0.0.0.0:8443", False)
    assert found.keys == tmp_path / "keys"
    assert found.test is None
    assert found.metrics.address is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[server]\nadress = "x"', "did you mean server.address?"),
        ('[server]\naddress = "8443"', "is no host:port"),
        ('[server]\naddress = "0.0.0.0:99999"', "is no host:port"),
        ('[server]\naddress = "::1:8443"', "in brackets"),
        ('[server]\naddress = "0.0.0.0:8444"', "the same port 8444"),
        ("[rounds]\nwait = -1", "rounds.wait"),
        ("[server]\ninner_port = 0", "server.inner_port"),
        ("rounds =", "not valid TOML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, told: str):
    with pytest.raises(ConfigError, match=told.replace("?", r"\?")):
        ServerFile.parse(text, tmp_path)


def test_addresses():
    assert split_address("[::1]:8443") == ("::1", 8443)
    assert split_address("fed.example.org:1") == ("fed.example.org", 1)
    assert [is_loopback(host) for host in ("localhost", "127.0.0.9", "::1", "0.0.0.0", "fed.example.org")] == [
        True,
        True,
        True,
        False,
        False,
    ]
