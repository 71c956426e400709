"""A forger with a finished private run: every file and every line of it, changed in every way that is a line of code.

**Wrongly** passed is a copy whose audit says ``verified`` or ``consistent`` although something in it that the audit
prints or does not name as not covered differs from the true run. Two things are right: a file that is named as not
covered may differ, and without keys kept elsewhere a directory that was signed anew throughout may be ``consistent``,
because the text says first that whoever can write it could have made it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import fedlab
from fedlab.config import RunConfig
from fedlab.privacy.audit.render import render
from fedlab.privacy.audit.run import RunAudit, audit_run
from fedlab.privacy.ledger.ledger import canonical, seal
from fedlab.run.audit import audit_directory
from fedlab.run.regenerate import regenerate
from strategies.server.accounts import Accounts

_spec = importlib.util.spec_from_file_location("forging", Path(__file__).with_name("forging.py"))
forging: Any = importlib.util.module_from_spec(_spec)
sys.modules["forging"] = forging
_spec.loader.exec_module(forging)


@dataclass(frozen=True)
class Run:
    """A finished run: where it lies, its files, its keys, and what would be needed to sign in its name."""

    path: Path
    files: dict[str, bytes]
    published: dict[str, str]
    private: dict[str, Any]
    modes: dict[str, int]

    def audit(self, keys: bool = True, kept: dict[str, bytes] | None = None) -> RunAudit:
        return audit_run(self.path, self.published if keys else None, kept, regenerate)

    def restore(self) -> None:
        forging.replace_tree(self.path, self.files)


@pytest.fixture(scope="module")
def run(tiny_bert: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory, drawn_once: None) -> Run:
    from fedlab.privacy.ledger.keys import load_or_create_key

    path, kept = tmp_path_factory.mktemp("forger") / "run", tmp_path_factory.mktemp("keys")
    text = f"""
[run]
name = "forger"
rounds = 2
nodes = 1
backend = "local"
[model]
name = "{tiny_bert}"
[lora]
rank = 2
alpha = 4
target_modules = ["query"]
[data]
source = "files"
path = "{tiny_data}"
text = "text"
label = "topic"
clients = 3
max_length = 16
[train]
steps = 1
batch_size = 8
lr = 0.1
[privacy]
unit = "example"
sigma = 1.0
clip = 1.0
"""
    with pytest.MonkeyPatch.context() as keeping:
        keeping.setattr(Accounts, "destroy_keys", lambda self: shutil.move(path / "ledger" / "keys", kept / "keys"))
        fedlab.simulate(RunConfig.parse(text), path, quiet=True)
    private = {file.stem: load_or_create_key(file) for file in (kept / "keys").glob("*.pem")}
    files = {f.relative_to(path).as_posix(): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}
    start = json.loads(files["receipts.jsonl"].split(b"\n")[0])
    modes = {name: (path / name).stat().st_mode & 0o777 for name in files}
    return Run(path, files, {"server": start["key"], **start["clients"]}, private, modes)


def wrongly(audit: RunAudit) -> bool:
    return audit.verdict in ("verified", "consistent")


def test_the_true_run_is_verified(run: Run):
    own = {name: run.files[f"ledger/{name}.jsonl"] for name in ("client-1",)}
    assert run.audit(keys=False).verdict == "consistent"
    assert "could have made all of it" in render(run.audit(keys=False)).splitlines()[0]
    assert run.audit().verdict == "verified", run.audit().findings
    assert run.audit(keys=False, kept=own).verdict == "verified", run.audit(keys=False, kept=own)
    assert run.audit().not_covered == ("log.txt: the log",)
    (run.path / "log.txt").write_text("something else")
    assert run.audit().verdict == "verified"
    (run.path / "extra.txt").write_text("x")
    assert run.audit().not_covered == ("extra.txt: no part of the run", "log.txt: the log")
    run.restore()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("step", [29, pytest.param(1, marks=pytest.mark.slow)])
def test_no_mutation_passes(run: Run, tmp_path: Path, step: int):
    made = forging.mutations(run.files, tmp_path)
    assert len(made) >= 500
    assert len({what for what, _ in made}) == len(made)
    passed, unfinished = [], []
    for what, change in made[::step]:
        change(run.path)
        audit = run.audit(keys=False)
        if audit.verdict != "failed":  # keys only add findings
            unfinished.append(what)
            audit = run.audit()
        if wrongly(audit) or (audit.verdict == "incomplete" and audit.epsilon_claimed is not None):
            passed.append((what, audit.verdict))
        run.restore()
    print(f"{len(made)} mutations, incomplete: {unfinished}")
    assert passed == []
    assert run.audit().verdict == "verified"


def test_nothing_incomplete_holds_a_foreign_adapter(run: Run):
    (run.path / "result.json").unlink()
    assert run.audit().verdict == "incomplete", "cut off between the seal and the result"
    model = run.path / "adapter" / "adapter_model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"!")
    assert run.audit().verdict == "failed"
    run.restore()


# --- with keys of the run: the server's operator, and whoever makes new ones


def lines(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.splitlines()]


def sealed_again(entries: list[dict[str, Any]], key: Any) -> bytes:
    """A chain written anew by the holder of a key."""
    prev, out = "0" * 64, []
    for seq, entry in enumerate(entries):
        body = {k: v for k, v in entry.items() if k not in ("hash", "sig")} | {"seq": seq, "prev": prev}
        out.append(seal(body, key))
        prev = out[-1]["hash"]
    return b"".join(canonical(entry) + b"\n" for entry in out)


def operator(run: Run, root: Path, change: Callable[[list[dict[str, Any]], dict[str, Any]], None]) -> None:
    """The server's operator rewrites receipts, result and seal with the server's own key.

    ``change`` edits the receipts' lines before FINAL, and the result. Ledgers are what lies in ``root``.
    """
    import hashlib

    entries, result = lines(run.files["receipts.jsonl"]), json.loads(run.files["result.json"])
    final = entries.pop()
    change(entries, result)
    (root / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    for name, text in regenerate(root, result).items():
        (root / name).write_text(text)
    heads = {}
    for file in sorted((root / "ledger").glob("*.jsonl")):
        last = lines(file.read_bytes())[-1]
        heads[file.stem] = [last["seq"], last["hash"]]
    names = [name for name in final["files"] if (root / name).is_file()]
    sizes = {name: [len(d := (root / name).read_bytes()), hashlib.sha256(d).hexdigest()] for name in names}
    rounds = [entry for entry in entries if entry["type"] == "ROUND"]
    final |= {"heads": heads, "files": sizes, "status": result["status"]}
    final["state"] = rounds[-1]["out"] if rounds else final["state"]
    (root / "receipts.jsonl").write_bytes(sealed_again([*entries, final], run.private["server"]))


def first_round_only(run: Run) -> None:
    """Every client's file cut to a prefix, whose signatures stay valid."""
    for name in run.files:
        if name.startswith("ledger/"):
            kept = run.files[name].split(b"\n")[:4]  # PLAN CHARGE COMMIT RELEASE
            (run.path / name).write_bytes(b"\n".join(kept) + b"\n")


def without_the_second(entries: list[dict[str, Any]], result: dict[str, Any]) -> None:
    entries[:] = [entry for entry in entries if entry.get("round") != 2]
    result["rounds"] = 1


@pytest.mark.parametrize("status", ["completed", "budget-exhausted"])
def test_an_operator_who_cuts_a_round_is_found_by_keys_and_by_any_kept_ledger(run: Run, status: str):
    first_round_only(run)

    def change(entries: list[dict[str, Any]], result: dict[str, Any]) -> None:
        without_the_second(entries, result)
        result["status"] = status

    operator(run, run.path, change)
    assert not wrongly(run.audit()), run.audit()
    for client in ("client-0", "client-2"):
        audit = run.audit(keys=False, kept={"kept": run.files[f"ledger/{client}.jsonl"]})
        assert audit.verdict == "failed"
        assert any("the end was cut off" in str(f) or "was cut off or written anew" in str(f) for f in audit.findings)
    run.restore()


def test_an_operator_who_cuts_one_clients_last_round_is_found(run: Run):
    """Nobody else signs a client's participation; its own CLOSE is missing then."""
    file = run.path / "ledger" / "client-1.jsonl"
    file.write_bytes(b"\n".join(file.read_bytes().split(b"\n")[:4]) + b"\n")

    def change(entries: list[dict[str, Any]], result: dict[str, Any]) -> None:
        entries[:] = [e for e in entries if (e.get("round"), e.get("client")) != (2, "client-1")]
        for entry in entries:
            if entry["type"] == "ROUND" and entry["round"] == 2:
                del entry["clients"]["client-1"]

    operator(run, run.path, change)
    audit = run.audit()
    assert audit.verdict != "verified"
    assert audit.findings or "client-1 did not sign that the run is over" in " ".join(audit.notes)
    assert run.audit(keys=False, kept={"kept": run.files["ledger/client-1.jsonl"]}).verdict == "failed"
    assert run.audit(keys=False, kept={"kept": run.files["ledger/client-0.jsonl"]}).verdict == "failed"
    run.restore()


def test_an_operator_who_swaps_the_adapter_is_found_without_any_key(run: Run):
    model = run.path / "adapter" / "adapter_model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"!")
    operator(run, run.path, lambda entries, result: None)
    audit = run.audit(keys=False)
    assert [f.message for f in audit.findings if f.where == "adapter/adapter_model.safetensors"]
    run.restore()


def test_an_operator_who_promises_other_terms_is_found_without_any_key(run: Run):
    """run.toml is sealed anew with the edit; the clients' plans say otherwise."""
    edits = {
        "clip = 1.0": "clip = 0.001",
        "sigma = 1.0": "sigma = 40.0",
        "batch_size = 8": "batch_size = 1",
        "steps = 1": "steps = 2",
        'noise = "seeded"': 'noise = "secure"',
        "rounds = 2": "rounds = 1",
    }
    for old, new in edits.items():
        text = run.files["run.toml"].decode()
        assert old in text
        edited = text.replace(old, new).encode()
        (run.path / "run.toml").write_bytes(edited)

        def change(entries: list[dict[str, Any]], result: dict[str, Any], edited: bytes = edited) -> None:
            import hashlib

            entries[0]["config"] = hashlib.sha256(edited).hexdigest()

        operator(run, run.path, change)
        audit = run.audit(keys=False)
        assert audit.verdict == "failed", (new, audit)
        run.restore()


def test_new_keys_pass_as_consistent_at_most(run: Run):
    """Everything signed anew: nothing in the directory can tell. Any key or ledger from elsewhere does."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from fedlab.privacy.ledger.keys import public_hex

    keys = {name: Ed25519PrivateKey.generate() for name in run.published}
    receipts = lines(run.files["receipts.jsonl"])
    receipts[0] |= {"key": public_hex(keys["server"])}
    receipts[0]["clients"] = {name: public_hex(keys[name]) for name in receipts[0]["clients"]}
    for name in receipts[0]["clients"]:
        entries = lines(run.files[f"ledger/{name}.jsonl"])[:1]
        entries[0] |= {"key": public_hex(keys[name])}
        (run.path / "ledger" / f"{name}.jsonl").write_bytes(sealed_again(entries, keys[name]))
    audit = run.audit()
    assert audit.verdict == "failed"
    assert any("not the one that was published" in f.message for f in audit.findings)
    kept = {"kept": run.files["ledger/client-0.jsonl"]}
    assert run.audit(keys=False, kept=kept).verdict == "failed"
    run.restore()


@pytest.mark.parametrize("missing", ["server", "client-1"])
def test_keys_cover_the_server_and_every_client(run: Run, missing: str):
    keys = {name: key for name, key in run.published.items() if name != missing}
    audit = audit_run(run.path, keys, None, regenerate)
    assert audit.verdict == "failed"
    assert any(f.where == missing and "no key was published" in f.message for f in audit.findings)
    more = audit_run(run.path, {**run.published, "client-9": "0" * 64}, None, regenerate)
    assert any("it was left out" in f.message for f in more.findings)


def test_a_kept_ledger_of_before_the_end_is_said_not_to_reach_it(run: Run):
    older = b"\n".join(run.files["ledger/client-0.jsonl"].split(b"\n")[:4]) + b"\n"
    audit = run.audit(keys=False, kept={"kept": older})
    assert audit.verdict == "consistent"
    assert any("kept receipts reach round 1, not the last one" in note for note in audit.notes)
    assert run.audit(keys=False, kept={"kept": b"nonsense"}).verdict == "failed"


def test_the_command(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    keys, kept = tmp_path / "keys.json", tmp_path / "client-0.jsonl"
    keys.write_text(json.dumps(run.published))
    kept.write_bytes(run.files["ledger/client-0.jsonl"])
    assert audit_directory(run.path, None, [], False) == 0
    assert capsys.readouterr().out.startswith("CONSISTENT")
    assert audit_directory(run.path, keys, [kept], True) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "verified"
    (run.path / "result.json").unlink()
    assert audit_directory(run.path, None, [], True) == 5
    assert json.loads(capsys.readouterr().out)["verdict"] == "incomplete"
    (run.path / "run.toml").unlink()
    os.mkfifo(run.path / "run.toml")
    assert audit_directory(run.path, None, [], False) == 3
    assert capsys.readouterr().out.startswith("FAILED")
    run.restore()
    kept.write_bytes(b"\n".join(run.files["ledger/client-0.jsonl"].split(b"\n")[:4]) + b"\n")
    assert audit_directory(run.path, None, [kept], False) == 5, "less than was asked for"


def test_the_command_into_a_closed_pipe_ends_with_the_verdict(run: Run):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "fedlab.cli", "audit", str(run.path)]
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_only_its_owner_reads_the_partition_and_the_statement_names_it(run: Run):
    assert run.modes["partition.json"] == 0o600
    assert "`partition.json` of this directory, which its owner alone can read" in run.files["PRIVACY.md"].decode()
    assert "partition.json of this directory" in run.files["report.html"].decode()


def test_what_an_audit_of_signed_events_cannot_know(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A trainer that draws no noise signs the same lines: the audit says that it cannot tell."""
    from fedlab.privacy import plan
    from fedlab.run.directory import RunDirectory

    config = RunDirectory.open(run.path).config
    monkeypatch.setattr(plan.DPPlan, "privatise", lambda self, total, noise: {n: v.double() for n, v in total.items()})
    made = fedlab.simulate(config, tmp_path / "silent", quiet=True)
    audit = audit_run(made.path, None, None, regenerate)
    assert audit.verdict == "consistent"
    assert audit.epsilon_pld == run.audit().epsilon_pld
    assert any("that the noise was drawn as signed no ledger can show" in note for note in audit.notes)


def test_an_empirical_audit_beside_the_run_is_named_as_not_covered(run: Run):
    from fedlab.privacy.statement import EMPIRICAL, write_statement

    bound = {"name": "steinke", "epsilon": 1.0, "confidence": 0.95, "canaries": 9}
    setting = {"q": 1.0, "sigma": 1.0, "steps": 1}
    found = {"bounds": [bound], "findings": [], "configuration": setting, "claimed": 4.4, "delta": 1e-5}
    (run.path / EMPIRICAL).write_text(json.dumps(found))
    assert run.audit().verdict == "failed", "the statement does not quote it"
    write_statement(run.path, json.loads(run.files["result.json"])["clients"])
    audit = run.audit()
    assert audit.verdict == "verified", audit.findings
    assert any(text.startswith("empirical.json: ") for text in audit.not_covered)
    run.restore()
