"""A model in one GGUF file, as some packages carry one: converted once into the cache, in Hugging Face's format.

Its quantised weights are read as the numbers they stand for, float32, so nothing is rounded again; adapters are trained
on these. Loading such a file takes half a minute for 135 M parameters, its conversion a few seconds.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

from fedlab.data.cache import cache_directory
from fedlab.errors import ConfigError

FORMAT = 1  # raise when the meaning of a converted directory changes


def converted(file: Path) -> Path:
    """The directory that holds the model of a GGUF file; made at the first call, named by the file's content.

    Raises ConfigError for a file that transformers cannot read.
    """
    target = cache_directory() / "gguf" / f"{_content(file)}-{FORMAT}"
    if (target / "config.json").is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    except OSError as error:
        raise ConfigError(
            f"cannot write to {target.parent}: {error.strerror}; set FEDLAB_CACHE to a directory that can be written"
        ) from None
    try:
        _convert(file, temporary)
        if not (target / "config.json").is_file():
            temporary.rename(target)
    except FileExistsError:  # another process was first
        pass
    except (OSError, ValueError, KeyError, ImportError) as error:
        if not (target / "config.json").is_file():
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"{str(file)!r} cannot be read as a GGUF model: {reason}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _content(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:32]


def _convert(file: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(str(file.parent), dtype=torch.float32, **place)
    for holder, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(holder, name):  # it is not quantised any more, but would refuse to be saved
            delattr(holder, name)
    AutoTokenizer.from_pretrained(str(file.parent), **place).save_pretrained(target)
    model.save_pretrained(target)
