"""best.json: the step of a run with the highest value of the held-out metric that train.keep_best names."""

import json
from pathlib import Path
from typing import Any

from es_jax.rundir.directory import write_json

NAME, BEST = "best.json", "best"


def write_best(workdir: Path, facts: dict[str, Any] | None) -> None:
    """Write step, task, metric and value; None removes the file, since there is no best step."""
    if facts is None:
        (workdir / NAME).unlink(missing_ok=True)
    else:
        write_json(workdir / NAME, facts)


def step_of(workdir: str | Path, step: int | str, *, flag: str = "step") -> int:
    """The number of a step that is given as "best" or as digits.

    Args:
      workdir: a run's directory.
      flag: the name of the option in messages.

    Raises:
      ValueError: the text is neither, or the run has no best step.

    >>> step_of("runs/any", "50")
    50
    """
    if step != BEST:
        try:
            return int(step)
        except ValueError:
            raise ValueError(f"{flag} is {step!r}: give a whole number, or {BEST!r}") from None
    path = Path(workdir) / NAME
    try:
        return int(json.loads(path.read_bytes())["step"])
    except FileNotFoundError:
        raise ValueError(
            f"{flag} is {BEST!r}, but {workdir} has no {NAME}, which a run with train.keep_best=METRIC writes: give a "
            "number, or resume the run with that field"
        ) from None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}): delete it and resume the run, which writes it again"
        ) from None
