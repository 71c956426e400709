"""The endpoint: its three pages, where it may listen, and what it says where it cannot."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterable

import pydantic
import pytest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from fedlab.config.monitor import MetricsSection
from fedlab.errors import ConfigError
from fedlab.run.monitor.exporter import Exporter


class One(Collector):
    def collect(self) -> Iterable[GaugeMetricFamily]:
        yield GaugeMetricFamily("fedlab_one", "the number one", value=1.0)


def get(address: str, path: str, method: str = "GET") -> tuple[int, str]:
    connection = http.client.HTTPConnection(address, timeout=10)
    connection.request(method, path)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def test_three_pages_and_nothing_else():
    problems: list[str | None] = [None, "the trainer is not running"]
    with Exporter("127.0.0.1:0", [One()], lambda: problems.pop(0)) as exporter:
        address = exporter.address
        status, text = get(address, "/metrics")
        assert (status, "fedlab_one 1.0\n" in text, "python_info" in text) == (200, True, False)
        assert get(address, "/health") == (200, "alive\n")
        assert get(address, "/ready") == (200, "ready\n")
        assert get(address, "/ready") == (503, "not ready: the trainer is not running\n")
        assert get(address, "/ready")[0] == 503, "an error while looking is not being ready"
        assert get(address, "/health", "HEAD") == (200, "")
        assert get(address, "/health", "POST")[0] == 405
        assert get(address, "/")[0] == get(address, "/metrics/../etc")[0] == 404
    with pytest.raises(OSError, match="refused"):
        get(address, "/health")


def test_a_taken_port_is_named():
    with Exporter("127.0.0.1:0", []) as first, pytest.raises(ConfigError) as error:
        Exporter(first.address, [])
    assert str(error.value) == (
        f'metrics.address = "{first.address}": the port is taken by another process; stop it, or choose another port'
    )


def test_a_port_can_be_had_again_at_once():
    with Exporter("127.0.0.1:0", []) as first:
        get(first.address, "/health")
    with Exporter(first.address, []) as second:
        assert get(second.address, "/health")[0] == 200


@pytest.mark.parametrize("address", ["9464", ":9464", "127.0.0.1", "127.0.0.1:", "127.0.0.1:65536", "::1:9464", "a:²"])
def test_what_is_no_address(address: str):
    with pytest.raises(ConfigError, match=r"metrics\.address: expected host:port, for example"):
        Exporter(address, [])
    with pytest.raises(pydantic.ValidationError, match="expected host:port, for example"):
        MetricsSection(address=address)


def test_off_loopback_only_where_that_is_said():
    with pytest.raises(ConfigError, match=r"asks nobody for a password.*metrics\.exposed = true"):
        Exporter("0.0.0.0:0", [])
    with Exporter("0.0.0.0:0", [], exposed=True) as exporter:
        assert get(f"127.0.0.1:{exporter.address.rpartition(':')[2]}", "/health")[0] == 200


def test_places_that_are_not_here():
    with pytest.raises(ConfigError, match="this machine has no such address"):
        Exporter("192.0.2.1:0", [], exposed=True)
    with pytest.raises(ConfigError, match=r"'no\.such\.host\.invalid' is not known here"):
        Exporter("no.such.host.invalid:9464", [])


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_six_too():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 loopback here")
    with Exporter("[::1]:0", []) as exporter:
        assert exporter.address.startswith("[::1]:")
        assert get(exporter.address, "/health")[0] == 200
