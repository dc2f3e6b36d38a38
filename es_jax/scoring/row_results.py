"""The results of held-out rows, statistics of them, and evals/<task>.jsonl, which training and evaluation write.

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
}  # result → prefix of the columns of its drop
REASONS = ("format", "truncation", "knowledge")
EARLIER = "earlier"  # folder for rows from before the held-out rows of a run changed


@dataclasses.dataclass(frozen=True)
class RowResults:
    """The results of the n rows of a task, in their order.

    Attributes:
      right: [n] 0 or 1, by the published grader.
      strict, robust: [n] 0 or 1, by the other two graders; equal to `right` for a task with one grader.
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
        fields = {"robust": fields["right"]} | dict(fields)  # older rows, of a task with one grader
        own = {field.name: fields[field.name] for field in dataclasses.fields(cls)}
        return cls(**jax.tree.map(lambda x: np.array(x, float), own, is_leaf=lambda x: isinstance(x, list)))


def summary(step: int, now: RowResults, base: RowResults | None) -> dict[str, Any]:
    """A row of evals/<task>.jsonl. `base` holds the base model's results on the same rows, if they are known."""
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
    """The columns of one grader: accuracy and its binomial standard error; the change from the base and its paired
    standard error.

    >>> accuracy("strict", np.array([1.0, 1, 0, 0]), np.array([1.0, 1, 1, 1]))["strict_change"]
    -0.5
    """
    p = float(np.mean(now))
    columns: dict[str, float | None] = {column: p, f"{column}_se": math.sqrt(p * (1 - p) / len(now))}
    return columns if base is None else columns | change_columns(column, now, base)


def change_columns(column: str, now: np.ndarray, base: np.ndarray) -> dict[str, float | None]:
    """The change of the mean from the base, over the same rows, and its paired standard error."""
    difference = np.asarray(now, float) - base
    return {f"{column}_change": float(difference.mean()), f"{column}_change_se": standard_error(difference)}


def standard_error(values: Sequence[float] | np.ndarray) -> float | None:
    """The standard error of the mean of independent values: sample standard deviation over √n; None for one value."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def split_drop(base: RowResults, now: RowResults, view: str = "right") -> dict[str, float]:
    """The drop in accuracy from `base` to `now`, as the sum of three parts.

    Every row that is right in one and wrong in the other is counted under the reason why the wrong answer is wrong:
    "truncation" if it was cut at max_new_tokens, else "format" if it is not in the asked form or another grader finds
    the right answer in it, else "knowledge". A lost row counts +1/n, a gained row −1/n.

    >>> wrong = RowResults(*[np.zeros(1)] * 3, None, *[np.zeros(1)] * 4)
    >>> right = dataclasses.replace(wrong, right=np.ones(1), well_formed=np.ones(1))
    >>> split_drop(right, wrong)
    {'format': 1.0, 'truncation': 0.0, 'knowledge': 0.0}
    """
    was, is_ = getattr(base, view) > 0, getattr(now, view) > 0
    lost, gained = _reasons(now, was & ~is_), _reasons(base, is_ & ~was)
    return {reason: (lost[reason] - gained[reason]) / len(was) for reason in REASONS}


def seen_alone(base: RowResults, now: RowResults, view: str = "right") -> float:
    """The part of the drop in accuracy from `base` to `now` that only this grader sees: rows that it lost or gained
    while neither of the other two graders did.

    >>> wrong = RowResults(*[np.zeros(2)] * 3, None, *[np.zeros(2)] * 4)
    >>> seen_alone(dataclasses.replace(wrong, right=np.ones(2), robust=np.array([1, 0])), wrong)
    0.5
    """
    changes = {name: (getattr(base, name) > 0) * 1.0 - (getattr(now, name) > 0) for name in GRADERS}
    alone = np.all([changes[view] != changes[name] for name in GRADERS if name != view], axis=0)
    return float(np.mean(changes[view] * alone))


def _reasons(results: RowResults, rows: np.ndarray) -> dict[str, float]:
    """How many rows are wrong for each reason."""
    cut, formed = results.truncated > 0, np.True_ if results.well_formed is None else results.well_formed > 0
    formed = formed & (np.max([getattr(results, name) for name in GRADERS], axis=0) == 0)
    masks = {"truncation": cut, "format": ~cut & ~formed, "knowledge": ~cut & formed}
    return {reason: float(np.sum(rows & mask)) for reason, mask in masks.items()}


class EvalsFile:
    """The evaluations of one task: a row for each step.

    The results of single rows are in evals/verdicts/<task>.jsonl; later steps are compared row by row with step 0, the
    base model. Rows are appended as they come, and `read_evals` sorts them. Rows of steps after `last_step`, which did
    not finish, are dropped.

    Attributes:
      last: the row of the latest step, if there is one.
      steps: the steps that are evaluated.
    """

    results: Any = RowResults  # the results of a step
    summary = staticmethod(summary)  # these results as a row

    def __init__(self, folder: Path, task: str, *, last_step: int = LAST):
        self._rows = Jsonl(folder / f"{task}.jsonl", last_step=last_step)
        self._results = Jsonl(folder / "verdicts" / f"{task}.jsonl", last_step=last_step)
        self.steps = self._rows.steps
        self.last: dict[str, Any] | None = next(reversed(read_evals(self._rows.path)), None)

    def check(self, *, digest: str, max_new_tokens: int, n: int) -> None:
        """Raises ValueError if the file's rows were made from other held-out rows (now n), or with another limit."""
        for row in read_jsonl(self._rows.path):
            if row.get("rows") != digest:
                raise ValueError(
                    f"{self._rows.path} was made from {row.get('n')} rows with digest {row.get('rows')!r}, and this "
                    f"evaluation has {n} with {digest!r}: use the same --rows and --data_dir, or another --out. If "
                    "the chat template writes the date, use the same --template_date. If the graders' rules have "
                    "changed, only another --out helps"
                )
            if row.get("max_new") != max_new_tokens:
                raise ValueError(
                    f"{self._rows.path} was made with max_new_tokens = {row.get('max_new')}, and this evaluation has "
                    f"{max_new_tokens}: use the same --max_new_tokens, or another --out. To resume a run, move the "
                    "file elsewhere"
                )

    def add(self, step: int, results: Any, *, digest: str, max_new_tokens: int) -> dict[str, Any]:
        """Write a step's row and return it."""
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
    """If the evaluations of a task are of other held-out rows than those of the digest, move them to earlier/<their
    digest>/, laid out like `folder`; move back those that belong to the digest. Returns a sentence about it, or None if
    there was nothing to do."""
    rows, own = Path(f"{task}.jsonl"), folder / EARLIER / digest
    there = [row.get("rows") for row in read_rows(folder / rows)][:1]
    if there == [digest] or not (there or (own / rows).exists()):
        return None
    moves = [(folder, folder / EARLIER / str(other)) for other in there] + [(own, folder)]
    for source, target in moves:
        for name in (Path("verdicts") / rows, rows):  # rows last: they show a start after a kill what is left to do
            if (source / name).exists():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(source / name, target / name)
    if not there:
        return f"{task}: earlier evaluations on these held-out rows were moved back"
    return f"{task}: the held-out rows changed; earlier evaluations are in {moves[0][1]}"


def read_evals(path: Path) -> list[dict[str, Any]]:
    """The rows of evals/<task>.jsonl, evals/kl.jsonl or evals/drift.jsonl, by step; the last row of a step counts."""
    rows = {(row["step"], row.get("task", "")): row for row in read_rows(path)}
    return [rows[key] for key in sorted(rows)]
