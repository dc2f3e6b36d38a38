"""What a run tells of itself as it goes: metrics, samples, held-out rows, and the drift that theory predicts."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from es_jax.es import theory
from es_jax.training.config import RunConfig
from es_jax.training.grading import Graded, means
from es_jax.training.metrics import Jsonl, Metrics, Progress
from es_jax.training.seedlog import Entry


class Recorder:
    """Writes the rows of a run's directory, from behind the last of the finished steps given."""

    def __init__(
        self,
        config: RunConfig,
        workdir: Path,
        *,
        dim: int,
        finished: Sequence[Entry],
        tasks: Sequence[str],
        unit: tuple[str, int],
    ):
        self._config, self._dim, done = config, dim, len(finished)
        self._metrics = Metrics(workdir, last_step=done)
        self._samples = Jsonl(workdir / "samples.jsonl", last_step=done)
        files = {name: workdir / "evals" / f"{name}.jsonl" for name in {config.task.name: 0, **dict.fromkeys(tasks)}}
        self.heldout = {name: Jsonl(file, last_step=done) for name, file in files.items()}
        self.progress = Progress(steps=config.train.steps, done=done, unit=unit)
        self.reward = float(np.mean(np.array(finished[-1].rewards, float))) if finished else None
        self._walked = 0.0
        for entry in finished:
            self._walk(entry)

    def step(
        self,
        entry: Entry,
        graded: Sequence[Sequence[Graded]],
        *,
        drift: float,
        spent: dict[str, Any],
        learnt: dict[str, float],
    ) -> None:
        """A step's row in metrics.jsonl and TensorBoard, its samples, and its line on the screen.

        `learnt`: what the method has to say of its update. `spent`: the step's seconds, and their parts.
        """
        self._walk(entry)
        rewards, everyone = np.array(entry.rewards, float), [g for mine in graded for g in mine]
        self.reward = float(rewards.mean())
        row = {
            "step": entry.step,
            "reward_mean": self.reward,
            "reward_std": float(rewards.std()),
            "reward_min": float(rewards.min()),
            "reward_max": float(rewards.max()),
            **{name: value for name, value in means(everyone).items() if name != "reward"},
            **learnt,
            "drift": drift,
            "drift_theory": self._theory(entry.step),
            "tokens": sum(g.length for g in everyone),
            **spent,
        }
        self._metrics.write(row)
        self._samples.write(*(_sample(entry.step, g) for g in graded[0][: self._config.train.samples]))
        self.progress.step(row)

    def evaluation(self, task: str, row: dict[str, Any]) -> None:
        """A row of a task's held-out accuracy."""
        self.heldout[task].write(row)
        self._metrics.write(row, prefix=f"evals/{task}")
        self.progress.say(
            f"step {row['step']}: {task} held-out accuracy {row['accuracy']:.3f}, "
            f"reward {row['reward']:.4f} ± {row['reward_se'] or 0:.4f} on {row['n']} rows"
        )

    def close(self) -> None:
        self._metrics.close()
        self.progress.close()

    def _walk(self, entry: Entry) -> None:
        """Carry the predicted ‖θ − θ₀‖² on by the step's own weights: exact for the plain and the l2 walk."""
        if self._config.method != "es":
            return
        rate, strength = self._config.optim.learning_rate, self._config.anchor_strength
        self._walked += rate**2 * self._dim * theory.step_variance(np.array(entry.weights), paired=entry.paired)
        if self._config.optim.anchor.penalty == "l2":
            self._walked *= (1 - rate * strength) ** 2

    def _theory(self, step: int) -> float | None:
        """The predicted drift; None for methods and optimizers whose walk has no closed form."""
        config = self._config
        if config.method != "es" or config.optim.name != "sgd":
            return None
        if config.optim.anchor.penalty != "l1":
            return math.sqrt(self._walked)
        walk = self._walked / (config.optim.learning_rate**2 * self._dim * step)  # mean variance of a step: 1/N
        return theory.anchored_norm(
            learning_rate=config.optim.learning_rate * math.sqrt(walk * config.es.population),
            dim=self._dim,
            steps=step,
            population=config.es.population,
            strength=config.anchor_strength / math.sqrt(walk * config.es.population) if walk else 0.0,
            penalty="l1",
        )


def _sample(step: int, graded: Graded) -> dict[str, Any]:
    return {
        "step": step,
        "member": 0,
        "id": graded.example.id,
        "completion": graded.text,
        "reward": graded.score.reward,
        "parts": dict(graded.score.parts),
        "truncated": graded.truncated,
    }
