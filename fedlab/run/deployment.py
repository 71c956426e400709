"""``deployment.json`` of a run directory: that its clients are on machines of their own, and what its server knows.

A run directory without one is a simulation's. It is written when the directory is made, so that ``fedlab resume`` goes
on as the run was begun.
"""

from __future__ import annotations

from pathlib import Path

import pydantic
from pydantic import Field

from fedlab.config.base import Section
from fedlab.config.server import PublicTest
from fedlab.errors import ConfigError
from fedlab.files import write

FILE = "deployment.json"


class Deployment(Section):
    """How a run is deployed."""

    server: str = Field(description="the server's file, or host:port of its control interface")
    keys: str | None = Field(default=None, description="directory of the keys, where the server's file does not say it")
    wait: float = Field(default=600.0, ge=0, description="seconds to wait for the clients that a round needs")
    retries: int = Field(default=1, ge=0, description="times that a round's missing clients are asked again")
    test: PublicTest | None = Field(default=None, description="the server's own public records to score the model on")
    rehearsal: bool = Field(default=False, description="seeded noise is let through: the run is not private")

    def write(self, run_path: Path) -> None:
        """Into a run directory."""
        write(run_path / FILE, self.model_dump_json(indent=1, exclude_none=True) + "\n", mode=0o600)

    @classmethod
    def of(cls, run_path: Path) -> Deployment | None:
        """That of a run directory; None for a simulation's. Raises ConfigError for a file that is none."""
        try:
            return cls.model_validate_json((run_path / FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except pydantic.ValidationError as error:
            raise ConfigError(f"{run_path / FILE} is damaged: {error.errors()[0]['msg']}") from None
