"""What a language model says by itself to held-out prompts, held against the answers that were written.

ROUGE-L is rouge-score's (Lin, 2004), chrF sacrebleu's (Popović, 2015). Nothing is drawn: answers are greedy, or by
beams where the model's own generation config says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fedlab.config.sections import EvaluateSection
from fedlab.data import FederatedData
from fedlab.evaluate.base import Evaluator
from fedlab.evaluate.language import said
from fedlab.models.loaded import LoadedModel
from fedlab.models.loading import quiet_seeded
from fedlab.objectives.base import NO_LOSS
from fedlab.objectives.seq2seq import Seq2Seq


def answers(
    model: LoadedModel, data: FederatedData, indices: np.ndarray, settings: EvaluateSection
) -> dict[str, float]:
    """Scores of answers to at most ``evaluate.generations`` of the examples, spread evenly over them.

    ``exact_match``: share of answers that are the written ones, but for white space around them. ``rouge_l``: mean
    F-measure of the longest common subsequence of words, 0 to 1. ``chrf``: F2 of character 6-grams over all answers
    together, 0 to 1.
    """
    count = min(len(indices), settings.generations)
    some = indices[np.arange(count) * len(indices) // count]
    prompts, written = zip(*(prompt_and_answer(model, data, i) for i in some), strict=True)
    found = generate(model, list(prompts), settings.new_tokens, settings.batch_size)
    return scores_of(found, written)


def scores_of(found: Sequence[str], written: Sequence[str]) -> dict[str, float]:
    """``exact_match``, ``rouge_l`` and ``chrf`` of answers and the written ones, one or more of each."""
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    rouge = RougeScorer(["rougeL"], tokenizer=_Words())
    pairs = [(a.strip(), b.strip()) for a, b in zip(found, written, strict=True)]
    return {
        "exact_match": sum(a == b for a, b in pairs) / len(pairs),
        "rouge_l": sum(rouge.score(b, a)["rougeL"].fmeasure for a, b in pairs) / len(pairs),
        "chrf": sacrebleu.corpus_chrf([a for a, _ in pairs], [[b for _, b in pairs]]).score / 100,
    }


class _Words:
    """Words of any script, of letters and digits in lower case; of plain ASCII rouge-score's own. Its default knows
    a–z and 0–9 alone: an answer in Greek would have no words, and "für" two.
    """

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


def generate(
    model: LoadedModel, prompts: Sequence[list[int]], new_tokens: int, batch_size: int, seed: int | None = None
) -> list[str]:
    """The model's answer to each prompt, in their order, without special tokens.

    What else its own generation config says (beams, penalties, where an answer ends) holds; where that samples, answers
    are the most probable ones all the same unless there is a seed. An answer is the same in any batch, but for rounding
    and for what is drawn.

    Args:
        model: as it is loaded.
        prompts: token ids, with whatever the model reads before it answers.
        new_tokens: longest answer; shorter where a prompt leaves fewer positions.
        batch_size: prompts at once.
        seed: of what is drawn, if the generation config samples; None: nothing is drawn.
    """
    found: dict[int, str] = {}
    with quiet_seeded(seed or 0):
        for chosen, room in _batches(model, prompts, new_tokens, batch_size):
            rows = _answer([prompts[i] for i in chosen], model, room, {} if seed is not None else {"do_sample": False})
            found |= dict(zip(chosen, rows, strict=True))
    return [found[i] for i in range(len(prompts))]


def _batches(
    model: LoadedModel, prompts: Sequence[list[int]], new_tokens: int, batch_size: int
) -> Iterator[tuple[list[int], int]]:
    """Which prompts are answered together, those of like length, and with how many tokens at most: all that a prompt's
    own length leaves.
    """
    places = getattr(model.module.config, "max_position_embeddings", None)
    if places is None or isinstance(model.objective, Seq2Seq):  # whose answers have positions of their own
        places = max(map(len, prompts), default=0) + new_tokens
    rooms = [max(1, min(new_tokens, places - len(prompt))) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for room, same in groupby(order, key=lambda i: rooms[i]):
        chosen = list(same)
        for start in range(0, len(chosen), batch_size):
            yield chosen[start : start + batch_size], room


def _answer(prompts: list[list[int]], model: LoadedModel, room: int, options: dict[str, Any]) -> list[str]:
    tokenizer, module = model.tokenizer, cast(Any, model.module)
    pad, ends, encodes = cast(int, tokenizer.pad_token_id), _ends(model), isinstance(model.objective, Seq2Seq)
    longest = max(map(len, prompts))

    def padded(rows: list[list[int]], fill: int) -> Tensor:
        """A decoder goes on from where all prompts end; an encoder counts positions from where they begin."""
        fills = [[fill] * (longest - len(row)) for row in rows]
        both = [row + own if encodes else own + row for row, own in zip(rows, fills, strict=True)]
        return torch.tensor(both, device=model.device)

    with torch.inference_mode():
        answers = module.generate(
            input_ids=padded(prompts, pad),
            attention_mask=padded([[1] * len(prompt) for prompt in prompts], 0),
            max_new_tokens=room,
            use_cache=True,
            pad_token_id=pad,
            eos_token_id=ends or None,
            **options,
        )
    own = answers[:, 1 if encodes else longest :].tolist()  # what a decoder starts with, or the prompt, is no answer
    cut = [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in own]
    return [str(text) for text in tokenizer.batch_decode(cut, skip_special_tokens=True)]


def _ends(model: LoadedModel) -> list[int]:
    """Tokens that end an answer: those of the model's generation config (Llama 3 has several), and the one that it is
    trained to end with.
    """
    config = getattr(cast(Any, model.module).get_base_model(), "generation_config", None)
    own = getattr(config, "eos_token_id", None)
    found = {*(own if isinstance(own, list | tuple) else [own]), model.tokenizer.eos_token_id}
    return sorted(found - {None})


def prompt_and_answer(model: LoadedModel, data: FederatedData, index: int) -> tuple[list[int], str]:
    """Tokens that a model reads before it answers an example, and the written answer; of a conversation the first."""
    batch = data.batch(np.array([index]), cast(int, model.tokenizer.pad_token_id))
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].numpy()
    if isinstance(model.objective, Seq2Seq):
        return ids, said(model, labels)
    first = int(np.flatnonzero(labels != NO_LOSS)[0]) if (labels != NO_LOSS).any() else len(ids)
    after = np.flatnonzero(labels[first:] == NO_LOSS)  # a conversation goes on: its first answer is judged
    return ids[:first], said(model, labels[first : first + int(after[0])] if len(after) else labels[first:])


EVALUATOR = Evaluator(("exact_match", "rouge_l", "chrf"), frozenset({"instruction", "seq2seq"}), answers)
