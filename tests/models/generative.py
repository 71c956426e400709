"""Tiny random language models of many families, with one word-level tokenizer, saved as a user would find them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ENDS = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
SIZE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 66,
    **ENDS,
}
ONE_KEY = {"num_key_value_heads": 1}  # multi-query: all heads share a key and a value
HEAD = {"head_dim": 16}
GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 66, **ENDS}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, **ENDS}
T5 |= {"decoder_start_token_id": 0}
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
SIDES = {
    f"{side}_{what}": n
    for side in ("encoder", "decoder")
    for what, n in (("layers", 2), ("ffn_dim", 64), ("attention_heads", 2))
}
BART = {"vocab_size": 64, "d_model": 32, "max_position_embeddings": 66, **SIDES, **ENDS, "decoder_start_token_id": 3}
LED = {f"max_{side}_position_embeddings": 66 for side in ("encoder", "decoder")} | {"attention_window": 8}

# family → (transformers' model and configuration, by the beginning of their names, and the configuration's arguments)
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT),
    "gpt-bigcode": ("GPTBigCode", GPT),
    "gpt-j": ("GPTJ", GPT | {"rotary_dim": 8}),
    "gpt-neox": ("GPTNeoX", SIZE),
    "opt": ("OPT", SIZE | {"ffn_dim": 64, "word_embed_proj_dim": 16}),
    "bloom": ("Bloom", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 2, **ENDS}),
    "mpt": ("Mpt", {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 66, **ENDS}),
    "falcon": ("Falcon", {k: v for k, v in SIZE.items() if k != "intermediate_size"} | {"multi_query": True}),
    "llama": ("Llama", SIZE | ONE_KEY | {"tie_word_embeddings": True}),
    "smollm3": ("SmolLM3", SIZE | ONE_KEY | {"no_rope_layers": [1, 0]}),
    "mistral": ("Mistral", SIZE | ONE_KEY | {"sliding_window": 4}),
    "mixtral": ("Mixtral", SIZE | ONE_KEY | {"num_local_experts": 4}),
    "qwen2": ("Qwen2", SIZE | ONE_KEY),
    "qwen2-moe": (
        "Qwen2Moe",
        SIZE | ONE_KEY | EXPERTS | {"shared_expert_intermediate_size": 32, "decoder_sparse_step": 1},
    ),
    "qwen3": ("Qwen3", SIZE | ONE_KEY | HEAD),
    "qwen3-moe": ("Qwen3Moe", SIZE | ONE_KEY | HEAD | EXPERTS),
    "gemma": ("Gemma", SIZE | ONE_KEY | HEAD),
    "gemma2": ("Gemma2", SIZE | ONE_KEY | HEAD | {"sliding_window": 4}),
    "gemma3": ("Gemma3", SIZE | ONE_KEY | HEAD | {"sliding_window": 4}),
    "phi": ("Phi", SIZE),
    "phi3": ("Phi3", SIZE),
    "olmo2": ("Olmo2", SIZE),
    "granite": ("Granite", SIZE | ONE_KEY | {"logits_scaling": 4.0}),
    "starcoder2": ("Starcoder2", SIZE | ONE_KEY),
}
ENCODER_DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5", T5),
    "flan-t5": ("T5", T5 | GATED),
    "mt5": ("MT5", T5 | GATED),
    "umt5": ("UMT5", T5),
    "longt5": ("LongT5", T5 | {"local_radius": 4}),
    "bart": ("Bart", BART),
    "mbart": ("MBart", BART),
    "pegasus": ("Pegasus", BART),
    "marian": ("Marian", BART),
    "m2m-100": ("M2M100", BART),
    "led": ("LED", BART | LED),
}
GENERATIVE = DECODERS | ENCODER_DECODERS
SUFFIXES = {"gpt2": "LMHeadModel", "marian": "MTModel"}


def objective_of(family: str) -> str:
    """The objective under which a family is tried."""
    return "seq2seq" if family in ENCODER_DECODERS else "instruction"


def save_generative(family: str, tokenizer_files: Path, path: Path) -> Path:
    """Save a family's model to ``path``; whatever it adds to its logits is not zero."""
    import torch
    import transformers

    name, arguments = GENERATIVE[family]
    suffix = SUFFIXES.get(family, "ForConditionalGeneration" if family in ENCODER_DECODERS else "ForCausalLM")
    config = getattr(transformers, f"{name}{'Text' if family == 'gemma3' else ''}Config")(**arguments)
    torch.manual_seed(0)
    model = getattr(transformers, name + suffix)(config)
    for extra in (getattr(model, "final_logits_bias", None), getattr(model.get_output_embeddings(), "bias", None)):
        if extra is not None:
            extra.data.normal_()
    model.save_pretrained(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_files)
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(path)
    return path
