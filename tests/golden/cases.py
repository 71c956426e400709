"""The golden configurations: what is run on each tree, grouped by what they reach.

A case is a base configuration and settings (``section.key=value``), in the keys that users write. ``$INPUTS`` stands
for the folder of models and texts, ``$CASE`` for the folder of the case; both are the same paths for every tree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

DP = "privacy={unit='example', sigma=2.0, clip=1.0}"  # a large σ is quick to account
CLIENT_DP = "privacy={unit='client', sigma=3.0, clip=1.0}"
UNIFORM = "strategy.weights=uniform"
UPPER = "lora.layers_to_transform=[1]"
AGGREGATORS = (
    *("fedavg", "ffa", "fedsvd", "fedex", "flora", "flexlora"),
    *("hetlora", "lora-fair", "rolora", "fedsa", "head"),
)
CONTINUAL = ("osft", "osft-data", "fedsvd-continual", "o-lora", "full")
READS_INPUTS = ("osft-data", "fedsvd-continual")  # strategies with the keys ``energy`` and ``free``

ONE = """
[run]
name = "golden"
rounds = 2
nodes = 1
seed = 3
backend = "local"
[model]
name = "$INPUTS/models/bert"
[lora]
rank = 4
alpha = 8
target_modules = ["query", "value"]
[data]
source = "files"
path = "$INPUTS/data/topics.jsonl"
text = "text"
label = "topic"
clients = 3
max_length = 16
test_fraction = 0.2
[train]
steps = 2
batch_size = 16
physical_batch = 8
lr = 0.3
[evaluate]
every = 1
"""

STREAM = (
    ONE.replace("models/bert", "models/encoder").replace("topics.jsonl", "four.jsonl")
    + """
[[tasks]]
name = "wet"
labels = ["fruit", "ocean"]
[[tasks]]
name = "hard"
labels = ["metal", "dry"]
"""
)
SHARED_HEAD = (
    STREAM.partition("[[tasks]]")[0] + '[[tasks]]\nname = "early"\ndata = {limit = 200}\n[[tasks]]\nname = "late"\n'
)
TOMLS = {"one": ONE, "stream": STREAM, "shared": SHARED_HEAD}


@dataclass(frozen=True)
class Case:
    """One golden configuration.

    Attributes:
        name: ``group/what``.
        settings: overrides of the base, in order.
        base: key of ``TOMLS``.
        way: ``run``: to its end. ``interrupt``, ``kill``: by SIGINT or SIGKILL in a process of its own, then resumed.
            ``twice``: two runs one after the other, the second with another seed.
        begun: for interrupt and kill, how many runs must have a checkpoint first (tasks, in a stream).
        loose: why only what the run cost may be compared; empty if all of it may.
        extra: left out unless it is asked for; something near it is always run, or it is slow.
    """

    name: str
    settings: tuple[str, ...] = ()
    base: Literal["one", "stream", "shared"] = "one"
    way: Literal["run", "interrupt", "kill", "twice"] = "run"
    begun: int = 1
    loose: str = ""
    extra: bool = False

    @property
    def toml(self) -> str:
        """The base configuration, with its place holders."""
        return TOMLS[self.base]


def cases() -> list[Case]:
    """Every golden configuration, the slow ones last. Raises ValueError if two have one name."""
    groups = (strategies, options, means, ranks, training, lora, running, privacy, client_level, data, models, language)
    found = [case for group in (*groups, streams, private_streams, cut_off, on_ray) for case in group()]
    names = [case.name for case in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"several cases are called {', '.join(twice)}")
    return found


def strategies() -> Iterator[Case]:
    """Every strategy of one task, without and with example-level DP."""
    for name in AGGREGATORS:
        yield Case(f"strategy/{name}", (f"strategy.name={name}",))
        yield Case(f"strategy/{name}+dp", (f"strategy.name={name}", DP))


def options() -> Iterator[Case]:
    """The strategies' own keys."""
    longer = "run.rounds=4"
    yield Case("fedsvd/period", ("strategy={name='fedsvd', period=2, warmup=1}", longer))
    yield Case("fedsvd/refresh-random+dp", ("strategy={name='fedsvd', refresh={every=2}}", longer, DP))
    weights = "strategy={name='fedsvd', refresh={every=2, keep=1, source='weights'}}"
    yield Case("fedsvd/refresh-weights", (weights, longer))
    turned = "strategy={name='fedsvd', refresh={every=2, keep=1}, server={optimizer='momentum', lr=0.5}}"
    yield Case("fedsvd/refresh-momentum", (turned, longer))
    yield Case("fedsvd/refresh-random", ("strategy={name='fedsvd', refresh={every=1, keep=1}}", longer), extra=True)
    yield Case("flora/train-b+dp", ("strategy={name='flora', train='B'}", DP))
    yield Case("flora/train-b", ("strategy={name='flora', train='B'}",), extra=True)
    yield Case("flora/kaiming-residual", ("strategy={name='flora', redraw='kaiming', residual_rank=5}",))
    yield Case("fedex/residual", ("strategy={name='fedex', residual_rank=3}",))
    yield Case("flexlora/left", ("strategy={name='flexlora', split='left'}",))
    yield Case("flexlora/fisher", ("strategy={name='flexlora', fisher='updates'}",))
    few = ("run.rounds=1", "lora.target_modules=['query']")  # its sub-gradient steps are many
    yield Case("flexlora/robust", ("strategy={name='flexlora', mean='robust'}", *few))
    yield Case("hetlora/prune", pruned("strategy={name='hetlora', prune=0.5}"))
    yield Case("hetlora/own-weights", pruned("strategy={name='hetlora', norm_weights=false, prune=0.5, min_rank=2}"))
    yield Case("lora-fair/ridge", ("strategy={name='lora-fair', ridge=0.1}",))


def pruned(strategy: str) -> tuple[str, ...]:
    """Settings under which HetLoRA prunes somebody."""
    return (strategy, "clients.rank={client-0=3}", "train.weight_decay=0.5", "train.steps=3")


def means() -> Iterator[Case]:
    """What is done with the clients' mean: weights, server optimisers, robust rules."""
    yield Case("mean/uniform", ("strategy={name='fedavg', weights='uniform'}", "data.partition={kind='linear'}"))
    for optimizer in ("momentum", "adam", "yogi"):
        server = f"server={{optimizer='{optimizer}', lr=0.1, beta1=0.8}}"
        yield Case(f"server/fedavg-{optimizer}", (f"strategy={{name='fedavg', {server}}}", "run.rounds=3"))
        private = (f"strategy={{name='ffa', {server}}}", "run.rounds=3", DP)
        yield Case(f"server/ffa-{optimizer}+dp", private, extra=optimizer != "adam")
    yield Case("server/fedsvd-momentum", ("strategy={name='fedsvd', server={optimizer='momentum'}}", "run.rounds=3"))
    rules = {
        "coordinate_median": "",
        "trimmed_mean": ", trim=0.2",
        "krum": ", byzantine=1",
        "multi_krum": ", byzantine=1, keep=3",
        "bulyan": ", byzantine=1",
        "geometric_median": "",
        "norm_bounded_mean": "",
    }
    for rule, own in rules.items():
        robust = f"strategy={{name='fedavg', robust={{rule='{rule}'{own}}}}}"
        yield Case(f"robust/{rule}", (robust, "data.clients=7"))
    bounded = "strategy={name='fedsvd', robust={rule='norm_bounded_mean', bound=0.5}}"
    yield Case("robust/bounded-fedsvd+dp", (bounded, "data.clients=5", DP))


def ranks() -> Iterator[Case]:
    """Clients of their own rank and learning rate."""
    unequal = "clients.rank={client-0=1, client-2=2}"
    for name in ("fedsvd", "flora", "flexlora", "hetlora"):
        yield Case(f"clients/rank-{name}", (f"strategy.name={name}", unequal))
    for name in ("fedavg", "ffa", "rolora", "fedsa"):
        yield Case(f"clients/rank-{name}", (f"strategy.name={name}", unequal), extra=True)
    yield Case("clients/rank-share+dp", ("clients.rank={'67%'=2}", DP))
    yield Case("clients/lr", ("clients.lr={client-1=0.5, client-2=2.0}",))
    yield Case("clients/lr-share+dp", ("clients.lr={'50%'=0.5}", DP))


def training() -> Iterator[Case]:
    """One client's local steps."""
    for gradients in ("hooks", "opacus"):
        yield Case(f"gradients/{gradients}", (f"train.gradients={gradients}",))
        yield Case(f"gradients/{gradients}+dp", (f"train.gradients={gradients}", DP, "lora.dropout=0.2"))
        both = (f"train.gradients={gradients}", "train.momentum=0.9", "train.prox=0.5", DP)
        yield Case(f"gradients/{gradients}-momentum-prox+dp", both, extra=True)
    yield Case("gradients/fused+dp", ("train.gradients=fused", DP, "lora.dropout=0.2"))
    settings = {
        "momentum": ("train.momentum=0.9", "train.steps=4"),
        "adamw": ("train.optimizer=adamw", "train.lr=0.01", "train.weight_decay=0.1", "train.steps=4"),
        "prox": ("train.prox=0.5", "train.steps=4", "strategy.name=fedavg"),
        "head-lr": ("train.head_lr=0.05",),
        "head-frozen": ("train.head=freeze",),
        "cosine": ("train.schedule=cosine", "train.warmup_rounds=1", "run.rounds=4"),
        "linear": ("train.schedule=linear", "run.rounds=3"),
        "physical-batch": ("train.physical_batch=5",),
    }
    for what, own in settings.items():
        yield Case(f"train/{what}+dp", (*own, DP))
        yield Case(f"train/{what}", own, extra=what not in ("adamw", "prox"))
    for what, length in (("epochs", "epochs=1"), ("part-epoch", "epochs=0.5")):
        by_epochs = (f"train={{{length}, batch_size=16, lr=0.3}}",)
        yield Case(f"train/{what}", by_epochs, extra=what == "epochs")
        yield Case(f"train/{what}+dp", (*by_epochs, DP), extra=what != "epochs")


def lora() -> Iterator[Case]:
    """The adapter: where it is, how it begins, dropout."""
    yield Case("lora/dropout", ("lora.dropout=0.3", "strategy.name=fedavg"))
    yield Case("lora/rslora", ("lora.rslora=true",))
    for start in ("kaiming", "random", "weights"):
        yield Case(f"lora/init-{start}", (f"lora.init_a={start}", "strategy.name=ffa"))
    yield Case("lora/init-eva", ("lora.init_a=eva", "lora.public=$INPUTS/public.txt", "strategy.name=ffa"))
    yield Case("lora/all-linear+dp", ("lora.target_modules=all-linear", DP))
    yield Case("lora/upper-layer+dp", (UPPER, DP))


def running() -> Iterator[Case]:
    """Clients per pass, nodes, participation, number formats, caches: what must or must not change bits."""
    for cohort in (1, 2):
        yield Case(f"cohort/{cohort}", (f"run.cohort={cohort}", "data.clients=5"))
        yield Case(f"cohort/{cohort}+dp", (f"run.cohort={cohort}", "data.clients=5", DP))
    yield Case("cohort/default+dp", ("data.clients=5", DP), extra=True)
    yield Case("run/two-nodes+dp", ("run.nodes=2", DP))
    yield Case("run/three-nodes-cohort", ("run.nodes=3", "run.cohort=2", "data.clients=5"))
    yield Case("run/seed", ("run.seed=11",), extra=True)
    yield Case("run/fraction", ("run.fraction=0.34", "run.rounds=4"))
    some = ("run.fraction=0.5", "data.clients=6", "run.rounds=3")
    yield Case("run/fraction-uniform+dp", ("run.sampling=uniform", *some, DP))
    yield Case("run/threads", ("run.threads=2",))
    yield Case("run/checkpointing+dp", ("run.checkpointing=true", DP))
    yield Case("prefix/off", (UPPER,))
    yield Case("prefix/on", (UPPER, "run.cache_prefix=true"))
    yield Case("prefix/on+dp", (UPPER, "run.cache_prefix=true", DP))
    yield Case("dtype/bfloat16+dp", ("run.dtype=bfloat16", DP))
    yield Case("dtype/wire", ("run.wire_dtype=bfloat16",))
    yield Case("dtype/both+dp", ("run.dtype=bfloat16", "run.wire_dtype=bfloat16", "strategy.name=fedavg", DP))
    yield Case("dtype/bfloat16", ("run.dtype=bfloat16",), extra=True)
    yield Case("evaluate/seldom", ("evaluate.every=2", "evaluate.clients=never", "run.rounds=3"))
    yield Case("evaluate/always", ("evaluate.clients=always", "evaluate.batch_size=7"))


def privacy() -> Iterator[Case]:
    """Example-level DP: calibration, caps, budgets, ledgers."""
    calibrated, unequal = "privacy={unit='example', epsilon=1.5, clip=1.0}", "data.partition={kind='linear'}"
    yield Case("privacy/epsilon", (calibrated,))
    yield Case("privacy/epsilon-fraction", (calibrated, "run.fraction=0.34", "run.rounds=4"))
    yield Case("privacy/epsilon-unequal", (calibrated, "privacy.clip=0.5", unequal), extra=True)
    yield Case("privacy/participations", (calibrated, "privacy.participations=2", "run.rounds=5"))
    delta = "privacy={unit='example', sigma=1.8, clip=2.0, delta=1e-6, share_metrics=true}"
    yield Case("privacy/delta-shared-metrics", (delta,))
    yield Case("privacy/budget-ends-it", (budget("1.0"), "run.rounds=4"))
    yield Case("privacy/budget-unequal", (budget("1.9"), "run.rounds=3", unequal), extra=True)
    shared = "privacy={unit='example', sigma=2.0, clip=1.0, ledger='$CASE/ledger'}"
    yield Case("privacy/shared-ledger", (shared,), way="twice")
    secure = "privacy={unit='example', sigma=2.0, clip=1.0, noise='secure'}"
    yield Case("privacy/secure-noise", (secure,), loose="noise is not seeded")


def budget(limit: str) -> str:
    """Example-level DP with a budget."""
    return f"privacy={{unit='example', sigma=2.0, clip=1.0, budget={{epsilon={limit}}}}}"


def client_level() -> Iterator[Case]:
    """Client-level DP, by how clients are drawn."""
    for name in ("fedavg", "fedsvd"):
        yield Case(f"client-dp/full-{name}", (f"strategy.name={name}", UNIFORM, CLIENT_DP))
    for name in ("ffa", "rolora", "head"):
        yield Case(f"client-dp/full-{name}", (f"strategy.name={name}", UNIFORM, CLIENT_DP), extra=True)
    drawn = ("run.fraction=0.5", "data.clients=6", "run.rounds=3", UNIFORM)
    yield Case("client-dp/poisson", ("run.sampling=poisson", *drawn, CLIENT_DP))
    yield Case("client-dp/fixed", (*drawn, CLIENT_DP))
    calibrated = "privacy={unit='client', epsilon=6.0, clip=0.5}"
    yield Case("client-dp/full-epsilon", (UNIFORM, calibrated))
    yield Case("client-dp/poisson-epsilon", ("run.sampling=poisson", *drawn, calibrated), extra=True)
    ends = "privacy={unit='client', sigma=3.0, clip=1.0, budget={epsilon=3.0, delta=1e-5}}"
    yield Case("client-dp/budget", ("run.rounds=6", UNIFORM, ends))
    turned = "strategy={name='fedsvd', weights='uniform', server={optimizer='momentum'}}"
    yield Case("client-dp/momentum", (turned, CLIENT_DP), extra=True)


def data() -> Iterator[Case]:
    """Partitions and sources."""
    partitions = {
        "dirichlet": "{kind='dirichlet', alpha=1.0}",
        "linear": "{kind='linear'}",
        "shard": "{kind='shard', shards_per_client=2}",
        "pathological": "{kind='pathological', classes_per_client=2}",
        "square": "{kind='square'}",
        "exponential": "{kind='exponential'}",
    }
    for kind, partition in partitions.items():
        yield Case(f"data/{kind}", (f"data.partition={partition}",), extra=kind in ("square", "exponential"))
    yield Case("data/dirichlet+dp", (f"data.partition={partitions['dirichlet']}", "data.clients=2", DP))
    natural = ("data.partition={kind='natural', column='site'}", "data.clients=5")
    yield Case("data/natural+dp", (*natural, DP), loose="client ids may differ")
    yield Case("data/natural", natural, loose="client ids may differ", extra=True)
    yield Case("data/test-split", ("data.test_path=$INPUTS/data/test.jsonl",))
    yield Case("data/pairs+dp", ("data.path=$INPUTS/data/pairs.jsonl", "data.text=['text', 'other']", DP))
    yield Case("data/limit", ("data.limit=150", "data.max_length=6"))
    yield Case("data/docstrings+dp", ("data={source='docstrings', limit=2000, max_length=16}", DP), extra=True)


def models() -> Iterator[Case]:
    """A decoder of Conv1D layers, and a sentence encoder with mean pooling."""
    gpt2 = ("model.name=$INPUTS/models/gpt2", "lora.target_modules=['c_attn', 'c_fc']")
    encoder = ("model.name=$INPUTS/models/encoder", "lora.target_modules=auto")
    for name, settings in (("gpt2", gpt2), ("encoder", encoder)):
        yield Case(f"model/{name}-fedsvd+dp", (*settings, "strategy.name=fedsvd", DP))
        yield Case(f"model/{name}-fedavg", (*settings, "strategy.name=fedavg"))
        yield Case(f"model/{name}-hooks+dp", (*settings, "train.gradients=hooks", DP))
        yield Case(f"model/{name}-fedsvd", (*settings, "strategy.name=fedsvd"), extra=True)
        yield Case(f"model/{name}-fedavg+dp", (*settings, "strategy.name=fedavg", DP), extra=True)
        yield Case(f"model/{name}-flora", (*settings, "strategy.name=flora"), extra=True)


def language() -> Iterator[Case]:
    """A decoder that answers each text with its topic, or learns the texts themselves."""
    llama = ("model.name=$INPUTS/models/llama", "lora.target_modules=['q_proj', 'v_proj']")
    quick = "evaluate={every=1, evaluators=['language']}"
    answers = (*llama, "objective={name='instruction'}", quick)
    for name in ("fedsvd", "fedavg", "flexlora"):
        yield Case(f"language/{name}", (*answers, f"strategy.name={name}"), extra=name != "fedavg")
        yield Case(f"language/{name}+dp", (*answers, f"strategy.name={name}", DP), extra=name == "flexlora")
    yield Case("language/hooks-sum+dp", (*answers, "objective.loss=sum", "train.gradients=hooks", DP))
    yield Case(
        "language/bfloat16-upper+dp", (*answers, "run.dtype=bfloat16", UPPER, "run.cache_hidden_states=true", DP)
    )
    texts = "data={source='files', path='$INPUTS/data/topics.jsonl', text='text', clients=3, max_length=16}"
    yield Case("language/texts+dp", (*llama, "objective={name='causal-lm'}", texts, DP))
    measured = ("evaluate.membership={pairs=20, references=1}", "data.canaries={count=2, space=40}")
    yield Case("language/by-heart+dp", (*answers, *measured, DP))


def in_stream(name: str) -> str:
    """A strategy of a stream, with the keys that leave room in a tiny model."""
    return f"strategy={{name='{name}'{', energy=0.9, free=4' if name in READS_INPUTS else ''}}}"


def streams() -> Iterator[Case]:
    """Two tasks one after the other, without DP."""
    for name in (*CONTINUAL, "fedavg"):
        yield Case(f"stream/{name}", (in_stream(name),), "stream")
    yield Case("stream/fedsvd", (in_stream("fedsvd"),), "stream", extra=True)
    public = "lora.public=$INPUTS/public.txt"
    yield Case("stream/osft-importance", ("strategy={name='osft', importance=true, preserve=0.4}", public), "stream")
    yield Case("stream/two-nodes", (in_stream("osft-data"), "run.nodes=2"), "stream")
    yield Case("stream/replay", (in_stream("fedavg"), "stream.replay=0.5"), "stream")
    yield Case("stream/joint", (in_stream("fedavg"), "stream.joint=true"), "stream")
    yield Case("stream/shared-head", (in_stream("fedavg"), "stream.heads=shared"), "shared")
    clear = "strategy={name='osft-data', energy=0.9, free=4, gram={clear=true}}"
    yield Case("stream/osft-data-clear", (clear,), "stream", extra=True)
    weights = (in_stream("fedsvd-continual"), "lora.init_a=weights")
    yield Case("stream/fedsvd-continual-weights", weights, "stream", extra=True)
    yield Case("stream/o-lora-penalty", (in_stream("o-lora"), "stream.penalty=0.1"), "stream", extra=True)
    gpt2 = ("model.name=$INPUTS/models/gpt2", "lora.target_modules=['c_attn']")
    yield Case("stream/gpt2", (in_stream("osft-data"), *gpt2), "stream", extra=True)


def private_streams() -> Iterator[Case]:
    """Two tasks one after the other, with DP."""
    for name in (*READS_INPUTS, "fedavg", "osft"):
        yield Case(f"stream/{name}+dp", (in_stream(name), DP), "stream", extra=name == "osft")
    yield Case("stream/replay+dp", (in_stream("fedavg"), "stream.replay=0.5", DP), "stream", extra=True)
    calibrated = "privacy={unit='example', epsilon=4.0, clip=1.0}"
    for name in (*READS_INPUTS, "fedavg"):
        extra = name != "osft-data"
        yield Case(f"stream/{name}-epsilon", (in_stream(name), calibrated), "stream", extra=extra)
    fewer = "data.clients=2"
    yield Case("stream/budget", (in_stream("osft-data"), budget("2.5"), fewer), "stream")
    client = "privacy={unit='client', epsilon=4.0, clip=1.0}"
    uniform = "strategy={name='osft', weights='uniform'}"
    yield Case("stream/client-dp", (uniform, client), "stream")
    drawn = ("run.sampling=poisson", "run.fraction=0.7")
    yield Case("stream/client-dp-poisson", (uniform, client, *drawn), "stream", extra=True)


def cut_off() -> Iterator[Case]:
    """Runs that are cut off in the middle and resumed. A whole run has the same record."""
    refresh = ("strategy={name='fedsvd', refresh={every=1}}", DP, "run.rounds=8")
    fedsa = ("strategy.name=fedsa", "run.fraction=0.67", "run.rounds=8")
    stream = (in_stream("osft-data"), DP, "run.rounds=6", "evaluate.clients=never")
    yield Case("resume/whole-fedsvd+dp", refresh, extra=True)
    yield Case("resume/whole-fedsa", fedsa, extra=True)
    yield Case("resume/whole-stream+dp", stream, "stream", extra=True)
    yield Case("resume/interrupt-fedsvd+dp", refresh, way="interrupt")
    yield Case("resume/interrupt-stream+dp", stream, "stream", way="interrupt", begun=2)
    yield Case("resume/kill-fedsa", fedsa, way="kill")


def on_ray() -> Iterator[Case]:
    """The Ray backend, which has the bits of the local one."""
    yield Case("ray/fedsvd+dp", ("run.backend=ray", "run.nodes=2", DP))
