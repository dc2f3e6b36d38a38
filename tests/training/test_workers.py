"""A run whose task has worker processes."""

import dataclasses

import jax
import pytest

from configs.lab import get_config
from es_jax.rundir.metrics import read_jsonl
from es_jax.scoring import heldout
from es_jax.scoring.workers import workers_of
from es_jax.tasks.lab import Lab
from es_jax.training import loop
from es_jax.training.loop import run


@dataclasses.dataclass(frozen=True)
class LabWithWorkers(Lab):
    workers: int = 2


@pytest.mark.parametrize("method", ["population=2", "grpo"])
def test_a_run_has_the_same_rewards_with_workers_and_without(tmp_path, monkeypatch, method):
    config = get_config(f"steps=2,{method}")
    config.evals.every, config.evals.rows, config.mesh.groups, config.task.prompts_per_step = 2, 20, 1, 16
    with jax.numpy_dtype_promotion("standard"):  # optax's adamw needs it
        run(config, tmp_path / "without")
    monkeypatch.setattr(loop, "make_task", lambda config: LabWithWorkers("countdown"))
    used = []

    def counted(task, timeout_seconds=None):
        used.append(getattr(task, "workers", 0))
        return workers_of(task, timeout_seconds)

    for module in (loop, heldout):
        monkeypatch.setattr(module, "workers_of", counted)
    with jax.numpy_dtype_promotion("standard"):
        run(config, tmp_path / "with")
    logs = [(tmp_path / name / "seedlog.jsonl").read_text() for name in ("without", "with")]
    assert logs[0] == logs[1]
    evals = [read_jsonl(tmp_path / name / "evals/lab-countdown.jsonl") for name in ("without", "with")]
    assert evals[0] == evals[1] and [row["step"] for row in evals[0]] == [0, 2]
    assert used.count(2) == 3  # the run's, and each evaluation's of that task
