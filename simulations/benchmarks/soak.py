"""A long run on real processes, which are killed, hung, cut off and lied to at random: no ε lost, nothing stuck.

    python simulations/benchmarks/soak.py                # 200 rounds, three clients; about an hour on two cores
    python simulations/benchmarks/soak.py --rounds 10 --every 20 --seed 1 --out DIR

Starts a server, clients and a run on loopback, over TLS with node keys, a tiny model and secure noise. About every so
many seconds one fault befalls a part of it. In the end every client's own ledger is held against what the run claims of
it, and the run's directory is audited. Exit code 1 if anything is lost, or the run does not end by itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import ROOT, parser, write_json
from processes import children, command_of, free_ports, hang, kill, resident, wait

LABELS = ("fruit", "metal", "ocean")
WORDS = {label: [f"{label}{i}" for i in range(8)] for label in LABELS}
RUN = """
[run]
name = "soak"
rounds = {rounds}
fraction = {drawn:.3f}
timeout = {timeout}
[model]
name = "{model}"
[objective]
labels = {labels}
[data]
clients = {clients}
max_length = 16
[lora]
rank = 4
alpha = 8
target_modules = ["query", "value"]
[strategy]
name = "fedsvd"
[train]
steps = 2
batch_size = 16
physical_batch = 16
lr = 0.1
[privacy]
unit = "example"
noise = "secure"
sigma = 4.0
clip = 1.0
participations = {rounds}
[evaluate]
clients = "never"
"""
CLIENT = """
[client]
id = "{name}"
server = "localhost:{port}"
ca = "keys/ca.crt"
key = "{name}.key"
[data]
path = "{name}.jsonl"
text = "text"
label = "topic"
[models."{model}"]
[policy]
max_epsilon = 10000.0
[budget]
epsilon = 20000.0
[machine]
threads = 1
deadline = 100.0
"""
TIMEOUT = 120  # seconds of a round
GRACE = 90.0  # seconds between the last round that was seen and the verdict that the run is stuck, beside run.timeout


@dataclass
class Soak:
    """The processes, and what was seen of them."""

    place: Path
    rounds: int
    names: list[str]
    chance: random.Random
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    faults: Counter[str] = field(default_factory=Counter)
    memory: list[tuple[int, str, int, int]] = field(default_factory=list)  # round, part, process, KiB
    ended: int = 0  # servers and clients that ended although nobody killed them
    again: dict[str, float] = field(default_factory=dict)  # command → when it is to be started again

    @property
    def run(self) -> Path:
        return self.place / "out"

    def start(self, name: str, *command: str) -> None:
        """Leave a command of fedlab running; its output goes into a file of its name."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "FLWR_HOME": str(self.place / f"flower-{name}")}
        environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        with (self.place / f"{name}.out").open("ab") as out:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "fedlab.cli", *command],
                cwd=self.place,
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def said(self, name: str) -> str:
        path = self.place / f"{name}.out"
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    def done(self) -> list[dict[str, Any]]:
        """Lines of the rounds that are complete."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
        return [line for line in map(json.loads, lines) if line["phase"] == "train"]

    def parts(self) -> Iterator[tuple[str, int]]:
        """Name and process of everything that runs."""
        for name, process in self.processes.items():
            if process.poll() is None:
                yield name, process.pid
                for child in children(process.pid):
                    for part in ("clients.serve", "flower-supernode", "deploy.carrier", "flower-superlink"):
                        if part in command_of(child):
                            yield f"{name} {part.rpartition('.')[2]}", child

    def measure(self, number: int) -> None:
        self.memory += [(number, name, pid, resident(pid)) for name, pid in self.parts()]

    def fault(self) -> None:
        """One of them, at random."""
        name = self.chance.choice(self.names)
        found = dict(self.parts())
        choices: dict[str, Callable[[], None]] = {
            f"{part} killed": lambda part=part: kill(found.get(f"{name} {part}"))  # type: ignore[misc]
            for part in ("serve", "flower-supernode", "carrier")
        }
        choices["superlink killed"] = lambda: kill(found.get("server flower-superlink"))
        choices["client killed, back later"] = lambda: self._away(name, self.chance.uniform(2, 20))
        choices["server killed, back later"] = lambda: self._away("server", self.chance.uniform(1, 10))
        choices["run killed, then resumed"] = lambda: self._away("run", self.chance.uniform(0, 5))
        choices["trainer hangs"] = lambda: hang(found.get(f"{name} serve"), self.chance.uniform(5, 40))
        choices["rubbish at the trainer"] = lambda: rubbish(self.place / name / "trainer.sock", self.chance)
        choices["request replayed"] = lambda: replay(self.place / name)
        chosen = self.chance.choice(sorted(choices))
        self.faults[chosen] += 1
        with (self.place / "faults.log").open("a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%H:%M:%S')} round {len(self.done())}: {chosen} ({name})\n")
        choices[chosen]()

    def _away(self, name: str, seconds: float) -> None:
        if name not in self.again and self.processes[name].poll() is None:
            self.processes[name].kill()
            self.processes[name].wait()
            self.again[name] = time.monotonic() + seconds

    def come_back(self) -> None:
        """Start again what was away for long enough, and, as systemd would, a server or client that ended by itself."""
        for name, process in self.processes.items():
            if name != "run" and name not in self.again and process.poll() is not None:
                self.ended += 1
                self.again[name] = time.monotonic() + 2
        for name in [name for name, when in self.again.items() if when <= time.monotonic()]:
            del self.again[name]
            if name == "run" and (self.run / "run.toml").is_file():
                self.start("run", "resume", "out")
            else:
                self.start(name, *self.command(name))

    def command(self, name: str) -> list[str]:
        if name == "run":
            return ["run", "run.toml", "--server", "server.toml", "--out", "out"]
        return ["server", "server.toml"] if name == "server" else ["client", f"{name}.toml"]


def main(arguments: list[str] | None = None) -> None:
    """Run it and print what came of it."""
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=200)
    made.add_argument("--clients", type=int, default=3)
    made.add_argument("--every", type=float, default=30.0, help="seconds between two faults, on average")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--minutes", type=float, default=0, help="end it earlier, by SIGTERM to the run")
    made.add_argument("--out", type=Path, help="directory that is kept; default: a temporary one")
    options = made.parse_args(arguments)
    place = options.out.absolute() if options.out else Path(tempfile.mkdtemp(prefix="fedlab-soak-"))
    place.mkdir(parents=True, exist_ok=True)
    names = [f"client-{i}" for i in range(options.clients)]
    soak = Soak(place, options.rounds, names, random.Random(options.seed))
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and what was started is ended
    prepare(soak)
    try:
        for name in ("server", *names):
            soak.start(name, *soak.command(name))
        wait(lambda: all("ready" in soak.said(name) for name in soak.processes), 300, "all to be ready")
        soak.start("run", *soak.command("run"))
        stuck = endure(soak, options.every, options.minutes * 60)
    finally:
        for process in soak.processes.values():
            if process.poll() is None:
                process.terminate()
        for process in soak.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
    found = verdict(soak, stuck) | {"seconds": round(time.monotonic() - began)}
    show(found)
    write_json(options.json, found)
    if not options.out:
        shutil.rmtree(place, ignore_errors=True)
    raise SystemExit(0 if found["ok"] else 1)


def endure(soak: Soak, every: float, seconds: float) -> bool:
    """Until the run has ended by itself; True where no round came for longer than its deadlines and waits allow."""
    began = seen = time.monotonic()
    number, next_fault = -1, began + 60
    while soak.processes["run"].poll() is None or "run" in soak.again:
        time.sleep(0.5)
        soak.come_back()
        if (done := len(soak.done())) != number:
            number, seen = done, time.monotonic()
            soak.measure(number)
        if number >= 1 and time.monotonic() >= next_fault and number < soak.rounds:
            soak.fault()
            next_fault = time.monotonic() + soak.chance.expovariate(1 / every)
        if time.monotonic() - seen > 3 * TIMEOUT + 120 + GRACE:
            return True
        if seconds and time.monotonic() - began > seconds:
            soak.again.clear()
            soak.processes["run"].send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                soak.processes["run"].wait(300)
            break
    soak.measure(len(soak.done()))
    return False


def verdict(soak: Soak, stuck: bool) -> dict[str, Any]:
    """What the run claims, held against the clients' own ledgers."""
    from fedlab.privacy.accounting import epsilon
    from fedlab.privacy.audit.run import audit_run
    from fedlab.privacy.ledger.ledger import events, parse_lines
    from fedlab.run.directory import RunDirectory
    from fedlab.run.regenerate import regenerate

    result = json.loads((soak.run / "result.json").read_text(encoding="utf-8"))
    run, lost, charges = RunDirectory.open(soak.run).run_id, 0.0, Counter[str]()
    for name in soak.names:
        spent = events(parse_lines((soak.place / name / "ledger" / f"{name}.jsonl").read_text()), run)
        charges[name] = len(spent)
        claimed = result["clients"].get(name, {"epsilon": 0.0, "delta": 1e-5}) if "clients" in result else None
        if claimed is None:
            continue  # it was cut off while it began: nothing is claimed of anybody
        lost = max(lost, epsilon(spent, claimed["delta"]) - claimed["epsilon"])
    audit = audit_run(soak.run, regenerate=regenerate)
    done, code = soak.done(), soak.processes["run"].returncode
    excluded = Counter(reason.partition(" (")[0][:70] for line in done for reason in line["excluded"].values())
    finished = result["status"] in ("completed", "budget-exhausted")
    well = audit.findings == () and audit.verdict in ("consistent", "incomplete") and (code == 0) == finished
    return {
        "ok": not stuck and lost < 1e-6 and well,
        "status": result["status"],
        "code": code,
        "rounds": len({line["round"] for line in done}),
        "faults": dict(soak.faults),
        "excluded": dict(excluded),
        "charges": dict(charges),
        "epsilon": result.get("epsilon"),
        "lost": max(0.0, lost),
        "audit": audit.verdict,
        "findings": [str(finding) for finding in audit.findings],
        "stuck": stuck,
        "ended": soak.ended,
        "memory": growth(soak.memory),
    }


def growth(memory: list[tuple[int, str, int, int]]) -> dict[str, dict[str, float]]:
    """Of each part: MiB at first and at last, and how many rounds its longest-lived process saw, and its MiB."""
    found = {}
    for part in dict.fromkeys(name for _, name, _, _ in memory):
        own = [(number, pid, size) for number, name, pid, size in memory if name == part and number >= 1 and size]
        if not own:
            continue
        lives: dict[int, list[tuple[int, int]]] = {}
        for number, pid, size in own:
            lives.setdefault(pid, []).append((number, size))
        longest = max(lives.values(), key=lambda life: life[-1][0] - life[0][0])
        found[part] = {
            "first": own[0][2] / 1024,
            "last": own[-1][2] / 1024,
            "processes": len(lives),
            "longest_rounds": longest[-1][0] - longest[0][0],
            "longest_first": longest[0][1] / 1024,
            "longest_last": longest[-1][1] / 1024,
        }
    return found


def show(found: dict[str, Any]) -> None:
    print(f"{found['rounds']} rounds, {found['status']} (exit code {found['code']}), {found['seconds']} s")
    print(f"{sum(found['faults'].values())} faults: {found['faults']}")
    print(f"left out of rounds: {found['excluded']}")
    print(f"charges in the clients' own ledgers: {found['charges']}")
    print(f"ε {found['epsilon']}, ε lost {found['lost']:.3g}, audit {found['audit']} {found['findings']}")
    print("| process | MiB first | last | processes | longest life: rounds | MiB first | last |\n|" + "---|" * 7)
    for part, one in found["memory"].items():
        values = " | ".join(f"{value:.0f}" for value in one.values())
        print(f"| {part} | {values} |")
    print(f"{'stuck' if found['stuck'] else 'not stuck'}; {found['ended']} times a server or client ended by itself")


def prepare(soak: Soak) -> None:
    """Model, data, keys and files."""
    from fedlab.run.launch.deploy import keys

    model, ports = make_model(soak.place / "model"), free_ports(2)
    keys.init(soak.place / "keys", ["localhost"])
    for i, name in enumerate(soak.names):
        keys.add_node(soak.place / "keys", keys.make_node(name, soak.place)[1])
        rng = random.Random(i)
        with (soak.place / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for number in range(120):
                topic = LABELS[number % len(LABELS)]
                file.write(json.dumps({"text": " ".join(rng.choices(WORDS[topic], k=6)), "topic": topic}) + "\n")
        text = CLIENT.format(name=name, port=ports[0], model=model)
        (soak.place / f"{name}.toml").write_text(text, encoding="utf-8")
    server = f'[server]\naddress = "127.0.0.1:{ports[0]}"\ninner_port = {ports[1]}\n[rounds]\nwait = 120\nretries = 2\n'
    (soak.place / "server.toml").write_text(server, encoding="utf-8")
    text = RUN.format(
        rounds=soak.rounds,
        timeout=TIMEOUT,
        drawn=max(1, len(soak.names) - 1) / len(soak.names),
        clients=len(soak.names),
        model=model,
        labels=json.dumps(LABELS),
    )
    (soak.place / "run.toml").write_text(text, encoding="utf-8")


def make_model(path: Path) -> Path:
    """A BERT encoder of two layers with random weights, and a tokenizer of the words that occur."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *(word for topic in WORDS.values() for word in topic)]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(path)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=32, **shape)).save_pretrained(path)
    return path


def rubbish(place: Path, chance: random.Random) -> None:
    """Somebody who may connect sends bytes that are no request, or half of one."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(place))
        connection.sendall(chance.choice([b'{"kind": "train", "header": 9, "table": 0, "body": 0}\nab', b"x" * 999]))


def replay(home: Path) -> None:
    """A request of the run comes once more: who it is, with the configuration that it knows."""
    from fedlab.protocol import encode
    from fedlab.protocol.fields import RunReference
    from fedlab.protocol.messages import DescribeRequest
    from fedlab.protocol.pipe import receive, send

    for folder in (home / "runs").glob("*"):
        for path in folder.glob("?" * 64):
            reference = RunReference(folder.name, path.name, ("lora_B", "head"))
            frame = encode("describe", DescribeRequest(reference, path.read_text(encoding="utf-8"), ()))
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(30)
                connection.connect(str(home / "trainer.sock"))
                send(connection, vars(frame))
                receive(connection)


if __name__ == "__main__":
    main()
