"""The embedded default: first sentences of the docstrings of installed libraries; the label is the library.

The sources are read with ``ast`` and never imported. A library's own name is masked in its sentences, for it would give
the label away. The corpus depends on the installed versions and on nothing else.
"""

from __future__ import annotations

import ast
import hashlib
import re
import warnings
from collections import deque
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np

from fedlab.config.data import DataSection
from fedlab.data.cache import cached_arrays
from fedlab.data.corpus import Corpus, written
from fedlab.errors import ConfigError

# distribution → words that name it
LIBRARIES = {
    "matplotlib": ("matplotlib", "pyplot"),
    "networkx": ("networkx", "nx"),
    "numpy": ("numpy", "np"),
    "pandas": ("pandas", "pd"),
    "ray": ("ray", "rllib"),
    "scipy": ("scipy",),
    "sqlalchemy": ("sqlalchemy",),
    "sympy": ("sympy",),
    "torch": ("torch", "pytorch"),
    "transformers": ("transformers", "huggingface"),
}
PER_LIBRARY = 1000
MINIMUM_LIBRARIES = 8
_FIRST_SENTENCE = re.compile(r"(.+?[.!?])(?:\s+(?=[A-Z`'\"(:*])|$)")


def installed() -> dict[str, str]:
    """library → version, of those that are installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def check(data: DataSection) -> None:
    """Raise ConfigError unless enough libraries are installed."""
    if len(found := installed()) < MINIMUM_LIBRARIES:
        missing = sorted(set(LIBRARIES) - set(found))
        raise ConfigError(
            f'data.source = "docstrings" needs {MINIMUM_LIBRARIES} of its libraries; install {", ".join(missing)}'
        )


def load(data: DataSection) -> Corpus:
    """About 10 × 1,000 distinct sentences; read once for a set of installed versions, then from the cache."""
    check(data)
    key = {"versions": installed(), "per_library": PER_LIBRARY, "rules": 2}
    arrays = cached_arrays("docstrings", key, lambda: _as_arrays(*_collect()))
    lines = arrays["lines"].tobytes().decode("utf-8", "surrogatepass").split("\n")
    labels = written([line.partition("\t")[0] for line in lines])
    return Corpus("docstrings", [line.partition("\t")[2] for line in lines], labels)


def _as_arrays(texts: list[str], labels: list[str]) -> dict[str, np.ndarray]:
    lines = "\n".join(f"{label}\t{text}" for label, text in zip(labels, texts, strict=True))
    return {"lines": np.frombuffer(lines.encode("utf-8", "surrogatepass"), dtype=np.uint8)}


def _collect() -> tuple[list[str], list[str]]:
    """Sentences and their libraries."""
    sentences = {name: _sentences(name) for name in installed()}
    owners: dict[str, int] = {}
    for found in sentences.values():
        for sentence in found:
            owners[sentence] = owners.get(sentence, 0) + 1
    texts, labels = [], []
    for name, found in sentences.items():
        own = [s for s in found if owners[s] == 1]  # a sentence of two libraries has no label
        texts += own
        labels += [name] * len(own)
    return texts, labels


def _sentences(library: str) -> list[str]:
    """Up to PER_LIBRARY distinct masked sentences."""
    mask = mask_of(library)
    found: dict[str, None] = {}  # a set that keeps its order
    for tree in trees(library):
        for sentence in _docstrings(tree):
            found.setdefault(mask.sub("library", sentence))
            if len(found) == PER_LIBRARY:
                return list(found)
    return list(found)


def trees(library: str) -> Iterator[ast.Module]:
    """Every source file of a library that can be parsed, less its tests, in the order of a hash of their path, so that
    no folder dominates.
    """
    files = [f for f in metadata.distribution(library).files or [] if f.suffix == ".py" and not is_test(f.parts)]
    files.sort(key=lambda f: hashlib.sha256(f.as_posix().encode()).digest())
    for file in files:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(Path(str(file.locate())).read_text(encoding="utf-8"))
        except (OSError, ValueError, SyntaxError, RecursionError):
            continue
        yield tree


def mask_of(library: str) -> re.Pattern[str]:
    """What is replaced in a library's sentences: its names, also inside identifiers. Short ones (np, pd, nx, ray) only
    where no letter touches them, for they occur inside other words (array).
    """
    names = (re.escape(n) if len(n) > 4 else rf"(?<![a-z]){re.escape(n)}(?![a-z])" for n in LIBRARIES[library])
    return re.compile("|".join(names), re.IGNORECASE)


def is_test(parts: tuple[str, ...]) -> bool:
    """Whether a file is a test, or somebody else's that a library brings."""
    return any(part.startswith(("test", "_test", "conftest")) or part == "_vendor" for part in parts)


def _docstrings(tree: ast.Module) -> list[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in blocks(tree) if isinstance(node, kinds))
    return [sentence for text in found if text and (sentence := first_sentence(text))]


def blocks(tree: ast.Module) -> Iterator[ast.AST]:
    """The nodes of ``ast.walk`` in its order (breadth first), less expressions: they are most of a tree and hold no
    docstring.
    """
    nodes: deque[ast.AST] = deque([tree])
    while nodes:
        node = nodes.popleft()
        for field in ("body", "handlers", "orelse", "finalbody", "cases"):
            children = getattr(node, field, None)
            if isinstance(children, list):  # the body of a lambda or a conditional expression is none
                nodes.extend(children)
        yield node


def first_sentence(docstring: str) -> str | None:
    """The first sentence on one line, if it says something: 4 to 60 words, 20 to 300 characters."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    match = _FIRST_SENTENCE.match(paragraph)
    sentence = match.group(1) if match else paragraph
    if "===" in sentence or "---" in sentence:  # a heading and its underline
        return None
    return sentence if 20 <= len(sentence) <= 300 and 4 <= len(sentence.split()) <= 60 else None
