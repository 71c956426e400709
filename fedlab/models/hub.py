"""Where a model's files are, without importing torch: a directory, an installed package that carries one,
or a hub id.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from fedlab.config.sections import ModelSection
from fedlab.errors import ConfigError


def locate(model: ModelSection) -> str:
    """Where the model's files are: a directory (given, or inside an installed package), or the hub id as it stands."""
    if Path(model.name).is_dir():
        return str(Path(model.name).resolve())
    if model.name.startswith((".", "/", "~")):
        raise ConfigError(f"model.name = {model.name!r} is not a directory")
    package = model.name.replace("-", "_").replace(".", "_")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for candidate in (Path(folder) / "model", Path(folder)):
            if (candidate / "config.json").is_file():
                return str(candidate)
        if len(files := sorted(Path(folder).glob("*.gguf"))) == 1:
            from fedlab.models.gguf import converted  # here: transformers comes with it

            return str(converted(files[0]))
    return model.name


def check_model(model: ModelSection) -> None:
    """Raise ConfigError if the model cannot be had, without importing torch models or loading a weight."""
    from fedlab.models.quantised import check_quantiser  # here: torch comes with it

    check_quantiser(model)
    location = locate(model)
    if Path(location).is_dir():
        if not (Path(location) / "config.json").is_file():
            raise ConfigError(f"model.name = {model.name!r} has no config.json: not a Hugging Face model directory")
        return
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        hf_hub_download(location, "config.json", revision=model.revision, etag_timeout=10)
    except HFValidationError:
        raise ConfigError(
            f"model.name = {model.name!r} is neither a directory, an installed package nor a hub id"
        ) from None
    except Exception as error:
        raise ConfigError(
            f"model.name = {model.name!r} is no directory and no installed model package, and the hub did not give it "
            f"({type(error).__name__}); check the spelling, or give a local directory"
        ) from None
