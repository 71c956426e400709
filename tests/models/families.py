"""Tiny random models of many families, saved as a user would find them, with one word-level tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SIZE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 34,
    "pad_token_id": 0,
}
ENDS = {"bos_token_id": 2, "eos_token_id": 3}
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}
SMALL = {"vocab_size": 64, "d_model": 32, "pad_token_id": 0}
SIDES = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 64))}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 34}

# family → (transformers' model and configuration, by the beginning of their names, and the configuration's arguments)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", SIZE),
    "roberta": ("Roberta", SIZE | {"type_vocab_size": 1}),
    "electra": ("Electra", SIZE | {"embedding_size": 16}),
    "distilbert": ("DistilBert", {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}),
    "albert": ("Albert", SIZE | {"embedding_size": 16}),
    "mpnet": ("MPNet", SIZE),
    "deberta": ("Deberta", SIZE | RELATIVE),
    "deberta-v2": ("DebertaV2", SIZE | RELATIVE),
    # as DeBERTa v3: the keys and queries of texts and of positions come from the same layers
    "deberta-v3": ("DebertaV2", SIZE | RELATIVE | {"share_att_key": True, "position_buckets": 8}),
    "modernbert": ("ModernBert", SIZE | ENDS | {"cls_token_id": 2, "sep_token_id": 3}),
    "gpt2": ("GPT2", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 34, **ENDS}),
    "gpt-neox": ("GPTNeoX", SIZE),
    "llama": ("Llama", SIZE),
    "qwen2": ("Qwen2", SIZE | {"num_key_value_heads": 2}),
    "mixtral": ("Mixtral", SIZE | {"num_key_value_heads": 2, "num_local_experts": 4}),
    "opt": ("OPT", SIZE | {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "xlnet": ("XLNet", SMALL | {"n_layer": 2, "n_head": 2, "d_inner": 64}),
    "t5": ("T5", SMALL | {"d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "eos_token_id": 3}),
    "bart": ("Bart", SMALL | SIDES | HEADS | ENDS | {"decoder_start_token_id": 3, "forced_eos_token_id": 3}),
}


def save_family(family: str, tokenizer_files: Path, path: Path) -> Path:
    """Save a family's model, without a head, to ``path``."""
    import torch
    import transformers

    name, arguments = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**arguments)
    if family == "t5":
        config.decoder_start_token_id = 0
    torch.manual_seed(0)
    getattr(transformers, f"{name}Model")(config).save_pretrained(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_files)
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(path)
    return path
