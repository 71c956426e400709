"""Prompts with answers, and who owns them, from what is installed: for objectives that generate.

``code``: functions of installed libraries without their docstring, and its first sentence; the owner is the library.
``definitions``: WordNet's words and their glosses; the owner is the lexicographer file.
"""

from __future__ import annotations

import ast

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
    seen: dict[str, tuple[str, str]] = {}
    for line in wordnet.synsets(data):
        gloss, owner = wordnet.parse(line)
        if gloss:
            seen.setdefault(line.split(" ", 5)[4].replace("_", " ").partition("(")[0], (gloss, owner))
    return Corpus(
        "definitions",
        [f"{WORD}{word}" for word in seen],
        written([gloss for gloss, _ in seen.values()]),
        natural=[owner for _, owner in seen.values()],
    )


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
    """(code without its docstring, first sentence of it) of a library's short functions."""
    found: dict[tuple[str, str], None] = {}
    for tree in docstrings.trees(library):
        try:
            pairs = [pair for node in docstrings.blocks(tree) if (pair := _pair(node)) is not None]
        except RecursionError:  # a file of nesting that cannot be written again
            continue
        for pair in pairs:
            found.setdefault(pair)
            if len(found) == 2 * docstrings.PER_LIBRARY:
                return list(found)
    return list(found)


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
