"""evals/<task>.jsonl, which training and `python -m es_jax.evaluate` both write, and the verdicts behind its rows."""

from pathlib import Path
from typing import Any

from es_jax.rundir.metrics import Jsonl, read_jsonl
from es_jax.scoring.row_results import Verdicts, summary

MAX = 2**62  # a step after every step


class EvalsFile:
    """The evaluations of one task, a row a step.

    The verdicts on single rows stand in evals/verdicts/<task>.jsonl: with those of step 0, of the base model, later
    steps are compared row by row. Rows are appended as they come; `read_evals` puts them in order.

    Args:
      folder: the run's evals/.
      task: its name.
      last_step: rows of later steps, which did not finish, are dropped.

    Attributes:
      last: the row of the latest step; None when there is none.
    """

    def __init__(self, folder: Path, task: str, *, last_step: int = MAX):
        self.task, self._rows = task, Jsonl(folder / f"{task}.jsonl", last_step=last_step)
        self._verdicts = Jsonl(folder / "verdicts" / f"{task}.jsonl", last_step=last_step)
        self.last: dict[str, Any] | None = max(read_evals(self._rows.path), key=lambda row: row["step"], default=None)

    @property
    def steps(self) -> set[int]:
        """The steps that are evaluated."""
        return self._rows.steps

    def check(self, *, digest: str, max_new_tokens: int, n: int) -> None:
        """Raises ValueError where the file's rows were made from other held-out rows, now n, or with another limit."""
        for row in read_jsonl(self._rows.path):
            if row.get("rows") != digest:
                raise ValueError(
                    f"{self._rows.path} was made from {row.get('n')} rows with digest {row.get('rows')!r}, and this "
                    f"evaluation has {n} with {digest!r}: use the same --rows and --data_dir, or another --out"
                )
            if row.get("max_new") != max_new_tokens:
                raise ValueError(
                    f"{self._rows.path} was made with max_new_tokens = {row.get('max_new')}, and this evaluation has "
                    f"{max_new_tokens}: use the same --max_new_tokens, or another --out"
                )

    def add(self, step: int, verdicts: Verdicts, *, digest: str, max_new_tokens: int) -> dict[str, Any]:
        """Write a step's row, and give it back."""
        base = verdicts if step == 0 else self._base(digest, max_new_tokens)
        row = summary(step, verdicts, base) | {"max_new": max_new_tokens, "rows": digest}
        self._verdicts.write({"step": step, "max_new": max_new_tokens, "rows": digest, **verdicts.to_json()})
        self._rows.write(row)
        self.last = row if self.last is None or step >= self.last["step"] else self.last
        return row

    def _base(self, digest: str, max_new_tokens: int) -> Verdicts | None:
        for fields in read_jsonl(self._verdicts.path):
            if (fields["step"], fields["rows"], fields["max_new"]) == (0, digest, max_new_tokens):
                return Verdicts.from_json(fields)
        return None


def read_evals(path: Path) -> list[dict[str, Any]]:
    """The rows of evals/<task>.jsonl, of evals/kl.jsonl or evals/drift.jsonl, in order of steps; the last of equals."""
    rows = {(row["step"], row.get("task")): row for row in read_jsonl(path)}
    return [rows[key] for key in sorted(rows, key=lambda key: (key[0], key[1] or ""))]
