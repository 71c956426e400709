"""What a model makes of public texts before the first round and after the last: how well it still says ordinary text,
and what it answers to prompts that a report may show.

The server measures both by itself, of text that is nobody's: they cost no privacy beyond what the model has cost.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from fedlab.config import RunConfig
from fedlab.data.collate import by_length, tokenise
from fedlab.data.corpus import Corpus, written
from fedlab.data.public import drift_texts, prompts
from fedlab.errors import ConfigError
from fedlab.evaluate.generation import generate
from fedlab.evaluate.language import over
from fedlab.models.loaded import LoadedModel
from fedlab.objectives import objective_class
from fedlab.objectives.base import NO_LOSS
from fedlab.objectives.causal_lm import CausalLM
from fedlab.objectives.language import LanguageModel
from fedlab.seeds import stream_seed

MEASURED = ("loss", "perplexity", "bits_per_byte")


def check_measures(config: RunConfig) -> None:
    """Raise ConfigError for a measure that the objective's models cannot be put to."""
    kind, name = objective_class(config.objective.name), config.objective.name
    if config.evaluate.drift is not None and not (issubclass(kind, LanguageModel) and kind.shift):
        raise ConfigError(
            f'evaluate.drift is the perplexity of plain text, which objective.name = "{name}" does not give: it needs a'
            " decoder alone (causal-lm, instruction); remove it"
        )
    if config.evaluate.prompts is not None and not issubclass(kind, LanguageModel):
        raise ConfigError(
            f'evaluate.prompts are answered by objectives that generate text, and "{name}" does not; remove it'
        )


def drift(model: LoadedModel, config: RunConfig) -> dict[str, float]:
    """Scores of the public texts of ``evaluate.drift`` as plain text, by the model as it is loaded.

    ``loss``: nats per token after a text's first; ``perplexity``: its exponential; ``bits_per_byte``; and ``texts`` and
    ``tokens``, how many that were. Texts are cut to ``data.max_length`` tokens.
    """
    texts, plain = drift_texts(config.evaluate), CausalLM()
    corpus = Corpus("evaluate.drift", texts, written([""] * len(texts)))
    tokens = tokenise(corpus, model.tokenizer, config.data.max_length, plain)
    pad, rows = cast(int, model.tokenizer.pad_token_id), np.arange(len(texts))
    batches = [tokens.batch(chunk, pad) for chunk in by_length(tokens.lengths(rows), config.evaluate.batch_size)]
    found = over(model, plain, batches)
    count = sum(int((batch["labels"] != NO_LOSS).sum()) for batch in batches)
    return {name: found[name] for name in MEASURED} | {"texts": len(texts), "tokens": count}


def sample_answers(model: LoadedModel, config: RunConfig) -> list[dict[str, Any]]:
    """Each prompt of ``evaluate.prompts`` with the model's answer, by the model's own generation config; where that
    samples, from a seed of the run's. A prompt is cut to ``data.max_length`` tokens.
    """
    asked, objective = prompts(config.evaluate), cast(LanguageModel, model.objective)
    most = config.data.max_length
    whole = [objective.prompt_ids(prompt, model.tokenizer) for prompt in asked]
    ids = [row[-most:] if objective.shift else row[:most] for row in whole]  # a decoder goes on from a prompt's end
    seed = stream_seed(config.run.seed, "prompts")
    answers = generate(model, ids, config.evaluate.new_tokens, config.evaluate.batch_size, seed)
    return [{"prompt": prompt, "answer": answer} for prompt, answer in zip(asked, answers, strict=True)]
