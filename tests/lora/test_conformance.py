"""The conformance suite can fail: it passes what is right, and names the property that each of some forty bugs breaks.

Correct ones are in aggregators.py, broken ones in broken_aggregators.py; fedlab's own strategies in
tests/strategies/test_conformance.py.
"""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlab.lora import conformance
from fedlab.lora.conformance import PROPERTIES, check, markdown


def sibling(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


aggregators = sibling("aggregators")
broken = sibling("broken_aggregators")
CORRECT, BUGS = aggregators.CORRECT, broken.BUGS
EXACT, FACTORS, BEST, FAIR = list(conformance.PROMISES)[:4]


@pytest.mark.parametrize("name", CORRECT)
def test_a_correct_aggregator_passes_everything(name: str):
    aggregate, claims = CORRECT[name]
    report = check(aggregate, **claims)
    report.require()
    assert [finding.name for finding in report.findings] == list(PROPERTIES)
    skipped = {finding.name for finding in report.findings if finding.ok is None}
    assert skipped <= {"frozen tensors", "opposite clients", "unequal ranks"}
    assert ("unequal ranks" in skipped) == ("ranks" not in claims)


def test_a_correct_aggregator_with_memory_passes():
    report = check(broken.Momentum(), promise=FACTORS, only=broken.MEMORY, fresh=broken.Momentum)
    report.require()
    assert "tensors of the server's" in report["save, load, go on"].text


@pytest.mark.parametrize("kept", [None, {"m": 3}])
def test_a_server_state_is_a_dictionary_of_tensors(kept: Any):
    class Odd(broken.Momentum):
        def aggregate(self, *arguments):
            return super().aggregate(*arguments)[0], kept

    report = check(Odd(), promise=FACTORS, only=["head", "save, load, go on"])
    assert [finding.text for finding in report.findings] == [
        "Broken: the server's state is not a dictionary of tensors"
    ] * 2


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_is_named(name: str):
    bug = BUGS[name]
    aggregate = bug.aggregate() if bug.aggregate is broken.remembers else bug.aggregate
    report = check(
        **{
            "aggregate": aggregate,
            "promise": bug.promise,
            "only": dict.fromkeys((*bug.names, *bug.keeps)),
            **bug.claims,
        }
    )
    assert set(bug.names) <= set(report.failed), str(report)
    assert not set(bug.keeps) & set(report.failed), str(report)
    if bug.error is not None:
        assert report[bug.names[0]].measured >= bug.error
    with pytest.raises(AssertionError) as raised:
        report.require()
    assert all(name in str(raised.value) for name in report.failed)


def test_every_property_has_a_bug_that_it_names():
    assert {name for bug in BUGS.values() for name in bug.names} == set(PROPERTIES)
    alone = [name for name in PROPERTIES if any(bug.names[0] == name for bug in BUGS.values())]
    assert len(alone) >= 15


def test_a_personal_strategy_passes():
    report = check(**{**broken.personal(), "promise": FACTORS, "title": "fedsa"})
    report.require()
    assert report["client isolation"].ok is True


# --- the report
# -----------------------------------------------------------------------------------------------------------------


def test_the_report_is_readable_and_numbers_are_measured():
    report = check(broken.only_the_first, promise=FACTORS)
    lines = str(report).splitlines()
    assert lines[0] == "only_the_first: product of means"
    assert [re.split(r"  +", line.strip())[0] for line in lines[2:]] == list(PROPERTIES)
    assert re.search(r"unequal weights +FAILED +relative error \d\.\de[+-]\d\d", str(report))
    assert report["unequal weights"].measured > 0.1 > 1e-6 > report["one client"].measured
    assert re.search(r"opposite clients +– +the promise, 'product of means', is not about products", str(report))


def test_an_exception_is_a_failure_with_its_text():
    def aggregate(state, updates, weights, round_number):
        raise RuntimeError("no such layer\nsecond line")

    report = check(aggregate, promise=FACTORS)
    assert {f.text for f in report.findings if f.ok is False} == {"RuntimeError: no such layer"}
    assert check(lambda *a: None, promise=FACTORS)["head"].text == "Broken: returned NoneType, not a state"


def test_the_markdown_table():
    good, bad = check(aggregators.fedavg, promise=FACTORS), check(broken.forgets_the_head, promise=FACTORS, title="bad")
    table = markdown([good, bad]).splitlines()
    assert table[:2] == ["| property | `fedavg` | `bad` |", "|---|---|---|"]
    assert "| head | ✓ | ✗ |" in table
    assert "| unequal ranks | – | – |" in table
    assert len(table) == len(PROPERTIES) + 2
    with pytest.raises(ValueError, match="other properties"):
        markdown([good, check(aggregators.fedavg, promise=FACTORS, only=["head"])])


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ({"promise": "mean"}, "promise: 'mean' is none of 'mean of products'"),
        ({"only": ["heads"]}, "only: 'heads'"),
        ({"ranks": "padded"}, "ranks: 'padded' is none of 'changes', 'held'"),
        ({"trains": ("B",)}, "trains: 'B' is neither a part"),
        ({"rewrites": ("A",)}, "rewrites: 'A'"),
        ({"aggregate": 3}, "aggregate must be a function"),
    ],
)
def test_wrong_claims_are_refused(claims: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        check(**{"aggregate": aggregators.fedavg, "promise": FACTORS, **claims})


def test_the_suite_draws_nothing_from_the_global_generator():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = str(check(aggregators.fedex, promise=EXACT))
    assert torch.equal(torch.get_rng_state(), before)
    assert str(check(aggregators.fedex, promise=EXACT)) == first


def test_the_example_of_the_module_is_true():
    import doctest

    assert doctest.testmod(conformance.suite).failed == 0
    assert doctest.testmod(conformance.suite).attempted >= 4


def test_the_example_of_the_docs_is_true(capsys: pytest.CaptureFixture[str]):
    text = (Path(__file__).resolve().parents[2] / "docs" / "strategies.md").read_text(encoding="utf-8")
    code = text.partition("```python\n")[2].partition("```")[0]
    claimed = re.search(r"AssertionError: (fedavg fails \d+ of \d+ properties)", code)[1]
    with pytest.raises(AssertionError, match=claimed):
        exec(code, {})
    assert "opposite clients       FAILED" in capsys.readouterr().out


def test_nothing_but_torch_and_the_library_is_needed():
    for path in Path(conformance.__file__).parent.glob("*.py"):
        imported = re.findall(r"^ *(?:from|import) ([\w.]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        others = [
            name
            for name in imported
            if name.partition(".")[0] not in sys.stdlib_module_names | {"torch", "safetensors"}
        ]
        assert all(name.startswith(("fedlab.lora", "fedlab.seeds", "fedlab._validate")) for name in others)


def test_references_against_hand_computed_numbers():
    """2×2, rank 1: products diag(3, 0) and diag(0, 1), weights 1/2."""
    from fedlab.lora.conformance.cases import Case, dense_mean

    state = {"x.lora_A": torch.zeros(1, 2), "x.lora_B": torch.zeros(2, 1)}
    updates = {
        "a": {"x.lora_A": torch.tensor([[1.0, 0.0]]), "x.lora_B": torch.tensor([[3.0], [0.0]])},
        "b": {"x.lora_A": torch.tensor([[0.0, 1.0]]), "x.lora_B": torch.tensor([[0.0], [1.0]])},
    }
    mean, size = dense_mean(Case(state, updates, {"a": 0.5, "b": 0.5}, 1), "x", "")
    assert math.isclose(size, 2.0)
    wanted = {
        EXACT: [[1.5, 0.0], [0.0, 0.5]],
        FACTORS: [[0.75, 0.75], [0.25, 0.25]],
        BEST: [[1.5, 0.0], [0.0, 0.0]],
        FAIR: [[0.75, 0.75], [0.25, 0.25]],
        "unchanged": [[0.0, 0.0], [0.0, 0.0]],
    }
    for promise, matrix in wanted.items():
        assert torch.allclose(conformance.PROMISES[promise](mean), torch.tensor(matrix).double(), atol=1e-12)
