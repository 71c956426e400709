"""A whole run directory: intact passes; whatever is changed in it, by whomever, is found and named."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedlab.cli import app
from fedlab.errors import ConfigError
from fedlab.privacy.accounting import Event, epsilon
from fedlab.privacy.audit.render import render
from fedlab.privacy.audit.run import RunAudit, audit_run

spec = importlib.util.spec_from_file_location("ledgers", Path(__file__).parents[1] / "ledgers.py")
ledgers: Any = importlib.util.module_from_spec(spec)
sys.modules["ledgers"] = ledgers
spec.loader.exec_module(ledgers)

ONE, TWO = {"client-0": ledgers.event(), "client-1": ledgers.event(0.05, 1.2, 5)}, 2
CLAIMS = {
    "client-0": epsilon([Event("poisson", 0.02, 1.0, 10)], 1e-5),
    "client-1": epsilon([Event("poisson", 0.05, 1.2, 10)], 1e-5),
}


MADE: dict[str, Any] = {}  # what ``root`` was written from


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = ledgers.write_run(tmp_path / "run", epsilon=CLAIMS, events=ONE)
    MADE.update(made)
    return tmp_path / "run"


def found(root: Path, **more: Any) -> list[str]:
    return [str(finding) for finding in audit_run(root, **more).findings]


def only(root: Path, *texts: str) -> None:
    """Exactly these findings."""
    there = found(root)
    assert len(there) == len(texts), there
    for text in texts:
        assert any(text in line for line in there), (text, there)


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def client(root: Path, name: str = "client-0") -> Path:
    return root / "ledger" / f"{name}.jsonl"


def test_an_intact_run_passes(root: Path):
    audit = audit_run(root)
    assert (audit.verdict, audit.findings, audit.unit, audit.delta) == ("consistent", (), "example", 1e-5)
    assert audit.epsilon_pld == pytest.approx(max(CLAIMS.values()), rel=1e-4) == audit.epsilon_claimed
    assert audit.epsilon_pld <= audit.epsilon_rdp
    row = audit.per_client["client-0"]
    assert (row["charges"], row["commits"], row["releases"], row["refusals"], row["runs"], row["lines"]) == (
        2,
        2,
        2,
        0,
        1,
        8,
    )
    assert row["epsilon_unamplified"] > 5 * row["epsilon_pld"]
    assert audit.per_client["client-2"]["epsilon_pld"] == 0
    text = render(audit)
    assert text.startswith("CONSISTENT: it fits together. Whoever can write this directory")
    assert "client-1" in text
    written = json.loads(json.dumps(audit.to_dict(), allow_nan=False))
    assert {
        "verdict",
        "delta",
        "epsilon_claimed",
        "epsilon_pld",
        "epsilon_rdp",
        "epsilon_prv",
        "per_client",
        "findings",
        "not_covered",
    } <= written.keys()


def test_published_keys(root: Path):
    keys = {name: ledgers.public(name) for name in ("server", "client-0", "client-1", "client-2")}
    assert audit_run(root, keys).verdict == "verified"
    assert found(root, keys={**keys, "client-9": "00" * 32}) == [
        "client-9: a key was published for it, but nothing in this run is signed by it: it was left out"
    ]
    assert found(root, keys={**keys, "client-1": ledgers.public("mallory")}) == [
        "client-1: the key is not the one that was published"
    ]
    assert found(root, keys={**keys, "server": ledgers.public("mallory")}) == [
        "server: the key is not the one that was published"
    ]
    assert found(root, keys={"client-0": keys["client-0"]}) == [
        "client-1: no key was published for this client",
        "client-2: no key was published for this client",
        "server: no key was published for this run: it signs all",
    ]


def test_every_file_of_the_chain_bytewise(root: Path):
    """A sample of bytes of receipts.jsonl and of a ledger, through the whole audit:
    always a finding on the right line.
    """
    for path, where in ((root / "receipts.jsonl", "receipts.jsonl"), (client(root), "client-0")):
        raw = path.read_bytes()
        for position in range(0, len(raw), 97):
            path.write_bytes(raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :])
            line = raw[:position].count(b"\n") + 1
            assert any(text.startswith(f"{where}: line {line}: ") for text in found(root)), (where, position)
        path.write_bytes(raw)


def test_the_end_cut_off_or_an_older_copy(root: Path):
    raw = client(root).read_bytes().splitlines(keepends=True)
    client(root).write_bytes(b"".join(raw[:4]))
    there = found(root)
    assert any(
        "client-0: ends at line 4, but a receipt (receipts.jsonl line 6) names line 6: the end was cut off or an older"
        in t
        for t in there
    )
    assert any("FINAL (receipts.jsonl line 8) names line 8" in text for text in there)
    assert any("claims more than the ledger shows" in text for text in there)
    client(root).write_bytes(b"".join(raw[:6]))
    only(root, "client-0: ends at line 6, but FINAL")
    client(root).unlink()
    assert any("client-0: has no ledger file" in text for text in found(root))


def test_receipts_cut_off(root: Path):
    path = root / "receipts.jsonl"
    raw = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(raw[:-1]))
    only(root, "does not end in a FINAL")
    path.write_bytes(b"".join(raw[:5]))
    assert any(
        "receipts.jsonl: ends at line 5, but the receipt in client-0 line 7 names line 6" in text
        for text in found(root)
    )
    path.unlink()
    only(root, "receipts.jsonl: is missing")
    path.write_bytes(b"")
    assert any("receipts.jsonl: the file is empty" in text for text in found(root))


def test_swapped_files(root: Path):
    a, b = client(root).read_bytes(), client(root, "client-1").read_bytes()
    client(root).write_bytes(b)
    client(root, "client-1").write_bytes(a)
    there = found(root)
    assert any(text.startswith("client-0: the file was swapped") for text in there)
    assert any(text.startswith("client-1: the file was swapped") for text in there)
    assert not any(text.startswith(("client-0: line", "client-1: line")) for text in there), "no line of it is damaged"


def test_unknown_and_missing_ledgers(root: Path):
    client(root, "client-7").write_bytes(ledgers.client_file(1, "client-7").bytes)
    assert any("client-7: START names no such client" in text for text in found(root))


def rebuilt(root: Path, change: Callable[[dict[str, Any]], None], final: bool = True) -> None:
    """The run written again, all consistent, after something happened before FINAL."""
    MADE["server"].lines.pop()
    change(MADE)
    if final:
        ledgers.finish(root, MADE["server"], MADE["files"])
    else:
        ledgers.write(root, MADE["server"], MADE["files"])


def test_signed_anew_with_another_key(root: Path):
    def resign(made: dict[str, Any]) -> None:
        file = ledgers.File("client-0", key="mallory")
        file.plan()
        for r in (1, 2):
            file.commit(file.charge(r))
        made["files"]["client-0"] = file

    rebuilt(root, resign)
    assert any("it is signed with another key than START names" in text for text in found(root))


def test_a_charge_without_commit_counts_and_claims_must_follow(root: Path):
    rebuilt(root, lambda made: made["files"]["client-0"].charge(3))
    there = found(root)
    assert any("client-0: result.json claims less than the ledger shows" in text for text in there)
    assert any("PRIVACY.md: line 5: says ε" in text and "rounded up" in text for text in there)
    assert any("says that it took part 2 times, its ledger shows 3" in text for text in there)
    assert any("exceeds the 2 participations" in text for text in there)
    assert len(there) == 4


def test_forged_receipts(root: Path):
    rebuilt(root, lambda made: made["server"].receipt("client-0", 2, {"seq": 5, "hash": "ee" * 32, "out": "ee" * 32}))
    assert any("a forked ledger" in text for text in found(root))
    MADE["server"].lines = MADE["server"].lines[:-2]
    ledgers.write(root, MADE["server"], MADE["files"])
    file = MADE["files"]["client-0"]
    commit = file.commit(file.charge(3))
    forger = ledgers.File("server", key="mallory", dataset=ledgers.ZEROS)
    fields = {"round": 3, "client": "client-0", "number": commit["seq"], "head": commit["hash"], "out": commit["out"]}
    file.release(commit, forger.add("RECEIPT", key=ledgers.public("mallory"), **fields))
    ledgers.finish(root, MADE["server"], MADE["files"])
    assert any(
        "client-0: line 11: RELEASE holds a receipt that is not signed with this run's server key" in text
        for text in found(root)
    )


def test_states_of_a_round(root: Path):
    rebuilt(root, lambda made: made["files"]["client-0"].charge(2, state="ee" * 32))
    assert any(
        "client-0: line 9: CHARGE of round 2 has another state than the one the server sent" in text
        for text in found(root)
    )

    def disagree(made: dict[str, Any]) -> None:
        made["files"]["client-0"].lines.pop()
        made["files"]["client-0"].charge(9, state="ee" * 32)
        made["files"]["client-1"].charge(9, state="ff" * 32)

    rebuilt(root, disagree)
    assert any(
        "client-1: line 9: CHARGE of round 9 has another state than client-0's (line 9)" in text for text in found(root)
    )


def test_a_round_without_its_commits(root: Path):
    after = ledgers.state_digest(ledgers.STATE)
    rebuilt(root, lambda made: made["server"].round(3, {"client-0": "ee" * 32}, after, before=after))
    there = found(root)
    assert any("who has no COMMIT for it" in text for text in there)
    assert any("without a receipt for it" in text for text in there)
    assert any("says completed; run.toml asks for 2 rounds, receipts.jsonl has 3" in text for text in there)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"before": "ee" * 32}, "does not begin with the state that was left"),
        ({"out": "ee" * 32}, "FINAL has another state than ROUND 2 left"),
        (
            {"clients": {"client-0": "ee" * 32, "client-1": None}},
            "used an update of 'client-0', who committed another one",
        ),
        ({"round": 3}, "ROUND 3 follows no ROUND 2"),
        ({"round": 1}, "a second ROUND 1, though nothing was resumed"),
    ],
)
def test_each_round_goes_on_from_the_last(root: Path, change: dict[str, Any], text: str):
    """The server's operator signs another round: what goes before and after it says so."""

    def edit(made: dict[str, Any]) -> None:
        lines = made["server"].lines
        at = max(i for i, line in enumerate(lines) if line["type"] == "ROUND")
        rest, made["server"].lines = lines[at:], lines[:at]
        for line in rest:
            own = {k: v for k, v in line.items() if k not in ledgers.FRAME}
            made["server"].add(line["type"], **(own | change if line["type"] == "ROUND" else own))

    rebuilt(root, edit)
    assert any(text in finding for finding in found(root)), found(root)


def test_a_line_after_the_end(root: Path):
    MADE["files"]["client-0"].add("REFUSE", round=3, kind="participations", reason="r")
    ledgers.write(root, MADE["server"], MADE["files"])
    only(root, "client-0: line 9: was added after the run's end")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda r: r["clients"]["client-0"].update(epsilon=0.5), "claims less than the ledger shows"),
        (
            lambda r: r["clients"]["client-0"].update(epsilon=1.0),
            "client-0: result.json claims more than the ledger shows",
        ),
        (
            lambda r: r["clients"]["client-0"].update(epsilon="inf"),
            "client-0: result.json claims more than the ledger shows",
        ),
        (lambda r: r["clients"]["client-0"].update(epsilon=None), "claims no ε for 'client-0'"),
        (lambda r: r["clients"]["client-0"].update(epsilon=-1), "claims no ε for 'client-0'"),
        (lambda r: r["clients"]["client-0"].update(delta=1e-3), "claims ε at δ = 0.001, the PLAN in line 1 says 1e-05"),
        (lambda r: r["clients"]["client-0"].pop("delta"), "claims no δ"),
        (lambda r: r["clients"].pop("client-0"), "does not list 'client-0'"),
        (
            lambda r: r["clients"]["client-2"].update(participations=1),
            "client-2: result.json says that it took part 1 times, its ledger shows 0",
        ),
        (lambda r: r.update(epsilon=0.1), "is not the maximum over clients"),
        (lambda r: r.update(epsilon="no DP"), "claims no ε"),
        (lambda r: r.update(adapter_digest="ee" * 32), "adapter_digest is not state of FINAL"),
        (lambda r: r.update(status="budget-exhausted"), "status is not status of FINAL"),
        (lambda r: r.update(clients=[]), "no object `clients`"),
    ],
)
def test_result_json(root: Path, change: Callable[[Any], None], text: str):
    edit_json(root / "result.json", change)
    assert any(text in line for line in found(root)), found(root)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", b'{"epsilon": NaN}', b"[" * 100_000, b'{"a": 1, "a": 1}']
)
def test_result_json_unreadable(root: Path, content: bytes):
    (root / "result.json").write_bytes(content)
    assert any(line.startswith("result.json: ") for line in found(root))


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        (r"\| client-0 \| [0-9.]+", "| client-0 | 0.1", "says ε = 0.1 for 'client-0', which is below"),
        (r"\| client-0 \| [0-9.]+", "| client-0 | 3.5", "says ε = 3.5 for 'client-0', recomputed"),
        (r"\| client-0 \| [0-9.]+", "| client-0 | small", "has no ε"),
        (r"\| client-0 \|", "| client-8 |", "has no row for 'client-0'"),
        (r"1e-05", "1e-09", "says δ = 1e-09"),
    ],
)
def test_privacy_md(root: Path, old: str, new: str, text: str):
    card = root / "PRIVACY.md"
    card.write_text(re.sub(old, new, card.read_text()))
    assert any(text in line for line in found(root)), found(root)
    assert any("PRIVACY.md: was changed: its size or SHA-256 is not the one in FINAL" in line for line in found(root))
    card.unlink()
    only(root, "PRIVACY.md: is missing", "is missing, FINAL names it")


def test_adapter_files(root: Path):
    model = root / "adapter" / "adapter_model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"!")
    only(root, "adapter/adapter_model.safetensors: was changed")
    (root / "adapter" / "more").mkdir()
    (root / "adapter" / "more" / "x.bin").write_bytes(b"x")
    only(root, "was changed", "adapter/more/x.bin: is not among the files")
    shutil.rmtree(root / "adapter")
    only(root, "adapter_config.json: is missing", "adapter_model.safetensors: is missing")


def test_the_adapter_is_the_last_rounds_state(root: Path):
    """Sealed anew with the server's key: the seal fits, the tensors do not."""

    def other(name: str, values: list[float]) -> Any:
        state = {**ledgers.STATE, name: (ledgers.STATE[name][0], values)}
        names = {key: key.removeprefix("head.") + ".weight" * ("lora" in key) for key in state}
        return ledgers.tensors({f"base_model.model.{names[key]}": value for key, value in state.items()})

    model = root / "adapter" / "adapter_model.safetensors"
    model.write_bytes(other("m.lora_B", [1, 0, 0, 2]))
    rebuilt(root, lambda made: None)
    only(root, "base_model.model.m.lora_B.weight differs from the last round's state")
    model.write_bytes(other("head.c.weight", [7, 9]))
    rebuilt(root, lambda made: None)
    only(root, "base_model.model.c.weight differs from the last round's state")
    model.write_bytes(b"\xff" * 20)
    rebuilt(root, lambda made: None)
    only(root, "cannot be compared with the adapter: its header would have")
    kept = root / "checkpoints" / "round-2.safetensors"
    kept.write_bytes(ledgers.tensors({**ledgers.STATE, "server/m": ([1], [3])}))
    model.write_bytes(other("head.c.weight", [7, 8]))
    rebuilt(root, lambda made: None)
    assert found(root) == [], "what the strategy keeps is no part of the state"
    kept.unlink()
    rebuilt(root, lambda made: None)
    only(root, "is not among the files that FINAL names")


def test_a_line_that_cannot_be_accounted_for_leaves_nothing_promised(root: Path):
    event = ledgers.event(sampler="weighted")
    rebuilt(root, lambda made: made["files"]["client-0"].charge(3, event=event))
    audit = audit_run(root)
    assert (
        "client-0: line 9: CHARGE event: sampler: unknown sampler 'weighted', which cannot be accounted for"
        in found(root)
    )
    assert audit.epsilon_pld == math.inf
    assert audit.to_dict()["per_client"]["client-0"]["epsilon_pld"] == "inf"


@pytest.mark.parametrize(
    ("plan", "verdict", "text"),
    [
        ({"delta": (1 / 1000).hex()}, "failed", "δ·n = 1 is not below 1"),
        ({"delta": (0.5 / 1000).hex()}, "consistent", "client-0: δ·n = 0.5 is above 0.1"),
        ({"noise": "seeded"}, "consistent", "noise was seeded: reproducible, hence no protection"),
        ({"budget": {"epsilon": (0.3).hex(), "delta": (1e-5).hex()}}, "failed", "the budget was exceeded"),
    ],
)
def test_plans(tmp_path: Path, plan: dict[str, Any], verdict: str, text: str):
    made, delta = ledgers.File.charge, float.fromhex(plan.get("delta", (1e-5).hex()))
    spent = {"client-0": Event("poisson", 0.02, 1.0, 10), "client-1": Event("poisson", 0.05, 1.2, 10)}
    claims = {name: epsilon([event], delta) for name, event in spent.items()}
    if "budget" in plan:
        ledgers.File.charge = lambda self, r, state="", **more: made(self, r, state, **{"filter": "pld", **more})
    try:
        ledgers.write_run(tmp_path / "run", epsilon=claims, events=ONE, **plan)
    finally:
        ledgers.File.charge = made
    audit = audit_run(tmp_path / "run")
    assert audit.verdict == verdict, audit.findings
    assert text in render(audit)


def test_unit_client(tmp_path: Path):
    whole = epsilon([Event("full", 1.0, 1.0, 2)], 1e-5)
    claims = {f"client-{i}": whole for i in range(3)}
    ledgers.write_run(tmp_path / "run", epsilon=claims, unit="client")
    audit = audit_run(tmp_path / "run")
    assert (audit.verdict, audit.unit) == ("consistent", "client"), audit.findings
    assert audit.per_client["client-2"]["epsilon_pld"] == pytest.approx(whole, rel=1e-4)
    client(tmp_path / "run", "server").unlink()
    assert any(line.startswith("server: has no ledger file") for line in found(tmp_path / "run"))


def test_no_dp_is_said_and_must_be_true(root: Path):
    (root / "run.toml").write_text('[privacy]\nunit = "none"\n')
    assert any("says privacy.unit" in line and "there are ledgers" in line for line in found(root))
    for name in ("ledger", "adapter"):
        shutil.rmtree(root / name)
    (root / "receipts.jsonl").unlink()
    (root / "result.json").write_text('{"status": "completed", "epsilon": "no DP"}')
    audit = audit_run(root)
    assert (audit.verdict, audit.epsilon_pld, audit.epsilon_claimed) == ("no-dp", None, None)
    assert render(audit).startswith("NO DP")
    (root.parent / "keys.json").write_text("{}")
    command = CliRunner().invoke(app, ["audit", str(root)])
    assert (command.exit_code, command.output.startswith("NO DP")) == (0, True)
    asked = CliRunner().invoke(app, ["audit", str(root), "--keys", str(root.parent / "keys.json")])
    assert asked.exit_code == 5, "less than was asked for"


def test_a_run_that_did_not_end_has_no_final(root: Path):
    edit_json(root / "result.json", lambda r: r.update(status="interrupted"))
    rebuilt(root, lambda made: None, final=False)
    (root / "PRIVACY.md").unlink()
    assert any("an adapter without its seal" in line for line in found(root))
    shutil.rmtree(root / "adapter")
    audit = audit_run(root)
    assert (audit.verdict, audit.findings, audit.epsilon_claimed) == ("incomplete", (), None)
    assert audit.epsilon_pld == pytest.approx(CLAIMS["client-1"], rel=1e-4)
    assert any("has no FINAL: the run was interrupted" in note for note in audit.notes)
    assert render(audit).startswith("INCOMPLETE: the run did not come to its end. This vouches for no adapter")
    (root / "result.json").unlink()
    assert audit_run(root).verdict == "incomplete", "killed"
    client(root, "client-2").write_bytes(b"")
    client(root).write_bytes(client(root).read_bytes() + b'{"torn')
    audit = audit_run(root)
    assert audit.verdict == "incomplete"
    assert any("its last line was cut off" in note for note in audit.notes)


def test_other_runs_and_units(root: Path):
    edit_json(root / "environment.json", lambda e: e.update(run_id="cd" * 16))
    only(root, "receipts.jsonl: belongs to run", "environment.json: was changed")
    (root / "environment.json").unlink()
    only(root, "environment.json: is missing", "environment.json: is missing, FINAL")
    (root / "environment.json").write_text(json.dumps({"run_id": ledgers.RUN}))
    (root / "run.toml").write_text("[privacy\n")
    assert any("run.toml: cannot be read" in line for line in found(root))
    assert any("run.toml: is not the configuration that START names" in line for line in found(root))
    (root / "run.toml").write_text('[privacy]\nunit = "client"\n')
    assert any("START has unit 'example', run.toml says 'client'" in line for line in found(root))


def test_a_directory_in_place_of_a_file_does_not_raise(root: Path):
    for name in ("ledger/client-0.jsonl", "receipts.jsonl", "result.json", "PRIVACY.md", "environment.json"):
        (root / name).unlink()
        (root / name).mkdir()
        assert audit_run(root).verdict == "failed"
    with pytest.raises(ConfigError, match="no run directory"):
        audit_run(root / "ledger")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"clip": (2.0).hex()}, "PLAN has clip 2, run.toml makes it 1"),
        ({"event": ledgers.event(0.02, 0.5)}, "PLAN has σ 0.5, run.toml makes it 1"),
        ({"event": ledgers.event(0.02, 1.0, 6)}, "PLAN has steps 6, run.toml makes it 5"),
        ({"event": ledgers.event(0.5, 1.0)}, "PLAN has q 0.5, run.toml makes it 0.02"),
        ({"event": ledgers.event(sampler="full")}, "PLAN has sampler 'full', run.toml makes it 'poisson'"),
        ({"normaliser": (1.0).hex()}, "PLAN has normaliser 1, run.toml makes it 20"),
        ({"delta": (1e-4).hex()}, "PLAN has δ 0.0001, run.toml makes it 1e-05"),
        ({"participations": 9}, "PLAN has participations 9, run.toml makes it 2"),
        ({"noise": "seeded"}, "PLAN has noise 'seeded', run.toml makes it 'secure'"),
    ],
)
def test_every_plan_is_the_configurations(tmp_path: Path, change: dict[str, Any], text: str):
    """Whoever signs: a plan that run.toml does not make is found."""
    made = ledgers.File.plan
    ledgers.File.plan = lambda self, happens=None, **more: made(self, happens, **{**more, **change})
    try:
        ledgers.write_run(tmp_path / "run")
    finally:
        ledgers.File.plan = made
    assert any(text in line for line in found(tmp_path / "run")), found(tmp_path / "run")


def test_a_run_of_the_first_edition_is_not_vouched_for(root: Path):
    def older(made: dict[str, Any]) -> None:
        made["server"].lines[0] = ledgers.seal(
            {k: v for k, v in made["server"].lines[0].items() if k != "config"}, "server"
        )

    rebuilt(root, older)
    assert any("was written by the first edition" in line for line in found(root))


def test_the_command(root: Path, tmp_path: Path):
    """What follows from the ledgers is made again by the product, which needs more of a run than these files."""
    run = CliRunner()
    client(root).write_bytes(client(root).read_bytes().replace(b'"steps":5', b'"steps":1', 1))
    done = run.invoke(app, ["audit", str(root)])
    assert (done.exit_code, done.stdout.startswith("FAILED")) == (3, True), done.output
    keys = tmp_path / "keys.json"
    keys.write_text("[]")
    assert run.invoke(app, ["audit", str(root), "--keys", str(keys)]).exit_code == 2
    assert run.invoke(app, ["audit", str(root), "--kept", str(tmp_path / "none")]).exit_code == 2
    done = run.invoke(app, ["audit", str(root), "--json"])
    assert done.exit_code == 3
    value = json.loads(done.stdout)
    assert value["verdict"] == "failed"
    assert value["findings"][0].startswith("client-0: ")
    assert run.invoke(app, ["audit", str(tmp_path)]).exit_code == 2


@pytest.mark.slow
def test_a_large_run_in_well_under_a_minute(tmp_path: Path):
    events = {f"client-{i}": ledgers.event(20 / (1000 + 40 * i), 0.7 + 0.05 * i, 50) for i in range(20)}
    ledgers.write_run(tmp_path / "run", clients=21, rounds=100, events=events, participations=100)
    began = time.perf_counter()
    audit: RunAudit = audit_run(tmp_path / "run")
    seconds = time.perf_counter() - began
    print(f"100 rounds x 20 clients x 5000 steps: {seconds:.1f} s")
    assert seconds < 60
    assert all("claims less" in f.message or "rounded up" in f.message for f in audit.findings), (
        "nothing but the claims of 0 is wrong"
    )
