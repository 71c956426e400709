"""Instruction tuning: a conversation in the model's own template, loss on the assistant's words and its end alone.

A record is a prompt (text column) and an answer (label column), or whole conversations (``data.messages``). The
template is ``objective.template``, or the tokenizer's chat template, or the prompt on a line of its own.

Labels are masked by position, never by id: padding, the end of a turn and the end of a text are the same token in some
models, which would never learn to stop. What a turn begins and ends with is found by encoding prefixes: the tokens of a
conversation up to an answer are the first ones of the whole, which is checked.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from jinja2 import TemplateError
from torch import Tensor

from fedlab.config.data import DataSection
from fedlab.config.sections import ObjectiveSection
from fedlab.errors import ConfigError
from fedlab.objectives.base import NO_LOSS, with_label
from fedlab.objectives.causal_lm import ended
from fedlab.objectives.language import LanguageModel

Row = tuple[list[int], list[int]]  # ids and labels
DAY = "26 Jul 2024"  # what Llama 3's templates say where nobody knows the day
LEAST_ANSWER = 2  # 1/2 of max_length: so much of an answer stays at least where a prompt is too long


@dataclass(frozen=True)
class Instruction(LanguageModel):
    """Answers to prompts by a decoder."""

    template: str | None = None
    system: str | None = None

    auto_class = "AutoModelForCausalLM"
    task_type = "CAUSAL_LM"
    evaluators = ("language", "generation")

    @classmethod
    def columns(cls, data: DataSection) -> DataSection:
        """See ``Objective.columns``: prompts and answers, or whole conversations."""
        return data if data.messages is not None else with_label(data)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """With the template, which decides the tokens."""
        return json.dumps(["instruction/2", self.template, self.system])

    @classmethod
    def of(cls, section: ObjectiveSection, labels: tuple[str, ...], groups: tuple[int, ...]) -> Self:
        """See ``Objective.of``."""
        plain = super().of(section, labels, groups)
        if section.template is not None and "{prompt}" not in section.template:
            raise ConfigError(f"objective.template = {section.template!r} has no {{prompt}}, where the prompt goes")
        return replace(plain, template=section.template, system=section.system)

    def encode(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None,
        labels: np.ndarray | None,
        tokenizer: Any,
        max_length: int,
    ) -> dict[str, list[list[int]]]:
        """See ``Objective.encode``. A second text is context: it follows the prompt after an empty line."""
        if labels is None:
            return super().encode(texts, pairs, None, tokenizer, max_length)
        prompts = texts if pairs is None else [f"{a}\n\n{b}" if b else a for a, b in zip(texts, pairs, strict=True)]
        rows = [
            _cut(self._row(prompt, str(answer), tokenizer), max_length)
            for prompt, answer in zip(prompts, labels, strict=True)
        ]
        return {"input_ids": [ids for ids, _ in rows], "labels": [labels for _, labels in rows]}

    def prompt_ids(self, prompt: str, tokenizer: Any) -> list[int]:
        """What a model reads before it answers."""
        if self._chats(tokenizer):
            return _templated(tokenizer, self._opened([{"role": "user", "content": prompt}]), True)
        return super().prompt_ids(self._filled(prompt), tokenizer)

    def _chats(self, tokenizer: Any) -> bool:
        return self.template is None and getattr(tokenizer, "chat_template", None) is not None

    def _opened(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        """Messages after what the system says, unless they say it themselves."""
        own = messages[0]["role"] == "system"
        return messages if self.system is None or own else [{"role": "system", "content": self.system}, *messages]

    def _filled(self, prompt: str) -> str:
        before = f"{self.system}\n\n" if self.system else ""
        return before + (self.template or "{prompt}\n").replace("{prompt}", prompt)

    def _row(self, prompt: str, answer: str, tokenizer: Any) -> Row:
        whole = not answer  # of data.messages: a conversation has no column of answers
        if whole and not self._chats(tokenizer):
            raise ConfigError(
                'objective.name = "instruction" with conversations needs a tokenizer with a chat template, and no'
                " objective.template; give prompt and answer columns instead"
            )
        if self._chats(tokenizer):
            said = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            return _conversation_row(self._opened(json.loads(prompt) if whole else said), tokenizer)
        ids = super().prompt_ids(self._filled(prompt), tokenizer)
        own = ended(list(tokenizer(answer, truncation=False, add_special_tokens=False)["input_ids"]), tokenizer)
        return ids + own, [NO_LOSS] * len(ids) + own

    def probe_labels(self, input_ids: Tensor) -> Tensor:
        """The last half of the tokens."""
        before = input_ids.shape[1] // 2
        return torch.cat([torch.full_like(input_ids[:, :before], NO_LOSS), input_ids[:, before:]], dim=1)


def _conversation_row(messages: list[dict[str, str]], tokenizer: Any) -> Row:
    """A conversation with labels on every turn of the assistant, up to the end that it says."""
    ids = _templated(tokenizer, messages, False)
    labels = [NO_LOSS] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _templated(tokenizer, messages[:turn], True)
        through = _templated(tokenizer, messages[: turn + 1], False)
        if ids[: len(before)] != before or ids[: len(through)] != through:
            raise ConfigError(
                'objective.name = "instruction": this tokenizer\'s chat template writes the beginning of a conversation'
                " otherwise once an answer follows, so that answers cannot be told from prompts; set objective.template"
            )
        end = len(through)
        while end > len(before) and ids[end - 1] != tokenizer.eos_token_id:  # what a template writes after the end
            end -= 1
        end = end if end > len(before) else len(through)
        labels[len(before) : end] = ids[len(before) : end]
    last = max((i for i, label in enumerate(labels) if label != NO_LOSS), default=len(ids) - 1)
    if labels[last] != tokenizer.eos_token_id and tokenizer.eos_token_id is not None and last == len(ids) - 1:
        ids, labels = [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]
        last += 1
    return ids[: last + 1], labels[: last + 1]


def _templated(tokenizer: Any, messages: list[dict[str, str]], answer_follows: bool) -> list[int]:
    """Tokens of a conversation. Raises ConfigError where the template refuses it, or is itself at fault."""
    # Llama 3's templates say which day it is, unless they are told one: other tokens tomorrow
    dated = {"date_string": DAY} if "date_string" in str(tokenizer.chat_template) else {}
    try:
        found = tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=answer_follows, return_dict=True, **dated
        )["input_ids"]
    except (TemplateError, ValueError, TypeError, LookupError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        said = ", ".join(message["role"] for message in messages) or "nobody"
        raise ConfigError(
            f'objective.name = "instruction": this tokenizer\'s chat template does not take a conversation of {said}'
            f" ({reason}); leave such conversations out, or take another model; prompts and answers can go without the"
            " chat template, with objective.template"
        ) from None
    return list(found)


def _cut(row: Row, max_length: int) -> Row:
    """At most ``max_length`` tokens: the answer keeps up to half of them, a prompt that is too long loses its middle,
    and then the end is cut.
    """
    ids, labels = row
    if len(ids) <= max_length:
        return row
    prompt = next((i for i, label in enumerate(labels) if label != NO_LOSS), len(ids))
    room = max_length - min(len(ids) - prompt, max_length // LEAST_ANSWER)
    if prompt > room:
        head = room // 2
        kept = [*range(head), *range(prompt - (room - head), len(ids))]
        ids, labels = [ids[i] for i in kept], [labels[i] for i in kept]
    return ids[:max_length], labels[:max_length]
