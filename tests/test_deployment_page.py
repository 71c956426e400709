"""docs/deployment.md: every command on it is one, with options that exist; its files are read by what reads such."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from fedlab.cli import app
from fedlab.config import RunConfig
from fedlab.config.client import ClientFile
from fedlab.config.server import ServerFile

PAGES = ("docs/deployment.md", "docs/threat-model.md", "docs/faults.md", "docker/README.md", "README.md")
ROOT = Path(__file__).parents[1]
TEXT = (ROOT / PAGES[0]).read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [line for kind, block in BLOCKS if not kind for line in block.splitlines() if line.startswith("fedlab ")]
FILES = [block for kind, block in BLOCKS if kind == "toml"]


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_is_one(line: str):
    command = typer.main.get_command(app)
    context = None
    words = shlex.split(line)[1:]
    while hasattr(command, "commands"):
        assert words[0] in command.commands, line
        command, words = command.commands[words[0]], words[1:]
    context = command.make_context("fedlab", words, resilient_parsing=False)
    assert context is not None


def test_the_page_has_commands_and_files():
    assert len(COMMANDS) >= 9
    assert len(FILES) == 3


def test_the_files_are_read(tmp_path: Path):
    server, run, client = FILES
    assert RunConfig.parse(run).privacy.noise == "secure"
    assert ServerFile.parse(server, tmp_path).test is not None
    assert ClientFile.parse(client.replace('sha256 = ["…"]', "# sha256"), tmp_path).client.id == "north"


@pytest.mark.parametrize("page", PAGES)
def test_tests_and_pages_that_are_named_are_there(page: str):
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(r"`(tests/[\w/.]+?)`", text)) | set(re.findall(r"`(tests/[\w/]+\.py)", text))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    for link in re.findall(r"\]\(([\w./-]+\.md)\)", text):
        assert (ROOT / page).parent.joinpath(link).exists(), link
    shown = set(re.findall(r"`(test_\w+?)_?…?`", text))
    known = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name in sorted(shown) if name not in known] == []
