"""Question: does the curve of a run depend on how many devices it has?

The same run of the laboratory on 1, 2, 4 and 8 devices: those that a CPU makes believe it has, or with --platform=gpu
the first of a node. Each is a process of its own. Members are decoded one at a time, so that all decode by the same
program. The CSV has each evaluation with two digests: of the seed log up to its step (seeds, rewards and weights of the
members), and of the weights of the last step, to the bit.

Command:  python -m experiments.devices [--counts 1 2 4 8] [--steps=100] [--docs=docs/real_model]
          other runs: --config=configs/json_facts.py:steps=30, with any arguments
Cost:     not yet run.
Result:   not yet run.
"""

import argparse
import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from es_jax.plotting import figures, read_run
from es_jax.rundir.seed_log import digest
from experiments.runs import done, markdown, plain_errors, report

STEPS = 100
CONFIG = "configs/lab.py:anchor=l2,steps={steps}"
FIXED = ("--config.decode.members_at_once=1", "--config.decode.slots=64", "--config.mesh.model=1")


def command(config: str, folder: Path) -> str:
    """Of one run; the devices are in its environment."""
    return " ".join(["python -m es_jax.train", f"--config={config}", f"--workdir={folder}", *FIXED])


def environment(count: int, platform: str) -> dict[str, str]:
    """What gives a process that many devices."""
    if platform == "gpu":
        return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(count)))}
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}


def execute(config: str, folder: Path, count: int, platform: str) -> None:
    """Run, or go on with, the run on that many devices. ValueError where it fails."""
    words = command(config, folder).split()
    result = subprocess.run([sys.executable, *words[1:]], check=False, env=os.environ | environment(count, platform))
    if result.returncode:
        raise ValueError(f"the run on {count} devices ended with status {result.returncode}; the same command goes on")


def weights_digest(folder: Path, step: int) -> str:
    """Of all weights after a step, to the bit, read from the run's checkpoint."""
    from es_jax.core.tree import named_leaves
    from es_jax.training.weights_at import weights_at

    ((_, params),) = weights_at(folder, [step])
    total = hashlib.sha256()
    for name, leaf in named_leaves(params):
        total.update(name.encode() + np.asarray(leaf).tobytes())
    return total.hexdigest()[:16]


def lines_of(count: int, folder: Path, how: str) -> list[dict[str, Any]]:
    """A line for each evaluation."""
    run = read_run(folder)
    others = [name for name in run.evals if name != run.target]
    weights = weights_digest(folder, run.step)
    metrics = {row["step"]: row for row in run.metrics}
    return [
        {
            "devices": count, "step": step, "target": run.target, "accuracy": row["accuracy"], "reward": row["reward"],
            "prior": float(np.mean([one["accuracy"] for one in prior])) if prior else None,
            "reward_mean": metrics.get(step, {}).get("reward_mean"), "drift": metrics.get(step, {}).get("drift", 0.0),
            "seedlog": digest(folder, step)[:16], "weights": weights if step == run.step else "", "command": how,
        }
        for step, (row, *prior) in run.rows([run.target, *others]).items()
    ]  # fmt: skip


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: the last evaluation on each number of devices, its digests, and whether all are equal."""
    last = {line["devices"]: line for line in lines}.values()
    head = ("devices", "step", "accuracy", "reward", "prior", "drift", "seedlog", "weights")
    show = lambda x: f"{x:.6g}" if isinstance(x, float) else str(x)  # noqa: E731
    text = markdown(head, [[show(line[name]) for name in head] for line in last])
    same = len({tuple(line[name] for name in head[1:]) for line in last}) == 1
    equal = "Equal to the bit on all." if same else "Not equal: look at the first step whose seedlog differs."
    return f"{text}\n\n{equal}"


def figure(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy over iterations, a line for each number of devices; equal ones lie on one another."""
    drawing = figures.canvas(5.5, 3.6)
    axes = drawing.subplots()
    for number, count in enumerate(dict.fromkeys(line["devices"] for line in lines)):
        own = [line for line in lines if line["devices"] == count]
        style = figures.line(number) | {"markersize": 11 - 2.5 * number, "markerfacecolor": "none"}
        axes.plot([line["step"] for line in own], [line["accuracy"] for line in own], label=f"{count}", **style)
    axes.set(xlabel="iteration", ylabel=f"held-out accuracy on {lines[0]['target']}")
    axes.legend(title="devices")
    axes.grid(alpha=0.3)
    drawing.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--steps", type=int, default=STEPS, help="of the laboratory's run")
    parser.add_argument("--config", help="another run: the --config of es_jax.train")
    parser.add_argument("--platform", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/devices"))
    parser.add_argument("--docs", type=Path, help="where the report goes; the out folder by default")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    parser.add_argument("--only-report", action="store_true", help="run nothing; report what is finished")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    args = parser.parse_args()
    config = args.config or CONFIG.format(steps=args.steps)
    with plain_errors(traceback=args.traceback):
        if min(args.counts) < 1:
            raise ValueError(f"--counts has {min(args.counts)}: a run needs at least 1 device")
        lines: list[dict[str, Any]] = []
        for count in args.counts:
            folder = args.out / str(count)
            settings = " ".join(f"{name}={value}" for name, value in environment(count, args.platform).items())
            how = f"{settings} {command(config, folder)}"
            if args.list:
                print(f"{'done' if done(folder) else 'open'} {how}")
            elif not args.only_report and not done(folder):
                execute(config, folder, count, args.platform)
            lines += lines_of(count, folder, how) if done(folder) else []
        if not args.list:
            text = table(lines) if lines else None
            report(lines, args.docs or args.out, "devices", labels=(), figure=figure, text=text)


if __name__ == "__main__":
    main()
