"""Runs of killed_compress, one after the other or side by side, and what they leave."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

KILLED = -signal.SIGKILL
# Files of an output that tell times, or hold hashes of those that do.
TIMED = {"results.json", "layers.csv", "manifest.json", "report.html", "README.md"}


class Forks:
    """A process that has imported everything and forks a run for every order."""

    def __init__(self, folder: Path):
        here = Path(__file__).parent
        path = os.pathsep.join([str(here), *sys.path])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self._errors = open(folder / "err", "w")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, here / "killed_compress.py"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            text=True, cwd=folder, env=environment,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    def begin(self, **order) -> None:
        order = {k: str(v) if isinstance(v, Path) else v for k, v in order.items()}
        order["answer"] = str(self.folder / "answer")
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def end(self) -> dict:
        line = self._process.stdout.readline()
        assert line, (self.folder / "err").read_text()[-3000:]
        return json.loads(line)

    def run(self, **order) -> dict:
        self.begin(**order)
        return self.end()

    def close(self) -> None:
        self._process.stdin.close()
        assert self._process.wait(60) == 0
        self._errors.close()


def hashes(folder: Path) -> dict[str, str]:
    """Of every file that tells no times, and of results.json without its times."""
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name not in TIMED
    }
    results = json.loads((folder / "results.json").read_text())
    del results["totals"]["seconds"]
    return {**found, "results.json": json.dumps(results, sort_keys=True)}


def beside(out: Path) -> list[str]:
    """What is in the folder of an output that begins with its name, hidden or not."""
    return sorted(path.name for path in out.parent.iterdir() if out.name in path.name)


def commits(out: Path) -> int:
    """Layers and shards in the journal of an output that is on its way."""
    journal = out.parent / f".{out.name}.compress" / "journal.jsonl"
    lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
    return sum(b'"kind": "layer"' in line or b'"kind": "shard"' in line for line in lines)
