"""What ``fedlab client --check`` says of a run, from the client's own file and records, before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from clients.check import show

CLIENT = """
[client]
id = "north"
server = "fed.example.org:8443"
ca = "ca.crt"
key = "north.key"
[data]
path = "records.csv"
text = "text"
label = "topic"
[models.{model!r}]
[policy]
max_epsilon = 3.0
min_batch = 8
[budget]
epsilon = 4.0
"""
RUN = """
[run]
rounds = 2
[model]
name = {model!r}
[objective]
labels = ["heart", "bone"]
[lora]
rank = 2
alpha = 2
[data]
max_length = 16
[train]
steps = 1
batch_size = 16
lr = 1.0
[privacy]
unit = "example"
epsilon = 3.0
clip = 1.0
noise = "secure"
"""


def checked(place: Path, model: str, run: str, *labels: str) -> tuple[int, str]:
    """Exit code, and everything that was said, for records of these labels."""
    rows = [f"note {i} about the {label},{label}" for i in range(60) for label in labels]
    (place / "records.csv").write_text("text,topic\n" + "\n".join(rows) + "\n")
    (place / "client.toml").write_text(CLIENT.format(model=model))
    (place / "run.toml").write_text(run.format(model=model))
    said: list[str] = []
    code = show(place / "client.toml", place / "run.toml", said.append, said.append)
    return code, "\n".join(said)


def test_what_it_would_cost_is_known_before_there_is_a_certificate(tiny_bert: Path, tmp_path: Path):
    code, said = checked(tmp_path, str(tiny_bert), RUN, "heart", "bone")
    assert code == 0, said
    assert "cannot reach a server yet: cannot read certificate" in said
    assert "labels: heart 5" in said
    assert "cost: ε = 2.99" in said
    assert said.endswith("this run would be taken part in")
    assert not (tmp_path / "north").exists()  # nothing is made, and nothing charged


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("epsilon = 3.0", "epsilon = 3.5", "ε = 3.5 for the run, the policy allows at most 3"),
        ('noise = "secure"', 'noise = "seeded"', 'privacy.noise = "seeded", the policy wants "secure"'),
        ("batch_size = 16", "batch_size = 4", "train.batch_size = 4, the policy wants at least 8"),
        ("name = {model!r}", 'name = "another"', "model.name is not among the client's models"),
        ('"bone"]', '"skin"]', "has the label 'bone', which is not among the 2 of objective.labels"),
        ("clip = 1.0", "clip = 1.0\nshare_metrics = true", "the release 'training-metrics' is not among those"),
    ],
)
def test_what_would_be_refused_is_said_with_its_key(old: str, new: str, told: str, tiny_bert: Path, tmp_path: Path):
    assert old in RUN
    code, said = checked(tmp_path, str(tiny_bert), RUN.replace(old, new), "heart", "bone")
    assert code == 3, said
    assert told in said
    assert said.endswith("this run would be refused")
