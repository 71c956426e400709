"""Load a base model once per process, put a LoRA adapter into it, say what is trainable.

A base model is a Hugging Face id, a local directory, or an installed package that carries one. It is frozen, shared by
every client that this process trains, and never serialised: only a ``State`` (adapter and head tensors) leaves a
process. Adapters are peft's (``LoraConfig``), so what a run saves loads with ``PeftModel.from_pretrained``.

The frozen base runs without its own dropout; ``lora.dropout`` is the only dropout there is. That makes a client's
gradient a function of its batch alone, and costs nothing: a base that does not learn needs no regularisation.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fedlab.config import RunConfig
from fedlab.config.sections import LoraSection, ModelSection
from fedlab.errors import ConfigError
from fedlab.models.attention import attend_in_float32
from fedlab.models.encoder import SentenceClassifier, pooling_of
from fedlab.models.fingerprint import check_fingerprint, model_fingerprint
from fedlab.models.head import nested_copies, whole_modules
from fedlab.models.hub import locate
from fedlab.models.loaded import LoadedModel
from fedlab.models.quantised import quantisation, require_plain
from fedlab.models.targets import check_adapted, target_modules
from fedlab.objectives.base import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@contextmanager
def quiet_seeded(seed: int) -> Iterator[None]:
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


def load_base(
    model: ModelSection, objective: Objective, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> tuple[nn.Module, list[str]]:
    """The base as an objective needs it, and the names of its head's modules, which are trained whole; none for an
    objective without a head.

    This is the object to give to ``PeftModel.from_pretrained(base, RUN_DIR/"adapter")``: what the objective's Auto
    class returns; for a sentence encoder under an objective with a head, a ``SentenceClassifier``.

    A quantised base goes to ``device`` at once, others stay on the CPU.

    Raises ConfigError for a model that cannot be loaded, has no head where one is to be trained, or lacks weights where
    none is; for a quantised one with a head.
    """
    import transformers

    location, width = locate(model), objective.head_width
    options: dict[str, Any] = {"revision": model.revision, "dtype": dtype, "local_files_only": Path(location).is_dir()}
    if model.quantize != "none":
        if width is not None:
            raise ConfigError(
                f'model.quantize = "{model.quantize}" is for language models: this objective trains a head, which would'
                ' be quantised too; set model.quantize = "none"'
            )
        options |= quantisation(model, dtype) | {"device_map": {"": device or torch.device("cpu")}}
    sized = {} if width is None else {"num_labels": width, "ignore_mismatched_sizes": True}
    try:
        with quiet_seeded(0):
            pooling = None if width is None else pooling_of(location, model.revision)
            if width is not None and pooling is not None:
                encoder = transformers.AutoModel.from_pretrained(location, **options)
                return named(SentenceClassifier(encoder, pooling, width), objective), ["classifier"]
            base, info = getattr(transformers, objective.auto_class).from_pretrained(
                location, output_loading_info=True, **sized, **options
            )
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.name = {model.name!r} cannot be loaded: {str(error).splitlines()[0]}") from None
    require_plain(base, model)
    fresh = {
        *info["missing_keys"],
        *(entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]),
    }
    head = whole_modules(base, objective.head_modules(base, fresh), model.name)
    if width is not None and not head:
        raise ConfigError(f"model.name = {model.name!r}: no head found to train")
    if width is None and fresh:
        raise ConfigError(
            f"model.name = {model.name!r} has no weights for {min(fresh)}, and this objective trains no head; take a"
            " model that was made for it"
        )
    return named(base, objective), head


def named(base: nn.Module, objective: Objective) -> nn.Module:
    """The base, whose configuration knows the labels' names and what they are, so that a pipeline answers with them."""
    config: Any = base.config
    if objective.problem is not None:
        config.problem_type = objective.problem
    if objective.labels:
        config.id2label = dict(enumerate(objective.labels))
        config.label2id = {label: i for i, label in enumerate(objective.labels)}
    return base


def load_tokenizer(model: ModelSection) -> PreTrainedTokenizerBase:
    """The model's own tokenizer; one without a padding token pads with its end-of-text token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(locate(model), revision=model.revision)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.name = {model.name!r} has no usable tokenizer: {str(error).splitlines()[0]}"
        ) from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ConfigError(f"model.name = {model.name!r}: its tokenizer has neither a padding nor an end-of-text token")
    loaded: PreTrainedTokenizerBase = tokenizer
    return loaded


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


def build(config: RunConfig, objective: Objective) -> LoadedModel:
    """The process's one model for this configuration and objective; later calls return the same object, with an adapter
    of ``lora.rank``, whatever rank the run before gave it.
    """
    loaded = _build(config.model, config.lora, objective, config.run.dtype, config.run.device)
    loaded.resize(config.lora.rank)
    return loaded


@lru_cache(maxsize=1)
def _build(model: ModelSection, lora: LoraSection, objective: Objective, dtype: str, device_name: str) -> LoadedModel:
    if model.sha256 is not None:
        check_fingerprint(model_fingerprint(model), [model.sha256], "model.sha256")
    tokenizer = load_tokenizer(model)
    device = device_of(device_name)
    base, head = load_base(model, objective, torch.bfloat16 if dtype == "bfloat16" else torch.float32, device)
    return adapt(base, head, tokenizer, lora, model.name, device, objective, model.revision)


def adapt(
    base: Any,
    head: list[str],
    tokenizer: PreTrainedTokenizerBase,
    lora: LoraSection,
    name: str,
    device: torch.device,
    objective: Objective,
    revision: str | None = None,
) -> LoadedModel:
    """Put an adapter into a base, whose ``head`` modules are trained beside it (none: []). ``name`` and ``revision``
    are what a saved adapter calls its base.

    Raises ConfigError where the adapter would do less, or more, than ``lora`` says.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    sixteen_bits = next(base.parameters()).dtype == torch.bfloat16
    own_padding = getattr(base.config, "pad_token_id", None)
    base.config.pad_token_id = tokenizer.pad_token_id
    for part in base.modules():  # T5's stacks have configurations of their own
        if hasattr(getattr(part, "config", None), "use_cache"):
            part.config.use_cache = False  # keys and values are never read again: training generates nothing
    if sixteen_bits and device.type == "cpu":
        attend_in_float32(base)
    if getattr(base, "hf_quantizer", None) is None:  # a quantised one is there
        base.to(device)  # before the adapter is made: moving afterwards would detach what optimisers hold
    settings = LoraConfig(
        task_type=TaskType[objective.task_type],
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=target_modules(base, lora, head),
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        layers_to_transform=list(lora.layers_to_transform) if lora.layers_to_transform is not None else None,
        modules_to_save=head or None,
        revision=revision,
    )
    with quiet_seeded(0):
        try:
            wrapped = get_peft_model(base, settings)
        except ValueError as error:
            if lora.layers_to_transform is not None:
                layers = ", ".join(map(str, lora.layers_to_transform))
                raise ConfigError(
                    f"lora.layers_to_transform: no adapted module in layer {layers}; layers count from 0"
                ) from None
            raise ConfigError(f"lora: peft found nothing to adapt ({str(error).splitlines()[0]})") from None
    wrapped.peft_config["default"].base_model_name_or_path = name
    if nested := nested_copies(wrapped):
        raise ConfigError(f"model.name = {name!r}: peft would keep {nested[0]} twice, and save the one nobody uses")
    loaded = LoadedModel(wrapped, tokenizer, device, objective)
    loaded.told_padding = own_padding != tokenizer.pad_token_id
    check_adapted(loaded, base, lora)
    if sixteen_bits:
        _float32_head(loaded)
    return loaded


def _float32_head(loaded: LoadedModel) -> None:
    """A 16-bit base keeps float32 adapters (peft casts around them); the head gets the same."""
    for name in (n for n in loaded.parameters if n.startswith("head.")):
        in_float32(loaded.owners[name])


def in_float32(layer: nn.Module) -> None:
    """Let a layer compute in float32 whatever comes in."""
    layer.float()
    layer.register_forward_pre_hook(lambda _, args: tuple(a.float() if a.is_floating_point() else a for a in args))
