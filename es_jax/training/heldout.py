"""Accuracy of the unperturbed model on held-out rows."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from es_jax.tasks.task import Example, Task
from es_jax.training.es_step import Evaluator
from es_jax.training.grading import Graded, Grader, means
from es_jax.weights.model import Model


def evaluate_rows(
    evaluator: Evaluator,
    task: Task,
    model: Model,
    params: Any,
    *,
    examples: Sequence[Example],
    batches: Sequence,
) -> list[Graded]:
    """Greedy completions of the examples, graded. `batches` holds their prompts in the same order."""
    slots, own, grader = evaluator.engine.slots, {}, Grader(task, model, examples)
    for batch, tokens, length in evaluator.unperturbed(params, batches):
        rows = range(batch * slots, min((batch + 1) * slots, len(examples)))
        own[batch] = rows, grader(rows, tokens, length)
    return [one for part in grader.shared(own).values() for one in part]


def summary(step: int, graded: Sequence[Graded]) -> dict[str, Any]:
    """A row of evals/<task>.jsonl: accuracy and reward with their standard errors over rows, and the means."""
    n = len(graded)
    right = np.array([g.score.parts["answer"] for g in graded], float)
    rewards = np.array([g.score.reward for g in graded], float)
    deviation = lambda x: float(x.std(ddof=1) / math.sqrt(n)) if n > 1 else None  # noqa: E731
    row = {"step": step, "n": n, "accuracy": float(right.mean()), "accuracy_se": deviation(right)}
    rest = {name: value for name, value in means(graded).items() if name not in ("answer",)}
    return row | rest | {"reward_se": deviation(rewards)}
