"""What a run is: frozen models read from TOML. ``RunConfig.load(path)`` is the way in."""

from fedlab.config.run import RunConfig

__all__ = ["RunConfig"]
