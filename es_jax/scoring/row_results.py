"""The results of held-out rows, what follows from them, and evals/<task>.jsonl, which training and evaluation write.

docs/evaluate.md explains every column.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from es_jax.rundir.metrics import LAST, Jsonl, read_jsonl, read_rows

VIEWS = {
    "accuracy": "right",
    "strict": "strict",
    "robust": "robust",
    "loglik": "loglik",
}  # column → the result that it averages
GRADERS = {
    "right": "lost_",
    "strict": "strict_lost_",
    "robust": "robust_lost_",
}  # result → prefix of its drop's columns
REASONS = ("format", "truncation", "knowledge")
EARLIER = "earlier"  # folder of rows that a run evaluated before its held-out rows became others


@dataclasses.dataclass(frozen=True)
class RowResults:
    """The results of the n rows of a task, in their order.

    Attributes:
      right: [n] 0 or 1, by the published grader.
      strict, robust: [n] 0 or 1, by the other two; the same where a task has one grader.
      loglik: [n] 0 or 1, whether the right option is the likeliest; None for a task without options.
      well_formed: [n] 0 or 1, exactly the asked form; None for a task that asks for none.
      truncated: [n] 0 or 1, cut at max_new_tokens.
      length: [n] tokens of the completion.
      reward: [n] as training scores it.
      parts: the other parts of the score, by name, [n] each.
    """

    right: np.ndarray
    strict: np.ndarray
    robust: np.ndarray
    loglik: np.ndarray | None
    well_formed: np.ndarray | None
    truncated: np.ndarray
    length: np.ndarray
    reward: np.ndarray
    parts: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return jax.tree.map(np.ndarray.tolist, vars(self))

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "RowResults":
        fields = {"robust": fields["right"]} | dict(fields)  # older rows of a task with one grader
        own = {field.name: fields[field.name] for field in dataclasses.fields(cls)}
        return cls(**jax.tree.map(lambda x: np.array(x, float), own, is_leaf=lambda x: isinstance(x, list)))


def summary(step: int, now: RowResults, base: RowResults | None) -> dict[str, Any]:
    """A row of evals/<task>.jsonl. `base`: the results of the base model on the same rows, if they are known."""
    row: dict[str, Any] = {"step": step, "n": len(now.right)}
    for column, field in VIEWS.items():
        if getattr(now, field) is not None:
            row |= accuracy(column, getattr(now, field), None if base is None else getattr(base, field))
    for view, prefix in GRADERS.items():
        if base is not None:
            row |= {prefix + reason: share for reason, share in split_drop(base, now, view).items()}
            row[f"{prefix}alone"] = seen_alone(base, now, view)
    means = {**now.parts, "well_formed": now.well_formed, "truncated": now.truncated}
    means |= {"mean_length": now.length, "reward": now.reward}
    row |= {name: float(np.mean(values)) for name, values in means.items() if values is not None}
    row["reward_se"] = standard_error(now.reward)
    return row if base is None else row | change_columns("reward", now.reward, base.reward)


def accuracy(column: str, now: np.ndarray, base: np.ndarray | None) -> dict[str, float | None]:
    """The columns of one view: accuracy and binomial standard error; change against the base and its paired one.

    >>> accuracy("strict", np.array([1.0, 1, 0, 0]), np.array([1.0, 1, 1, 1]))["strict_change"]
    -0.5
    """
    p = float(np.mean(now))
    columns: dict[str, float | None] = {column: p, f"{column}_se": math.sqrt(p * (1 - p) / len(now))}
    return columns if base is None else columns | change_columns(column, now, base)


def change_columns(column: str, now: np.ndarray, base: np.ndarray) -> dict[str, float | None]:
    """Of the mean over the same rows: the change against the base, and its paired standard error."""
    difference = np.asarray(now, float) - base
    return {f"{column}_change": float(difference.mean()), f"{column}_change_se": standard_error(difference)}


def standard_error(values: Sequence[float] | np.ndarray) -> float | None:
    """Of the mean of independent values: sample standard deviation over √n; None for one value."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def split_drop(base: RowResults, now: RowResults, view: str = "right") -> dict[str, float]:
    """The drop in accuracy from `base` to `now`, as the sum of three parts.

    Every row that is right in one and wrong in the other is booked under the reason why the wrong one is wrong:
    "truncation" if it was cut at max_new_tokens, else "format" if it is not in the asked form or another grader finds
    the right answer in it, else "knowledge". A row that was lost counts +1/n, a row that was gained −1/n.

    >>> wrong = RowResults(*[np.zeros(1)] * 3, None, *[np.zeros(1)] * 4)
    >>> right = dataclasses.replace(wrong, right=np.ones(1), well_formed=np.ones(1))
    >>> split_drop(right, wrong)
    {'format': 1.0, 'truncation': 0.0, 'knowledge': 0.0}
    """
    was, is_ = getattr(base, view) > 0, getattr(now, view) > 0
    lost, gained = _reasons(now, was & ~is_), _reasons(base, is_ & ~was)
    return {reason: (lost[reason] - gained[reason]) / len(was) for reason in REASONS}


def seen_alone(base: RowResults, now: RowResults, view: str = "right") -> float:
    """The part of the drop in accuracy from `base` to `now` that no other grader sees: of the rows that this one lost
    or gained where neither of the other two did the same.

    >>> wrong = RowResults(*[np.zeros(2)] * 3, None, *[np.zeros(2)] * 4)
    >>> seen_alone(dataclasses.replace(wrong, right=np.ones(2), robust=np.array([1, 0])), wrong)
    0.5
    """
    changes = {name: (getattr(base, name) > 0) * 1.0 - (getattr(now, name) > 0) for name in GRADERS}
    alone = np.all([changes[view] != changes[name] for name in GRADERS if name != view], axis=0)
    return float(np.mean(changes[view] * alone))


def _reasons(results: RowResults, rows: np.ndarray) -> dict[str, float]:
    """How many of the rows are wrong for each reason."""
    cut, formed = results.truncated > 0, np.True_ if results.well_formed is None else results.well_formed > 0
    formed = formed & (np.max([getattr(results, name) for name in GRADERS], axis=0) == 0)
    masks = {"truncation": cut, "format": ~cut & ~formed, "knowledge": ~cut & formed}
    return {reason: float(np.sum(rows & mask)) for reason, mask in masks.items()}


class EvalsFile:
    """The evaluations of one task, a row a step.

    The results of single rows stand in evals/verdicts/<task>.jsonl: with those of step 0, of the base model, later
    steps are compared row by row. Rows are appended as they come; `read_evals` puts them in order. Rows of steps after
    `last_step`, which did not finish, are dropped.

    Attributes:
      last: the row of the latest step, if there is one.
      steps: the steps that are evaluated.
    """

    results: Any = RowResults  # of a step
    summary = staticmethod(summary)  # of these, as a row

    def __init__(self, folder: Path, task: str, *, last_step: int = LAST):
        self._rows = Jsonl(folder / f"{task}.jsonl", last_step=last_step)
        self._results = Jsonl(folder / "verdicts" / f"{task}.jsonl", last_step=last_step)
        self.steps = self._rows.steps
        self.last: dict[str, Any] | None = next(reversed(read_evals(self._rows.path)), None)

    def check(self, *, digest: str, max_new_tokens: int, n: int) -> None:
        """Raises ValueError where the file's rows were made from other held-out rows, now n, or with another limit."""
        for row in read_jsonl(self._rows.path):
            if row.get("rows") != digest:
                raise ValueError(
                    f"{self._rows.path} was made from {row.get('n')} rows with digest {row.get('rows')!r}, and this "
                    f"evaluation has {n} with {digest!r}: use the same --rows and --data_dir, or another --out; where "
                    "the chat template writes the date, the same --template_date; where the graders' rules changed "
                    "since, only another --out will do"
                )
            if row.get("max_new") != max_new_tokens:
                raise ValueError(
                    f"{self._rows.path} was made with max_new_tokens = {row.get('max_new')}, and this evaluation has "
                    f"{max_new_tokens}: use the same --max_new_tokens, or another --out; a run goes on where the file "
                    "is moved elsewhere"
                )

    def add(self, step: int, results: Any, *, digest: str, max_new_tokens: int) -> dict[str, Any]:
        """Write a step's row, and return it."""
        base = results
        if step:
            rows = read_jsonl(self._results.path)
            same = (row for row in rows if (row["step"], row["rows"], row["max_new"]) == (0, digest, max_new_tokens))
            base = next(map(self.results.from_json, same), None)
        facts = {"max_new": max_new_tokens, "rows": digest}
        row = self.summary(step, results, base) | facts
        self._results.write({"step": step, **facts, **results.to_json()})
        self._rows.write(row)
        self.last = row if self.last is None or step >= self.last["step"] else self.last
        return row


def set_aside(folder: Path, task: str, digest: str) -> str | None:
    """Move the rows of a task, where they are of other held-out rows than those of the digest, to earlier/<their
    digest>/, in the form of `folder`, and bring back what an earlier change moved of these. Returns a sentence about
    it, None where there was nothing to do."""
    rows, own = Path(f"{task}.jsonl"), folder / EARLIER / digest
    there = [row.get("rows") for row in read_rows(folder / rows)][:1]
    if there == [digest] or not (there or (own / rows).exists()):
        return None
    moves = [(folder, folder / EARLIER / str(other)) for other in there] + [(own, folder)]
    for source, target in moves:
        for name in (Path("verdicts") / rows, rows):  # the rows last: they tell a start after a kill what is to do
            if (source / name).exists():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(source / name, target / name)
    if not there:
        return f"{task}: what was evaluated on these held-out rows before is back"
    return (
        f"{task}: evaluated on other held-out rows from here on; what was evaluated on those of before is in "
        f"{moves[0][1]}"
    )


def read_evals(path: Path) -> list[dict[str, Any]]:
    """The rows of evals/<task>.jsonl, of evals/kl.jsonl or evals/drift.jsonl, in order of steps; the last of equals."""
    rows = {(row["step"], row.get("task", "")): row for row in read_rows(path)}
    return [rows[key] for key in sorted(rows)]
