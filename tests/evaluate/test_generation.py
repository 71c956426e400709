"""A batch of prompts is answered as each of them alone, by models of every way to count positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from fedlab.config.sections import LoraSection, ModelSection
from fedlab.evaluate.generation import _ends, generate, scores_of
from fedlab.models.loaded import LoadedModel
from fedlab.models.loading import adapt, load_base, load_tokenizer
from fedlab.objectives import CausalLM, Seq2Seq
from fedlab.objectives.language import LanguageModel

SMALL = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 48}
PROMPTS = [[10], [11, 12, 13], list(range(20, 37)), [14, 15], list(range(9, 20)), list(range(30, 39))]


def loaded(path: Path, objective: LanguageModel, dtype: torch.dtype = torch.float32) -> LoadedModel:
    section = ModelSection(name=str(path))
    base, head = load_base(section, objective, dtype)
    lora = LoraSection(rank=2, alpha=4, target_modules="all-linear")
    return adapt(base, head, load_tokenizer(section), lora, str(path), torch.device("cpu"), objective)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_t5: Path) -> dict[str, LoadedModel]:
    """Rotary (Llama), learned (GPT-2, OPT, BART) and relative (T5) positions, of weights that answer variously."""
    import transformers

    ends = {"pad_token_id": 1, "eos_token_id": 1, "bos_token_id": 0}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    shapes: dict[str, Any] = {
        "llama": transformers.LlamaConfig(
            vocab_size=420, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, **ends
        ),
        "gpt2": transformers.GPT2Config(vocab_size=420, n_embd=32, n_layer=2, n_head=2, n_positions=48, **ends),
        "opt": transformers.OPTConfig(
            vocab_size=420, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=48, **ends,
        ),
        "bart": transformers.BartConfig(vocab_size=420, decoder_start_token_id=1, **SMALL, **HEADS, **ends),
        "t5": transformers.T5Config(
            vocab_size=420, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=1,
            pad_token_id=1, eos_token_id=1,
        ),
    }  # fmt: skip
    found = {}
    for name, config in shapes.items():
        encodes = name in ("bart", "t5")
        torch.manual_seed(1)
        made = transformers.AutoModelForSeq2SeqLM if encodes else transformers.AutoModelForCausalLM
        model = made.from_config(config)
        with torch.no_grad():  # small random weights say one token for ever
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter).mul(0.3))
        path = tmp_path_factory.mktemp(name)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        found[name] = loaded(path, Seq2Seq() if encodes else CausalLM())
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bart", "t5"])
def test_an_answer_is_the_same_in_any_batch(name: str, models: dict[str, LoadedModel]):
    model = models[name]
    alone = [generate(model, [prompt], 12, 1)[0] for prompt in PROMPTS]
    assert len(set(alone)) > 2, "or the test would see nothing"
    assert generate(model, PROMPTS, 12, len(PROMPTS)) == alone
    assert generate(model, PROMPTS[::-1], 12, 4) == alone[::-1]


def test_a_long_prompt_does_not_shorten_the_answers_of_others(models: dict[str, LoadedModel]):
    """GPT-2 has 48 positions: of the longest prompt three are left, of its neighbours more."""
    model, prompts = models["gpt2"], [[10], list(range(20, 65)), list(range(20, 58)), list(range(3, 51))]
    assert generate(model, prompts, 12, 4) == [generate(model, [prompt], 12, 1)[0] for prompt in prompts]


def test_in_16_bits_too(models: dict[str, LoadedModel]):
    """With attention of our own, which a CPU has in 16 bits."""
    name = str(models["llama"].module.peft_config["default"].base_model_name_or_path)
    model = loaded(Path(name), CausalLM(), torch.bfloat16)
    alone = [generate(model, [prompt], 12, 1)[0] for prompt in PROMPTS]
    assert len(set(alone)) > 2
    assert generate(model, PROMPTS, 12, len(PROMPTS)) == alone


def greedy(model: LoadedModel, prompt: list[int], count: int) -> list[int]:
    """The most probable tokens one after the other, with their end."""
    said: list[int] = []
    with torch.no_grad():
        while len(said) < count and model.tokenizer.eos_token_id not in said:
            ids = torch.tensor([prompt + said])
            logits = model.outputs({"input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits
            said.append(int(logits[0, -1].argmax()))
    return said


def test_an_answer_is_what_greedy_decoding_by_hand_gives(models: dict[str, LoadedModel]):
    model, prompt = models["llama"], PROMPTS[1]
    said = greedy(model, prompt, 12)
    assert generate(model, [prompt], 12, 1) == [model.tokenizer.decode(said, skip_special_tokens=True)]


def test_answers_end_at_every_end_of_the_generation_config(models: dict[str, LoadedModel], monkeypatch):
    model = models["llama"]
    ids = greedy(model, PROMPTS[2], 8)
    config = model.module.get_base_model().generation_config
    monkeypatch.setattr(config, "eos_token_id", [400, ids[3]])
    assert _ends(model) == sorted({1, 400, ids[3]})
    short = generate(model, [PROMPTS[2]], 12, 1)[0]
    assert short == model.tokenizer.decode(ids[: ids.index(ids[3])]), "and the end itself is not said"


def test_nothing_is_drawn_without_a_seed(models: dict[str, LoadedModel], monkeypatch):
    model = models["llama"]
    plain = generate(model, PROMPTS, 8, 8)
    config = model.module.get_base_model().generation_config
    monkeypatch.setattr(config, "do_sample", True)
    monkeypatch.setattr(config, "temperature", 5.0)
    before = torch.random.get_rng_state()
    assert generate(model, PROMPTS, 8, 8) == plain
    drawn = [generate(model, PROMPTS, 8, 8, seed) for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert plain not in drawn
    assert torch.equal(torch.random.get_rng_state(), before)


def test_scores_of_answers():
    assert scores_of(["the cat", " a dog "], ["the cat", "a dog"]) == {"exact_match": 1.0, "rouge_l": 1.0, "chrf": 1.0}
    found = scores_of(["the cat sat", "no"], ["the cat", "yes"])
    assert found["exact_match"] == 0
    assert found["rouge_l"] == pytest.approx(0.4)  # precision 2/3, recall 1


@settings(deadline=None, max_examples=100)
@given(*[st.text(st.characters(max_codepoint=127), max_size=40)] * 2)
def test_words_of_plain_text_are_rouge_scores_own(found: str, written: str):
    own = RougeScorer(["rougeL"]).score(written.strip(), found.strip())["rougeL"].fmeasure
    assert scores_of([found], [written])["rouge_l"] == own


def test_words_of_any_script_count():
    pairs = [("η παλιά παλίρροια", "παλιά παλίρροια"), ("für Öl", "fur Ol"), ("漢字", "漢字")]
    scores = [scores_of([found], [written])["rouge_l"] for found, written in pairs]
    assert scores == pytest.approx([0.8, 0, 1])
