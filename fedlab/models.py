"""Load a base model once per process, put a LoRA adapter into it, say what is trainable.

A base model is a Hugging Face id, a local directory, or an installed package that carries one. It is frozen, shared by every
client that this process trains, and never serialised: only a ``State`` (adapter and head tensors) leaves a process.
Adapters are peft's (``LoraConfig``), so what a run saves loads with ``PeftModel.from_pretrained``.

The frozen base runs without its own dropout; ``lora.dropout`` is the only dropout there is. That makes a client's gradient a
function of its batch alone, and costs nothing: a base that does not learn needs no regularisation.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from fedlab.attention import attend_in_float32
from fedlab.blocks import stepping_over
from fedlab.config import RunConfig
from fedlab.errors import ConfigError
from fedlab.hub import locate
from fedlab.lora.state import BASIS, RESIDUAL, UNTRAINED, State, digest, outer_b, part_of, residual_of
from fedlab.lora.svd import principal_rows
from fedlab.sections import LoraSection, ModelSection

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

PEFT_PREFIX = "base_model.model."


class SentenceClassifier(nn.Module):
    """A sentence encoder with its own pooling (``1_Pooling/config.json``) and one linear layer: logits [N, labels]."""

    def __init__(self, encoder: Any, pooling: str, num_labels: int) -> None:
        super().__init__()
        self.encoder, self.pooling = encoder, pooling
        self.config: Any = encoder.config
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None  # never read by this pooling; an adapter there would train on nothing
        self.classifier = nn.Linear(self.config.hidden_size, num_labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **inputs: Any) -> Any:
        from transformers.modeling_outputs import SequenceClassifierOutput

        known = {k: v for k, v in inputs.items() if k in ("token_type_ids", "position_ids", "inputs_embeds")}
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **known).last_hidden_state
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            mask = attention_mask.unsqueeze(-1).to(hidden.dtype)  # [N, T, 1]
            pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        logits = self.classifier(pooled)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def _pooling(location: str, revision: str | None) -> str | None:
    """ "mean" or "cls" for a sentence encoder, None for a plain transformer (which brings its own classification head)."""
    from transformers.utils import cached_file

    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    if cached_file(location, "modules.json", revision=revision, **quiet) is None:
        return None
    path = cached_file(location, "1_Pooling/config.json", revision=revision, **quiet)
    modes = {k for k, v in json.loads(Path(path).read_text()).items() if k.startswith("pooling_mode_") and v is True} if path else set()
    known = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(modes) != 1 or not modes <= set(known):
        raise ConfigError(f"the model pools by {sorted(modes) or 'nothing known'}; fedlab knows mean and cls pooling")
    return known[modes.pop()]


@contextmanager
def _quiet_seeded(seed: int) -> Iterator[None]:
    """Draw what the loader initialises at random from ``seed``, and leave the caller's random state alone."""
    from transformers.utils import logging as hf_logging

    level = hf_logging.get_verbosity()
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(seed % 2**63)
        hf_logging.set_verbosity_error()
        hf_logging.disable_progress_bar()
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            hf_logging.set_verbosity(level)


def load_base(model: ModelSection, num_labels: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[str]]:
    """The base with a classification head, and the names of the head's modules (those that no checkpoint filled).

    This is the object to give to ``PeftModel.from_pretrained(base, RUN_DIR/"adapter")``. For a plain transformer it is what
    ``AutoModelForSequenceClassification`` returns; for a sentence encoder it is a ``SentenceClassifier``.
    """
    from transformers import AutoModel, AutoModelForSequenceClassification

    location = locate(model)
    options: dict[str, Any] = {"revision": model.revision, "dtype": dtype, "local_files_only": Path(location).is_dir()}
    try:
        with _quiet_seeded(0):
            pooling = _pooling(location, model.revision)
            if pooling is not None:
                return SentenceClassifier(AutoModel.from_pretrained(location, **options), pooling, num_labels), ["classifier"]
            base, info = AutoModelForSequenceClassification.from_pretrained(
                location, num_labels=num_labels, ignore_mismatched_sizes=True, output_loading_info=True, **options
            )
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.name = {model.name!r} cannot be loaded: {str(error).splitlines()[0]}") from None
    fresh = {*info["missing_keys"], *(entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"])}
    head = sorted({key.rpartition(".")[0] for key in fresh}) or [n for n in ("classifier", "score") if hasattr(base, n)]
    if not head:
        raise ConfigError(f"model.name = {model.name!r}: no classification head found to train")
    return base, head


def load_tokenizer(model: ModelSection) -> PreTrainedTokenizerBase:
    """The model's own tokenizer; one without a padding token pads with its end-of-text token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(locate(model), revision=model.revision)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.name = {model.name!r} has no usable tokenizer: {str(error).splitlines()[0]}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ConfigError(f"model.name = {model.name!r}: its tokenizer has neither a padding nor an end-of-text token")
    return cast("PreTrainedTokenizerBase", tokenizer)


def _linear_names(base: nn.Module, head: list[str]) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    outside = tuple(f"{name}." for name in head)
    return [n for n, m in base.named_modules() if isinstance(m, nn.Linear | Conv1D) and not (n in head or n.startswith(outside))]


def _target_modules(base: nn.Module, lora: LoraSection, head: list[str]) -> list[str]:
    """Resolve ``lora.target_modules`` to names that each match at least one linear module, or raise ConfigError."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as known

    linear = _linear_names(base, head)
    asked = lora.target_modules
    if asked == "all-linear":  # peft leaves whole names alone whatever layers_to_transform says
        layers = lora.layers_to_transform
        return linear if layers is None else [n for n in linear if not {*n.split(".")}.isdisjoint(map(str, layers))]
    if asked == "auto":
        model_type = getattr(base.config, "model_type", "")
        if model_type not in known:
            raise ConfigError(f'lora.target_modules = "auto" knows no default for {model_type!r}; name modules, or use "all-linear"')
        asked = tuple(known[model_type])
    names = [asked] if isinstance(asked, str) else list(asked)
    for name in names:
        if not any(n == name or n.endswith(f".{name}") for n in linear):
            short = sorted({n.rpartition(".")[2] for n in linear})
            raise ConfigError(f"lora.target_modules: {name!r} matches no linear module; this model has {', '.join(short)}")
    return names


class LoadedModel:
    """A frozen base with one adapter whose tensors are overwritten per client. Made by ``build``; one per process."""

    def __init__(self, peft_model: PeftModel, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> None:
        self.module, self.tokenizer, self.device = peft_model, tokenizer, device
        self.parameters: dict[str, nn.Parameter] = {}  # State name → the tensor inside the model
        self.owners: dict[str, nn.Module] = {}  # State name → the module that multiplies with it
        for owner_name, owner in peft_model.named_modules():
            for leaf, parameter in owner.named_parameters(recurse=False):
                if (name := _state_name(f"{owner_name}.{leaf}")) is not None:
                    self.parameters[name], self.owners[name] = parameter, owner
        self.scale: dict[str, float] = {
            name.removeprefix(PEFT_PREFIX): float(layer.scaling["default"])
            for name, layer in peft_model.named_modules()
            if hasattr(layer, "lora_A") and hasattr(layer, "scaling")
        }
        self.lower: tuple[list[nn.Module], int] = ([], -1)  # blocks that a batch with ``hidden`` steps over, and their output's form
        self._pristine: dict[str, Tensor] = {}  # module → its weight before any residual was folded in
        self._folded = digest({})
        self.module.requires_grad_(False)
        self.module.eval()

    @torch.no_grad()
    def load(self, state: State) -> None:
        """Overwrite every adapter and head tensor and the residual. All names must be there, so that nothing of another client stays.

        An adapter may have another rank than before; B is written out of the coordinates of a ``basis_U``.
        """
        own = {name for name in state if part_of(name) not in UNTRAINED}
        if missing := self.parameters.keys() ^ own:
            raise ValueError(f"state and model differ in {len(missing)} names, for example {sorted(missing)[0]!r}")
        for name in sorted(own):
            module, _, part = name.rpartition(".")
            self._overwrite(name, outer_b(state, module) if part == "lora_B" and f"{module}.{BASIS}" in state else state[name])
        self._fold({name: value for name, value in state.items() if part_of(name) in RESIDUAL})

    def _overwrite(self, name: str, value: Tensor) -> None:
        parameter = self.parameters[name]
        if parameter.shape == value.shape:
            parameter.copy_(value)
            return
        if part_of(name) == "head":
            raise ValueError(f"{name} has shape {tuple(value.shape)}, want {tuple(parameter.shape)}")
        owner = cast(nn.Linear, self.owners[name])
        owner.weight = nn.Parameter(value.to(parameter.device, parameter.dtype, copy=True), requires_grad=False)
        owner.out_features, owner.in_features = value.shape
        self.parameters[name] = owner.weight

    def _fold(self, residual: State) -> None:
        """Base weights = pristine + s·residual. Done once for all clients that carry the same residual, which is told by its bytes."""
        if (name := digest(residual)) == self._folded:
            return
        for module, pristine in self._pristine.items():
            self._weight(module).copy_(pristine)
        for module in sorted({n.rpartition(".")[0] for n in residual}):
            if module not in self.scale:
                raise ValueError(f"residual of {module!r}, which has no adapter")
            factors = residual_of(residual, module)
            assert factors is not None
            weight = self._weight(module)
            if module not in self._pristine:
                self._pristine[module] = weight.clone()
            B, A = (f.to(self.device, torch.float32) for f in factors)
            delta = self.scale[module] * (B @ A)
            pristine = self._pristine[module]
            weight.copy_(pristine.float() + (delta.mT if self.transposed(module) else delta))
        self._folded = name

    def _weight(self, module: str) -> Tensor:
        return cast(Tensor, cast(Any, self.layer(module)).base_layer.weight)

    def transposed(self, module: str) -> bool:
        """GPT-2's Conv1D keeps its weight as [in, out]."""
        return bool(getattr(self.layer(module), "fan_in_fan_out", False))

    def layer(self, module: str) -> nn.Module:
        """The peft layer of an adapted module."""
        return cast(nn.Module, self.module.get_submodule(PEFT_PREFIX + module))

    def state(self) -> State:
        """A copy of every adapter and head tensor on the CPU, float32 unless the model is float64."""
        return {name: p.detach().to("cpu", torch.promote_types(p.dtype, torch.float32), copy=True) for name, p in self.parameters.items()}

    def pristine(self, module: str) -> Tensor:
        """A module's weight [m, n] as it was loaded, without any residual; float64 on the CPU."""
        weight = self._pristine.get(module, self._weight(module)).detach().to("cpu", torch.float64)
        return weight.mT if self.transposed(module) else weight

    def leading_inputs(self, module: str, rank: int) -> Tensor:
        """The ``rank`` leading right singular vectors of a module's pristine weight, as orthonormal rows [rank, n], signs fixed."""
        weight = self.pristine(module)
        return principal_rows(weight.mT @ weight, rank)[0].float()

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits [N, labels] of one padded batch.

        ``labels`` in it is ignored, from ``hidden``, if there, the model goes on, and where ``allowed`` is False a logit is −∞.
        """
        inputs = {k: v.to(self.device) for k, v in batch.items() if k not in ("labels", "hidden", "allowed")}
        blocks, extra = self.lower
        with stepping_over(blocks, batch["hidden"].to(self.device), extra) if "hidden" in batch else nullcontext():
            logits = cast(Tensor, self.module(**inputs).logits.float())
        return logits if "allowed" not in batch else logits.masked_fill(~batch["allowed"].to(self.device), -torch.inf)


def _state_name(parameter_name: str) -> str | None:
    """peft's parameter name → ``<module>.lora_A``, ``<module>.lora_B`` or ``head.<name>``; None for the frozen base."""
    name = parameter_name.removeprefix(PEFT_PREFIX)
    for part in ("lora_A", "lora_B"):
        if name.endswith(f".{part}.default.weight"):
            return name.removesuffix(".default.weight")
    return f"head.{name.replace('.modules_to_save.default', '')}" if ".modules_to_save.default" in name else None


def device_of(name: str) -> torch.device:
    """What ``run.device`` names; ConfigError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"run.device = {name!r} is no torch device; use auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"run.device = {name!r}, but torch sees no GPU here; use auto or cpu")
    return device


def build(config: RunConfig, num_labels: int) -> LoadedModel:
    """The process's one model for this configuration; later calls return the same object."""
    return _build(config.model, config.lora, num_labels, config.run.dtype, config.run.device)


@lru_cache(maxsize=1)
def _build(model: ModelSection, lora: LoraSection, num_labels: int, dtype: str, device_name: str) -> LoadedModel:
    tokenizer = load_tokenizer(model)
    base, head = load_base(model, num_labels, torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    return adapt(base, head, tokenizer, lora, model.name, device_of(device_name))


def adapt(
    base: nn.Module, head: list[str], tokenizer: PreTrainedTokenizerBase, lora: LoraSection, name: str, device: torch.device
) -> LoadedModel:
    """Put an adapter into a base, whose ``head`` modules are trained beside it. ``name`` is what a saved adapter calls its base.

    Raises ConfigError where the adapter would do less, or more, than ``lora`` says.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    sixteen_bits = next(base.parameters()).dtype == torch.bfloat16
    cast(Any, base).config.pad_token_id = tokenizer.pad_token_id
    cast(Any, base).config.use_cache = False  # keys and values are never read again: nothing is generated
    if sixteen_bits and device.type == "cpu":
        attend_in_float32(base)
    base.to(device)  # before the adapter is made: moving afterwards would detach what optimisers hold
    settings = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=lora.rank,
        lora_alpha=cast(int, lora.alpha),
        target_modules=_target_modules(base, lora, head),
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        layers_to_transform=list(lora.layers_to_transform) if lora.layers_to_transform is not None else None,
        modules_to_save=head,
    )
    with _quiet_seeded(0):
        try:
            wrapped = get_peft_model(cast(Any, base), settings)
        except ValueError as error:
            if lora.layers_to_transform is not None:
                layers = ", ".join(map(str, lora.layers_to_transform))
                raise ConfigError(f"lora.layers_to_transform: no adapted module in layer {layers}; layers count from 0") from None
            raise ConfigError(f"lora: peft found nothing to adapt ({str(error).splitlines()[0]})") from None
    cast(Any, wrapped.peft_config["default"]).base_model_name_or_path = name
    loaded = LoadedModel(cast("PeftModel", wrapped), tokenizer, device)
    _check_adapted(loaded, base, lora)
    if sixteen_bits:
        _float32_head(loaded)
    return loaded


def _check_adapted(loaded: LoadedModel, base: nn.Module, lora: LoraSection) -> None:
    """Refuse adapters that would silently do less, or more, than was asked."""
    adapted = loaded.scale
    for layer in lora.layers_to_transform or []:
        if not any(f".{layer}." in f".{name}." for name in adapted):
            raise ConfigError(f"lora.layers_to_transform: no adapted module in layer {layer}; layers count from 0")
    if (layers := lora.layers_to_transform) is not None:
        outside = [name for name in adapted if {*name.split(".")}.isdisjoint(map(str, layers))]
        if outside:
            raise ConfigError(
                f"lora.layers_to_transform = {list(layers)}, but {outside[0]} is adapted too; name modules by their last part"
            )
    owners: dict[int, list[str]] = {}
    for name, module in base.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    for name in adapted:
        weight = cast(Any, base.get_submodule(name)).base_layer.weight
        if len(shared := owners[id(weight)]) > 1:
            raise ConfigError(f"lora: {name} shares its weight with {len(shared) - 1} other module(s) (tied); adapt other modules")
        if lora.rank > min(weight.shape):
            raise ConfigError(f"lora.rank = {lora.rank} exceeds {name}'s smaller side, {min(weight.shape)}")


def _float32_head(loaded: LoadedModel) -> None:
    """A 16-bit base keeps float32 adapters (peft casts around them); the head gets the same."""
    for name in (n for n in loaded.parameters if n.startswith("head.")):
        owner = loaded.owners[name]
        owner.float()
        owner.register_forward_pre_hook(lambda _, args: tuple(a.float() if a.is_floating_point() else a for a in args))
