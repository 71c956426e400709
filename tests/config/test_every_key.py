"""Every key of a configuration changes something that can be seen, or is refused: a key without a row here fails.

The keys that belong to one strategy are tried by ``tests/strategies/test_options.py``.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import fedlab
from fedlab.config import RunConfig
from fedlab.config.explain import keys
from fedlab.errors import ConfigError, RunFailed
from fedlab.privacy.plan import plan_of
from fedlab.privacy.promise import headline
from fedlab.run.launch import check
from fedlab.run.launch.local import LocalGrid
from strategies import STRATEGIES

spec = importlib.util.spec_from_file_location("observers", Path(__file__).with_name("observers.py"))
assert spec is not None
assert spec.loader is not None
look: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(look)

Observer = Callable[[RunConfig, Path], Any]
NO_DP = "privacy={{unit='none'}}"
CALIBRATED = "privacy={{unit='example', epsilon=6.0, clip=1.0}}"
SHARED = ("train.steps=1", "train.sampling_rate=0.2", "train.momentum=0.0")
SECRETS = "data.canaries={{count=1, space=50}}"
SHARDS = "data.partition={{kind='shard', shards_per_client=3}}"
UNEQUAL = "data.partition={{kind='linear'}}"
TASKS = "[[tasks]]\nname = 'a'\nlabels = ['fruit', 'metal']\n[[tasks]]\nname = 'b'\nlabels = ['metal', 'ocean']\n"
STREAM = (NO_DP, "strategy={{name='osft'}}", "run.rounds=1")
SECOND = "stage={{task=1}}"
DECODER = ("model.name={tiny_llama}", "lora.target_modules=['q_proj', 'v_proj']", "data.max_length=64")


@dataclass(frozen=True)
class Row:
    """Another value of a key, where the difference is seen, and what else is set on both sides."""

    value: str  # as after --set KEY=; where it begins with "[[", tables that take the place of TASKS
    seen: Observer
    base: tuple[str, ...] = ()
    tasks: str = ""


def refused(pattern: str, action: Observer = lambda config, path: check(config)) -> Observer:
    """Sees whether a configuration is refused with these words."""

    def observe(config: RunConfig, path: Path) -> Any:
        try:
            action(config, path)
        except (ConfigError, RunFailed) as error:
            if pattern not in str(error):
                raise
            return pattern
        return None

    return observe


def start(config: RunConfig, path: Path) -> None:
    fedlab.simulate(config, path / "run", quiet=True)


def silence(config: RunConfig, path: Path) -> Any:
    """What is said of nodes that do not answer in time."""
    from strategies.server.loop import Rounds
    from strategies.server.server_data import SimulatedData

    class Silent(LocalGrid):
        def pull_messages(self, message_ids: Any) -> list[Any]:
            return []

    made = look.RunDirectory.create(config, path / "run")
    data = SimulatedData(config)
    with pytest.raises(RunFailed) as caught:
        Rounds(Silent(lambda *_: None, 1), config, made, look.MetricsLog(made), look.Progress(), data)
    return str(caught.value)


def budgeted(config: RunConfig, path: Path) -> Any:
    return plan_of(config, 90).delta


def sent_back(config: RunConfig, path: Path) -> Any:
    """Who is sent what rank."""
    from fedlab.config.clients import initial_ranks

    return initial_ranks(config, look.corpus_and_shards(config)[1].clients)


ROWS = {
    "run.name": Row("other", look.directory),
    "run.rounds": Row("5", look.plan),
    "run.seed": Row("4", look.partition),
    "run.backend": Row("ray", refused("nothing answers", start), ("run.ray_address='127.0.0.1:9'", "run.rounds=1")),
    "run.nodes": Row("3", look.nodes),
    "run.threads": Row("2", look.forward_passes, ("run.rounds=1",)),
    "run.cpus_per_node": Row("4096", look.ray),
    "run.gpus_per_node": Row("64", look.ray),
    "run.ray_address": Row("'127.0.0.1:9'", look.ray),
    "run.device": Row("cuda:99", refused("run.device = 'cuda:99'", look.adapters)),
    "run.dtype": Row("bfloat16", look.adapters),
    "run.wire_dtype": Row("bfloat16", look.result, ("run.rounds=1",)),
    "run.cohort": Row("1", look.passes),
    "run.memory": Row("0.001", refused("one client needs", look.memory)),
    "run.checkpointing": Row("true", look.forward_passes, ("run.rounds=1",)),
    "run.cache_hidden_states": Row("true", look.adapters, ("lora.layers_to_transform=[1]",)),
    "run.fraction": Row("0.5", look.drawn),
    "run.sampling": Row("uniform", look.drawn, ("run.fraction=0.4", "run.rounds=8")),
    "run.min_clients": Row("2", look.result, ("run.fraction=0.67", "privacy.participations=1", "run.rounds=2")),
    "run.outlier": Row("1.0", look.result, ("run.rounds=1",)),
    "run.timeout": Row("1.0", silence, ("run.timeout=0.1",)),
    "run.tensorboard": Row("true", look.files, ("run.rounds=1",)),
    "model.name": Row("{tiny_gpt2}", look.adapters, ("lora.target_modules=auto",)),
    "model.revision": Row("v2", refused("the hub did not give it"), ("model.name='some/model'",)),
    "model.sha256": Row(f"'{'a' * 64}'", refused("model.sha256 names aaaaaaaaaaaaaaaa…, but the files of the copy")),
    "model.quantize": Row("int8", refused('model.quantize = "int8"', look.adapters)),
    "objective.name": Row("regresion", refused("regresion")),
    "objective.labels": Row("['ocean', 'metal', 'fruit']", look.adapters),
    "objective.loss": Row("sum", look.update, ("objective={generative}", *DECODER)),
    "objective.template": Row("'{{prompt}} ->'", look.lengths, ("objective={generative}", *DECODER)),
    "objective.system": Row("'the old tide'", look.lengths, ("objective={generative}", *DECODER)),
    "lora.rank": Row("2", look.adapters),
    "lora.alpha": Row("4", look.adapters),
    "lora.target_modules": Row("['query']", look.adapters),
    "lora.dropout": Row("0.5", look.update),
    "lora.rslora": Row("true", look.adapters),
    "lora.init_a": Row("kaiming", look.adapters),
    "lora.public": Row("'{other}'", look.adapters, ("lora.init_a=eva", "lora.public='{public}'")),
    "lora.public_texts": Row("4", look.adapters, ("lora.init_a=eva", "lora.public='{public}'")),
    "lora.layers_to_transform": Row("[0]", look.adapters),
    "data.source": Row("wordnet", refused("is not read by data.source")),
    "data.clients": Row("4", look.partition),
    "data.partition.kind": Row("linear", look.partition),
    "data.partition.alpha": Row("0.5", look.partition, ("data.partition={{kind='dirichlet', alpha=5.0}}",)),
    "data.partition.column": Row(
        "kind", look.partition, ("data={named}", "data.partition={{kind='natural', column='site'}}")
    ),
    "data.partition.classes_per_client": Row(
        "2", look.partition, ("data.partition={{kind='pathological', classes_per_client=1}}",)
    ),
    "data.partition.shards_per_client": Row("2", look.partition, (SHARDS,)),
    "data.min_client_size": Row("200", refused("data.min_client_size = 200", look.partition)),
    "data.max_length": Row("4", look.lengths),
    "data.test_fraction": Row("0.4", look.partition),
    "data.canaries.count": Row("2", look.partition, (SECRETS, "objective={generative}", *DECODER)),
    "data.canaries.records": Row("2", look.partition, (SECRETS, "objective={generative}", *DECODER)),
    "data.canaries.space": Row("500", look.content, (SECRETS, "objective={generative}", *DECODER)),
    "data.limit": Row("200", look.partition),
    "data.seed": Row("4", look.partition),
    "data.on_bad_row": Row("drop", refused("have nothing in column", look.partition), ("data={gaps}",)),
    "data.duplicates": Row("purge", look.partition, ("data={twice}",)),
    "data.path": Row("'{other}'", look.partition),
    "data.test_path": Row("'{other}'", look.partition),
    "data.subset": Row("verb", look.partition, ("data={wordnet}",)),
    "data.split": Row("more", look.partition, ("data={hub}",)),
    "data.test_split": Row("more", look.partition, ("data={hub}",)),
    "data.revision": Row("v2", look.partition, ("data={hub}",)),
    "data.text": Row("site", look.partition),
    "data.label": Row("site", look.partition),
    "data.context": Row("site", look.partition, ("data={context}", "objective.name=instruction")),
    "data.messages": Row("again", look.partition, ("data={chats}", "objective.name=instruction")),
    "clients.rank": Row("{{client-1 = 2}}", sent_back),
    "clients.lr": Row("{{client-0 = 2.0}}", look.update),
    "strategy.name": Row("ffa", look.result, ("run.rounds=1",)),
    "strategy.weights": Row("uniform", look.result, ("run.rounds=1", UNEQUAL)),
    "train.steps": Row("4", look.plan),
    "train.epochs": Row("2.0", look.plan, ("train={{epochs=1.0, lr=0.5}}",)),
    "train.batch_size": Row("20", look.plan),
    "train.sampling_rate": Row("0.3", look.plan),
    "train.physical_batch": Row("4", look.forward_passes, ("run.rounds=1",)),
    "train.optimizer": Row("adamw", look.update, ("train.momentum=0.0",)),
    "train.lr": Row("0.1", look.update),
    "train.head_lr": Row("0.1", look.update),
    "train.momentum": Row("0.9", look.update),
    "train.weight_decay": Row("0.1", look.update),
    "train.schedule": Row("linear", look.update),
    "train.warmup_rounds": Row("4", look.update),
    "train.prox": Row("0.5", look.update),
    "train.gradients": Row("hooks", look.passes),
    "train.head": Row("freeze", look.update),
    "privacy.unit": Row("client", look.plan, ("strategy={{name='ffa', weights='uniform'}}", CALIBRATED)),
    "privacy.epsilon": Row("3.0", look.plan, (CALIBRATED,)),
    "privacy.sigma": Row("2.0", look.plan),
    "privacy.delta": Row("1e-7", look.plan),
    "privacy.clip": Row("0.5", look.plan),
    "privacy.participations": Row("2", look.plan),
    "privacy.noise": Row("secure", look.plan),
    "privacy.share_metrics": Row("true", look.lines, ("run.rounds=1",)),
    "privacy.scores_sigma": Row("2.0", look.plan, (CALIBRATED, "evaluate.clients=last")),
    "privacy.survivors": Row("2", look.plan, SHARED),
    "privacy.colluding": Row("1", look.plan, (*SHARED, "privacy.survivors=3")),
    "privacy.masked": Row("true", lambda config, path: headline(config), (*SHARED, "privacy.survivors=3")),
    "privacy.budget.epsilon": Row("20.0", look.result, ("privacy.budget={{epsilon=3.2}}", "run.rounds=2")),
    "privacy.budget.delta": Row("1e-7", budgeted, ("privacy.budget={{epsilon=5.0}}",)),
    "privacy.ledger": Row("'{path}/ledgers'", look.files, ("run.rounds=1",)),
    "evaluate.evaluators": Row("['clasification']", refused("clasification")),
    "evaluate.every": Row("2", look.lines, ("run.rounds=2",)),
    "evaluate.clients": Row("never", look.result, ("run.rounds=1",)),
    "evaluate.batch_size": Row("7", look.forward_passes, ("run.rounds=1",)),
    "evaluate.generations": Row("1", look.answered, ("objective={generative}", *DECODER)),
    "evaluate.new_tokens": Row("1", look.answered, ("objective={generative}", *DECODER)),
    "evaluate.choices": Row("['fruit', 'metal']", look.chosen, ("objective={generative}", *DECODER)),
    "evaluate.drift": Row("'{public}'", look.drifted, ("objective={generative}", *DECODER)),
    "evaluate.drift_texts": Row(
        "4", look.drifted, ("objective={generative}", *DECODER, "evaluate.drift='{public}'", "evaluate.batch_size=8")
    ),
    "evaluate.prompts": Row("'{public}'", look.asked, ("objective={generative}", *DECODER)),
    "evaluate.membership.pairs": Row("2", look.memorised, ("evaluate.membership={{pairs=3}}",)),
    "evaluate.membership.references": Row("1", look.memorised, ("evaluate.membership={{pairs=3}}", "run.rounds=1")),
    "tasks.name": Row(TASKS.replace("'b'", "'c'"), look.folders, STREAM, TASKS),
    "tasks.labels": Row(TASKS.replace("'metal', 'o", "'fruit', 'o"), look.partition, (*STREAM, SECOND), TASKS),
    "tasks.rounds": Row(TASKS + "rounds = 4\n", look.folders, STREAM, TASKS),
    "tasks.data": Row(TASKS + "data = {limit = 100}\n", look.partition, (*STREAM, SECOND), TASKS),
    "stream.heads": Row("shared", look.adapters, (*STREAM, SECOND), TASKS),
    "stream.replay": Row("0.5", look.partition, (*STREAM, SECOND), TASKS),
    "stream.penalty": Row("50.0", look.bits, (*STREAM, "strategy={{name='o-lora'}}"), TASKS),
    "stream.joint": Row("true", look.folders, STREAM, TASKS),
    "stage.task": Row("0", look.partition, (*STREAM, SECOND), TASKS),
    "stage.previous": Row("'{path}'", refused("that task is not finished", start), (*STREAM, SECOND), TASKS),
}


def test_every_key_has_a_row():
    assert [key.name for key in keys(RunConfig)] == list(ROWS)


def test_every_key_says_what_it_means():
    found = [*keys(RunConfig), *(key for one in STRATEGIES.values() for key in keys(one.Options, "strategy."))]
    assert not [key.name for key in found if len(key.meaning.split()) < 2]
    assert not [key.name for key in found if not key.range or not key.default]


@pytest.fixture(scope="session")
def places(
    tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, tiny_gpt2: Path, tiny_llama: Path
) -> dict[str, str]:
    """Files that rows name."""
    root = tmp_path_factory.mktemp("keys")
    rows = [json.loads(line) for line in tiny_data.read_text(encoding="utf-8").splitlines()]

    def write(name: str, kept: list[Any]) -> str:
        (root / name).write_text("\n".join(map(json.dumps, kept)), encoding="utf-8")
        return str(root / name)

    synset = "0 {:02d} n 01 word 0 000 | a {} of kind {}"
    for part, numbers in (("noun", (5, 6)), ("verb", (29, 30))):
        lines = [synset.format(numbers[i % 2], part, i) for i in range(60)]
        (root / f"data.{part}").write_text("\n".join(lines), encoding="utf-8")
    turns = [(row["text"], [{"role": "assistant", "content": row["topic"]}]) for row in rows]
    chats = [
        {
            "chat": [{"role": "user", "content": text}, *answer],
            "again": [{"role": "user", "content": text.upper()}, *answer],
        }
        for text, answer in turns
    ]
    named = [row | {"site": f"s{i % 3}", "kind": f"k{i % 3}"} for i, row in enumerate(rows)]
    table = "source='files', text='text', label='topic', test_fraction=0.2, max_length=16"
    return {
        "tiny_gpt2": str(tiny_gpt2),
        "tiny_llama": str(tiny_llama),
        "generative": "{name='instruction'}",
        "context": f"{{{table}, path='{write('context.jsonl', named)}', context='kind'}}",
        "chats": f"{{source='files', path='{write('chats.jsonl', chats)}', messages='chat'}}",
        "other": write("other.jsonl", [row | {"text": row["text"].upper()} for row in rows]),
        "public": write("public.jsonl", [{"text": row["text"]} for row in rows[:40]]),
        "named": f"{{{table}, path='{write('named.jsonl', named)}'}}",
        "gaps": f"{{{table}, path='{write('gaps.jsonl', [*rows, rows[0] | {'topic': ''}])}'}}",
        "twice": f"{{{table}, path='{write('twice.jsonl', rows[:120] * 2)}'}}",
        "wordnet": f"{{source='wordnet', path='{root}', clients=3, min_client_size=2}}",
        "hub": "{source='hub', path='some/set', text='text', clients=3, min_client_size=2}",
    }


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set of the hub with three splits in every revision."""
    import datasets

    def load(path: str, subset: str | None, revision: str | None) -> dict[str, datasets.Dataset]:
        def split(name: str) -> datasets.Dataset:
            texts = [f"{name} {i} of {revision}" for i in range(60)]
            return datasets.Dataset.from_dict({"text": texts, "label": [str(i % 2) for i in range(60)]})

        return {name: split(name) for name in ("train", "more", "validation")}

    monkeypatch.setattr(datasets, "load_dataset", load)


@pytest.fixture
def cached_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the hub that has the main revision of one model, and no network."""
    import huggingface_hub.constants

    folder = tmp_path / "hub" / "models--some--model"
    for name, text in (("refs/main", "a" * 40), (f"snapshots/{'a' * 40}/config.json", "{}")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.parametrize("key", ROWS)
def test_a_key_changes_what_is_seen(
    key: str, tiny_toml: str, places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub, cached_model
):
    row = ROWS[key]
    monkeypatch.chdir(tmp_path)
    found = []
    for side in ("before", "after"):
        path = tmp_path / side
        path.mkdir()
        known = {**places, "path": str(path)}
        settings = [setting.format(**known) for setting in row.base]
        tasks = row.tasks
        if side == "after" and row.value.startswith("[["):
            tasks = row.value
        elif side == "after":
            settings.append(f"{key}={row.value.format(**known)}")
        found.append(row.seen(RunConfig.parse(f"{tiny_toml}\n{tasks}", settings), path))
    assert found[0] != found[1], f"{key} = {row.value} changes nothing"
