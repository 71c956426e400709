"""Whole runs on data as people have them: what is refused at the start, said, written, and compared at a resume."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedlab
from fedlab.config import RunConfig
from fedlab.data import corpus_and_shards
from fedlab.errors import ConfigError
from fedlab.evaluate import evaluate
from fedlab.privacy.accounting import Event, epsilon
from fedlab.run.data import check_data
from fedlab.run.launch import prepared, resume
from fedlab.session import open_session
from strategies.server.loop import Rounds

NO_DP = 'privacy={unit="none"}'


@pytest.fixture
def rows(tiny_data: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in tiny_data.read_text().splitlines()]


@pytest.fixture
def config(tiny_toml: str, tiny_data: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """The tiny run on other rows; ``named``: rows of further files by the key of [data] that names them."""

    def make(rows: list[dict[str, Any]], *overrides: str, **named: list[dict[str, Any]]) -> RunConfig:
        text, files = tiny_toml, {"path": rows, **named}
        for key, own in files.items():
            place = tmp_path / f"{key}.jsonl"
            place.write_text("".join(json.dumps(row) + "\n" for row in own))
            text = text.replace(str(tiny_data), str(place)) if key == "path" else text
            overrides = overrides if key == "path" else (*overrides, f"data.{key}={place}")
        return RunConfig.parse(text, ["run.rounds=2", *overrides])

    return make


def report(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "data.json").read_text())
    return found


def test_the_report_says_what_became_of_every_row(
    config: Callable[..., RunConfig], rows: list[dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    dirty = [row | {"topic": f" {row['topic']}"} if i == 5 else row for i, row in enumerate(rows)]
    dirty[7] = dirty[7] | {"topic": ""}
    dirty += [rows[0]] * 6 + [{"text": "apple " * 40, "topic": "fruit", "site": "site0"}]
    run = fedlab.simulate(config(dirty, 'data.on_bad_row="drop"', NO_DP), tmp_path / "run")
    found, shown = report(run.path), capsys.readouterr().out
    assert (found["rows"], found["examples"]["kept"], found["classes"]) == (367, 366, 3)
    assert found["dropped"] == {"no label in column 'topic'": {"rows": 1, "first": ["path.jsonl: line 8"]}}
    assert found["stripped"] == {"topic": 1}
    assert found["cut"] == {"max_length": 16, "texts": 1}
    copies = sum(found["duplicates"][name] for name in ("within", "across", "trained"))
    assert copies >= 6
    assert {own["classes"] for own in found["clients"].values()} == {3}
    assert "data: 367 rows read, 366 kept" in shown
    assert "1 rows left out: no label in column 'topic' (path.jsonl: line 8" in shown
    assert "1 texts are longer than data.max_length = 16" in shown
    assert (run.path / "data.json").stat().st_mode & 0o077 == 0, "it is its owner's"


def test_clean_data_are_one_line(
    config: Callable[..., RunConfig], rows: list[dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    unique = list({row["text"]: row for row in rows}.values())
    fedlab.simulate(config(unique), tmp_path / "run")
    lines = capsys.readouterr().out.splitlines()
    before = lines[: next(i for i, line in enumerate(lines) if line.startswith("round "))]
    assert len([line for line in before if line.startswith(("data: ", "warning: "))]) == 1
    assert "data.json" in (tmp_path / "run" / "PRIVACY.md").read_text(), "no ε covers it, and the statement says so"


@pytest.mark.parametrize(
    ("change", "test", "words"),
    [
        (lambda i, row: {"topic": f"{row['topic']} {i}"}, None, ["288 classes in 288", "data.label"]),
        (lambda i, row: {"topic": str(i // 3)}, None, ["classes in 288", "data.label"]),
        (
            lambda i, row: {"topic": str(i % 3)},
            lambda i, row: {"topic": f"{i % 3}.0"},
            ["'0' and '0.0' are one number"],
        ),
        (lambda i, row: {}, lambda i, row: {"topic": row["topic"].upper()}, ["differ only in case"]),
        (lambda i, row: {}, lambda i, row: {"topic": "xyz"[i % 3]}, ["another column, or another coding"]),
    ],
)
def test_labels_that_nobody_can_learn_are_refused_before_there_is_a_directory(
    change: Callable[..., Any],
    test: Callable[..., Any] | None,
    words: list[str],
    config: Callable[..., RunConfig],
    rows: list[dict[str, str]],
    tmp_path: Path,
):
    named = {} if test is None else {"test_path": [row | test(i, row) for i, row in enumerate(rows[:60])]}
    made = config([row | change(i, row) for i, row in enumerate(rows)], **named)
    with pytest.raises(ConfigError) as caught:
        fedlab.simulate(made, tmp_path / "run")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_class_of_the_test_split_alone_is_warned_of_and_one_of_training_alone_is_fine(
    config: Callable[..., RunConfig], rows: list[dict[str, str]]
):
    dry = [row for row in rows if row["topic"] != "ocean"]
    made = prepared(config(dry, test_path=rows[:60]))
    assert [text.partition(":")[0] for text in check_data(made).warnings] == [
        "1 of 3 classes of the test split are in nobody's training examples"
    ]
    assert "'ocean' (20 of 60" in check_data(made).warnings[0]
    assert check_data(prepared(config(rows, test_path=dry[:40]))).warnings == []


def test_purging_leaves_trained_texts_out_of_the_scores_and_changes_no_training(
    config: Callable[..., RunConfig], rows: list[dict[str, str]]
):
    twice = rows[:120] * 2
    kept, purged = (prepared(config(twice, f'data.duplicates="{how}"')) for how in ("keep", "purge"))
    before, after = check_data(kept), check_data(purged)
    assert before.duplicates.trained == after.duplicates.trained == after.duplicates.purged > 0
    corpus, shards = corpus_and_shards(purged)
    trained = {corpus.texts[i] for own in shards.train.values() for i in own}
    assert not any(corpus.texts[i] in trained for i in shards.test)
    assert not any(corpus.texts[i] in trained for own in shards.local_test.values() for i in own)
    assert before.examples["trained"] == after.examples["trained"]
    assert before.examples["test"] - after.examples["test"] == after.duplicates.purged


def test_a_test_split_whose_every_text_is_trained_on_cannot_be_purged(
    config: Callable[..., RunConfig], rows: list[dict[str, str]]
):
    with pytest.raises(ConfigError, match="leaves no test example"):
        prepared(config(rows * 4, 'data.duplicates="purge"', "data.test_fraction=0.01", test_path=rows))


@pytest.mark.parametrize(("model", "limit"), [("tiny_bert", 32), ("tiny_gpt2", 32)])
def test_texts_beyond_the_models_positions_are_refused_by_key_and_limit(
    model: str, limit: int, tiny_toml: str, tmp_path: Path, request: pytest.FixtureRequest
):
    place = request.getfixturevalue(model)
    overrides = [f"model.name={place}", "lora.target_modules=auto", NO_DP]
    made = RunConfig.parse(tiny_toml, [*overrides, f"data.max_length={limit + 1}"])
    with pytest.raises(ConfigError, match=rf"data.max_length = {limit + 1}.* positions for {limit} tokens"):
        fedlab.simulate(made, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    prepared(RunConfig.parse(tiny_toml, [*overrides, f"data.max_length={limit}"]))


def test_a_text_of_no_token_is_refused_at_the_start(
    config: Callable[..., RunConfig], rows: list[dict[str, str]], tiny_bert: Path, tmp_path: Path
):
    """With a tokenizer that adds nothing and drops what it does not know."""
    import shutil

    from tokenizers import Regex, Tokenizer, normalizers

    shutil.copytree(tiny_bert, tmp_path / "bare")
    raw = Tokenizer.from_file(str(tmp_path / "bare" / "tokenizer.json"))
    raw.post_processor = None
    raw.normalizer = normalizers.Replace(Regex("[0-9]"), "")
    raw.save(str(tmp_path / "bare" / "tokenizer.json"))
    made = config([*rows, {"text": "4711", "topic": "fruit"}], f"model.name={tmp_path / 'bare'}")
    with pytest.raises(ConfigError, match="1 of 361 texts are no token at all"):
        fedlab.simulate(made, tmp_path / "run")


def interrupted(config: RunConfig, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was cut off after its first round."""
    whole = Rounds._round

    def cut(self: Rounds, number: int) -> bool:
        if number == 2:
            raise KeyboardInterrupt
        return whole(self, number)

    monkeypatch.setattr(Rounds, "_round", cut)
    with pytest.raises(fedlab.errors.Interrupted):
        fedlab.simulate(config, out, quiet=True)
    monkeypatch.undo()


@pytest.mark.parametrize("private", [True, False], ids=["DP", "no DP"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows[:-40], "path.jsonl' is not what it was"),
        (
            lambda rows: [
                row | {"topic": {"fruit": "metal", "metal": "fruit"}.get(row["topic"], "ocean")} for row in rows
            ],
            "is not what it was",
        ),
        (lambda rows: [rows[1], rows[0], *rows[2:]], "is not what it was"),
    ],
    ids=["removed", "relabelled", "reordered"],
)
def test_a_run_does_not_go_on_with_other_data(
    change: Callable[..., Any],
    words: str,
    private: bool,
    config: Callable[..., RunConfig],
    rows: list[dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    interrupted(config(rows, *([] if private else [NO_DP])), tmp_path / "run", monkeypatch)
    before = (tmp_path / "run" / "partition.json").read_bytes()
    config(change(rows))
    with pytest.raises(ConfigError, match=words):
        resume(tmp_path / "run", quiet=True)
    assert (tmp_path / "run" / "partition.json").read_bytes() == before
    config(rows)
    assert resume(tmp_path / "run", quiet=True).result["status"] == "completed"


def test_a_run_does_not_go_on_with_another_deal_or_without_its_report(
    config: Callable[..., RunConfig], rows: list[dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    interrupted(config(rows, NO_DP), tmp_path / "run", monkeypatch)
    toml = tmp_path / "run" / "run.toml"
    whole = toml.read_text()
    toml.write_text(whole.replace("[data]\n", "[data]\nseed = 9\n"))
    with pytest.raises(ConfigError, match="clients hold other examples"):
        resume(tmp_path / "run", quiet=True)
    toml.write_text(whole)
    (tmp_path / "run" / "data.json").unlink()
    with pytest.raises(ConfigError, match=r"has no data\.json"):
        resume(tmp_path / "run", quiet=True)


def test_a_file_that_was_changed_is_read_again_by_the_next_run_of_the_process(
    config: Callable[..., RunConfig], rows: list[dict[str, str]]
):
    assert check_data(prepared(config(rows))).examples["kept"] == 360
    assert check_data(prepared(config(rows[:330]))).examples["kept"] == 330


def spent_by_record(runs: list[RunConfig], sigma: float = 1.0) -> list[float]:
    """ε of each of the records, over all runs, whichever client it was with."""
    found: dict[int, list[Event]] = {}
    for config in runs:
        for own in corpus_and_shards(config)[1].train.values():
            for i in own:
                found.setdefault(int(i), []).append(Event("poisson", 16 / len(own), sigma, 3 * config.run.rounds))
    cached: dict[tuple[Event, ...], float] = {}
    values = []
    for spent in found.values():
        key = tuple(sorted(spent, key=lambda e: e.q))
        values.append(cached.setdefault(key, epsilon(key, 1e-5)))
    return values


def test_records_that_were_dealt_anew_have_no_fresh_budget(tiny_toml: str, tmp_path: Path):
    """Of one small client and a large one: a record that changes from one to the other spends more than any ledger
    shows. The second deal is refused; with ``data.seed`` the same deal goes on under the same ledger.
    """
    shared = [f"privacy.ledger={tmp_path / 'shared'}", "data.partition={kind='linear'}", "run.rounds=1"]
    first = RunConfig.parse(tiny_toml, shared)
    run = fedlab.simulate(first, tmp_path / "first", quiet=True)
    anew = RunConfig.parse(tiny_toml, [*shared, "run.seed=9"])
    claimed = max(epsilon([Event("poisson", 16 / n, 1.0, 6)], 1e-5) for n in (47, 96, 144))
    assert run.result["epsilon"] < claimed
    worst = spent_by_record([first, anew])
    ledgers = [Event("poisson", 16 / len(own), 1.0, 3) for own in corpus_and_shards(anew)[1].train.values()]
    assert max(worst) <= epsilon([max(ledgers, key=lambda e: e.q)] * 2, 1e-5) + 1e-6
    moved = sum(value > min(worst) + 1e-3 for value in worst)
    assert moved > 60, "so many records spend another sum than their last client's ledger says"
    with pytest.raises(fedlab.PrivacyError, match=r"records would go to another client.*set data\.seed = 3"):
        fedlab.simulate(anew, tmp_path / "second", quiet=True)
    assert not (tmp_path / "second").exists()
    again = fedlab.simulate(
        RunConfig.parse(tiny_toml, [*shared, "run.seed=9", "data.seed=3"]), tmp_path / "third", quiet=True
    )
    told = again.result["clients"]["client-0"]
    assert told["epsilon_before"] == pytest.approx(run.result["clients"]["client-0"]["epsilon"], rel=1e-9)


@pytest.mark.parametrize("way", ["spelling", "link", "copy", "key"])
def test_another_way_to_the_same_records_opens_no_fresh_ledger(
    way: str, tiny_toml: str, tiny_data: Path, tmp_path: Path
):
    shared = [f"privacy.ledger={tmp_path / 'shared'}", "run.rounds=1"]
    first = fedlab.simulate(RunConfig.parse(tiny_toml, shared), tmp_path / "first", quiet=True)
    place = tmp_path / "copy.jsonl"
    more = [f"data.path={place}"]
    if way == "spelling":
        more = [f"data.path={tiny_data.parent / '..' / tiny_data.parent.name / tiny_data.name}"]
    elif way == "link":
        place.symlink_to(tiny_data)
    elif way == "copy":
        place.write_text(tiny_data.read_text().replace('", "', '",  "'))
    else:
        more = ["data.split=x"]
    second = RunConfig.parse(tiny_toml, [*shared, *more])
    if way in ("spelling", "link"):
        run = fedlab.simulate(second, tmp_path / "second", quiet=True)
        told, before = (one.result["clients"]["client-1"] for one in (run, first))
        assert told["epsilon_before"] == pytest.approx(before["epsilon"], rel=1e-9)
    else:
        words = "are in the ledgers of another place" if way == "copy" else "is not read by data.source"
        with pytest.raises(fedlab.FedlabError, match=words):
            fedlab.simulate(second, tmp_path / "second", quiet=True)
    assert len([p for p in (tmp_path / "shared").iterdir() if p.is_dir()]) == 1


def test_examples_without_a_token_to_learn_are_told_and_are_not_all_there_is(
    causal_toml: str, tiny_llama: Path, tiny_data: Path, tmp_path: Path
):
    """Plain text of one token, by a tokenizer that knows no end of text."""
    from transformers import AutoTokenizer

    shutil.copytree(tiny_llama, tmp_path / "model")
    endless = AutoTokenizer.from_pretrained(tiny_llama)
    endless.eos_token, endless.pad_token = None, "<|im_start|>"
    endless.save_pretrained(tmp_path / "model")
    short = [json.dumps({"text": "a"})] * 60
    toml = causal_toml.replace(str(tiny_llama), str(tmp_path / "model")).replace(
        str(tiny_data), str(tmp_path / "a.jsonl")
    )
    (tmp_path / "a.jsonl").write_text("\n".join(short))
    with pytest.raises(ConfigError, match="60 of 60 examples have no token to learn"):
        check_data(RunConfig.parse(toml))
    (tmp_path / "b.jsonl").write_text("\n".join([*short[:50], *tiny_data.read_text().splitlines()[:10]]))
    config = RunConfig.parse(toml.replace("a.jsonl", "b.jsonl"))
    assert any("50 of 60 examples have no token to learn" in text for text in check_data(config).warnings)
    session = open_session(config.to_toml())
    scores = evaluate(session.model, session.data, np.arange(3), config)
    assert all(math.isnan(score) for score in scores.values()), "nothing was said, so nothing is known"
