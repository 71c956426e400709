"""A disk that is full, at a client and at the server."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlab.errors import Unwritable
from fedlab.protocol import Frame
from fedlab.protocol.failures import explained


def full_for(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No byte of a file whose path has this pattern reaches the disk."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if pattern in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize(("place", "charges"), [("south/ledger/south.jsonl", 2), ("south/ledger/kept", 3)])
def test_a_client_whose_disk_is_full_sits_a_round_out_and_is_there_again_in_the_next(
    place: str, charges: int, sites: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    world = sites("north", "south")

    def fault(asked: Any) -> Frame:
        if (asked.site.name, asked.kind, asked.round) == ("south", "train", 2):
            with monkeypatch.context() as patch:
                full_for(place, patch)
                return asked.answer()
        return asked.answer()

    world.fault = fault
    result = world.run("run.rounds=3").result
    assert (result["status"], result["rounds"]) == ("completed", 3)
    assert world.excluded() == [{}, {"south": explained("storage")}, {}]
    assert "No space left on device" in world["south"].log
    assert world["south"].kinds().count("CHARGE") == charges, "what could not be written down was not done"
    world.check_nothing_is_lost()


@pytest.mark.parametrize("place", ["run/ledger/south", "receipts.jsonl", "latest.json"])
def test_a_server_whose_disk_is_full_says_so_and_goes_on_when_there_is_room(
    place: str, sites: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    world = sites("north", "south")
    with monkeypatch.context() as patch:

        def fault(asked: Any) -> Frame:
            reply = asked.answer()
            if asked.kind == "train":
                full_for(place, patch)
                if place.startswith("run/ledger"):
                    full_for_writing(place, patch)
            return reply

        world.fault = fault
        with pytest.raises(Unwritable) as caught:
            world.run()
    assert str(caught.value).startswith(f"cannot write {world.path}")
    assert str(caught.value).endswith(f"then continue with: fedlab resume {world.path}")
    assert caught.value.exit_code == 4
    world.fault = lambda asked: asked.answer()
    result = world.resume().result
    assert (result["status"], result["rounds"]) == ("completed", 2)
    for site in world.sites:
        assert site.kinds().count("CHARGE") == 2, "the round that was cut off is answered again for no further charge"
    world.check_nothing_is_lost()


def full_for_writing(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are written without being synced: they cannot be opened to write."""
    real = Path.open

    def opened(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if pattern in str(self) and mode != "r" and "+" in mode + "+" and "b" in mode and mode != "rb":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return real(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)
