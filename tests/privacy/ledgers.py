"""A small writer of ledgers for tests, from ``docs/ledger.md`` alone: it shares nothing with the product on either
side.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

FRAME = ("v", "seq", "prev", "type", "time", "run", "owner", "dataset", "hash", "sig")
RUN, DATA, ZEROS = "ab" * 16, "d1" * 32, "0" * 64
SCOPE = "5c" * 32


def private(name: str) -> Ed25519PrivateKey:
    """A key that depends on the name only."""
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())


def public(name: str) -> str:
    return private(name).public_key().public_bytes_raw().hex()


def dump(line: dict[str, Any]) -> str:
    return json.dumps(line, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def sha(text: str | bytes) -> str:
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()


def seal(line: dict[str, Any], name: str) -> dict[str, Any]:
    """Hash and sign a line by the key of ``name``."""
    body = {key: value for key, value in line.items() if key not in ("hash", "sig")}
    body["hash"] = sha(dump(body))
    return {**body, "sig": private(name).sign(b"fedlab-ledger-v1:" + body["hash"].encode()).hex()}


def event(q: float = 0.02, sigma: float = 1.0, steps: int = 5, sampler: str = "poisson") -> dict[str, Any]:
    return {"sampler": sampler, "q": q.hex(), "sigma": sigma.hex(), "steps": steps}


class File:
    """One file under construction; every method appends a line and returns it."""

    def __init__(self, owner: str, key: str | None = None, dataset: str = DATA, run: str = RUN):
        self.owner, self.key, self.dataset, self.run, self.lines = owner, key or owner, dataset, run, []

    def add(self, kind_: str, **more: Any) -> dict[str, Any]:
        prev = self.lines[-1]["hash"] if self.lines else ZEROS
        line = {
            "v": 1,
            "seq": len(self.lines),
            "prev": prev,
            "type": kind_,
            "time": "2026-11-23T14:20:01Z",
            "run": self.run,
        }
        self.lines.append(seal({**line, "owner": self.owner, "dataset": self.dataset, **more}, self.key))
        return self.lines[-1]

    @property
    def bytes(self) -> bytes:
        return "".join(dump(line) + "\n" for line in self.lines).encode()

    def plan(self, happens: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
        self.planned = happens or event()
        fields = {
            "key": public(self.key), "unit": "example", "relation": "add_remove", "event": self.planned,
            "clip": 1.0.hex(),
            "normaliser": 20.0.hex(), "delta": 1e-5.hex(), "n": 1000, "participations": 10, "scope": SCOPE,
            "budget": None,
            "noise": "secure", "content": None, "configuration": "c0" * 32, "releases": ["size", "timing"],
            "code": {"fedlab": "0.1.0"}, "shared": None,
        }  # fmt: skip
        return self.add("PLAN", **{**fields, **more})

    def charge(self, round_: int, state: str = "", **more: Any) -> dict[str, Any]:
        plan = [line for line in self.lines if line["type"] == "PLAN"][-1]
        fields = {
            "round": round_,
            "plan": plan["hash"],
            "event": self.planned,
            "in": state or sha(f"state {round_}"),
            "filter": "none",
        }
        return self.add("CHARGE", **{**fields, **more})

    def commit(self, charge: dict[str, Any], **more: Any) -> dict[str, Any]:
        fields = {
            "charge": charge["hash"],
            "steps": charge["event"]["steps"],
            "out": sha(f"{self.owner} {charge['seq']}"),
        }
        return self.add("COMMIT", **{**fields, **more})

    def release(self, commit: dict[str, Any], receipt: dict[str, Any]) -> dict[str, Any]:
        return self.add("RELEASE", commit=commit["hash"], receipt=receipt)

    def close(self) -> dict[str, Any]:
        mine = [line for line in self.lines if line["run"] == self.run]
        plan = [line for line in mine if line["type"] == "PLAN"][-1]
        return self.add("CLOSE", plan=plan["hash"], charges=sum(line["type"] == "CHARGE" for line in mine))


class Server(File):
    """``receipts.jsonl`` under construction."""

    def __init__(self, clients: list[str], unit: str = "example", config: str = ZEROS):
        super().__init__("server", dataset=ZEROS)
        keys = {name: public(name) for name in clients}
        self.add("START", key=public("server"), unit=unit, clients=keys, config=config)

    def receipt(self, client_: str, round_: int, commit: dict[str, Any], **more: Any) -> dict[str, Any]:
        fields = {
            "key": public("server"),
            "round": round_,
            "client": client_,
            "number": commit["seq"],
            "head": commit["hash"],
        }
        return self.add("RECEIPT", **{**fields, "out": commit["out"], **more})

    def round(self, round_: int, clients: dict[str, str | None], after: str = "", **more: Any) -> dict[str, Any]:
        states = {
            "before": sha(f"whole {round_}"),
            "in": sha(f"state {round_}"),
            "out": after or sha(f"whole {round_ + 1}"),
        }
        return self.add("ROUND", **{"round": round_, **states, "clients": clients, **more})


def client_file(rounds: int = 2, owner: str = "client-0", **plan: Any) -> File:
    """PLAN, then CHARGE, COMMIT, RELEASE per round; the receipts are of a server whose file is elsewhere."""
    file, server = File(owner), Server([owner])
    file.plan(**plan)
    for r in range(1, rounds + 1):
        commit = file.commit(file.charge(r))
        file.release(commit, server.receipt(owner, r, commit))
    return file


def write_run(
    root: Path, clients: int = 3, rounds: int = 2, epsilon: dict[str, float] | None = None, events: dict[str,
    dict[str, Any]] | None = None,
    unit: str = "example", **plan: Any,
) -> dict[str, Any]:  # fmt: skip
    """A whole intact run directory. Everybody takes part in every round but the last client, who signed its plan only.

    ``epsilon``: what result.json claims per client. Every client has q·n = 20, so its size follows from its event.
    Returns {"server": Server, "files": {owner: File}}.
    """
    names = [f"client-{i}" for i in range(clients)]
    owners = names if unit == "example" else ["server"]
    toml = configuration(unit, clients, rounds, events or {}, plan)
    server, files = Server(names, unit, sha(toml)), {name: File(name) for name in owners}
    for name, file in files.items():
        happens = (events or {}).get(name) or (event() if unit == "example" else event(1.0, 1.0, 1, "full"))
        n = round(20 / float.fromhex(happens["q"])) if unit == "example" else clients
        terms = {"n": n, "normaliser": (20.0 if unit == "example" else float(n)).hex(), "participations": rounds}
        terms["configuration"] = sha(toml)
        file.plan(happens, unit=unit, **{**terms, **plan})
    after = state_digest(STATE)
    for r in range(1, rounds + 1):
        commits = {name: file.commit(file.charge(r)) for name, file in files.items() if name != names[-1]}
        updates = {name: commits[name]["out"] if unit == "example" else None for name in names[:-1]}
        server.round(r, updates, after if r == rounds else "")
        for name, commit in commits.items() if unit == "example" else ():
            files[name].release(commit, server.receipt(name, r, commit))
    for file in files.values():
        file.close()
    for name in ("ledger", "adapter", "checkpoints"):
        (root / name).mkdir(parents=True)
    (root / "adapter" / "adapter_config.json").write_text("{}")
    adapter = {
        f"base_model.model.{name.removeprefix('head.')}{'.weight' * ('lora' in name)}": v for name, v in STATE.items()
    }
    (root / "adapter" / "adapter_model.safetensors").write_bytes(tensors(adapter))
    (root / "checkpoints" / f"round-{rounds}.safetensors").write_bytes(tensors(STATE))
    (root / "run.toml").write_text(toml)
    (root / "environment.json").write_text(json.dumps({"run_id": RUN}))
    (root / "metrics.jsonl").write_text("{}\n")
    claims = {
        name: {
            "epsilon": (epsilon or {}).get(name, 0.0),
            "delta": float.fromhex(plan.get("delta", (1e-5).hex())),
            "participations": rounds,
        }
        for name in names
    }
    claims[names[-1]]["participations"] = 0 if unit == "example" else rounds
    write_claims(root, claims)
    finish(root, server, files)
    return {"server": server, "files": files}


def configuration(unit: str, clients: int, rounds: int, events: dict[str, Any], plan: dict[str, Any]) -> str:
    """A run.toml that makes the plans that ``write_run`` signs."""
    one = next(iter(events.values()), event())
    privacy = {
        "unit": unit,
        "noise": plan.get("noise", "secure"),
        "clip": 1.0,
        "delta": float.fromhex(plan.get("delta", (1e-5).hex())),
    }
    privacy |= {"epsilon": 1e6} if events else {"sigma": 1.0}  # with events of their own every client has its σ
    if plan.get("budget"):
        privacy["budget"] = {"epsilon": float.fromhex(plan["budget"]["epsilon"])}
    train = {"steps": one["steps"], "batch_size": 20}
    if shared := plan.get("shared"):
        privacy |= {"survivors": shared["survivors"], "colluding": shared["colluding"]}
        train["sampling_rate"] = float.fromhex(one["q"])
    run = {"rounds": rounds, "fraction": 1.0, "sampling": "balanced", "min_clients": 1}
    tree = {"run": run, "data": {"clients": clients}, "train": train, "privacy": privacy}
    lines = []
    for section, keys in tree.items():
        lines.append(f"[{section}]")
        lines += [
            f"{k} = {'{epsilon = ' + str(v['epsilon']) + '}' if isinstance(v, dict) else json.dumps(v)}"
            for k, v in keys.items()
        ]
    return "\n".join(lines) + "\n"


STATE = {"m.lora_A": ([2, 3], [1, 2, 3, 4, 5, 6]), "m.lora_B": ([2, 2], [1, 0, 0, 1]), "head.c.weight": ([2], [7, 8])}


def tensors(state: dict[str, tuple[list[int], list[float]]]) -> bytes:
    """A safetensors file of float32 tensors."""
    header, data = {}, b""
    for name, (shape, values) in state.items():
        raw = struct.pack(f"<{len(values)}f", *values)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def state_digest(state: dict[str, tuple[list[int], list[float]]]) -> str:
    """Over names, dtypes, shapes and bytes."""
    result = hashlib.sha256()
    for name, (shape, values) in sorted(state.items()):
        result.update(f"{name}|<f4|{tuple(shape)}|".encode() + struct.pack(f"<{len(values)}f", *values))
    return result.hexdigest()


def finish(root: Path, server: Server, files: dict[str, File]) -> None:
    """FINAL, and every file to disk."""
    heads = {name: [file.lines[-1]["seq"], file.lines[-1]["hash"]] for name, file in files.items()}
    paths = [path for path in sorted(root.rglob("*")) if path.is_file() and path.name != "receipts.jsonl"]
    names = {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}
    sealed = {name: [len(data), sha(data)] for name, data in names.items() if not name.startswith("ledger/")}
    status = json.loads(names["result.json"])["status"]
    server.add("FINAL", heads=heads, files=sealed, state=state_digest(STATE), status=status)
    write(root, server, files)


def write(root: Path, server: Server, files: dict[str, File]) -> None:
    (root / "receipts.jsonl").write_bytes(server.bytes)
    for name, file in files.items():
        (root / "ledger" / f"{name}.jsonl").write_bytes(file.bytes)


def write_claims(root: Path, claims: dict[str, dict[str, Any]]) -> None:
    """result.json and PRIVACY.md."""
    top = max(claim["epsilon"] for claim in claims.values())
    result = {"status": "completed", "epsilon": top, "adapter_digest": state_digest(STATE), "clients": claims}
    (root / "result.json").write_text(json.dumps(result))
    rows = [f"| {name} | {up(claim['epsilon']):.4f} | {claim['delta']:g} | x |" for name, claim in claims.items()]
    (root / "PRIVACY.md").write_text(
        "# Privacy\n\n| client | ε | δ | … |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
    )


def up(value: float) -> float:
    """Rounded up to four decimals."""
    rounded = round(value, 4)
    return rounded if rounded >= value else rounded + 1e-4
