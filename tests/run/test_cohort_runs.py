"""Runs whose clients share a pass: the numbers of one after the other, the same bits on any number of nodes, failures
by themselves.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import clients.train
import fedlab
from fedlab.config import RunConfig
from fedlab.errors import RunFailed
from fedlab.privacy.audit.run import audit_run
from fedlab.privacy.ledger.ledger import parse_lines

slow = pytest.mark.slow
STRATEGIES = ["fedsvd", "flora", "fedsa"]  # and the others, in the slow suite
STRATEGIES += [
    pytest.param(n, marks=slow)
    for n in ("fedavg", "ffa", "fedex", "flexlora", "hetlora", "lora-fair", "rolora", "head")
]


def simulate(toml: str, out: Path, *overrides: str) -> fedlab.Run:
    return fedlab.simulate(RunConfig.parse(toml, overrides), out, quiet=True)


def adapters(run: fedlab.Run) -> dict[str, torch.Tensor]:
    """The final adapter, or every client's own, flat."""
    found = sorted(run.path.glob("personal/*/adapter/adapter_model.safetensors")) or [
        run.path / "adapter" / "adapter_model.safetensors"
    ]
    return {f"{path.relative_to(run.path)}/{name}": value for path in found for name, value in load_file(path).items()}


@pytest.mark.parametrize("private", [pytest.param(False, marks=slow), True], ids=["plain", "dp"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_ends_where_one_client_at_a_time_ends(name: str, private: bool, tiny_toml: str, tmp_path: Path):
    settings = [
        f"strategy.name={name}",
        "run.rounds=2",
        "train.lr=0.1",
        *([] if private else ["privacy={unit='none'}"]),
    ]
    alone, together = (simulate(tiny_toml, tmp_path / f"{k}", *settings, f"run.cohort={k}") for k in (1, 3))
    one, other = adapters(alone), adapters(together)
    assert one.keys() == other.keys()
    products = {
        n for n in one if "lora_" not in n
    }  # factors may turn, and in flora A is redrawn: compare what they amount to
    for name_ in products:
        assert torch.allclose(one[name_], other[name_], atol=2e-5)
    for name_ in (n for n in one if "lora_A" in n):
        b = name_.replace("lora_A", "lora_B")
        assert torch.allclose(one[b] @ one[name_], other[b] @ other[name_], atol=2e-5)
    assert together.result["epsilon"] == alone.result["epsilon"]
    assert [c["epsilon"] for c in together.result["clients"].values()] == [
        c["epsilon"] for c in alone.result["clients"].values()
    ]
    if private:
        assert not audit_run(together.path).findings


@pytest.mark.parametrize("cohort", [pytest.param(1, marks=slow), 2, pytest.param(5, marks=slow)])
def test_the_same_bits_on_any_number_of_nodes(cohort: int, tiny_toml: str, tmp_path: Path):
    settings = ["data.clients=5", "run.rounds=2", f"run.cohort={cohort}"]
    digests = {
        simulate(tiny_toml, tmp_path / f"{n}", *settings, f"run.nodes={n}").result["adapter_digest"] for n in (1, 2, 4)
    }
    assert len(digests) == 1


def test_a_client_that_fails_in_a_shared_pass_is_excluded_alone_and_charged(
    tiny_toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    original = clients.train.train_cohort

    def one_diverges(*args, **kwargs):
        return original(*args, **kwargs) | {"client-1": RunFailed("client-1: local training diverged")}

    monkeypatch.setattr(clients.train, "train_cohort", one_diverges)
    run = simulate(tiny_toml, tmp_path / "run", "run.rounds=2")
    assert run.result["excluded"] == 2
    entries = {c: parse_lines((run.path / "ledger" / f"{c}.jsonl").read_text()) for c in ("client-0", "client-1")}
    assert [e["type"] for e in entries["client-0"]].count("COMMIT") == 2
    assert [e["type"] for e in entries["client-1"]].count("ABORT") == 2
    assert run.result["clients"]["client-0"]["epsilon"] > 0
    assert run.result["clients"]["client-1"]["epsilon"] > 0, "it was charged before it failed"
    assert not audit_run(run.path).findings


def test_an_error_of_the_pass_excludes_its_clients_and_names_them(
    tiny_toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def breaks(*args, **kwargs):
        raise RuntimeError("the pass broke")

    monkeypatch.setattr(clients.train, "train_cohort", breaks)
    with pytest.raises(fedlab.RunFailed, match="usable updates"):
        simulate(tiny_toml, tmp_path / "run")
    counts = [parse_lines(path.read_text()) for path in (tmp_path / "run" / "ledger").glob("client-*.jsonl")]
    assert all([e["type"] for e in entries].count("CHARGE") == 1 for entries in counts)
    assert all([e["type"] for e in entries].count("ABORT") == 1 for entries in counts)


def test_a_head_with_a_norm_trains_one_by_one(tiny_toml: str, tiny_bert: Path, tmp_path: Path, tokenizer_files: Path):
    """Fused layers are linear ones; a head of another kind is trained without them, where there is no DP."""
    from transformers import AutoTokenizer, ModernBertConfig, ModernBertModel

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "cls_token_id", "sep_token_id", "eos_token_id"), 0)
    ModernBertModel(ModernBertConfig(vocab_size=64, **shape, **special)).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tokenizer_files).save_pretrained(tmp_path / "model")
    toml = tiny_toml.replace(str(tiny_bert), str(tmp_path / "model"))
    settings = ["lora.target_modules=['Wqkv']", "privacy={unit='none'}", "run.rounds=1"]
    fused, hooks = (
        simulate(toml, tmp_path / way, *settings, f"train.gradients={way}").result["adapter_digest"]
        for way in ("fused", "hooks")
    )
    assert fused == hooks, "one client at a time either way"


@pytest.mark.parametrize("private", [True, False], ids=["dp", "plain"])
def test_the_references_end_where_fused_layers_do(private: bool, tiny_toml: str, tmp_path: Path):
    """``train.gradients``: fedlab's hooks and Opacus' give the same adapter, and the same charges."""
    settings = ["run.rounds=2", "train.lr=0.1", "lora.dropout=0.2", *([] if private else ["privacy={unit='none'}"])]
    fused, *others = (
        simulate(tiny_toml, tmp_path / g, *settings, f"train.gradients={g}") for g in ("fused", "hooks", "opacus")
    )
    for other in others:
        assert other.result["epsilon"] == fused.result["epsilon"]
        for name, value in adapters(fused).items():
            assert torch.allclose(value, adapters(other)[name], atol=2e-5), name


def test_a_pass_that_does_not_fit_is_halved(tiny_toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    original, sizes = clients.train.train_cohort, []

    def small_memory(model, data, members, *args):
        sizes.append(len(members))
        if len(members) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return original(model, data, members, *args)

    monkeypatch.setattr(clients.train, "train_cohort", small_memory)
    run = simulate(tiny_toml, tmp_path / "run", "run.rounds=1", "data.clients=5", "run.cohort=5")
    assert sizes == [5, 2, 3, 1, 2], "halves of five are two and three, and of three one and two"
    assert run.result["excluded"] == 0
    assert not audit_run(run.path).findings
