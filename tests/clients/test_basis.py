"""Bases on a node: kept under the hash of their content, refused if they are not what was announced."""

from pathlib import Path

import pytest
import torch

from clients.basis import held, keep
from fedlab.errors import FedlabError


@pytest.fixture(autouse=True)
def forget():
    held.cache_clear()


def test_a_basis_comes_back_as_it_went(tmp_path: Path):
    basis = {"a.lora_A": torch.randn(3, 4), "a.basis_U": torch.randn(2, 5).T.contiguous().T}
    name = keep(tmp_path, basis)
    assert keep(tmp_path, basis) == name
    found = held(tmp_path, name)
    assert all(torch.equal(found[key], value) for key, value in basis.items())
    assert [p.suffix for p in tmp_path.iterdir()] == [".safetensors"]


def test_a_basis_that_never_came_is_refused(tmp_path: Path):
    with pytest.raises(FedlabError, match="not on this node"):
        held(tmp_path, "0" * 64)


def test_a_basis_that_was_changed_is_refused(tmp_path: Path):
    name = keep(tmp_path, {"a.lora_A": torch.ones(2, 2)})
    other = keep(tmp_path, {"a.lora_A": torch.zeros(2, 2)})
    (tmp_path / f"{other}.safetensors").replace(tmp_path / f"{name}.safetensors")
    with pytest.raises(FedlabError, match="does not hold the basis"):
        held(tmp_path, name)
