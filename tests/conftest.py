"""What the tests share: tiny real models and data sets on disk, made once per session, and a cache directory of their
own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: a second thread only waits
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TOPICS = {
    "fruit": ["apple", "pear", "plum", "cherry", "grape", "lemon", "ripe", "sweet", "juicy", "peel"],
    "metal": ["iron", "copper", "zinc", "steel", "alloy", "rust", "forge", "molten", "ore", "weld"],
    "ocean": ["wave", "tide", "reef", "salt", "coral", "harbour", "sail", "storm", "deep", "current"],
}
FILLER = ["the", "a", "of", "and", "with", "under", "near", "some", "very", "old", "new", "small", "large", "thing"]


def _sentences(path: Path, seed: int, count: int, topics: list[str], filler: int, sites: int = 0) -> Path:
    """Write short sentences on topics in turn: three of the topic's words and two to ``filler`` others, shuffled."""
    rng = np.random.default_rng(seed)
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            topic = topics[i % len(topics)]
            words = [*rng.choice(TOPICS.get(topic, FILLER), 3), *rng.choice(FILLER, int(rng.integers(2, filler + 1)))]
            rng.shuffle(words)
            file.write(
                json.dumps({"text": " ".join(words), "topic": topic} | ({"site": f"site{i % sites}"} if sites else {}))
                + "\n"
            )
    return path


@pytest.fixture(scope="session", autouse=True)
def cache_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every test caches below one temporary directory, never in the user's home."""
    path = tmp_path_factory.mktemp("cache")
    os.environ["FEDLAB_CACHE"] = str(path)
    return path


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A jsonl file of 360 short sentences on three topics."""
    return _sentences(tmp_path_factory.mktemp("data") / "topics.jsonl", 0, 360, list(TOPICS), filler=7, sites=5)


@pytest.fixture(scope="session")
def tokenizer_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A word-level tokenizer over the words of ``tiny_data``."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *FILLER, *(w for t in TOPICS.values() for w in t)]
    vocabulary = {word: i for i, word in enumerate(words)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    path = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(path)
    return path


def _save(model: object, tokenizer_files: Path, path: Path) -> Path:
    from transformers import AutoTokenizer

    model.save_pretrained(path)  # type: ignore[attr-defined]
    AutoTokenizer.from_pretrained(tokenizer_files).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory, tokenizer_files: Path) -> Path:
    """A two-layer BERT encoder with random weights, saved as a local model directory."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    return _save(BertModel(config), tokenizer_files, tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory, tokenizer_files: Path) -> Path:
    """A two-layer GPT-2 (Conv1D layers), saved as a local model directory."""
    import torch
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=2, eos_token_id=3)
    return _save(GPT2Model(config), tokenizer_files, tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with tied embeddings and a byte-level tokenizer whose chat template pads with the end of a
    turn, as SmolLM2's does; saved as a local model directory.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    words = [*FILLER, *(word for topic in TOPICS.values() for word in topic), "user", "assistant"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet)
    raw.train_from_iterator([f"{word} " * 3 for word in words], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|im_end|>", bos_token="<|im_start|>"
    )
    fast.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    torch.manual_seed(0)
    ends = {"pad_token_id": fast.pad_token_id, "eos_token_id": fast.eos_token_id, "bos_token_id": fast.bos_token_id}
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 96}
    config = LlamaConfig(
        vocab_size=len(fast), num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, **shape, **ends
    )
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(path)
    fast.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A T5 of two blocks in each stack with ``tiny_llama``'s tokenizer; saved as a local model directory."""
    import torch
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    torch.manual_seed(0)
    ends = {"pad_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 0}
    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, **ends)
    path = tmp_path_factory.mktemp("t5")
    T5ForConditionalGeneration(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def t5_toml(llama_toml: str, tiny_llama: Path, tiny_t5: Path) -> str:
    """``llama_toml`` with an encoder-decoder."""
    text = llama_toml.replace(str(tiny_llama), str(tiny_t5)).replace('["q_proj", "v_proj"]', '["q", "v"]')
    return text.replace('"instruction"', '"seq2seq"')


@pytest.fixture
def llama_toml(tiny_toml: str, tiny_bert: Path, tiny_llama: Path) -> str:
    """``tiny_toml`` with a decoder that answers each sentence with its topic."""
    text = tiny_toml.replace(str(tiny_bert), str(tiny_llama)).replace('["query", "value"]', '["q_proj", "v_proj"]')
    return text.replace("max_length = 16", "max_length = 64") + '[objective]\nname = "instruction"\n'


@pytest.fixture
def causal_toml(llama_toml: str) -> str:
    """``llama_toml`` that learns the sentences themselves."""
    return llama_toml.replace('"instruction"', '"causal-lm"').replace('label = "topic"\n', "")


@pytest.fixture(scope="session")
def tiny_sentence_encoder(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    """``tiny_bert`` with sentence-transformers' files for mean pooling beside it."""
    import shutil

    path = tmp_path_factory.mktemp("encoder") / "model"
    shutil.copytree(tiny_bert, path)
    (path / "modules.json").write_text(json.dumps([{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}]))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(
        json.dumps({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False})
    )
    return path


@pytest.fixture
def learnable_toml(tiny_toml: str, tiny_bert: Path, tiny_sentence_encoder: Path) -> str:
    """``tiny_toml`` without DP, on the mean-pooling encoder, whose random features are worth learning from."""
    head, _, rest = tiny_toml.partition("[privacy]")
    return head.replace(str(tiny_bert), str(tiny_sentence_encoder)) + "[evaluate]" + rest.partition("[evaluate]")[2]


@pytest.fixture
def tiny_toml(tiny_bert: Path, tiny_data: Path) -> str:
    """A whole configuration that runs in seconds: three clients, three rounds, FedSVD, DP with a given σ, local
    backend.
    """
    return f"""
[run]
name = "tiny"
rounds = 3
nodes = 1
seed = 3
backend = "local"
[model]
name = "{tiny_bert}"
[lora]
rank = 4
alpha = 8
target_modules = ["query", "value"]
[data]
source = "files"
path = "{tiny_data}"
text = "text"
label = "topic"
clients = 3
max_length = 16
test_fraction = 0.2
[strategy]
name = "fedsvd"
[train]
steps = 3
batch_size = 16
physical_batch = 8
lr = 0.5
momentum = 0.5
[privacy]
unit = "example"
sigma = 1.0
clip = 1.0
[evaluate]
every = 1
"""


@pytest.fixture(scope="session")
def stream_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A jsonl file of 480 short sentences on four topics, the fourth of filler words alone."""
    return _sentences(tmp_path_factory.mktemp("stream") / "topics.jsonl", 1, 480, [*TOPICS, "dry"], filler=5)


@pytest.fixture
def stream_toml(learnable_toml: str, tiny_data: Path, stream_data: Path) -> str:
    """Two tasks of two topics each, without DP, on the mean-pooling encoder."""
    text = learnable_toml.replace(str(tiny_data), str(stream_data)).replace(
        'name = "fedsvd"', 'name = "osft-data"\nenergy = 0.9\nfree = 4'
    )
    return (
        text + '\n[[tasks]]\nname = "wet"\nlabels = ["fruit", "ocean"]\n[[tasks]]\nname = "hard"\nlabels = ["metal",'
        ' "dry"]\n'
    )


@pytest.fixture(scope="module")
def drawn_once() -> Iterator[None]:
    """Figures of reports are drawn once each: they are pure functions, and half a second every time."""
    import fedlab.report.plots as plots
    import fedlab.report.stream as stream

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((plots, "line_chart"), (plots, "bar_chart"), (stream, "heat_map")):
            patch.setattr(module, name, _once(getattr(module, name)))
        yield


def _once(function: Callable[..., str]) -> Callable[..., str]:
    made: dict[str, str] = {}

    def cached(*arguments: Any) -> str:
        key = repr(arguments)
        if key not in made:
            made[key] = function(*arguments)
        return made[key]

    return cached


@pytest.fixture
def carried() -> Any:
    """Files of clients on machines of their own → what carries a deployed run's messages to them in this process."""
    from flwr.app import ConfigRecord, Context, Message, RecordDict

    from clients.answer import answer
    from clients.serve import OwnDesk
    from fedlab.protocol import Frame
    from fedlab.run.launch.local import LocalGrid

    def make(files: Any) -> Any:
        desks = [OwnDesk(file) for file in files]

        def app(message: Message, context: Context) -> Message:
            fields: dict[str, Any] = dict(message.content.config_records["fedlab"])
            reply = answer(Frame(**fields), desks[int(context.node_config["partition-id"])])
            return Message(RecordDict({"fedlab": ConfigRecord(vars(reply))}), reply_to=message)

        def run(server_app: Any, client_app: Any, config: Any, run_config: dict[str, Any]) -> None:
            server_app(LocalGrid(app, len(desks)), Context(1, 1, {}, RecordDict(), run_config))

        return run

    return make
