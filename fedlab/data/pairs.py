"""Prompts with answers, and who owns them, from what is installed: for objectives that generate.

``code``: functions of installed libraries without their docstring, and its first sentence; the owner is the library.
``definitions``: WordNet's words and their glosses; the owner is the lexicographer file.
"""

from __future__ import annotations

import ast
import hashlib
import warnings
from importlib import metadata
from pathlib import Path

import numpy as np

from fedlab.config.data import DataSection
from fedlab.data import docstrings, wordnet
from fedlab.data.cache import cached_arrays
from fedlab.data.corpus import Corpus, written
from fedlab.errors import ConfigError

LIBRARY, LEXNAME = "library", "lexname"  # what data.partition.column may name
LONGEST = 260  # characters of a function
PROMPT, WORD = "What does this function do?\n\n", "Define: "
SEPARATOR = "\x1f"  # between the columns of a cached line; no source of Python has it


def check_code(data: DataSection) -> None:
    """Raise ConfigError unless enough libraries are installed."""
    docstrings.check(data)
    _check_owner(data, LIBRARY)


def load_code(data: DataSection) -> Corpus:
    """About 10,000 short functions; read once for a set of installed versions, then from the cache."""
    check_code(data)
    key = {"versions": docstrings.installed(), "longest": LONGEST, "rules": 1}
    lines = cached_arrays("code", key, _collect)["lines"].tobytes().decode("utf-8", "surrogatepass").split("\0")
    rows = [line.split(SEPARATOR) for line in lines]
    return Corpus(
        "code",
        [PROMPT + code for _, code, _ in rows],
        written([said for *_, said in rows]),
        natural=[r[0] for r in rows],
    )


def check_definitions(data: DataSection) -> None:
    """Raise ConfigError unless WordNet's files are there."""
    wordnet.check(data)
    _check_owner(data, LEXNAME)


def load_definitions(data: DataSection) -> Corpus:
    """A word of every synset and its gloss; the first gloss of a word only, so that a prompt has one answer."""
    parts = wordnet.parts_of(data.subset)
    directory, seen = wordnet.find(data.path, parts), dict[str, tuple[str, str]]()
    for part in parts:
        for line in (directory / f"data.{part}").read_text(encoding="utf-8", errors="replace").splitlines():
            if line[:1].isdigit():
                gloss, owner = wordnet.parse(line)
                seen.setdefault(line.split(" ", 5)[4].replace("_", " ").partition("(")[0], (gloss, owner))
    texts = [f"{WORD}{word}" for word in seen]
    glosses, owners = zip(*seen.values(), strict=True)
    return Corpus("definitions", texts, written(list(glosses)), natural=list(owners))


def _check_owner(data: DataSection, column: str) -> None:
    if data.partition.column not in (None, column):
        raise ConfigError(
            f'data.partition.column = {data.partition.column!r}: data.source = "{data.source}" has one column of'
            f" owners, {column!r}"
        )


def _collect() -> dict[str, np.ndarray]:
    rows: dict[tuple[str, str], str] = {}
    for library in docstrings.installed():
        for code, sentence in _functions(library):
            rows.setdefault((code, sentence), library)
    lines = "\0".join(SEPARATOR.join((library, *pair)) for pair, library in rows.items())
    return {"lines": np.frombuffer(lines.encode("utf-8", "surrogatepass"), dtype=np.uint8)}


def _functions(library: str) -> list[tuple[str, str]]:
    """(code without its docstring, first sentence of it) of a library's short functions, in the order of a hash of
    their file's path.
    """
    files = [
        f for f in metadata.distribution(library).files or [] if f.suffix == ".py" and not docstrings.is_test(f.parts)
    ]
    files.sort(key=lambda f: hashlib.sha256(f.as_posix().encode()).digest())
    found: dict[tuple[str, str], None] = {}
    for file in files:
        for pair in _of_file(Path(str(file.locate()))):
            found.setdefault(pair)
            if len(found) == 2 * docstrings.PER_LIBRARY:
                return list(found)
    return list(found)


def _of_file(path: Path) -> list[tuple[str, str]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_text(encoding="utf-8"))
            return [pair for node in ast.walk(tree) if (pair := _pair(node)) is not None]
    except (OSError, ValueError, SyntaxError, RecursionError):
        return []


def _pair(node: ast.AST) -> tuple[str, str] | None:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
        return None
    docstring = ast.get_docstring(node)
    sentence = docstrings.first_sentence(docstring) if docstring else None
    if sentence is None:
        return None
    node.body = node.body[1:]
    code = ast.unparse(node)
    return (code, sentence) if len(code) <= LONGEST and "\0" not in code + sentence else None
