"""A saved adapter without fedlab: loaded as peft loads it, and held against the model that the run scored.

A run's scores say something about its adapter only if the files hold that model. So a run ends by reading them as
anybody would (the base from its own files, then ``PeftModel.from_pretrained``) and comparing logits.
"""

from __future__ import annotations

import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedlab.config import RunConfig
from fedlab.config.sections import ModelSection
from fedlab.errors import ConfigError, RunFailed
from fedlab.lora.state import RESIDUAL, State, modules, part_of
from fedlab.models.adapters import save_adapter, widened
from fedlab.models.attention import attend_in_float32
from fedlab.models.card import LABELS
from fedlab.models.loaded import PEFT_PREFIX, LoadedModel, state_name
from fedlab.models.loading import in_float32, load_base
from fedlab.models.trial import together, trial_rows
from fedlab.objectives import objective_class
from fedlab.objectives.base import Objective

# Largest difference of logits, relative to the largest logit (at least 1). The operations are the same and it is 0; but
# with a residual peft adds in another order than folding does, and where a GPU cannot hold the base twice, the CPU does
EXACT, FOLDED, ACROSS = 1e-5, 1e-4, 1e-3
REJECTED = ".rejected"  # what the directory of an adapter that differs is called, beside the others


def load_plain(
    model: ModelSection,
    objective: Objective,
    adapter: Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> nn.Module:
    """The base from its own files with the adapter of a directory, as ``PeftModel.from_pretrained`` loads it; on the
    CPU, a quantised one on ``device``. In 16 bits it attends and ends in float32, as a run does.
    """
    from peft import PeftModel

    base, head = load_base(model, objective, dtype, device)
    told = json.loads((adapter / LABELS).read_text(encoding="utf-8"))
    if "pad_token_id" in told:
        cast(Any, base).config.pad_token_id = told["pad_token_id"]
    if dtype == torch.bfloat16:
        attend_in_float32(base)
        for name in head:
            base.get_submodule(name).float()  # before peft copies it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = cast(nn.Module, PeftModel.from_pretrained(cast(Any, base), str(adapter)).eval())
    if dtype == torch.bfloat16:
        for name, layer in plain.named_modules():
            if ".modules_to_save." in name and any(True for _ in layer.parameters(recurse=False)):
                in_float32(layer)
    return plain


def saved(path: Path) -> tuple[RunConfig, Objective]:
    """The configuration of a run that has saved an adapter, and its objective over the labels that it had.

    Raises ConfigError for a directory that holds no run or no adapter.
    """
    if not (path / "run.toml").is_file():
        raise ConfigError(f"{str(path)!r} is no run directory: it has no run.toml")
    if not (path / "adapter" / LABELS).is_file():
        config = RunConfig.load(path / "run.toml")
        why = "give one of its tasks' directories" if config.is_stream else "the run is not finished, or saved none"
        raise ConfigError(f"{str(path)!r} has no adapter/{LABELS}: {why}")
    config = RunConfig.load(path / "run.toml")
    names = json.loads((path / "adapter" / LABELS).read_text(encoding="utf-8")).get("id2label", {})
    labels = tuple(names[key] for key in sorted(names, key=int))
    return config, objective_class(config.objective.name).of(config.objective, labels, ())


def load_run(run: str | Path) -> nn.Module:
    """The model of a finished run, for any base: a ``PeftModel`` whose configuration knows the labels' names.

    Raises ConfigError for a directory that holds no run or no adapter.
    """
    path = Path(run)
    config, objective = saved(path)
    return load_plain(config.model, objective, path / "adapter")


def save_checked(
    loaded: LoadedModel, state: State, path: Path, config: RunConfig, rejected: Path | None = None
) -> None:
    """``save_adapter``, and the proof that plain peft gives the run's scores with it.

    Raises RunFailed where it does not; the files are then at ``rejected``, by default ``<path>.rejected``.
    """
    rejected = rejected or path.with_name(path.name + REJECTED)
    what = rejected.name.removesuffix(REJECTED)
    shutil.rmtree(rejected, ignore_errors=True)
    save_adapter(loaded, state, rejected)
    try:
        plain = load_plain(
            config.model, loaded.objective, rejected, next(loaded.module.parameters()).dtype, loaded.device
        )
        other = differing(plain, loaded, state)
        gap, limit = logits_gap(plain, loaded, state)
    except Exception as error:
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise RunFailed(f"{what}: plain peft cannot load what was saved ({why}); see {rejected}") from error
    if other is not None:
        raise RunFailed(f"{what}: plain peft loads another {other} than was scored; see {rejected}")
    if not gap <= limit:
        raise RunFailed(
            f"{what}: with plain peft its logits differ by {gap:.2g} (relative; at most {limit:g}) from the model"
            f" that was scored; see {rejected}"
        )
    rejected.replace(path)


def differing(plain: nn.Module, loaded: LoadedModel, state: State) -> str | None:
    """The first tensor of a state, or scale of a module, that peft did not load to the bit; None if all are there. A
    residual is further directions of its adapter.
    """
    held = {name: p for full, p in plain.named_parameters() if (name := state_name(full)) is not None}
    wanted = {name: value for name, value in state.items() if part_of(name) == "head"}
    for module in modules(state):
        B, A = widened(state, module)
        wanted |= {f"{module}.lora_A": A, f"{module}.lora_B": B}
        scale = cast(Any, plain.get_submodule(PEFT_PREFIX + module)).scaling["default"]
        if not math.isclose(scale, loaded.scale[module], rel_tol=1e-6):
            return f"scale of {module}"
    equal = {name for name in held.keys() & wanted.keys() if torch.equal(held[name].detach().cpu(), wanted[name].cpu())}
    return min((held.keys() | wanted.keys()) - equal, default=None)


def logits_gap(plain: nn.Module, loaded: LoadedModel, state: State) -> tuple[float, float]:
    """Largest difference of logits on made-up rows between a state in the run's model and its adapter in peft, relative
    to the largest logit (at least 1; infinite where only one is finite), and what it may be at most.
    """
    batch = together(trial_rows(loaded), cast(int, loaded.tokenizer.pad_token_id))
    device, limit = loaded.device, FOLDED if any(part_of(name) in RESIDUAL for name in state) else EXACT
    try:
        plain.to(device)
    except torch.cuda.OutOfMemoryError:
        plain.to(device := torch.device("cpu"))
        limit = ACROSS
    loaded.load(state)
    inputs = {name: value.to(device) for name, value in loaded.objective.inputs(loaded, batch).items()}
    with torch.no_grad():
        wanted: Tensor = loaded.outputs(batch).logits.double().cpu()
        found: Tensor = plain(**inputs).logits.double().cpu()
    same = (wanted == found) | (wanted.isnan() & found.isnan())  # a model that diverged is saved as it is
    gap = (wanted - found).abs().masked_fill(same, 0.0).nan_to_num(nan=torch.inf)
    finite = wanted[wanted.isfinite()].abs()
    return float(gap.max()) / max(1.0, float(finite.max()) if len(finite) else 1.0), limit
