"""What the frozen blocks below the lowest adapter compute for each text, kept on disk (``run.cache_hidden_states``).

With adapters in the upper blocks only, the lower ones give the same hidden states in every step, round and evaluation.
They are computed once per text, in batches that depend on the texts alone, by whichever processes are there, and read
back memory-mapped. Results differ from running the whole model by rounding only; where a model passes more from block
to block than hidden states this is refused, by trial.

A hidden state tells nearly as much as its text. It lies in the cache directory of whoever holds the text, and never
leaves it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedlab.data import FederatedData
from fedlab.data.cache import cache_directory
from fedlab.data.collate import Tokens, by_length
from fedlab.data.hidden_states import HiddenStates
from fedlab.errors import ConfigError
from fedlab.files import replacing
from fedlab.models.blocks import find_blocks, stepping_over
from fedlab.models.loaded import PEFT_PREFIX, LoadedModel
from fedlab.models.quantised import kind_of
from fedlab.models.watch import watching

PART = 4096  # texts per file
BATCH = 64  # texts per forward pass
TRIAL = 4  # texts on which the model is tried
TOLERANCE = 1e-4  # relative difference of logits; float32 leaves 1e-6
SETTING = "run.cache_hidden_states"


def cache_hidden_states(model: LoadedModel, data: FederatedData) -> FederatedData:
    """The same data, whose batches carry ``hidden``; computes and stores what is not there yet.

    Raises ConfigError if the lowest block is adapted, if the model's blocks cannot be stepped over, or if the disk is
    too small.
    """
    if getattr(model.module.config, "is_encoder_decoder", False):
        raise ConfigError(
            f"{SETTING} = true is for models with one stack of blocks; this one has an encoder and a decoder that reads"
            f" it: set {SETTING} = false"
        )
    if any(kind_of(layer) is not None for layer in model.module.modules()):
        raise ConfigError(
            f"{SETTING} = true keeps what weights of a base give by the weights' bytes, which quantised ones"
            f' (model.quantize) do not tell alone; set {SETTING} = false, or model.quantize = "none"'
        )
    adapted = [PEFT_PREFIX + name for name in model.scale]
    blocks, lowest = find_blocks(model.module, adapted, SETTING)
    if lowest == 0:
        raise ConfigError(
            f"{SETTING} = true, but the lowest block has an adapter: nothing below it to cache; set"
            " lora.layers_to_transform"
        )
    tokens = data.tokens
    lengths = tokens.lengths(np.arange(len(tokens)))
    files = list(by_length(lengths, PART))  # texts of each file
    extra, width, dtype = _try(model, tokens, blocks[:lowest], files[-1][-TRIAL:])
    folder = cache_directory() / "hidden-states" / _identity(model, tokens, blocks[lowest:])
    _require_space(folder, int(lengths.sum()) * width * dtype.itemsize)
    starts, part_of = np.empty(len(tokens), np.int64), np.empty(len(tokens), np.int64)
    paths, shapes = [], []
    for number, texts in enumerate(files):
        own = lengths[texts]
        starts[texts], part_of[texts] = np.cumsum(own) - own, number
        paths.append(folder / f"{number:05d}.npy")
        shapes.append((int(own.sum()), width))
    for wait in (False, True):  # first whatever nobody works at, then what the others have not finished
        for texts, path, shape in zip(files, paths, shapes, strict=True):
            with _alone(path, wait) as mine:
                if mine and _open(path, shape) is None:
                    _store(path, _compute(model, tokens, blocks[lowest - 1], texts))
    parts = [part for path, shape in zip(paths, shapes, strict=True) if (part := _open(path, shape)) is not None]
    model.lower = (blocks[:lowest], extra)
    return replace(data, hidden_states=HiddenStates(dtype, starts, part_of, parts))


def _append(seen: list[Any], _: int, x: Tensor | None, output: Any) -> None:
    seen.append(output)


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _try(
    model: LoadedModel, tokens: Tokens, lower: list[nn.Module], indices: np.ndarray
) -> tuple[int, int, torch.dtype]:
    """Form, width and type of the last lower block's output, tried on some texts.

    Raises ConfigError unless the logits need nothing else of the lower blocks.
    """
    batch = tokens.batch(indices, model.tokenizer.pad_token_id)
    seen: list[Any] = []
    before = {name: parameter.detach().clone() for name, parameter in model.parameters.items()}
    try:
        with torch.no_grad(), watching({0: lower[-1]}, partial(_append, seen)):
            model.logits(batch)
            for name, parameter in model.parameters.items():
                if name.endswith("lora_B"):
                    parameter.fill_(0.01)
            wanted = model.logits(batch)
        if not torch.equal(_hidden(seen[0]), _hidden(seen[1])):
            raise ConfigError(
                f"{SETTING}: an adapter below the lowest adapted block changes what is to be cached; set {SETTING} ="
                " false"
            )
        extra = len(seen[1]) - 1 if isinstance(seen[1], tuple) else -1
        shape = (*batch["input_ids"].shape, _hidden(seen[1]).shape[-1])
        try:
            with torch.no_grad(), stepping_over(lower, _hidden(seen[1]), extra):
                gap = float((model.logits(batch) - wanted).norm() / wanted.norm())
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ConfigError(
                f"{SETTING}: this model's blocks cannot be stepped over ({error}); set {SETTING} = false"
            ) from None
        if _hidden(seen[1]).shape != shape or not gap < TOLERANCE:
            raise ConfigError(f"{SETTING}: this model's blocks pass on more than hidden states; set {SETTING} = false")
    finally:
        with torch.no_grad():
            for name, parameter in model.parameters.items():
                parameter.copy_(before[name])
    return extra, shape[-1], _hidden(seen[1]).dtype


def _compute(model: LoadedModel, tokens: Tokens, last: nn.Module, indices: np.ndarray) -> np.ndarray:
    """Hidden states of these texts one after the other, [tokens, H]; 16-bit floats as their bits."""
    rows: list[Tensor] = []
    for first in range(0, len(indices), BATCH):
        batch = tokens.batch(indices[first : first + BATCH], model.tokenizer.pad_token_id)
        seen: list[Any] = []
        with torch.inference_mode(), watching({0: last}, partial(_append, seen)):
            model.objective.visit(model, batch)
        rows.append(_hidden(seen[0])[batch["attention_mask"].to(model.device).bool()].cpu())
    flat = torch.cat(rows)
    if not bool(torch.isfinite(flat).all()):
        raise ConfigError(f'{SETTING}: hidden states are NaN or infinite; use run.dtype = "float32"')
    return (flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat).numpy()


def _identity(model: LoadedModel, tokens: Tokens, upper: list[nn.Module]) -> str:
    """Name of what determines the hidden states: the lower weights, the texts' tokens, and what computes them."""
    result = hashlib.sha256(
        json.dumps([PART, BATCH, torch.__version__, model.device.type, torch.get_num_threads()]).encode()
    )
    skipped = {id(p) for block in upper for p in block.parameters()} | {id(p) for p in model.parameters.values()}
    for name, parameter in [*model.module.named_parameters(), *model.module.named_buffers()]:
        if id(parameter) not in skipped and ".modules_to_save." not in name and ".original_module." not in name:
            value = parameter.detach().cpu().contiguous()
            result.update(
                f"{name}{value.dtype}{tuple(value.shape)}".encode()
                + value.reshape(-1).view(torch.uint8).numpy().tobytes()
            )
    for array in (tokens.ids, tokens.offsets, tokens.types):
        result.update(b"none" if array is None else np.ascontiguousarray(array).tobytes())
    return result.hexdigest()[:32]


def _require_space(folder: Path, needed: int) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    needed -= sum(path.stat().st_size for path in folder.glob("*.npy"))
    if needed > (free := shutil.disk_usage(folder).free):
        raise ConfigError(
            f"{SETTING} needs {needed / 1e9:.1f} GB in {cache_directory()}, which has {free / 1e9:.1f} GB free; point"
            f" FEDLAB_CACHE to a larger disk, shorten data.max_length, or set {SETTING} = false"
        )


@contextmanager
def _alone(path: Path, wait: bool) -> Iterator[bool]:
    """Whether this process may work at a file now; it is let go when a process dies, however it dies."""
    with path.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _store(path: Path, rows: np.ndarray) -> None:
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, rows, allow_pickle=False)


def _open(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The stored array, memory-mapped; None if it is not there or was cut off."""
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return array if array.shape == shape else None
