"""A finished run's model outside fedlab: opened to be asked, or merged into its base as a plain transformers model."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fedlab.errors import ConfigError, RunFailed
from fedlab.models.card import merged_card
from fedlab.models.encoder import SentenceClassifier
from fedlab.models.loaded import LoadedModel
from fedlab.models.loading import device_of, load_tokenizer, quiet_seeded
from fedlab.models.plain import EXACT, load_plain, saved
from fedlab.models.positions import table_rows
from fedlab.models.trial import together, trial_rows
from fedlab.objectives.language import LanguageModel

STATEMENT = "PRIVACY.md"  # of a run; goes with what was made of it
RESULT = "result.json"


def open_run(run: str | Path) -> LoadedModel:
    """The model that a run has saved, with its tokenizer and its objective, on the run's device.

    Raises ConfigError for a directory that holds no run or no adapter, or a damaged one.
    """
    path = Path(run)
    with _damage_told(path):
        config, objective = saved(path)
        dtype = torch.bfloat16 if config.run.dtype == "bfloat16" else torch.float32
        device = device_of(config.run.device)
        plain = load_plain(config.model, objective, path / "adapter", dtype, device)
    return LoadedModel(cast(Any, plain.to(device)), load_tokenizer(config.model), device, objective)


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    """Raise ConfigError for whatever a run's adapter, or its files beside it, make a library trip over."""
    from safetensors import SafetensorError

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (SafetensorError, ValueError, LookupError, RuntimeError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{str(path / 'adapter')!r} is damaged, or of another model than model.name in run.toml ({reason}); put"
            " back what the run saved"
        ) from None


def prompts_of(model: LoadedModel, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of what a model reads before it answers.

    Raises ConfigError for a model that answers with no text, and for a prompt without text or with too much.
    """
    if not isinstance(model.objective, LanguageModel):
        raise ConfigError(
            "objective.name: this run's model gives no text; load it with a pipeline of transformers, as"
            " adapter/README.md shows"
        )
    if empty := [prompt for prompt in prompts if not prompt.strip()]:
        raise ConfigError(f"--prompt {empty[0]!r} has no text")
    found = [model.objective.prompt_ids(prompt, model.tokenizer) for prompt in prompts]
    limit, longest = table_rows(model.module), max(map(len, found), default=0)
    if limit is not None and longest > limit:
        raise ConfigError(
            f"--prompt: one is {longest} tokens long as the model reads it, which has positions for {limit}; shorten it"
        )
    return found


def merge(run: str | Path, out: str | Path) -> Path:
    """Write a run's base with its adapter added to the weights, as ``save_pretrained`` does: tokenizer, model card and
    the run's privacy statement beside it. It is loaded again, and must give the same logits.

    Args:
        run: directory of a finished run.
        out: a directory that is made; an empty one may be there.

    Raises:
        ConfigError: there is no adapter, ``out`` is taken, or the base is no plain transformers model.
        RunFailed: what was written gives other logits.
    """
    path, target = Path(run), Path(out).resolve()
    with _damage_told(path):
        config, _ = saved(path)
    if not (path / RESULT).is_file():
        raise ConfigError(f"{str(run)!r} has no {RESULT}: the run is not finished; fedlab resume {str(run)!r}")
    if target.is_relative_to(path.resolve()):
        raise ConfigError(f"{str(out)!r} lies in the run directory, whose files are sealed; give a place outside it")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{str(out)!r} is there already; give another directory")
    if config.model.quantize != "none":
        raise ConfigError(
            f'model.quantize = "{config.model.quantize}": an adapter that is merged into weights of few bits would be'
            " rounded to them; load both with peft, as adapter/README.md shows"
        )
    model = open_run(path)
    if isinstance(model.module.get_base_model(), SentenceClassifier):
        raise ConfigError(
            f"model.name = {config.model.name!r} is a sentence encoder, whose pooling transformers does not know: it"
            " cannot be merged into a plain model; use fedlab.models.plain.load_run"
        )
    batch = together(trial_rows(model), cast(int, model.tokenizer.pad_token_id))
    with torch.no_grad():
        wanted = model.outputs(batch).logits.float()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        with quiet_seeded(0):
            merged: Any = cast(Any, model.module).merge_and_unload(safe_merge=True)
            plainly_named(merged)
            merged.save_pretrained(temporary)
            model.tokenizer.save_pretrained(temporary)
        statement = path / STATEMENT
        if statement.is_file():
            shutil.copyfile(statement, temporary / STATEMENT)
        result = json.loads((path / RESULT).read_text(encoding="utf-8"))
        (temporary / "README.md").write_text(merged_card(config, result), encoding="utf-8")
        _check(model, temporary, batch, wanted)
        _readable(temporary)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _readable(directory: Path) -> None:
    """Give a directory and its files the modes that the user's umask gives: some writers keep theirs to their owner."""
    os.umask(umask := os.umask(0))
    directory.chmod(0o777 & ~umask)
    for file in directory.rglob("*"):  # some tokenizers keep templates in a directory of their own
        file.chmod((0o777 if file.is_dir() else 0o666) & ~umask)


def plainly_named(merged: Any) -> None:
    """Let a model say of itself what was loaded: attention of the library's own, keys and values kept."""
    from fedlab.models.attention import NAME

    if getattr(merged.config, "_attn_implementation", None) == NAME:
        merged.set_attn_implementation("sdpa")
    merged.config.use_cache = True


def _check(model: LoadedModel, written: Path, batch: dict[str, torch.Tensor], wanted: torch.Tensor) -> None:
    """Raise RunFailed unless what transformers loads from the directory gives the wanted logits."""
    import transformers

    auto = getattr(transformers, model.objective.auto_class)
    dtype = next(model.module.parameters()).dtype
    with quiet_seeded(0):
        loaded: nn.Module = auto.from_pretrained(written, dtype=dtype, local_files_only=True).eval().to(model.device)
    inputs = {name: value.to(model.device) for name, value in model.objective.inputs(model, batch).items()}
    with torch.no_grad():
        found = cast(Any, loaded)(**inputs).logits.float()
    # W + s·B·A is rounded once as a sum, and in the forward pass as two products
    limit = 0.1 if dtype == torch.bfloat16 else 100 * EXACT
    if not (found - wanted).abs().max() <= limit * wanted.abs().max().clamp(min=1.0):
        raise RunFailed(f"the merged model's logits differ from the run's by {float((found - wanted).abs().max()):.2g}")
