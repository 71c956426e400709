from __future__ import annotations

import threading
from pathlib import Path

import pytest

from fedlab.files import below, create, replacing, write


def test_write_replaces_and_leaves_nothing_else(tmp_path: Path):
    target = tmp_path / "result.json"
    write(target, "ε = 6\n")
    write(target, b"\x00\xff")
    assert target.read_bytes() == b"\x00\xff"
    assert list(tmp_path.iterdir()) == [target]


def test_an_error_while_writing_keeps_the_old_file_and_removes_the_part(tmp_path: Path):
    target = tmp_path / "state"
    write(target, "old")

    def half() -> None:
        with replacing(target) as temporary:
            temporary.write_text("ne")
            assert target.read_text() == "old"
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        half()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_block_that_writes_nothing_is_an_error_and_changes_nothing(tmp_path: Path):
    target = tmp_path / "state"
    write(target, "old")
    with pytest.raises(FileNotFoundError), replacing(target):
        pass
    assert target.read_text() == "old"


def test_readers_never_see_a_part_while_threads_write(tmp_path: Path):
    target, texts = tmp_path / "state", [letter * 50_000 for letter in "abcd"]
    write(target, texts[0])
    threads = [threading.Thread(target=lambda t=text: [write(target, t) for _ in range(5)]) for text in texts]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert target.read_text() in texts
    assert target.read_text() in texts
    assert list(tmp_path.iterdir()) == [target]


def test_create_makes_once_with_the_mode_and_never_replaces(tmp_path: Path):
    target = tmp_path / "key.pem"
    assert create(target, "first")
    assert not create(target, "second")
    assert target.read_text() == "first"
    assert target.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [target]


def test_of_many_that_create_at_once_one_wins(tmp_path: Path):
    target, won = tmp_path / "key.pem", []
    threads = [threading.Thread(target=lambda i=i: create(target, str(i)) and won.append(i)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert target.read_text() == str(won[0])
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/etc/passwd", "a\\b", "a\0b", "x/../../../../victim/tls", "./a"]
)
def test_no_name_leaves_its_directory(name: str, tmp_path: Path):
    with pytest.raises(ValueError, match="is no name of a file"):
        below(tmp_path, "keys", name)
    with pytest.raises(ValueError, match="is no name of a file"):
        below(tmp_path, name, "key.pem")


def test_a_name_is_a_file_of_its_directory(tmp_path: Path):
    assert below(tmp_path, "keys", "north.pem") == tmp_path / "keys" / "north.pem"
    with pytest.raises(ValueError, match="no name"):
        below(tmp_path)
