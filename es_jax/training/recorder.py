"""What a run writes and reports about its steps: metrics, samples, and held-out rows."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from es_jax.rundir.metrics import Jsonl, Metrics, Progress, how_to_look, say
from es_jax.rundir.seed_log import Entry
from es_jax.scoring.grading import Graded, means
from es_jax.scoring.heldout import HeldOut
from es_jax.scoring.row_results import EvalsFile, RowResults
from es_jax.tasks.outside import label
from es_jax.training.config import RunConfig
from es_jax.training.predicted_drift import PredictedDrift


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """What the `callback` of `run` is told about a finished step.

    Attributes:
      step: 1..T.
      metrics: the step's row of metrics.jsonl: "reward_mean", "drift", "seconds", …
      heldout: by the name of the task, the row of each evaluation that was due after the step: "accuracy", "reward", …
        Empty where none was due.

    Examples:
      >>> record = StepRecord(1, {"reward_mean": 0.5}, {}, lambda: {"w": np.zeros(2)})
      >>> record.metrics["reward_mean"], record.params["w"].shape
      (0.5, (2,))
    """

    step: int
    metrics: Mapping[str, Any]
    heldout: Mapping[str, Mapping[str, Any]]
    _params: Callable[[], Any] = dataclasses.field(repr=False)

    @property
    def params(self) -> Any:
        """The weights after the step, in model.param_dtype, where they lie on the devices; not a copy.

        The next step writes over them. Read them in the callback, and copy what you keep (`jax.device_get`).
        """
        return self._params()


class Recorder:
    """Writes the rows of a run's directory, after those of its `finished` steps."""

    def __init__(
        self,
        config: RunConfig,
        workdir: Path,
        *,
        dim: int,
        finished: Sequence[Entry],
        tests: Sequence[HeldOut],
        unit: tuple[str, int],
        offset: float = 0.0,
    ):
        self._config, self._dim, done = config, dim, len(finished)
        self._metrics = Metrics(workdir, last_step=done)
        self._samples = Jsonl(workdir / "samples.jsonl", last_step=done)
        names = dict.fromkeys([label(config.task.name), *(held.name for held in tests)])
        self.heldout = {name: EvalsFile(workdir / "evals", name, last_step=done) for name in names}
        say(how_to_look(workdir / "tb"))
        self.progress = Progress(steps=config.train.steps, done=done, unit=unit)
        self.reward = float(np.array(finished[-1].rewards, float).mean()) if finished else None
        self._predicted = PredictedDrift(config, dim, offset=offset)
        for entry in finished:
            self._predicted.add(entry)

    def step(
        self,
        entry: Entry,
        graded: Sequence[Sequence[Graded]],
        drift: float,
        metrics: Mapping[str, float | None],
        timings: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Write a step's row to metrics.jsonl and TensorBoard, its samples and its screen line; returns the row.

        `metrics` come from the method's update; `timings` hold the step's tokens and seconds, and their parts.
        """
        self._predicted.add(entry)
        rewards, config = np.array(entry.rewards, float), self._config
        sigma = config.logged_rates(entry).sigma if config.record.perturbs else None
        self.reward = float(rewards.mean())
        row = {
            "step": entry.step,
            "reward_mean": self.reward,
            **{f"reward_{name}": float(getattr(rewards, name)()) for name in ("std", "min", "max")},
            **means([*itertools.chain(*graded)]),
            **metrics,
            "drift": drift,
            "drift_theory": self._predicted.norm,
            "kappa": drift / math.sqrt(self._dim) / sigma if sigma else None,
            **timings,
        }
        self._metrics.write(row)
        self._samples.write(
            *(
                {
                    "step": entry.step,
                    "member": 0,
                    "id": g.example.id,
                    "completion": g.text,
                    "reward": g.score.reward,
                    "parts": dict(g.score.parts),
                    "truncated": g.truncated,
                }
                for g in graded[0][: config.train.samples]
            )
        )
        self.progress.step(row)
        return row

    def evaluations(self, step: int, done: Iterable[tuple[HeldOut, RowResults]]) -> dict[str, dict[str, Any]]:
        """Write a row of held-out accuracy for each task, as soon as it is known, and one line on the screen; returns
        the rows."""
        rows, max_new_tokens = {}, self._config.decode.max_new_tokens
        for held, results in done:
            row = self.heldout[held.name].add(step, results, digest=held.digest, max_new_tokens=max_new_tokens)
            self._metrics.write(row, prefix=f"evals/{held.name}")
            rows[held.name] = row
        columns = [f"{name} {row['accuracy']:.3f}" for name, row in rows.items()]
        if len(rows) == 1:
            columns.append(f"reward {row['reward']:.4f} ± {row['reward_se'] or 0:.4f} on {row['n']} rows")
            if step and "reward_change" in row:
                change = f"{row['reward_change']:+.4f} ± {row['reward_change_se'] or 0:.4f}"
                columns.append(f"{change} (paired) since step 0")
        say(f"step {step}: held-out accuracy {', '.join(columns)}")
        return rows

    def close(self) -> None:
        self._metrics.close()
        self.progress.close()
