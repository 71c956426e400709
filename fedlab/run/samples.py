"""``samples.json`` of a run: public prompts and what the model answered before the first round and after the last."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SAMPLES = "samples.json"
Sample = dict[str, Any]  # prompt, before, after; an answer that is not there is None


def read_samples(run: Path) -> list[Sample]:
    """The samples of a run directory; [] where there are none."""
    path = run / SAMPLES
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"samples": []}
    return list(found["samples"])


def add_samples(run: Path, when: str, answers: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """What the file holds with these answers: those of the other time stay where the prompt is the same.

    Args:
        run: its directory.
        when: "before" or "after".
        answers: prompt and answer of each.
    """
    kept = {sample["prompt"]: sample for sample in read_samples(run)}
    new = [
        {"prompt": one["prompt"], **{t: kept.get(one["prompt"], {}).get(t) for t in ("before", "after")}}
        for one in answers
    ]
    return {"samples": [{**sample, when: one["answer"]} for sample, one in zip(new, answers, strict=True)]}
