"""Logs a run to Weights & Biases, in addition to its own files: its fields, a row for each step, and its held-out
rows."""

import json
import logging
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from es_jax.core import processes
from es_jax.core.extras import require
from es_jax.rundir.directory import write_json
from es_jax.rundir.metrics import numbers

TRACKERS = ("wandb",)
logger = logging.getLogger(__name__)


class Tracker:
    """A context around a run's work. Of several processes the first one tracks; without a name none does.

    The id of the tracked run is kept in tracker.json, so that a resumed run continues in it. A failure after the start
    is a warning, and the run continues without its tracker.

    Raises:
      ImportError: wandb is not installed. ValueError: wandb does not start, for example without a login.
    """

    def __init__(self, name: str | None, workdir: Path):
        self._run = _wandb(workdir) if name and processes.first() else None

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._try("at its end", lambda run: run.finish(exit_code=0 if kind is None else 1))

    def config(self, fields: Mapping[str, Any]) -> None:
        """The run's fields; in a resumed run some may have changed."""
        values = json.loads(json.dumps(fields))
        self._try("at the start", lambda run: run.config.update(values, allow_val_change=True))

    def write(self, step: int, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """The numbers of a step's rows, named as in TensorBoard; rows are given by prefix, "train" or
        "evals/<task>"."""
        values = {name: x for prefix, row in rows.items() for name, x in numbers(row, prefix).items()}
        if values:
            self._try(f"at step {step}", lambda run: run.log({"step": step, **values}))

    def _try(self, when: str, call: Callable[[Any], Any]) -> None:
        """Do that with the tracked run, if there is one; if it fails, stop tracking."""
        if self._run is None:
            return
        try:
            call(self._run)
        except Exception as error:
            self._run = None
            logger.warning(
                "train.tracker: wandb failed %s (%s): the run continues without it; metrics.jsonl has all steps",
                when, " ".join(str(error).split()) or type(error).__name__,
            )  # fmt: skip


def _wandb(workdir: Path) -> Any:
    """The Weights & Biases run whose id the directory records, or a new one."""
    require("wandb")
    import wandb

    path = workdir / "tracker.json"
    try:
        known = json.loads(path.read_bytes())["wandb"] if path.exists() else None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): restore it, or delete it to start a new wandb run") from None
    number = known or os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:8]
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "es_jax"), id=number, resume="allow", dir=str(workdir),
            name=os.environ.get("WANDB_NAME", workdir.resolve().name), reinit="create_new",
        )  # fmt: skip
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"train.tracker is 'wandb', which did not start ({reason[:300]}): run `wandb login` once, set "
            "WANDB_MODE=offline, or leave train.tracker out"
        ) from error
    write_json(path, {"wandb": run.id})
    return run
