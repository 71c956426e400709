import numpy as np
import pytest

from fedlab.config import RunConfig
from fedlab.data import corpus_and_shards, task_data
from fedlab.errors import ConfigError


def parse(toml: str, *settings: str) -> RunConfig:
    return RunConfig.parse(toml, ["strategy={name='fedavg'}", *settings])


def test_tasks_share_no_text_and_every_label_belongs_to_one(stream_toml: str):
    corpus, tasks = task_data(parse(stream_toml))
    assert corpus.label_names == ("fruit", "ocean", "dry", "metal")
    assert tasks.groups.tolist() == [0, 0, 1, 1]
    held = [np.concatenate([*s.train.values(), *s.local_test.values()]) for s in tasks.shards]
    assert len(np.intersect1d(*held)) == 0
    for task, positions in enumerate(held):
        assert set(tasks.groups[corpus.labels[positions]]) == {task}


def test_a_shared_head_has_the_union_of_the_labels(stream_toml: str):
    toml = stream_toml.replace('labels = ["metal", "dry"]', 'labels = ["fruit", "dry"]')
    corpus, tasks = task_data(parse(toml, "stream.heads=shared"))
    assert corpus.label_names == ("fruit", "ocean", "dry")
    assert tasks.groups is None
    own, groups = task_data(parse(toml))
    assert own.label_names == ("wet/fruit", "wet/ocean", "hard/dry", "hard/fruit")
    assert groups.groups.tolist() == [0, 0, 1, 1]


def test_each_task_may_have_data_of_its_own(stream_toml: str):
    toml = stream_toml.replace('labels = ["metal", "dry"]', 'labels = ["metal", "dry"]\ndata = {limit = 60}')
    _, tasks = task_data(parse(toml))
    sizes = [sum(map(len, s.train.values())) + sum(map(len, s.local_test.values())) for s in tasks.shards]
    assert sizes == [240, 60]


def test_a_text_is_classified_among_its_own_tasks_labels(stream_toml: str):
    from fedlab.session import open_session

    session = open_session(parse(stream_toml).at_stage(1, None).to_toml())
    batch = session.data.batch(session.data.train("client-0")[:4], 0)
    logits = session.model.logits(batch)
    assert bool(logits[:, :2].isneginf().all())
    assert bool(logits[:, 2:].isfinite().all())
    assert session.data.at(0).test.tolist() != session.data.test.tolist()


def test_a_stage_has_the_rounds_of_its_task(stream_toml: str):
    toml = stream_toml.replace('name = "hard"', 'name = "hard"\nrounds = 7')
    config = parse(toml)
    assert [config.at_stage(t, None).run.rounds for t in (0, 1)] == [3, 7]
    assert RunConfig.parse(config.at_stage(1, "x").to_toml()) == config.at_stage(1, "x")
    joint = parse(toml, "stream.joint=true").at_stage(0, None)
    assert joint.run.rounds == 10
    corpus, shards = corpus_and_shards(joint)
    assert sum(map(len, shards.train.values())) + sum(map(len, shards.local_test.values())) == len(corpus)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (('name = "hard"', 'name = "wet"'), "two are called 'wet'"),
        (('name = "hard"', 'name = "a/b"'), "tasks"),
        (('labels = ["metal", "dry"]', 'labels = ["metal", "dry"]\ndata = {clients = 4}'), "which all tasks share"),
        (('labels = ["metal", "dry"]', 'labels = ["metal", "dry"]\ndata = {sauce = "x"}'), "sauce"),
    ],
)
def test_tasks_that_make_no_sense_are_refused(change: tuple[str, str], reason: str, stream_toml: str):
    with pytest.raises(ConfigError, match=reason):
        parse(stream_toml.replace(*change))


def test_a_stream_needs_tasks(learnable_toml: str):
    with pytest.raises(ConfigError, match="belong to a configuration with"):
        parse(learnable_toml, "stream.replay=0.1")


def test_a_head_of_its_own_needs_two_labels(stream_toml: str):
    with pytest.raises(ConfigError, match="2"):
        task_data(parse(stream_toml.replace('labels = ["metal", "dry"]', 'labels = ["metal"]')))
