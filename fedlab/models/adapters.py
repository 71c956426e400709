"""The beginning and the end of an adapter: the state that round 1 starts from, and the files that peft loads."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from pathlib import Path

import torch
from torch import Tensor

from fedlab.config.sections import LoraSection
from fedlab.files import naming
from fedlab.lora.state import State, modules, outer_b, residual_of
from fedlab.lora.svd import orthonormal_rows
from fedlab.models.activations import public_inputs
from fedlab.models.card import LABELS, arguments, model_card
from fedlab.models.loaded import PEFT_PREFIX, LoadedModel
from fedlab.seeds import torch_stream


def draw_a(kind: str, shape: tuple[int, ...], seed: int, *names: str | int) -> Tensor:
    """A random A [r, n] from the stream of these names.

    ``orthonormal`` rows; ``kaiming``, peft's own (uniform, rows of norm about 1/√3); ``random``, Gaussian entries of
    standard deviation 1/r, which is peft's ``init_lora_weights="gaussian"`` (rows of norm about √n/r: with n = 384 and
    r = 8 about 2.4, so the same learning rate moves the weights six times as far as from orthonormal rows).
    """
    generator = torch_stream(seed, *map(str, names))
    if kind == "orthonormal":
        return orthonormal_rows(torch.randn(shape, generator=generator, dtype=torch.float64)).float()
    if kind == "random":
        return (torch.randn(shape, generator=generator, dtype=torch.float64) / shape[0]).float()
    bound = (1 / shape[1]) ** 0.5  # Kaiming uniform with a = √5
    return (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1).mul(bound).float()


def initial_state(loaded: LoadedModel, lora: LoraSection, seed: int) -> State:
    """Round 0's adapter and head: A as ``lora.init_a`` says, B = 0, head weights N(0, 0.02²), head biases 0, gains 1.

    ``orthonormal`` has orthonormal rows, FedSVD's fixed point; for ``kaiming`` and ``random`` see ``draw_a``;
    ``weights`` takes the base weight's r leading right singular vectors, which costs no privacy because it looks at no
    data; ``eva`` those of the module's inputs on public texts (``fedlab.models.activations``), which costs none as long
    as the texts are public; it leaves the model with a zero adapter. Each tensor is drawn from a stream of its own
    name, so adding a module changes no other.
    """
    state: State = {}
    seen = public_inputs(loaded, lora, seed) if lora.init_a == "eva" else {}
    for name, parameter in sorted(loaded.parameters.items()):
        generator = torch_stream(seed, "init", name)
        if name.endswith(".lora_A"):
            if lora.init_a == "eva":
                state[name] = seen[name.removesuffix(".lora_A")]
            elif lora.init_a == "weights":
                state[name] = loaded.leading_inputs(name.removesuffix(".lora_A"), parameter.shape[0])
            else:
                state[name] = draw_a(lora.init_a, parameter.shape, seed, "init", name)
        elif name.endswith((".lora_B", "bias")):
            state[name] = torch.zeros(parameter.shape)
        elif parameter.ndim == 1:  # the gain of a normalisation layer in the head
            state[name] = torch.ones(parameter.shape)
        else:
            state[name] = torch.randn(parameter.shape, generator=generator).mul(0.02)
    return state


def save_adapter(loaded: LoadedModel, state: State, path: Path) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json`` in peft's format, and beside them ``labels.json``
    and a model card; whole or not at all.
    """
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was cut off here
    if path.exists():
        raise FileExistsError(f"{path} exists; a run never overwrites an adapter")
    try:
        with naming(path):
            _write(loaded, state, temporary)
            temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(loaded: LoadedModel, state: State, temporary: Path) -> None:
    """Make the folder of an adapter, which nobody reads by this name."""
    loaded.load(state)
    logging.getLogger("peft").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded.module.save_pretrained(str(temporary))
    _widen_adapter(temporary, loaded, state)
    (temporary / LABELS).write_text(json.dumps(arguments(loaded), indent=2, ensure_ascii=False), encoding="utf-8")
    (temporary / "README.md").write_text(model_card(loaded), encoding="utf-8")


def _widen_adapter(path: Path, loaded: LoadedModel, state: State) -> None:
    """Put the residual into the saved adapter as further directions: [B, R_B]·[A; R_A] with peft's own rank and alpha
    patterns.

    So also for modules whose adapter has another rank than ``lora.rank``. Does nothing where all have that rank and no
    residual.
    """
    from safetensors.torch import load_file, save_file

    tensors = load_file(str(path / "adapter_model.safetensors"))
    config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    changed = [
        m for m in modules(state) if residual_of(state, m) is not None or len(state[f"{m}.lora_A"]) != config["r"]
    ]
    if not changed:
        return
    for module in changed:
        B, A = widened(state, module)
        for part, value in (("lora_A", A), ("lora_B", B)):
            key = f"{PEFT_PREFIX}{module}.{part}.weight"
            if key not in tensors:
                raise ValueError(f"{key} is not in the saved adapter; its format is not the one this was written for")
            tensors[key] = value.contiguous()
        rank = len(A)
        config["rank_pattern"][module] = rank
        config["alpha_pattern"][module] = loaded.scale[module] * (rank**0.5 if config["use_rslora"] else rank)
    save_file(tensors, str(path / "adapter_model.safetensors"), metadata={"format": "pt"})
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def widened(state: State, module: str) -> tuple[Tensor, Tensor]:
    """B [m, r + k] and A [r + k, n] of a module as they are saved: its residual of rank k as further directions."""
    B, A = outer_b(state, module), state[f"{module}.lora_A"]
    if (residual := residual_of(state, module)) is not None:
        B, A = torch.cat([B, residual[0]], 1), torch.cat([A, residual[1]], 0)
    return B, A
