"""Where a run starts: from a model, or from the weights of a step of another run, its parent.

A run with a parent keeps the weights that it started from in its folder `start`, and in `anchor` those that it is
anchored to, where they are of a run too. Both are model folders, so the run needs its parent no more.
"""

import dataclasses
import hashlib
import json
import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import config_dict

from es_jax.core import processes
from es_jax.core.mesh import make_mesh
from es_jax.models.transformer import param_shapes
from es_jax.rundir import directory, seed_log
from es_jax.rundir.places import FIELDS, MODELS, Step, as_given, as_step, is_run, locate, record
from es_jax.rundir.seed_log import steps_done
from es_jax.training.config import RunConfig, default_config, freeze, read_config
from es_jax.training.state import load_base
from es_jax.training.weights_at import weights_at
from es_jax.weights.model import Model, check_new, load_outline, save_model

logger = logging.getLogger(__name__)
CARD = "README.md"  # of such a folder; it is written with the weights, and says whose they are
OURS = (
    "The weights of a step of a run of es_jax, from which the run whose folder this is began, or to which it is pulled."
)


class Start(NamedTuple):
    """A run's config and its parent.

    Attributes:
      given: the config as config.json keeps it.
      config: the same, with each path as it is found from here.
      parent: None where the run starts from a model; else what config.json keeps: `run`, as it was named; its `path`;
        the `step`; `seedlog`, a digest of the parent's log up to that step; `digest` and `model` of the base weights
        that the first of its ancestors began from; `seeds` of the ancestors; and whether it is a `branch`.
    """

    given: RunConfig
    config: RunConfig
    parent: dict[str, Any] | None

    def written(self, config: RunConfig, workdir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """What config.json keeps of a config like `self.config`: its fields as they were given, and their places."""
        given, found = dataclasses.asdict(self.given), dataclasses.asdict(self.config)
        return as_given(dataclasses.asdict(config), given), record(given, found, workdir)


def start_of(config: RunConfig, workdir: Path, branch_from: str | None = None) -> Start:
    """Where a run begins that is asked for, or began that is in the directory. Nothing is written.

    Args:
      branch_from: RUN@STEP, or RUN for its last step: the run to branch from. Then model.source is that step; an anchor
        of which optim.anchor.source says nothing is where that run's was; and so is model.template_date.

    Raises:
      ValueError: the step is not there, model.source is another model than that run's, or the directory holds a run
        that began elsewhere.
      OSError: no run, or a path of config.json is in none of its places.
    """
    facts = directory.read(workdir) if steps_done(workdir) else {}
    begin = _again if facts else _anew
    given, parent = begin(config, workdir, branch_from, facts)
    needs = [name for name in FIELDS if parent is None or name not in MODELS]
    found = freeze(locate(dataclasses.asdict(given), facts, workdir, needs=needs), begun=True)
    return Start(given, found, parent)


def _anew(
    config: RunConfig, workdir: Path, branch_from: str | None, facts: dict[str, Any]
) -> tuple[RunConfig, dict[str, Any] | None]:
    source = config.model.source if branch_from is None else branch_from
    step = as_step(source) if source else None
    if step is None:
        if branch_from is not None:
            raise ValueError(f"branch_from is {branch_from!r}: give the directory of a run and a step, RUN@STEP")
        return config, None
    if step.run.resolve() == workdir.resolve():
        raise ValueError(f"{source!r} is a step of {workdir} itself: choose another --workdir for the new run")
    parent = _parent(source, step, branch=branch_from is not None)
    given = _with_source(config, source)
    if parent["branch"]:
        _check_base(config.model.source, parent, directory.read(step.run)["digest"])
        given = _as_the_parent(given, read_config(step.run, needs=MODELS))
    if given.record.perturbs and given.train.seed in parent["seeds"] and processes.first():
        logger.warning(
            "train.seed is %d, as of %s: its first steps draw that run's noise again; set it to another number",
            given.train.seed, parent["run"],
        )  # fmt: skip
    return given, parent


def _again(
    config: RunConfig, workdir: Path, branch_from: str | None, facts: dict[str, Any]
) -> tuple[RunConfig, dict[str, Any] | None]:
    source, parent = config.model.source if branch_from is None else branch_from, facts.get("parent")
    began = facts["config"]["model"]["source"] if parent is None else parent["run"]
    elsewhere = (
        f"{workdir} holds a run that began from {began!r}, and not from {source!r}: choose another --workdir, or leave "
        "it as it was"
    )
    if parent is None:
        if branch_from is not None or (source and as_step(source)):
            raise ValueError(elsewhere)
        return config, None
    if branch_from is not None and not parent["branch"]:
        raise ValueError(elsewhere)
    if source != parent["run"] and parent["branch"] and branch_from is None:  # with the config, and without the flag
        _check_base(source, parent, facts["digest"])
    elif source != parent["run"]:
        step = as_step(source)
        same = ("step", "digest", "seedlog")
        now = {} if step is None else _parent(source, step, branch=parent["branch"])
        if [parent[name] for name in same] != [now.get(name) for name in same]:
            raise ValueError(elsewhere)
    given, anchor = _with_source(config, parent["run"]), config.optim.anchor
    if parent["branch"] and anchor.penalty != "none" and anchor.source is None:
        given = _with_anchor(given, facts["config"]["optim"]["anchor"]["source"])
    return given, parent


def _parent(source: str, step: Step, *, branch: bool) -> dict[str, Any]:
    facts, last = directory.read(step.run), steps_done(step.run)
    number = last if step.step is None else step.step
    if number > last:
        raise ValueError(f"{source!r} is step {number}, but {step.run} holds steps 0 to {last}")
    first = facts.get("parent") or {"digest": facts["digest"], "model": facts["config"]["model"]["source"], "seeds": []}
    return {
        "run": source,
        "path": os.path.abspath(step.run),
        "step": number,
        "seedlog": seed_log.digest(step.run, number),
        "digest": first["digest"],
        "model": first["model"],
        "seeds": [facts["config"]["train"]["seed"], *first["seeds"]],
        "branch": branch,
    }


def _check_base(source: str, parent: dict[str, Any], digest: str) -> None:
    """Raises ValueError unless a branch's model.source is empty, or its parent's, or what that began from."""
    if source in ("", parent["run"], parent["model"]):
        return
    if as_step(source) or load_outline(source).digest not in (parent["digest"], digest):
        raise ValueError(
            f"model.source is {source!r}, and branch_from {parent['run']!r} of another model, {parent['model']!r}: "
            "leave model.source out; to start from a step and be anchored there, set model.source to it, without "
            "branch_from"
        )


def _with_source(config: RunConfig, source: str) -> RunConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, source=source))


def _with_anchor(config: RunConfig, source: str | None) -> RunConfig:
    anchor = dataclasses.replace(config.optim.anchor, source=source)
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, anchor=anchor))


def _as_the_parent(config: RunConfig, parent: RunConfig) -> RunConfig:
    """With the day of the parent's prompts and its anchor, where the config does not say others: the weights that it
    was pulled to, else those that it began from. An anchor that follows the weights has been left where they are."""
    config = config.with_date(config.model.template_date or parent.model.template_date)
    anchor, old = config.optim.anchor, parent.optim.anchor
    if anchor.penalty == "none" or anchor.source is not None or old.ema_decay is not None:
        return config
    return _with_anchor(config, old.source or parent.model.source)


def with_weights(start: Start, workdir: Path) -> Start:
    """The start, once its weights that are of a run are in the directory's folders `start` and `anchor`. All processes
    call it, and hold the directory."""
    config, started = start.config, bool(steps_done(workdir))
    if start.parent is not None:
        config = _with_source(config, _kept("model.source", config.model.source, workdir / "start", started))
    if (anchor := config.optim.anchor.source) is not None:
        config = _with_anchor(config, _kept("optim.anchor.source", anchor, workdir / "anchor", started))
    return start._replace(config=config)


def _kept(name: str, source: str, folder: Path, started: bool) -> str:
    """Where the weights of a source are: itself, or where they are of a run the folder, into which they come."""
    path = Path(source).expanduser()
    if path.is_dir() and not is_run(path):
        run = path.resolve().parent
        if name == "model.source" or run == folder.resolve().parent or not is_run(run):
            return source
        _copy(path, folder)
        return str(folder)
    try:
        step = as_step(source)
    except FileNotFoundError as error:
        if not started:
            raise
        raise FileNotFoundError(
            f"{name} of {folder.parent} is {source!r}, and neither {folder}, where the run kept those weights, nor "
            f"that run is there any more ({error}): put one of them back"
        ) from error
    if step is None:
        return source
    _write(step, folder, started)
    return str(folder)


def _copy(source: Path, folder: Path) -> None:
    """Copy a model folder, unless it is there; the copy appears when it is whole."""
    if processes.first() and not folder.exists():
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        with directory.writing(folder):
            shutil.copytree(source, partial)
            os.replace(partial, folder)
    processes.barrier()
    if load_outline(folder).digest != load_outline(source).digest:
        raise ValueError(f"{folder} has other weights than {source}: delete it, if no run needs it")


def outline_of(run: Path) -> Model:
    """The base model of a run without its weights, after a check that it is that."""
    source = read_config(run, needs=MODELS).model.source
    directory.check_files(run, source)
    model = load_outline(source)
    directory.check_base(run, source, model.digest)
    return model


def outline(source: str) -> Model:
    """A model, or a step of a run, without its weights; the digest tells steps apart."""
    if (step := as_step(source)) is None:
        return load_outline(source)
    model, parent = outline_of(step.run), _parent(source, step, branch=False)
    text = f"{model.digest} {parent['step']} {parent['seedlog']}"
    return dataclasses.replace(model, digest=hashlib.sha256(text.encode()).hexdigest())


def weights_of(source: str, config: RunConfig, mesh: Mesh) -> Any:
    """The weights of a model, as `load_base` gives them, or of a step of a run."""
    if (step := as_step(source)) is None:
        return load_base(config, mesh, source=source).params
    number = _parent(source, step, branch=False)["step"]
    ((_, params),) = weights_at(step.run, [number], mesh=mesh)
    return params


def _write(step: Step, folder: Path, started: bool) -> None:
    """Write the weights of a step as a model folder, unless it is there."""
    facts, config = directory.read(step.run), read_config(step.run)
    parent = _parent(str(step.run), step, branch=False)
    whose = {name: parent[name] for name in ("step", "seedlog")} | {"digest": facts["digest"]}
    card = f"{OURS}\n\n{json.dumps(whose)}\n"
    there = (folder / CARD).read_text(encoding="utf-8") if processes.first() and (folder / CARD).exists() else None
    there = processes.exchange({0: there} if processes.first() else {})[0]
    if there == card:
        return
    if there is not None and started:
        raise ValueError(f"{folder} has other weights than those of step {parent['step']} of {step.run}: restore it")
    if there is not None and there.startswith(OURS) and processes.first():
        shutil.rmtree(folder)
    model, dtype = outline_of(step.run), jnp.dtype(config.model.param_dtype)
    check_new(folder, nbytes=dtype.itemsize * sum(map(math.prod, param_shapes(model.config).values())))
    processes.connect(mesh := make_mesh())
    ((_, params),) = weights_at(step.run, [parent["step"]], mesh=mesh)
    save_model(folder, dataclasses.replace(model, params=params), dtype=dtype, card=card)


def config_of(run: str | Path) -> config_dict.ConfigDict:
    """The fields of a run, for another run with others: with `branch_from` one that goes on from its weights.

    Paths are as they are found from here. Raises FileNotFoundError where there is no run, ValueError where its
    config.json is damaged.
    """
    config = default_config()
    with config.unlocked():
        config.update(dataclasses.asdict(read_config(Path(run))))
    return config
