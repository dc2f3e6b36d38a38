"""Accuracy of the unperturbed model on held-out rows."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from es_jax.generate.prompts import Prompts
from es_jax.tasks.task import Example, Task
from es_jax.training.es_step import Evaluator
from es_jax.training.grading import Graded, Grader, means
from es_jax.weights.model import Model


def evaluate_rows(
    evaluator: Evaluator,
    model: Model,
    params: Any,
    *,
    tasks: Mapping[str, Task],
    examples: Mapping[str, Sequence[Example]],
    prompts: Mapping[str, Prompts],
) -> Iterator[tuple[str, list[Graded]]]:
    """Each task's name and its examples' greedy completions, graded; the others decode meanwhile.

    `prompts` are those of the examples, in the same order.
    """
    for name, lanes in zip(prompts, evaluator.unperturbed(params, prompts.values()), strict=True):
        grader = Grader(tasks[name], model, examples[name])
        own = {lane: (rows, grader(rows, tokens, length)) for lane, (rows, tokens, length) in lanes.items()}
        yield name, [one for part in grader.shared(own).values() for one in part]


def summary(step: int, graded: Sequence[Graded]) -> dict[str, Any]:
    """A row of evals/<task>.jsonl: accuracy and reward with their standard errors over rows, and the means."""
    n = len(graded)
    right = np.array([g.score.parts["answer"] for g in graded], float)
    rewards = np.array([g.score.reward for g in graded], float)
    deviation = lambda x: float(x.std(ddof=1) / math.sqrt(n)) if n > 1 else None  # noqa: E731
    row = {"step": step, "n": n, "accuracy": float(right.mean()), "accuracy_se": deviation(right)}
    rest = {name: value for name, value in means(graded).items() if name not in ("answer",)}
    return row | rest | {"reward_se": deviation(rewards)}
