"""Injects faults: kills, damaged files, hostile completions, a full disk, no network, NaN rewards, a dead process.

Command:  python -m benchmarks.faults [--only=KIND,…] [--trials=N] [--seed=0] [--json[=FILE]]
Cost:     about 5 minutes on 2 CPU cores.
Result:   docs/reliability.md: no trial ended with wrong weights, or without a sentence of ours.

Each trial is one fault, drawn from the seed, and ends in one of four ways:
  refused    an error of ours whose sentence names what is wrong
  harmless   the same result, to the bit; after a kill, a full disk or a NaN it is the result of the restarted run
  silent     a wrong result without a message
  otherwise  an error of a library, a crash, too much time or memory
Files are damaged in a separate folder and read in a child process. Only counts are kept.
"""

import argparse
import collections
import dataclasses
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import fault_children as children
from benchmarks.compare import add_json, write_json
from benchmarks.fault_inputs import mutated
from es_jax.tasks import TASKS

PATIENCE, WAYS = 60.0, ("refused", "harmless", "silent", "otherwise")  # seconds for a request
Counts, Outcome = collections.Counter[str], children.Outcome
ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    **{"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "PYTHONWARNINGS": "ignore::UserWarning:multiprocessing.resource_tracker",  # locks of killed processes
}
processes = multiprocessing.get_context("forkserver")


class Child:
    """A child process that answers requests; it is replaced if it ends or is silent for too long."""

    def __init__(self) -> None:
        self._process: Any = None

    def ask(self, name: str, *arguments: Any, names: Sequence[str] = (), patience: float = PATIENCE) -> Outcome:
        if self._process is None:
            self._connection, theirs = processes.Pipe()
            self._process = processes.Process(target=children.serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
        try:
            self._connection.send((name, arguments, names))
            if self._connection.poll(patience):
                return self._connection.recv()
            ended = "out of time"
        except (EOFError, OSError):
            ended = "crashed"
        self.close()
        return "otherwise", ended

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


class Campaign:
    """The folder of a campaign, its random numbers, the child that reads and the child that trains."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.seed, self.child, self.trainer, self._prepared = root, seed, Child(), Child(), False
        self._whole: tuple[Path, str, float] | None = None

    def draw(self, kind: str) -> random.Random:
        return random.Random(f"{self.seed} {kind}")

    def files(self) -> Path:
        """The folder of intact models, rows and runs."""
        if not self._prepared:
            self.value(self.child, "prepare", str(self.root / "files"))
            self._prepared = True
        return self.root / "files"

    def value(self, child: Child, name: str, *arguments: Any) -> Any:
        """The result of an operation without a fault."""
        way, value = child.ask(name, *arguments, patience=10 * PATIENCE)
        assert way == "value", f"{name} without a fault: {value}"
        return value

    def start(self, workdir: Path) -> tuple[Any, Any]:
        """A process that trains, and its output."""
        connection, theirs = processes.Pipe()
        process = processes.Process(target=children.train_and_tell, args=(theirs, str(workdir)), daemon=True)
        process.start()
        theirs.close()
        return process, connection

    def whole(self) -> tuple[Path, str, float]:
        """A laboratory run without a fault: its directory, its weights, and its seconds from fork to end."""
        if self._whole is None:
            weights = self.value(self.trainer, "train", str(self.root / "whole"))  # this compiles for all others
            began = time.monotonic()
            process, connection = self.start(self.root / "timed")
            process.join()
            assert process.exitcode == 0, "a run without a fault"
            connection.close()
            self._whole = self.root / "whole", weights, time.monotonic() - began
        return self._whole

    def resumed(self, workdir: Path) -> str:
        """How a run with a fault ends after it is started again without one."""
        whole, expected, _ = self.whole()
        way, weights = self.trainer.ask("train", str(workdir), patience=3 * PATIENCE)
        if way != "value" or children.leftovers(str(workdir)) or not (workdir / "DONE").exists():
            return "otherwise"
        logs = [(folder / "seedlog.jsonl").read_bytes() for folder in (workdir, whole)]
        return "harmless" if weights == expected and logs[0] == logs[1] else "silent"


@dataclasses.dataclass(frozen=True)
class Damage:
    """What is damaged and what reads it. The first of the readers (operation, its target) determines whether the result
    is the same; the others must end with a sentence or a result. `names`: a sentence must contain one of them."""

    trials: int
    files: tuple[str, ...]
    readers: tuple[tuple[str, str], ...]
    names: tuple[str, ...]


MODEL, GGUF = (("read_run", "run"), ("read_model", "model")), (("read_run", "gguf_run"), ("read_model", "model.gguf"))
TOKENIZER = ("model/tokenizer.json", "model/tokenizer_config.json", "model/chat_template.jinja")
CONFIG = ("model/config.json", "model/generation_config.json")
SAVED = (("restore_run", "run"), ("resume_run", "run"))
DAMAGED = {
    "weights of a run": Damage(60, ("model/model.safetensors",), MODEL, ("files/model",)),
    "weights with SHA256SUMS": Damage(
        40, ("summed/model.safetensors", "summed/SHA256SUMS"), (("read_model", "summed"),), ("files/summed",)
    ),
    "GGUF of a run": Damage(80, ("model.gguf",), GGUF, ("model.gguf",)),
    "tokenizer of a run": Damage(70, TOKENIZER, MODEL, ("files/model", "chat template")),
    "config.json of its model": Damage(50, CONFIG, MODEL, ("files/model",)),
    "config.json of a run": Damage(50, ("run/config.json",), (("replay_run", "run"),), ("run/config.json",)),
    "seed log": Damage(
        60, ("run/seedlog.jsonl",), (("replay_run", "run"),), ("run/seedlog.jsonl", "run has only steps")
    ),
    "checkpoint": Damage(40, (f"run/ckpt/{children.STEPS}/**/*",), SAVED, ("checkpoint of step",)),
    "rows as jsonl": Damage(
        25,
        ("rows/train.jsonl", "rows/test.jsonl"),
        (("resume_run", "run"),),
        ("files/rows", "rows was", "was made from"),
    ),
    "rows as parquet": Damage(
        25,
        ("parquet/train.parquet", "parquet/test.parquet"),
        (("resume_run", "parquet_run"),),
        ("files/parquet", "rows was", "was made from"),
    ),
}


def damage(campaign: Campaign, kind: str, trials: int) -> Counts:
    """Mutates one file at a time."""
    spec, counts = DAMAGED[kind], Counts()
    readers, names = spec.readers, spec.names
    files, draw = campaign.files(), campaign.draw(kind)
    kept, trial = campaign.root / "kept", campaign.root / "trial"
    expected = [_read(campaign, files, trial, reader, names) for reader in readers]
    assert all(way == "value" for way, _ in expected), f"{kind} without a fault: {expected}"
    campaign.child.ask("limit_memory")
    paths = sorted(path for pattern in spec.files for path in files.glob(pattern) if path.is_file())
    paths = [path for path in paths if path.stat().st_size]
    for _ in range(trials):
        path = draw.choice(paths)
        shutil.copy2(path, kept)
        path.write_bytes(mutated(path.read_bytes(), draw))
        outcomes = [_read(campaign, files, trial, reader, names) for reader in readers]
        os.replace(kept, path)
        (way, value), ways = outcomes[0], [way for way, _ in outcomes]
        if way == "value":
            way = "harmless" if value == expected[0][1] else "silent"
        counts["otherwise" if "otherwise" in ways else way] += 1
    campaign.child.close()
    return counts


def _read(campaign: Campaign, files: Path, trial: Path, reader: tuple[str, ...], names: Sequence[str]) -> Outcome:
    name, target = reader
    if name != "resume_run":
        return campaign.child.ask(name, str(files / target), names=names)
    shutil.copytree(files / target, trial)  # since a restart writes
    try:
        return campaign.child.ask(name, str(files), target, str(trial), names=names)
    finally:
        shutil.rmtree(trial)


def kills(campaign: Campaign, kind: str, trials: int) -> Counts:
    """SIGKILL at a random moment between the start and the end of a run, or while a checkpoint is saved."""
    draw, counts, seconds = campaign.draw(kind), Counts(), campaign.whole()[2]
    for trial in range(trials):
        workdir = campaign.root / f"killed{trial}"
        process, connection = campaign.start(workdir)
        connection.recv()
        if kind == "killed while saving":
            for _ in range(draw.randrange(1, 5)):  # of four checkpoints
                connection.recv()
            time.sleep(draw.uniform(0, 0.15))
        else:
            time.sleep(draw.uniform(0, seconds))
        process.kill()
        process.join()
        counts[campaign.resumed(workdir)] += 1
        shutil.rmtree(workdir)
    return counts


def full_disk(campaign: Campaign, kind: str, trials: int) -> Counts:
    """Files may not grow beyond some bytes, in training or in an export; with space again, the result must be the
    same."""
    draw, counts, (whole, expected, _) = campaign.draw(kind), Counts(), campaign.whole()
    for trial in range(trials):
        limit, workdir = int(10 ** draw.uniform(2, 5.5)), campaign.root / f"full{trial}"
        if trial % 2:
            way, value = campaign.trainer.ask("train_on_a_full_disk", str(workdir), limit, names=[str(workdir)])
            again = campaign.resumed(workdir)
        else:
            workdir.mkdir()
            out = workdir / "out"
            way, value = campaign.trainer.ask("export_to_a_full_disk", str(whole), str(out), limit, names=[str(out)])
            again = "otherwise" if way == "refused" and any(workdir.iterdir()) else "harmless"
        if way == "value":
            way = "harmless" if value == expected else "silent"
        counts[way if again == "harmless" else again] += 1
        shutil.rmtree(workdir)
    return counts


def nan_reward(campaign: Campaign, kind: str, trials: int) -> Counts:
    """One completion's reward is NaN."""
    draw, counts = campaign.draw(kind), Counts()
    for trial in range(trials):
        workdir, call = campaign.root / f"nan{trial}", draw.randrange(1, 8 * 4 * 16)
        way, _ = campaign.trainer.ask("train_with_nan", str(workdir), call, names=["nan"])
        again = campaign.resumed(workdir)
        counts[("silent" if way == "value" else way) if again == "harmless" else again] += 1
        shutil.rmtree(workdir)
    return counts


HUB = {"HF_HUB_OFFLINE": "1"}, {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}  # told to; nobody answers
NEEDS = ("--config.model.source=owner/name",), ("--config.task.name=gsm8k",)


def hub(campaign: Campaign, kind: str, trials: int) -> Counts:
    """A model or rows that are only on the hub, which cannot be reached."""
    counts = Counts()
    for trial in range(trials):
        state, fields = HUB[trial % 2], NEEDS[trial // 2 % 2]
        home = {"HF_HOME": str(campaign.root / "hub"), "HF_DATASETS_OFFLINE": state["HF_HUB_OFFLINE"]}
        command = ["--config=configs/lab.py", f"--workdir={campaign.root / 'no_hub'}", *fields]
        try:
            out = subprocess.run(
                [sys.executable, "-m", "es_jax.train", *command],
                cwd=ROOT, env=os.environ | home | state, capture_output=True, text=True, timeout=3 * PATIENCE,
            )  # fmt: skip
            counts[_ended(out.returncode, out.stderr)] += 1
        except subprocess.TimeoutExpired:
            counts["otherwise"] += 1
    return counts


def _ended(status: int, text: str) -> str:
    """The outcome of a command: refused if it ended with a sentence of ours and a status, without a traceback."""
    last = (text.strip().splitlines() or [""])[-1]
    return "refused" if status == 1 and last.startswith("es_jax.train: ") and "Traceback" not in text else "otherwise"


def dead(campaign: Campaign, kind: str, trials: int) -> Counts:
    """One of two processes is killed; the other must end within three times the requested heartbeat."""
    draw, counts = campaign.draw(kind), Counts()
    for trial in range(trials):
        workdir, victim = campaign.root / f"pair{trial}", trial % 2
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        pair, said = [], [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115 - closed below
        for rank in range(2):
            command = [sys.executable, "-m", "es_jax.train", "--config=configs/lab.py:population=4,steps=100000"]
            command += [f"--workdir={workdir}", f"--coordinator_address={address}", "--num_processes=2"]
            command += [f"--process_id={rank}", "--heartbeat_timeout=10", "--config.evals.every=0"]
            pair.append(subprocess.Popen(command, cwd=ROOT, stdout=said[rank], stderr=subprocess.STDOUT))
        until, log = time.monotonic() + 3 * PATIENCE, workdir / "seedlog.jsonl"
        while time.monotonic() < until and not (log.exists() and log.stat().st_size):
            time.sleep(0.2)
        time.sleep(draw.uniform(0, 1))
        pair[victim].send_signal(signal.SIGKILL)
        try:
            status = pair[1 - victim].wait(30)
        except subprocess.TimeoutExpired:
            status = 0
        for process in pair:
            process.kill()
            process.wait()
        said[1 - victim].seek(0)
        counts[_ended(status, said[1 - victim].read())] += 1
        for file in said:
            file.close()
    return counts


def completions(campaign: Campaign, kind: str, trials: int) -> Counts:
    """Hostile completions against every grader of every task: no error, a finite score, at most 10 ms."""
    counts = Counts()
    for task in sorted(TASKS):
        for grader in children.graders_of(task):
            arguments = str(campaign.root / "tasks"), task, grader, campaign.seed, trials
            way, value = campaign.child.ask("grade", *arguments, patience=10 * PATIENCE)
            wrong = sum(value) if way == "value" else trials
            counts += Counts(harmless=trials - wrong, otherwise=wrong)
    return counts


KINDS: dict[str, tuple[int, Callable[[Campaign, str, int], Counts]]] = {
    "killed while training": (10, kills),
    "killed while saving": (10, kills),
    **{kind: (spec.trials, damage) for kind, spec in DAMAGED.items()},
    "hostile completions": (1000, completions),
    "disk full": (6, full_disk),
    "hub offline": (4, hub),
    "NaN reward": (4, nan_reward),
    "one of two processes dead": (2, dead),
}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| what | tried | refused | harmless | silently wrong | otherwise | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, row in rows.items():
        lines.append(
            f"| {kind} | {row['tried']} | {' | '.join(str(row[way]) for way in WAYS)} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"kinds, separated by commas: {', '.join(KINDS)}")
    parser.add_argument("--trials", type=int, help="trials of each kind, instead of its default")
    parser.add_argument("--seed", type=int, default=0)
    add_json(parser)
    args = parser.parse_args()
    kinds = args.only.split(",") if args.only else [*KINDS]
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        parser.error(f"--only has {', '.join(unknown)}: choose among {', '.join(KINDS)}")
    rows = run(kinds, trials=args.trials, seed=args.seed)
    if not write_json(rows, args.json):
        print(table(rows))
    return int(any(row["silent"] or row["otherwise"] for row in rows.values()))


def run(kinds: Sequence[str], *, trials: int | None = None, seed: int = 0) -> dict[str, dict[str, Any]]:
    """A row of counts of each kind."""
    os.environ |= ENVIRONMENT  # before the server starts
    processes.set_forkserver_preload(["benchmarks.fault_children"])
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/cache")
        campaign = Campaign(Path(folder), seed)
        for kind in kinds:
            began, (number, faults) = time.monotonic(), KINDS[kind]
            counts = faults(campaign, kind, number if trials is None else trials)
            tried, seconds = sum(counts.values()), time.monotonic() - began
            rows[kind] = {"tried": tried, **{way: counts[way] for way in WAYS}, "seconds": seconds}
            print(f"{kind}: {dict(counts)}, {seconds:.0f} s", file=sys.stderr)
        campaign.child.close()
        campaign.trainer.close()
    return rows


if __name__ == "__main__":
    sys.exit(main())
