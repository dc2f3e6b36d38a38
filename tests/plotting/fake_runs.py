"""Directories of runs with made-up numbers, in the form in which training and evaluation write them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from es_jax.training.config import freeze

TASKS = ("lab-countdown", "lab-add", "lab-sort")


def fields(*, seed: int = 0, target: str = "lab-countdown", penalty: str = "none", strength: float | None = None,
           steps: int = 20, max_new_tokens: int = 6, method: str = "es", **more: Any) -> dict:  # fmt: skip
    """A run's config as plain fields."""
    anchor = {"penalty": penalty} | ({"strength": strength} if strength is not None else {})
    config: dict = {
        "method": method,
        "model": {"source": "models/Tiny-1B"},
        "task": {"name": target},
        "es": {"population": 8, "sigma": 0.01},
        "optim": {"name": "sgd" if method == "es" else "adamw", "learning_rate": 0.005, "anchor": anchor},
        "decode": {"max_new_tokens": max_new_tokens},
        "train": {"steps": steps, "seed": seed},
        "evals": {"every": 10, "rows": 50, "tasks": [task for task in TASKS if task != target]},
    }
    for name, value in more.items():
        group, _, field = name.partition("__")
        config.setdefault(group, {})[field] = value
    return dataclasses.asdict(freeze(config))


def make_run(folder: Path, *, done: int | None = None, kl: bool = False, split: bool = False, digest: str = "d",
             rows: str = "r", accuracy: float = 0.5, size: int = 1000, parent: dict | None = None, graded: bool = False,
             **options: Any) -> Path:  # fmt: skip
    """A run's directory: step s of 20 has accuracy on the target `accuracy` · s/20, and 1 − that on the others. A
    graded one has a reward, 0.3 + half of the accuracy, whose change has the paired error 0.01."""
    config = fields(**options)
    done = config["train"]["steps"] if done is None else done
    (folder / "evals").mkdir(parents=True)
    content = {"config": config, "digest": digest, "rows": rows, "parameters": size, "versions": {"git": "abc"}}
    content |= {"parent": parent} if parent else {}
    (folder / "config.json").write_text(json.dumps(content))
    walked = [(step, 2.0 * step**0.5) for step in range(1, done + 1)]
    write(folder / "metrics.jsonl", [{"step": step, "drift": norm, "drift_theory": norm} for step, norm in walked])
    for task in (config["task"]["name"], *config["evals"]["tasks"]):
        write(
            folder / "evals" / f"{task}.jsonl",
            [_row(config, task, s, accuracy, split, graded) for s in range(0, done + 1, 10)],
        )
    if kl:
        write(folder / "evals/kl.jsonl", [
            {"step": s, "task": task, "kl": 0.1, "kl_exact": 0.01 * s, "kl_exact_se": 0.001}
            for s in range(10, done + 1, 10) for task in TASKS
        ])  # fmt: skip
    return folder


def _row(config: dict, task: str, step: int, accuracy: float, split: bool, graded: bool) -> dict[str, Any]:
    share = accuracy * step / 20
    value = share if task == config["task"]["name"] else 1 - share
    row = {"step": step, "n": 50, "accuracy": value, "accuracy_se": (value * (1 - value) / 50) ** 0.5}
    lost = {"lost_format": 0.2 * share, "lost_truncation": 0.3 * share, "lost_knowledge": 0.5 * share}
    lost |= {"strict": value / 2, "well_formed": 0.9, "truncated": 0.1, "mean_length": 5.0}
    reward = {"reward": 0.3 + value / 2, "reward_se": 0.02}
    reward |= {"reward_change": share / 2, "reward_change_se": 0.01} if step else {}
    return row | (lost if split else {}) | (reward if graded else {})


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
