"""What was said of each held-out row, and what follows: accuracies, their errors, and what a drop is made of.

docs/evaluate.md explains every column.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

VIEWS = {"accuracy": "right", "strict": "strict", "loglik": "loglik"}  # column → the verdict that it averages
REASONS = ("format", "truncation", "knowledge")


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """The verdicts on the n rows of a task, in their order.

    Attributes:
      right: [n] 0 or 1, by the published grader.
      strict: [n] 0 or 1, by the strict one; the same where a task has one grader.
      loglik: [n] 0 or 1, whether the right option is the likeliest; None for a task without options.
      well_formed: [n] 0 or 1, exactly the asked form; None for a task that asks for none.
      truncated: [n] 0 or 1, cut at max_new_tokens.
      length: [n] tokens of the completion.
      reward: [n] as training scores it.
      parts: the other parts of the score, by name, [n] each.
    """

    right: np.ndarray
    strict: np.ndarray
    loglik: np.ndarray | None
    well_formed: np.ndarray | None
    truncated: np.ndarray
    length: np.ndarray
    reward: np.ndarray
    parts: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        plain = {
            name: None if x is None else np.asarray(x).tolist() for name, x in vars(self).items() if name != "parts"
        }
        return plain | {"parts": {name: np.asarray(x).tolist() for name, x in self.parts.items()}}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Verdicts":
        names = [field.name for field in dataclasses.fields(cls) if field.name != "parts"]
        plain: dict[str, Any] = {
            name: None if fields[name] is None else np.array(fields[name], float) for name in names
        }
        return cls(**plain, parts={name: np.array(x, float) for name, x in fields["parts"].items()})


def summary(step: int, now: Verdicts, base: Verdicts | None) -> dict[str, Any]:
    """A row of evals/<task>.jsonl. `base`: the verdicts of the base model on the same rows, if they are known."""
    row: dict[str, Any] = {"step": step, "n": len(now.right)}
    for column, field in VIEWS.items():
        mine, theirs = getattr(now, field), None if base is None else getattr(base, field)
        if mine is not None:
            row |= accuracy(column, mine, theirs)
    for column in ("accuracy", "strict"):
        if base is not None:
            parts = split_drop(base, now, VIEWS[column])
            prefix = "lost_" if column == "accuracy" else "strict_lost_"
            row |= {prefix + reason: value for reason, value in parts.items()}
    row |= {name: float(np.mean(value)) for name, value in now.parts.items()}
    row |= {} if now.well_formed is None else {"well_formed": float(np.mean(now.well_formed))}
    row |= {"truncated": float(np.mean(now.truncated)), "mean_length": float(np.mean(now.length))}
    return row | {"reward": float(np.mean(now.reward)), "reward_se": standard_error(now.reward)}


def accuracy(column: str, now: np.ndarray, base: np.ndarray | None) -> dict[str, float | None]:
    """The columns of one view: accuracy and binomial standard error; change against the base and its paired one.

    >>> accuracy("strict", np.array([1.0, 1, 0, 0]), np.array([1.0, 1, 1, 1]))["strict_change"]
    -0.5
    """
    p = float(np.mean(now))
    columns: dict[str, float | None] = {column: p, f"{column}_se": math.sqrt(p * (1 - p) / len(now))}
    if base is not None:
        difference = np.asarray(now, float) - base
        columns |= {f"{column}_change": float(difference.mean()), f"{column}_change_se": standard_error(difference)}
    return columns


def standard_error(values: Sequence[float] | np.ndarray) -> float | None:
    """Of the mean of independent values: sample standard deviation over √n; None for one value."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def split_drop(base: Verdicts, now: Verdicts, view: str = "right") -> dict[str, float]:
    """The drop in accuracy from `base` to `now`, as the sum of three parts.

    Every row that is right in one and wrong in the other is booked under the reason why the wrong one is wrong:
    "truncation" if it was cut at max_new_tokens, otherwise "format" if it is not in the asked form, otherwise "knowledge".
    A row that was lost counts +1/n, a row that was gained −1/n.

    >>> wrong = Verdicts(*(np.zeros(1), np.zeros(1), None, np.zeros(1), np.zeros(1), np.ones(1), np.zeros(1)))
    >>> right = dataclasses.replace(wrong, right=np.ones(1), well_formed=np.ones(1))
    >>> split_drop(right, wrong)
    {'format': 1.0, 'truncation': 0.0, 'knowledge': 0.0}
    """
    was, is_ = np.asarray(getattr(base, view)) > 0, np.asarray(getattr(now, view)) > 0
    lost, gained = was & ~is_, is_ & ~was
    return {
        reason: float((np.sum(lost & _because(now, reason)) - np.sum(gained & _because(base, reason))) / len(was))
        for reason in REASONS
    }


def _because(verdicts: Verdicts, reason: str) -> np.ndarray:
    cut = np.asarray(verdicts.truncated) > 0
    formed = np.ones_like(cut) if verdicts.well_formed is None else np.asarray(verdicts.well_formed) > 0
    return {"truncation": cut, "format": ~cut & ~formed, "knowledge": ~cut & formed}[reason]
