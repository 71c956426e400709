"""A model in one GGUF file, as some packages carry one: converted once into the cache, in Hugging Face's format.

Its quantised weights are read as the numbers they stand for, float32, so nothing is rounded again; adapters are trained
on these. Loading such a file takes half a minute for 135 M parameters, its conversion a few seconds.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from fedlab.data.cache import beside, cache_directory
from fedlab.errors import ConfigError
from fedlab.files import naming

FORMAT = 1  # raise when the meaning of a converted directory changes


def converted(file: Path) -> Path:
    """The directory that holds the model of a GGUF file; made at the first call, named by the file's content.

    Raises ConfigError for a file that transformers cannot read.
    """
    target = cache_directory() / "gguf" / f"{_content(file)}-{FORMAT}"
    if (target / "config.json").is_file():
        return target
    with beside(target) as temporary:
        model, tokenizer = _read(file)
        with naming(target):
            tokenizer.save_pretrained(temporary)
            model.save_pretrained(temporary)
        try:
            temporary.rename(target)
        except OSError:
            if not (target / "config.json").is_file():  # else another process was first
                raise
    return target


def _content(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:32]


def _read(file: Path) -> tuple[Any, Any]:
    """Model and tokenizer, float32. Raises ConfigError."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    try:
        model = AutoModelForCausalLM.from_pretrained(str(file.parent), dtype=torch.float32, **place)
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **place)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{str(file)!r} cannot be read as a GGUF model: {reason}") from None
    for holder, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(holder, name):  # it is not quantised any more, but would refuse to be saved
            delattr(holder, name)
    return model, tokenizer
