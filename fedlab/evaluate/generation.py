"""What a language model says by itself to held-out prompts, held against the answers that were written.

ROUGE-L is rouge-score's (Lin, 2004), chrF sacrebleu's (Popović, 2015); answers are greedy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch

from fedlab.config.sections import EvaluateSection
from fedlab.data import FederatedData
from fedlab.evaluate.base import Evaluator
from fedlab.evaluate.language import said
from fedlab.models.loaded import LoadedModel
from fedlab.objectives.base import NO_LOSS
from fedlab.objectives.seq2seq import Seq2Seq


def answers(
    model: LoadedModel, data: FederatedData, indices: np.ndarray, settings: EvaluateSection
) -> dict[str, float]:
    """Scores of greedy answers to at most ``evaluate.generations`` of the examples, spread evenly over them.

    ``exact_match``: share of answers that are the written ones, but for white space around them. ``rouge_l``: mean
    F-measure of the longest common subsequence of words, 0 to 1. ``chrf``: F2 of character 6-grams over all answers
    together, 0 to 1.
    """
    count = min(len(indices), settings.generations)
    some = indices[np.arange(count) * len(indices) // count]
    prompts, written = zip(*(_prompt_and_answer(model, data, i) for i in some), strict=True)
    found = generate(model, list(prompts), settings.new_tokens, settings.batch_size)
    return scores_of(found, written)


def scores_of(found: Sequence[str], written: Sequence[str]) -> dict[str, float]:
    """``exact_match``, ``rouge_l`` and ``chrf`` of answers and the written ones, one or more of each."""
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    rouge = RougeScorer(["rougeL"])
    pairs = [(a.strip(), b.strip()) for a, b in zip(found, written, strict=True)]
    return {
        "exact_match": sum(a == b for a, b in pairs) / len(pairs),
        "rouge_l": sum(rouge.score(b, a)["rougeL"].fmeasure for a, b in pairs) / len(pairs),
        "chrf": sacrebleu.corpus_chrf([a for a, _ in pairs], [[b for _, b in pairs]]).score / 100,
    }


def generate(model: LoadedModel, prompts: Sequence[list[int]], new_tokens: int, batch_size: int) -> list[str]:
    """The model's greedy answer to each prompt, in their order, without special tokens.

    Args:
        model: as it is loaded.
        prompts: token ids, with whatever the model reads before it answers.
        new_tokens: longest answer.
        batch_size: prompts at once.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: dict[int, str] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        rows = _answer([prompts[i] for i in chosen], model, new_tokens)
        found |= dict(zip(chosen, rows, strict=True))
    return [found[i] for i in range(len(prompts))]


def _answer(prompts: list[list[int]], model: LoadedModel, new_tokens: int) -> list[str]:
    tokenizer, module = model.tokenizer, cast(Any, model.module)
    longest = max(map(len, prompts))
    positions = getattr(module.config, "max_position_embeddings", None) or longest + new_tokens
    room = new_tokens if isinstance(model.objective, Seq2Seq) else max(1, min(new_tokens, positions - longest))
    pad = cast(int, tokenizer.pad_token_id)
    # prompts end together, so that all answers begin at one position
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    with torch.inference_mode():
        answer = module.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=room,
            do_sample=False,
            use_cache=True,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
        )
    own = answer if isinstance(model.objective, Seq2Seq) else answer[:, longest:]
    return [str(text) for text in tokenizer.batch_decode(own, skip_special_tokens=True)]


def _prompt_and_answer(model: LoadedModel, data: FederatedData, index: int) -> tuple[list[int], str]:
    batch = data.batch(np.array([index]), cast(int, model.tokenizer.pad_token_id))
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].numpy()
    if isinstance(model.objective, Seq2Seq):
        return ids, said(model, labels)
    first = int(np.flatnonzero(labels != NO_LOSS)[0]) if (labels != NO_LOSS).any() else len(ids)
    after = np.flatnonzero(labels[first:] == NO_LOSS)  # a conversation goes on: its first answer is judged
    return ids[:first], said(model, labels[first : first + int(after[0])] if len(after) else labels[first:])


EVALUATOR = Evaluator(("exact_match", "rouge_l", "chrf"), frozenset({"instruction", "seq2seq"}), answers)
