"""A run as a client on a machine of its own opens it: its own copy of the model, whatever the server says."""

from __future__ import annotations

from pathlib import Path

import pytest

from clients.check import check_data
from clients.own_session import own_config
from fedlab.config import RunConfig
from fedlab.config.client import ClientFile
from fedlab.errors import ConfigError

FILE = """
[client]
id = "north"
[data]
path = "records.csv"
text = "text"
label = "topic"
[models."{model}"]
{copy}
[policy]
min_sigma = 0.5
[budget]
epsilon = 4.0
"""


@pytest.mark.parametrize(
    ("copy", "name", "revision"),
    [
        ("", None, None),
        ('revision = "v2"', None, "v2"),
        ('path = "/somewhere/of/its/own"', "/somewhere/of/its/own", None),
    ],
)
def test_which_files_a_model_is_no_server_says(
    copy: str, name: str | None, revision: str | None, tiny_toml: str, tmp_path: Path
):
    config = RunConfig.parse(tiny_toml, ["model.revision=refs/pr/7"])
    own = own_config(config, ClientFile.parse(FILE.format(model=config.model.name, copy=copy), tmp_path))
    assert (own.model.name, own.model.revision) == (name or config.model.name, revision)


def test_a_model_that_is_none_of_its_own_is_refused(tiny_toml: str, tmp_path: Path):
    file = ClientFile.parse(FILE.format(model="another", copy=""), tmp_path)
    with pytest.raises(ConfigError, match="is none of this client's"):
        own_config(RunConfig.parse(tiny_toml), file)


@pytest.mark.parametrize("server", ["localhost", "https://fed.example.org:8443", "fed.example.org:8443/x", "h:0"])
def test_a_server_that_is_no_address_is_told_when_the_file_is_read(server: str, tmp_path: Path):
    text = FILE.format(model="m", copy="").replace('id = "north"', f'id = "north"\nserver = "{server}"')
    with pytest.raises(ConfigError, match=r"client\.server: .*is no host:port"):
        ClientFile.parse(text, tmp_path)


def test_records_that_are_not_there_are_told_by_the_check(tmp_path: Path):
    file = ClientFile.parse(FILE.format(model="m", copy=""), tmp_path)
    with pytest.raises(ConfigError, match=r"data\.path = '.*records\.csv' is not there"):
        check_data(file)
    (tmp_path / "records.csv").write_text("text,topic\n")
    check_data(file)
