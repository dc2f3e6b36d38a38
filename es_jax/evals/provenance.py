"""evals/subject.json: whose weights the rows of a folder are of, so that rows of two sources are not mixed."""

import json
from pathlib import Path
from typing import Any

from es_jax.core.names import RENAMED
from es_jax.evals.weight_source import DEFAULTS, WeightSource
from es_jax.rundir.directory import write_json
from es_jax.rundir.metrics import read_jsonl

NAME = "subject.json"  # as in the directories of earlier versions
SHOWN = 5  # differences in a message


def check(folder: Path, source: WeightSource) -> None:
    """Raises ValueError where the folder's rows are of other weights than the source's.

    A folder without subject.json, of training or of an earlier version, is taken as it is. Rows of step 0 are of the
    base model: while there are no others, any source with the same base may go on with them.
    """
    name, marks = _read(folder)
    if marks is None:
        return
    then, now = DEFAULTS | marks, DEFAULTS | source.marks(marks.get("steps", 0))
    differing = [field for field in {**then, **now} if then.get(field) != now.get(field)]
    beyond = any(row["step"] for path in sorted(folder.glob("*.jsonl")) for row in read_jsonl(path))
    if "base" in differing or (differing and beyond):
        pairs = [f"{field} {then.get(field)!r} there and {now.get(field)!r} here" for field in differing]
        raise ValueError(
            f"{folder} has rows of {name} and this evaluation is of {source.name}, with other weights "
            f"({'; '.join(pairs[:SHOWN])}): use another --out"
        )


def claim(folder: Path, source: WeightSource) -> None:
    """Write subject.json, unless it tells of the same weights; to call after `check`."""
    marks = source.marks(source.last)
    if _read(folder)[1] != marks:
        write_json(folder / NAME, {"name": source.name, "marks": marks})


def _read(folder: Path) -> tuple[str, dict[str, Any] | None]:
    """The name and the marks in subject.json, under the fields' names of today; None where there is no such file."""
    path = folder / NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content["name"], {RENAMED.get(name, name): value for name, value in content["marks"].items()}
    except FileNotFoundError:
        return "", None
    except (AttributeError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}): use another --out, or delete it where you know whose rows they are"
        ) from None
