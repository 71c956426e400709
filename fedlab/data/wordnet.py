"""WordNet: from a gloss to its lexicographer file (45 classes, 26 of them nouns).

Debian's ``wordnet-base`` has the files.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fedlab.config.data import DataSection
from fedlab.data.corpus import Corpus, written
from fedlab.errors import ConfigError

# lexnames(5WN): the number of a lexicographer file is its position
LEXICOGRAPHER_FILES = (  # noqa: SIM905 (a list would take 45 lines)
    "adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body noun.cognition"
    " noun.communication noun.event noun.feeling noun.food noun.group noun.location noun.motive noun.object noun.person"
    " noun.phenomenon noun.plant noun.possession noun.process noun.quantity noun.relation noun.shape noun.state"
    " noun.substance noun.time verb.body verb.change verb.cognition verb.communication verb.competition"
    " verb.consumption verb.contact verb.creation verb.emotion verb.motion verb.perception verb.possession verb.social"
    " verb.stative verb.weather adj.ppl"
).split()
KEYS = frozenset({"path", "subset"})  # of [data]
PARTS = ("noun", "verb", "adj", "adv")
PLACES = ("/usr/share/wordnet", "/usr/share/wordnet-3.0", "/usr/local/share/wordnet", "/usr/local/WordNet-3.0/dict")


def find(path: str | None, parts: tuple[str, ...] = ("noun",)) -> Path:
    """The directory that holds ``data.<part>`` for all ``parts``, or ConfigError."""
    places = [path] if path is not None else list(PLACES)
    for place in places:
        directory = Path(place).expanduser()
        if all((directory / f"data.{part}").is_file() for part in parts):
            return directory
    files = ", ".join(f"data.{part}" for part in parts)
    raise ConfigError(
        f'data.source = "wordnet": no {files} in {", ".join(places)}; run make data (Debian, Ubuntu: apt-get install'
        " wordnet-base), or set data.path to a WordNet dict directory"
    )


def parts_of(subset: str | None) -> tuple[str, ...]:
    """``data.subset`` → the data files to read: noun (default), verb, adj, adv, or all."""
    if subset == "all":
        return PARTS
    if subset is not None and subset not in PARTS:
        raise ConfigError(
            f'data.subset = {subset!r} must be one of {", ".join(PARTS)} or all for data.source = "wordnet"'
        )
    return (subset or "noun",)


def check(data: DataSection) -> None:
    """Raise ConfigError unless the files of ``data.subset`` are there."""
    find(data.path, parts_of(data.subset))


def files(data: DataSection) -> list[tuple[str, Path]]:
    """(split, file) of all that is read."""
    parts = parts_of(data.subset)
    return [("train", find(data.path, parts) / f"data.{part}") for part in parts]


def place(data: DataSection) -> str | None:
    """Its directory, whether or not it is named."""
    try:
        return str(find(data.path, parts_of(data.subset)))
    except ConfigError:
        return data.path


def load(data: DataSection) -> Corpus:
    """All glosses of the subset, one example per synset."""
    found = [parse(line) for line in synsets(data)]
    return Corpus("wordnet", [text for text, _ in found], written([label for _, label in found]))


def synsets(data: DataSection) -> Iterator[str]:
    """The lines of the subset's files that hold a synset each."""
    parts = parts_of(data.subset)
    directory = find(data.path, parts)
    for part in parts:
        for line in (directory / f"data.{part}").read_text(encoding="utf-8", errors="replace").splitlines():
            if line[:1].isdigit():  # the licence's lines start with blanks
                yield line


def parse(line: str) -> tuple[str, str]:
    """One synset of a data file (wndb(5WN)) → (definition without its usage examples, lexicographer file)."""
    fields, _, gloss = line.partition(" | ")
    definition = gloss.strip().partition('; "')[0].strip()
    return definition or gloss.strip(), LEXICOGRAPHER_FILES[int(fields.split(" ", 2)[1])]
