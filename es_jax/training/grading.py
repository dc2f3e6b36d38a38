"""From tokens to scores, on the host."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from es_jax.tasks.task import Example, Score, Task
from es_jax.weights.model import Model


@dataclasses.dataclass(frozen=True)
class Graded:
    """One completion: its text without the stop token, its score, how many tokens, and whether max_new cut it."""

    example: Example
    text: str
    score: Score
    length: int
    truncated: bool


def grade(
    task: Task, model: Model, examples: Sequence[Example], tokens: np.ndarray, length: np.ndarray
) -> list[Graded]:
    """Scores of the first len(examples) rows of a Generation's tokens [B, L] and length [B]."""
    kept, stopped = [], []
    for i in range(len(examples)):
        row = tokens[i, : length[i]].tolist()
        stopped.append(bool(row) and row[-1] in model.stop_ids)
        kept.append(row[:-1] if stopped[-1] else row)
    texts = model.tokenizer.batch_decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [
        Graded(example, text, task.score(example, text), int(n), not stop)
        for example, text, n, stop in zip(examples, texts, length, stopped, strict=False)
    ]


def means(graded: Sequence[Graded]) -> dict[str, float]:
    """Mean reward, mean of each part of the score, mean length, and the share cut at max_new."""
    parts = graded[0].score.parts
    return {
        "reward": float(np.mean([g.score.reward for g in graded])),
        **{part: float(np.mean([g.score.parts[part] for g in graded])) for part in parts},
        "mean_length": float(np.mean([g.length for g in graded])),
        "truncated": float(np.mean([g.truncated for g in graded])),
    }
