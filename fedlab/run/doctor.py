"""``fedlab doctor``: look, do not touch. Nothing is started, nothing is fetched."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Literal

from rich.table import Table
from rich.text import Text

from fedlab.config.sections import DataSection, ModelSection
from fedlab.errors import ConfigError
from fedlab.run.output import console

PINNED = {"flwr": "1.41.", "ray": "2.55.1"}
NEEDED = (
    "torch",
    "flwr",
    "ray",
    "transformers",
    "peft",
    "opacus",
    "dp-accounting",
    "datasets",
    "flwr-datasets",
    "cryptography",
)
GB = 1 << 30


def examine() -> bool:
    """Print one row per check; True if the quickstart can run on this machine."""
    rows = [*_packages(), *_hardware(), *_content()]
    table = Table(box=None, pad_edge=False)
    for column in ("", "what", "found"):
        table.add_column(column)
    for required, fine, what, found in rows:
        mark = Text("ok", "green") if fine else Text("missing", "red") if required else Text("absent", "yellow")
        table.add_row(mark, what, found)
    console().print(table)
    return all(fine for required, fine, _, _ in rows if required)


Row = tuple[bool, bool, str, str]  # (needed for the quickstart, fine, what, found)


def _packages() -> list[Row]:
    rows: list[Row] = [(True, sys.version_info >= (3, 11), "Python >= 3.11", sys.version.split()[0])]
    for name in NEEDED:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            rows.append((True, False, name, "not installed; run make setup"))
            continue
        pin = PINNED.get(name, "")
        rows.append((True, version.startswith(pin), f"{name} {pin}{'*' if pin.endswith('.') else ''}".strip(), version))
    return rows


def _hardware() -> list[Row]:
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB
    free = shutil.disk_usage(Path.cwd()).free / GB
    gpus = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return [
        (True, memory >= 4, "memory >= 4 GB", f"{memory:.0f} GB"),
        (True, free >= 1, "disk >= 1 GB free", f"{free:.0f} GB"),
        (False, (os.cpu_count() or 1) >= 2, "cores >= 2", str(os.cpu_count())),
        (False, bool(gpus), "GPU", gpus or "none; simulations run on the CPU"),
    ]


def _content() -> list[Row]:
    from fedlab.data.sources import check_source
    from fedlab.models.hub import locate

    rows: list[Row] = []
    default = ModelSection()
    there = Path(locate(default)).is_dir()
    rows.append((True, there, f"model {default.name}", locate(default) if there else "not installed; run make setup"))
    sources: tuple[tuple[Literal["docstrings", "wordnet"], bool], ...] = (("docstrings", True), ("wordnet", False))
    for source, needed in sources:
        try:
            check_source(DataSection(source=source))
            rows.append((needed, True, f"data source {source}", "available"))
        except ConfigError as error:
            rows.append((needed, False, f"data source {source}", str(error).splitlines()[0]))
    rows.append(
        (False, importlib.util.find_spec("tensorboard") is not None, "tensorboard (run.tensorboard = true)", "")
    )
    return rows
