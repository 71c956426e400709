"""The head of a base model as peft keeps it: whole modules, each wrapped once.

Under its task type SEQ_CLS peft wraps every module whose name ends in ``classifier`` or ``score``, whatever it is told.
A layer inside such a module (RoBERTa's and ELECTRA's ``classifier.dense``) must therefore not be named beside it: it
would be wrapped a second time, and the copy that is saved would not be the one that scores.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from fedlab.errors import ConfigError

WRAPPED_BY_PEFT = ("classifier", "score")


def whole_modules(base: nn.Module, found: Iterable[str], name: str) -> list[str]:
    """The modules to train and save whole.

    Args:
        base: as it was loaded.
        found: names of the modules that hold the head's parameters, as the objective found them.
        name: ``model.name``, for the error.

    Returns:
        Their names in order, none inside another.

    Raises:
        ConfigError: a parameter that the checkpoint lacks belongs to a module with parts of its own that it does not
            lack: the "head" would be the model's body.
    """
    found = set(found)
    if found:  # DistilBERT's pre_classifier too, where the checkpoint brings it
        found |= {module for module, part in base.named_modules() if module.endswith(WRAPPED_BY_PEFT) and _holds(part)}
    lifted = set()
    for module in sorted(found):
        outermost = _outermost(module)
        owner = base.get_submodule(module)
        inside = any(True for child in owner.children() for _ in child.parameters())
        if outermost == module and inside and any(True for _ in owner.parameters(recurse=False)):
            raise ConfigError(
                f"model.name = {name!r}: its checkpoint lacks a parameter of {module or 'the model'} itself, which is"
                " no head; take a complete checkpoint"
            )
        lifted.add(outermost)
    return sorted(m for m in lifted if not any(m.startswith(f"{other}.") for other in lifted))


def _holds(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _outermost(module: str) -> str:
    """The outermost part of a dotted name that peft wraps by itself; the name if there is none."""
    parts = module.split(".")
    for depth, part in enumerate(parts, 1):
        if part.endswith(WRAPPED_BY_PEFT):
            return ".".join(parts[:depth])
    return module


def nested_copies(model: nn.Module) -> list[str]:
    """Names of modules that peft keeps a copy of inside another copy: state would be saved that nobody uses."""
    from peft.utils import ModulesToSaveWrapper

    kept = [name for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    return [name for name in kept if any(name.startswith(f"{other}.") for other in kept)]
