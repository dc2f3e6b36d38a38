"""Evaluation of a run's steps: accuracy by every view, KL and drift, each (task, step) once."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from tqdm.auto import tqdm

from es_jax.core import processes
from es_jax.evals import drift as drifts
from es_jax.evals import provenance
from es_jax.evals.kl import Continuation, kl, sample
from es_jax.evals.weight_source import Subject, is_run, of_model, of_run
from es_jax.generate.engine import Engine, check_context
from es_jax.rundir.directory import compilation_cache, write_json
from es_jax.rundir.metrics import LAST, Jsonl
from es_jax.scoring.heldout import HeldOut, cast, evaluate
from es_jax.scoring.row_results import EvalsFile, read_evals
from es_jax.tasks import get_task
from es_jax.tasks.rows import rows_folder
from es_jax.tasks.task import Task
from es_jax.training.config import RunConfig, read_config
from es_jax.training.es import Evaluator
from es_jax.training.fields import MeshConfig, ModelConfig
from es_jax.training.loop import make_task, other_task
from es_jax.training.state import base_config, compute_dtype, mesh_of
from es_jax.weights.model import config_only

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Options:
    """How to evaluate; what is None is as in the run's config.

    Attributes:
      size: test rows of each task.
      max_prompt_tokens, max_new_tokens, slots: of decoding.
      data_dir: a folder of folders of rows, named like their tasks (`-` may be `_`); None: each task's own rows, and
        for the task that was trained those of the run.
      kl_size: how many of the rows KL is measured on.
      kl_tokens: the longest continuation, in tokens.
      kl_seed: of the continuations.
    """

    size: int | None = None
    max_prompt_tokens: int | None = None
    max_new_tokens: int | None = None
    slots: int | None = None
    data_dir: str | None = None
    kl_size: int | None = None
    kl_tokens: int = 256
    kl_seed: int = 0

    def __post_init__(self):
        for field in ("size", "max_prompt_tokens", "max_new_tokens", "slots", "kl_size", "kl_tokens"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field} is {value}: it must be at least 1")


def evaluate_run(
    workdir: str | Path,
    *,
    tasks: Sequence[str] | None = None,
    every: int | None = None,
    steps: Sequence[int] | None = None,
    kl: bool = False,
    drift: bool = False,
    base: str | None = None,
    out: str | Path | None = None,
    options: Options = Options(),
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Evaluate steps of a run, or a model, and write evals/<task>.jsonl, evals/kl.jsonl and evals/drift.jsonl.

    The weights of a step come from its checkpoint if there is one, otherwise they are replayed from the seed log. A
    finished (task, step) is not done again. Step 0, the base model, is always evaluated: the rest is compared with it.

    Args:
      workdir: a run's directory; or a model folder, .gguf file or hub name.
      tasks: names of tasks; those that the run evaluated, by default.
      every: steps 0, every, 2·every, … and the last; the run's evals.every by default.
      steps: these steps instead.
      kl: also measure KL(base ‖ now) on the prompts of each task.
      drift: also measure ‖θ − θ₀‖.
      base: of a model, what it was trained from; it becomes step 0, and the model step 1.
      out: the folder of the files; workdir/evals by default, where workdir is a folder. Compiled programs are kept in
        its cache folder, or in the run's own.
      options: sizes and limits.
      mesh: devices; all by default.

    Returns:
      {"out": folder, "warnings": […], "tasks": {task: rows}, "kl": rows, "drift": rows}; rows of the steps asked for.

    Raises:
      ValueError, OSError: what is asked for does not exist or does not fit, before anything is computed.
    """
    run = is_run(Path(workdir))
    if not run and base is None and (kl or drift):
        raise ValueError(f"{workdir} is a model, not a run: kl and drift need base, the model it was trained from")
    if run and base is not None:
        raise ValueError(f"base is {base!r}, but {workdir} is a run, which knows its base model: leave base out")
    if not run:
        _check_models(str(workdir), base, out)
    if mesh is None:
        mesh = _mesh(read_config(Path(workdir)) if run else RunConfig(model=ModelConfig(source=str(workdir))))
    processes.connect(mesh)
    folder = Path(out) if out is not None else Path(workdir) / "evals"
    with compilation_cache((Path(workdir) if run and out is None else folder) / "cache"):
        subject = of_run(Path(workdir), mesh) if run else of_model(str(workdir), base, mesh)
        wanted = chosen_steps(subject, every=every, steps=steps)
        names = list(tasks) if tasks is not None else _own_tasks(subject.config, run)
        return _Evaluation(subject, folder, names, wanted, options=options, mesh=mesh, kl=kl, drift=drift).run()


def _check_models(workdir: str, base: str | None, out: str | Path | None) -> None:
    """Raises ValueError or OSError where rows have no folder, or one of the two is no model."""
    if out is None and not Path(workdir).is_dir():
        raise ValueError(
            f"--workdir is {workdir!r}, which is no folder, so there is none to write to: if it is a model ('lab', a "
            ".gguf file or a hub name) set --out; if it should be a run's directory or a model folder check the path"
        )
    for source, meaning in ((workdir, "--workdir is {!r}, no run's directory and no model"), (base, "--base is {!r}")):
        try:
            if source is not None:
                config_only(source)
        except (ValueError, OSError) as error:
            kind = ValueError if isinstance(error, ValueError) else OSError
            raise kind(f"{meaning.format(source)}: {error}") from None


def _mesh(config: RunConfig) -> Mesh:
    """All devices there are, whatever the run had, in groups that have room for the model."""
    config = dataclasses.replace(config, mesh=MeshConfig())
    return mesh_of(config, base_config(config))


def chosen_steps(subject: Subject, *, every: int | None, steps: Sequence[int] | None) -> list[int]:
    """The steps to evaluate, in order, step 0 among them."""
    if steps is not None:
        for step in steps:
            if not 0 <= step <= subject.last:
                raise ValueError(f"--steps has {step}, but there are steps 0 to {subject.last}: choose of them")
        return sorted({0, *steps})
    spacing = every or subject.config.evals.every or subject.last or 1
    if spacing < 1:
        raise ValueError(f"every is {every}: it must be at least 1")
    return sorted({*range(0, subject.last + 1, spacing), subject.last})


def _own_tasks(config: RunConfig, run: bool) -> list[str]:
    if not run:
        raise ValueError("tasks are not given: a model has none of its own, so name them")
    return list(dict.fromkeys([config.task.name, *config.evals.tasks]))


def make_tasks(config: RunConfig, names: Sequence[str], options: Options) -> dict[str, Task]:
    """The tasks by name, with their rows' folders."""
    made = {}
    for name in names:
        if options.data_dir is not None and not name.startswith("lab-"):
            made[name] = get_task(name, data_dir=rows_folder(options.data_dir, name))
        else:
            made[name] = make_task(config) if name == config.task.name else other_task(config, name)
    return made


class _Evaluation:
    """One call of `evaluate_run`: what is asked for is loaded and checked first, then done step by step."""

    def __init__(
        self,
        subject: Subject,
        folder: Path,
        names: Sequence[str],
        steps: Sequence[int],
        *,
        options: Options,
        mesh: Mesh,
        kl: bool,
        drift: bool,
    ):
        self.subject, self.folder, self.steps, self.options = subject, folder, steps, options
        config = subject.config
        limit = options.max_prompt_tokens or config.decode.max_prompt_tokens
        size = options.size or config.evals.rows
        made = make_tasks(config, names, options)
        self.tests = [
            HeldOut.of(task, task.test(size), subject.model, max_prompt_tokens=limit) for task in made.values()
        ]
        self.max_new_tokens = options.max_new_tokens or config.decode.max_new_tokens
        self.engine = self._engine(options.slots or config.decode.slots)
        self.evaluator = Evaluator.of(config, self.engine, mesh)
        if processes.first():
            provenance.check(folder, subject)
        self.files = {held.name: EvalsFile(folder, held.name) for held in self.tests}
        for held in self.tests:
            self.files[held.name].check(digest=held.digest, max_new_tokens=self.max_new_tokens, n=len(held.examples))
        self.kl, self.drift = Jsonl(folder / "kl.jsonl", last_step=LAST), Jsonl(folder / "drift.jsonl", last_step=LAST)
        self.ask_kl, self.ask_drift = kl, drift
        self.kl_done = {(row["step"], row["task"]): row for row in read_evals(self.kl.path)}
        for row in self.kl_done.values():
            self._check_kl(row)
        self.done = self._agreed()

    def run(self) -> dict[str, Any]:
        """Do what is not done, and give back the rows asked for."""
        todo = [step for step in self.steps if self._accuracy(step) or self._kl(step) or self._drift(step)]
        warnings: list[str] = []
        if processes.first():
            provenance.claim(self.folder, self.subject)
        if todo:
            total = sum(len(h.examples) for s in todo for h in self._accuracy(s)) + sum(
                self._kl_size(h) for s in todo for h in self._kl(s)
            )
            with tqdm(total=total, unit="row", dynamic_ncols=True, disable=not processes.first()) as self.bar:
                self._steps(todo)
        drift = [row for row in read_evals(self.drift.path) if row["step"] in self.steps]
        warnings = [text for row in drift if (text := drifts.warning(row))] if self.ask_drift else []
        for text in warnings if processes.first() else ():
            logger.warning(text)
        return {
            "out": str(self.folder),
            "warnings": warnings,
            "tasks": {held.name: self._rows(held.name) for held in self.tests},
            "kl": [r for r in read_evals(self.kl.path) if r["step"] in self.steps and r["task"] in self.files]
            if self.ask_kl
            else [],
            "drift": drift if self.ask_drift else [],
        }

    def _agreed(self) -> dict[str, Any]:
        """What is done already, as process 0 sees it, which writes it.

        Raises:
          ValueError: in all processes, where one was given something else to evaluate.
        """
        subject, tests = self.subject, {held.name: held.digest for held in self.tests}
        asked = [subject.model.digest, subject.last, repr(subject.config), self.steps, tests, repr(self.options)]
        done = {
            "rows": {name: sorted(file.steps) for name, file in self.files.items()},
            "kl": [list(key) for key in self.kl_done],
            "drift": sorted(self.drift.steps),
        }
        told = processes.exchange({jax.process_index(): [asked, done]})
        differing = [process for process, (of_other, _) in told.items() if of_other != told[0][0]]
        if differing:
            raise ValueError(
                f"process {differing[0]} evaluates something else than process 0: all need the same command, run, "
                "model files and rows"
            )
        return told[0][1]

    def _rows(self, name: str) -> list[dict[str, Any]]:
        return [row for row in read_evals(self.folder / f"{name}.jsonl") if row["step"] in self.steps]

    def _accuracy(self, step: int) -> list[HeldOut]:
        return [held for held in self.tests if step not in self.done["rows"][held.name]]

    def _kl(self, step: int) -> list[HeldOut]:
        return [held for held in self.tests if self.ask_kl and step and [step, held.name] not in self.done["kl"]]

    def _drift(self, step: int) -> bool:
        return bool(self.ask_drift and step and step not in self.done["drift"])

    def _steps(self, todo: Sequence[int]) -> None:
        dtype = compute_dtype(self.subject.config)
        needs_kl, needs_drift = any(map(self._kl, todo)), any(map(self._drift, todo))
        base = self.subject.base() if needs_kl or needs_drift else None
        small = cast(base, dtype) if needs_kl else None
        written = {h.name: self._continuations(h, small) for h in self.tests if any(h in self._kl(s) for s in todo)}
        predicted = self.subject.predicted(todo[-1], base) if needs_drift else {}
        for step, params in self.subject.weights(todo):
            self.bar.set_description(f"step {step}")
            for held, verdicts in evaluate(
                self.evaluator, self.subject.model, params, self._accuracy(step), done=self.bar.update
            ):
                self.files[held.name].add(step, verdicts, digest=held.digest, max_new_tokens=self.max_new_tokens)
            if self._drift(step):
                sigma = self.subject.sigma(step)
                row = drifts.drift(base, params, sigma=sigma, predicted=predicted.get(step))
                self.drift.write({"step": step, **row})
            for held in self._kl(step):
                row = kl(self.engine.config, small, cast(params, dtype), written[held.name])
                self.kl.write({"step": step, "task": held.name, **row, **self._kl_facts(held)})
                self.bar.update(self._kl_size(held))

    def _engine(self, slots: int) -> Engine:
        prompts = [ids for held in self.tests for ids in held.prompts]
        longest, config = max(map(len, prompts)), self.subject.model.config
        check_context(config, longest, self.max_new_tokens)
        return Engine(
            config,
            slots=min(slots, len(prompts)),
            max_prompt_tokens=longest,
            max_new_tokens=self.max_new_tokens,
            stop_token_ids=self.subject.model.stop_token_ids,
        )

    def _kl_size(self, held: HeldOut) -> int:
        return min(self.options.kl_size or len(held.prompts), len(held.prompts))

    def _kl_facts(self, held: HeldOut) -> dict[str, Any]:
        """What must be equal for two measurements of KL to be comparable."""
        prompts = json.dumps([list(ids) for ids in held.prompts[: self._kl_size(held)]])
        return {
            "max_new": self.options.kl_tokens,
            "seed": self.options.kl_seed,
            "rows": hashlib.sha256(prompts.encode()).hexdigest()[:16],
        }

    def _check_kl(self, row: dict[str, Any]) -> None:
        held = next((held for held in self.tests if held.name == row["task"]), None)
        if not self.ask_kl or held is None:
            return
        differing = [f"{k} = {row[k]!r}, not {v!r}" for k, v in self._kl_facts(held).items() if row[k] != v]
        if differing:
            raise ValueError(
                f"{self.kl.path} measured {held.name} with {'; '.join(differing)}: use the same --size, --data_dir, "
                "--kl_size, --kl_tokens and --kl_seed, or another --out"
            )

    def _continuations(self, held: HeldOut, base: Any) -> list[Continuation]:
        """What the base model wrote: sampled once, and kept in evals/continuations/<task>.json."""
        path, facts = self.folder / "continuations" / f"{held.name}.json", self._kl_facts(held)
        prompts = held.prompts[: self._kl_size(held)]
        content = json.loads(path.read_text(encoding="utf-8")) if processes.first() and path.exists() else {}
        (content,) = processes.exchange({0: content} if processes.first() else {}).values()
        if content.get("facts") == facts:
            return [Continuation(p, t) for p, t in zip(prompts, content["tokens"], strict=True)]
        self.bar.set_description(f"continuations of {held.name}")
        model, options = self.subject.model, self.options
        rows = sample(
            model.config, base, prompts, stop=model.stop_token_ids, slots=self.engine.slots,
            max_new_tokens=options.kl_tokens, seed=options.kl_seed,
        )  # fmt: skip
        if processes.first():
            write_json(path, {"facts": facts, "tokens": [list(row.tokens) for row in rows]})
        return rows
