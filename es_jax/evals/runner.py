"""Evaluation of a run's steps: accuracy on tasks, KL and drift. Each (task, step) is done once."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from tqdm.auto import tqdm

from es_jax.core import processes
from es_jax.core.chunked_map import ceil_div
from es_jax.evals import drift as drifts
from es_jax.evals.kl import kl, sample
from es_jax.evals.weight_source import (
    Fields,
    WeightSource,
    check_folder,
    claim_folder,
    of_model,
    of_run,
    with_date,
)
from es_jax.generate.engine import engine_for
from es_jax.rundir.best import step_of
from es_jax.rundir.directory import changed_sources, compilation_cache, write_json
from es_jax.rundir.metrics import Jsonl
from es_jax.rundir.places import MODELS, is_run, located, run_and_step, shape_source
from es_jax.scoring.heldout import HeldOut, cast, evaluate
from es_jax.scoring.row_results import EvalsFile, read_evals
from es_jax.scoring.sampled import SampledFile, Sampling, sample_rows
from es_jax.tasks import name_and_options
from es_jax.tasks.outside import is_reference
from es_jax.tasks.task import Task
from es_jax.training import kept_rows
from es_jax.training.config import RunConfig, read_config
from es_jax.training.config_groups import MeshConfig, ModelConfig, check_date
from es_jax.training.es import Evaluator
from es_jax.training.method import TokenLists
from es_jax.training.run_tasks import (
    by_label,
    held_out,
    make_task,
    other_task,
    rows_of,
    source_digests,
    takes_rows,
)
from es_jax.training.sizes import SLOTS
from es_jax.training.state import base_config, compute_dtype, mesh_of, perturbed_count
from es_jax.weights.model import config_only

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Options:
    """How to evaluate. A field that is None is as in the run's config.

    Attributes:
      rows: test rows of each task, at least 1.
      max_prompt_tokens: the longest prompt allowed, in tokens.
      max_new_tokens: tokens after which a completion is cut.
      slots: how many prompts are decoded at once; 64 for a model that no run made.
      data_dir: a folder of folders of rows, named like their tasks (`-` may be `_`). None is each task's own rows, and
        those of the run for the task that was trained.
      template_date: the day that the chat template sees, such as "2026-11-27". None is the run's; for a model, that of
        the folder's rows, or today.
      kl_rows: how many of the rows KL is measured on.
      kl_tokens: the longest continuation for KL, in tokens.
      kl_seed: the seed of these continuations.
      samples: n, how many completions of each row are also drawn, for pass@1..n and the majority's vote. None is none.
      temperature: of the drawn completions; 1 by default.
      top_p: of the drawn completions; 1 by default.
      sample_seed: the seed of the drawn completions; 0 by default.

    Raises:
      ValueError: a number is out of range, the date is not a date, or a field of drawn completions is set without
        `samples`.
    """

    rows: int | None = None
    max_prompt_tokens: int | None = None
    max_new_tokens: int | None = None
    slots: int | None = None
    data_dir: str | None = None
    template_date: str | None = None
    kl_rows: int | None = None
    kl_tokens: int = 256
    kl_seed: int = 0
    samples: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    sample_seed: int | None = None

    def __post_init__(self):
        check_date("template_date", self.template_date)
        sampling = ("temperature", "top_p", "sample_seed")
        for field, value in vars(self).items():
            if field not in ("data_dir", "template_date", "kl_seed", *sampling) and value is not None and value < 1:
                raise ValueError(f"{field} is {value}: it must be at least 1")
        if self.samples is None and (given := [name for name in sampling if getattr(self, name) is not None]):
            raise ValueError(f"{given[0]} is {getattr(self, given[0])} without samples: set samples, to 16 for example")
        _ = self.sampling

    @property
    def sampling(self) -> Sampling | None:
        """How rows are sampled; None without samples. Raises ValueError."""
        if self.samples is None:
            return None
        numbers = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.sample_seed}
        return Sampling(self.samples, **{name: x for name, x in numbers.items() if x is not None})  # type: ignore[arg-type]


def evaluate_run(
    workdir: str | Path,
    *,
    tasks: Sequence[str | Task] | None = None,
    every: int | None = None,
    steps: Sequence[int | str] | None = None,
    kl: bool = False,
    drift: bool = False,
    base: str | None = None,
    out: str | Path | None = None,
    options: Options = Options(),
    mesh: Mesh | None = None,
) -> Fields:
    """Evaluates steps of a run, or a model, and writes evals/<task>.jsonl, evals/kl.jsonl and evals/drift.jsonl.

    The weights of a step come from its checkpoint if there is one, and otherwise from a replay of the seed log. A
    finished (task, step) is not done again. Step 0, the base model, is always evaluated, because the rest is compared
    with it.

    Args:
      workdir: a run's directory, RUN@STEP for one step of it, or a model: a folder, a .gguf file, a name on the hub or
        "lab".
      tasks: tasks, or names of tasks. By default those that the run evaluated.
      every: at least 1: steps 0, every, 2·every, … and the last. By default the run's evals.every.
      steps: these steps instead. "best" is the best step of a run with train.keep_best.
      kl: True also measures KL(base ‖ now) in nats on the prompts of each task.
      drift: True also measures ‖θ − θ₀‖.
      base: for a model, the one that it was trained from. That is then step 0, and the model is step 1.
      out: the folder of the files. By default workdir/evals, if `workdir` is a folder. Compiled programs are kept in
        its cache folder, or in the run's own.
      options: sizes and limits.
      mesh: the devices; all of them by default.

    Returns:
      {"out": folder, "warnings": […], "tasks": {task: rows}, "samples": {task: rows}, "kl": rows, "drift": rows}, with
        the rows of the chosen steps.

    Raises:
      ValueError: what is asked for does not exist or does not fit, before anything is computed.
      OSError: a file is missing or cannot be written.

    Examples:
      >>> import tempfile
      >>> from es_jax import run
      >>> config = {
      ...     "model": {"source": "lab"},
      ...     "task": {"name": "lab-add", "train_size": 8},
      ...     "es": {"population": 4, "sigma": 0.01},
      ...     "decode": {"max_prompt_tokens": 16, "max_new_tokens": 6},
      ...     "train": {"steps": 2},
      ...     "evals": {"every": 0, "rows": 8},
      ... }
      >>> workdir = tempfile.mkdtemp()
      >>> _ = run(config, workdir)
      >>> found = evaluate_run(workdir, tasks=["lab-subtract"], steps=[2])
      >>> [(row["step"], row["n"]) for row in found["tasks"]["lab-subtract"]]
      [(0, 8), (2, 8)]
    """
    workdir, steps = run_and_steps(workdir, base, steps)
    path = Path(workdir)
    run = is_run(path)
    if not run and base is None and (kl or drift):
        raise ValueError(
            f"{workdir} is a model, not a run: kl and drift need base, so set it to the model it was trained from"
        )
    with opened(workdir, base=base, out=out, date=options.template_date, mesh=mesh) as (source, folder, mesh):
        chosen = chosen_steps(source, every, steps)
        names = _wanted(path, source, tasks, options.data_dir) if run else tasks
        if names is None:
            raise ValueError("tasks is not set: a model has no tasks of its own, so name them")
        return _Evaluation(source, folder, names, chosen, options=options, mesh=mesh, kl=kl, drift=drift).run()


def run_and_steps(
    workdir: str | Path, base: str | None, steps: Sequence[int | str] | None
) -> tuple[str | Path, Sequence[int | str] | None]:
    """What to evaluate, and which steps of it: RUN@STEP without a base is that step of the run."""
    run, step = (workdir, None) if base is not None else run_and_step(workdir)
    return run, [step] if steps is None and step is not None else steps


@contextlib.contextmanager
def opened(
    workdir: str | Path, *, base: str | None, out: str | Path | None, date: str | None, mesh: Mesh | None
) -> Iterator[tuple[WeightSource, Path, Mesh]]:
    """A context that yields what is evaluated, the folder of its rows, and the devices, as `evaluate_run` describes.
    Inside it, compiled programs are kept next to the rows, or in the run's own cache folder."""
    path = Path(workdir)
    run = is_run(path)
    if run and base is not None:
        raise ValueError(f"base is {base!r}, but {workdir} is a run, which knows its base model: leave base out")
    if not run:
        _check_models(str(workdir), base, out)
    if mesh is None:  # all devices, whatever the run used, in groups that have room for the model
        config = read_config(path, needs=MODELS) if run else RunConfig(model=ModelConfig(source=str(workdir)))
        config = dataclasses.replace(config, mesh=MeshConfig())
        mesh = mesh_of(config, base_config(config))
    processes.connect(mesh)
    folder = path / "evals" if out is None else Path(out)
    with compilation_cache((path if run and out is None else folder) / "cache"):
        source = of_run(path, mesh) if run else of_model(str(workdir), base, mesh)
        yield with_date(source, folder, date, run=run), folder, mesh


def _check_models(workdir: str, base: str | None, out: str | Path | None) -> None:
    """Raises ValueError or OSError if there is no folder to write to, or if one of the two is not a model."""
    if out is None and not Path(workdir).is_dir():
        raise ValueError(
            f"--workdir is {workdir!r}, which is not a folder to write to: if it is a model ('lab', a .gguf file or a "
            "hub name), set --out; if it should be a run's directory or a model folder, check the path"
        )
    sources = {f"--workdir is {workdir!r}, which is neither a run's directory nor a model": workdir}
    for meaning, source in (sources if base is None else sources | {f"--base is {base!r}": base}).items():
        try:
            config_only(shape_source(source))
        except (ValueError, OSError) as error:
            raise (ValueError if isinstance(error, ValueError) else OSError)(f"{meaning}: {error}") from None


def _wanted(
    workdir: Path, source: WeightSource, tasks: Sequence[str | Task] | None, data_dir: str | None
) -> list[str | Task]:
    """The tasks, or those that the run evaluated, with paths resolved from the working directory. Raises
    FileNotFoundError if a file or a folder of rows is in none of its places."""
    config, needs = source.config, ["evals.tasks"] if tasks is None else []
    own_names = [config.task.name, *config.evals.tasks]
    names: list[str | Task] = [*own_names]
    if tasks is not None:
        names = [
            _as_named(located("evals.tasks", task, source.facts, workdir, needed=True), own_names)
            if isinstance(task, str)
            else task
            for task in tasks
        ]
    if own := config.task.name in names:
        needs += ["task.name", "task.grader"]
    if data_dir is None:
        needs += ["task.data_dir"] * own + ["evals.data_dir"] * (len(names) > own)
    read_config(workdir, needs=needs)
    return names


def _as_named(task: str, names: Sequence[str]) -> str:
    """The name among these that names the same task, such as one with a relative path; else the name itself."""
    whole = lambda name: os.path.realpath(os.path.expanduser(name)) if is_reference(name) else name  # noqa: E731
    return next((name for name in names if whole(name) == whole(task)), task)


def chosen_steps(source: WeightSource, every: int | None, steps: Sequence[int | str] | None) -> list[int]:
    """Step 0 and the given steps, or else every `every`-th step and the last. "best" needs a run with train.keep_best.
    Raises ValueError if there is no such step."""
    if steps is not None:
        numbers = [step_of(source.workdir or "a model", step, flag="--steps") for step in steps]
        for step in numbers:
            if not 0 <= step <= source.last:
                raise ValueError(f"--steps has {step}, but there are only steps 0 to {source.last}: choose among them")
        return sorted({0, *numbers})
    spacing = every or source.config.evals.every or source.last or 1
    if spacing < 1:
        raise ValueError(f"every is {every}: it must be at least 1")
    return sorted({*range(0, source.last + 1, spacing), source.last})


def _make_tasks(config: RunConfig, tasks: Sequence[str | Task], data_dir: str | None) -> dict[str, Task]:
    """The tasks by their names in files, with their rows: from `data_dir` if it is set and the task takes it, otherwise
    as in the run."""
    if data_dir is not None:
        config = dataclasses.replace(config, evals=dataclasses.replace(config.evals, data_dir=data_dir))
    trained = config.task.name if data_dir is None or not takes_rows(config.task.name) else None
    made: dict[str, Task] = {}
    for task in tasks:
        name = task if isinstance(task, str) else name_and_options(task)[0]
        if not isinstance(task, str) and made.get(name, task) is not task:
            raise ValueError(
                f"two of the tasks have the name {name!r}: evaluate them one by one, each with its own --out"
            )
        if not isinstance(task, str):
            made[name] = task
        elif name not in made:
            made[name] = make_task(config) if name == trained else other_task(config, name)
    return by_label(made.items())


class _Evaluation:
    """One call of `evaluate_run`: it first loads and checks everything, then works step by step."""

    def __init__(
        self,
        source: WeightSource,
        folder: Path,
        wanted: Sequence[str | Task],
        steps: Sequence[int],
        *,
        options: Options,
        mesh: Mesh,
        kl: bool,
        drift: bool,
    ):
        self.source, self.folder, self.steps, self.options = source, folder, steps, options
        self.measure_drift, config, model = drift, source.config, source.model
        limit, rows = options.max_prompt_tokens or config.decode.max_prompt_tokens, options.rows or config.evals.rows
        tasks = _make_tasks(config, wanted, options.data_dir)
        self.warnings = changed_sources(source.facts, source_digests(tasks))
        self.kept = [place / kept_rows.FOLDER for place in (source.workdir, folder) if place is not None]
        tests = {name: rows_of(task, "test", rows, name, self.kept) for name, task in tasks.items()}
        self.tests = held_out(config, tasks, tests, model, limit)
        self.max_new_tokens = options.max_new_tokens or config.decode.max_new_tokens
        self.engine = engine_for(
            model.config,
            [ids for test in self.tests for ids in test.prompts],
            slots=options.slots or config.decode.slots or SLOTS,
            max_new_tokens=self.max_new_tokens,
            stop_token_ids=model.stop_token_ids,
        )
        evaluator = Evaluator.of(config, self.engine, mesh)
        each = ceil_div(max(len(test.prompts) for test in self.tests), evaluator.lanes)  # rows of a lane
        own = dataclasses.replace(self.engine, slots=min(self.engine.slots, each))  # more slots would decode padding
        self.evaluator = dataclasses.replace(evaluator, engine=own)
        self.sampling = options.sampling
        if processes.first():
            check_folder(folder, source)
        self.files = {test.name: EvalsFile(folder, test.name) for test in self.tests}
        for test in self.tests:
            self.files[test.name].check(digest=test.digest, max_new_tokens=self.max_new_tokens, n=len(test.examples))
        self.sampled = {test.name: SampledFile(folder, test.name, s) for test in self.tests if (s := self.sampling)}
        for test in self.tests if self.sampling else ():
            self.sampled[test.name].check(digest=test.digest, max_new_tokens=self.max_new_tokens, n=len(test.examples))
            if not callable(getattr(test.task, "extract_answer", None)):
                self.warnings.append(
                    f"task {test.name!r} has no majority voting, since it does not report the answer that it reads "
                    "from a completion: give it a method extract_answer(example, completion)"
                )
        self.kl, self.drift = (Jsonl(folder / name) for name in ("kl.jsonl", "drift.jsonl"))
        kl_rows = read_evals(self.kl.path)
        self.kl_inputs = {test.name: self._kl_input(test, kl_rows) for test in self.tests if kl}
        done = self._agreed([[row["step"], row["task"]] for row in kl_rows])
        # step → tasks to evaluate, tasks to measure KL on, whether to measure drift, tasks to sample
        self.due: dict[int, tuple[list[HeldOut], list[str], bool, list[HeldOut]]] = {}
        for step in steps:
            accuracies = [test for test in self.tests if step not in done["rows"][test.name]]
            kls = [name for name in self.kl_inputs if step and [step, name] not in done["kl"]]
            drift_due = bool(drift and step and step not in done["drift"])
            samples = [test for test in self.tests if self.sampling and step not in done["samples"][test.name]]
            if accuracies or kls or drift_due or samples:
                self.due[step] = accuracies, kls, drift_due, samples

    def run(self) -> Fields:
        """Do what is not done yet, and return the rows of the steps."""
        if processes.first():
            claim_folder(self.folder, self.source)
            for test in self.tests:
                kept_rows.keep(test.task, "test", test.name, test.examples, self.kept)
        if self.due:
            total = sum(len(test.examples) for accuracies, *_ in self.due.values() for test in accuracies)
            total += sum(len(self.kl_inputs[name][0]) for _, kls, *_ in self.due.values() for name in kls)
            n = self.sampling.samples if self.sampling else 0
            total += n * sum(len(test.examples) for *_, samples in self.due.values() for test in samples)
            quiet = None if processes.first() else True  # None: shown in a terminal only
            with tqdm(total=total, unit="row", dynamic_ncols=True, disable=quiet) as self.bar:
                self._steps()
        drift = self._rows("drift") if self.measure_drift else []
        warnings = self.warnings + [text for row in drift if (text := drifts.warning(row))]
        if processes.first():
            for text in warnings:
                logger.warning(text)
        return {
            "out": str(self.folder),
            "warnings": warnings,
            "tasks": {name: self._rows(name) for name in self.files},
            "samples": {name: self._rows(f"samples/{s.name}/{name}") for name in self.sampled if (s := self.sampling)},
            "kl": [row for row in self._rows("kl") if row["task"] in self.kl_inputs],
            "drift": drift,
        }

    def _rows(self, name: str) -> list[Fields]:
        return [row for row in read_evals(self.folder / f"{name}.jsonl") if row["step"] in self.steps]

    def _agreed(self, kl: list[list]) -> Fields:
        """What is already done, as process 0 sees it. All processes raise ValueError if one of them evaluates something
        else."""
        tests = {test.name: test.digest for test in self.tests}
        request = [self.source.marks(self.source.last), self.steps, tests, repr(self.options)]
        rows = {name: sorted(file.steps) for name, file in self.files.items()}
        samples = {name: sorted(file.steps) for name, file in self.sampled.items()}
        done = {"rows": rows, "kl": kl, "drift": sorted(self.drift.steps), "samples": samples}
        views = processes.exchange({jax.process_index(): [request, done]})
        differing = [process for process, (other, _) in views.items() if other != views[0][0]]
        if differing:
            raise ValueError(
                f"process {differing[0]} evaluates something else than process 0: give all processes the same "
                "command, run, model files and rows"
            )
        return views[0][1]

    def _steps(self) -> None:
        source, dtype = self.source, compute_dtype(self.source.config)
        kl_names = [name for name in self.kl_inputs if any(name in kls for _, kls, *_ in self.due.values())]
        needs_drift = any(drift_due for _, _, drift_due, _ in self.due.values())
        base = source.base() if kl_names or needs_drift else None
        small = cast(base, dtype) if kl_names else None
        continuations = {name: self._continuations(name, small) for name in kl_names}
        predicted = source.predicted(max(self.due), base) if needs_drift else {}
        for step, params in source.weights([*self.due]):
            self.bar.set_description(f"step {step}")
            accuracies, kls, drift_due, samples = self.due[step]
            for test, results in evaluate(self.evaluator, source.model, params, accuracies, done=self.bar.update):
                self.files[test.name].add(step, results, digest=test.digest, max_new_tokens=self.max_new_tokens)
            self._sample(step, params, samples)
            if drift_due:
                sigma, dim = source.sigma(step), perturbed_count(source.config, base)
                row = drifts.drift(base, params, sigma=sigma, predicted=predicted.get(step), dim=dim)
                self.drift.write({"step": step, **row})
            for name in kls:
                prompts, facts = self.kl_inputs[name]
                try:
                    row = kl(self.engine.config, small, cast(params, dtype), prompts, continuations[name])
                except ValueError as error:
                    raise ValueError(f"step {step}, task {name!r}: {error}") from None
                self.kl.write({"step": step, "task": name, **row, **facts})
                self.bar.update(row["n"])

    def _sample(self, step: int, params: Any, tests: Sequence[HeldOut]) -> None:
        if self.sampling is None or not tests:
            return
        sampler = self.evaluator.sampling(self.sampling.temperature, self.sampling.top_p)
        rows = sample_rows(sampler, self.source.model, params, tests, self.sampling, done=self.bar.update)
        for test, results in rows:
            file = self.sampled[test.name]
            file.add(step, results, digest=test.digest, max_new_tokens=self.max_new_tokens)

    def _kl_input(self, test: HeldOut, rows: Sequence[Fields]) -> tuple[TokenLists, Fields]:
        """The prompts, and what must be equal for two measurements of KL to be comparable. Raises ValueError if the
        file's rows differ in it."""
        prompts, options = test.prompts[: self.options.kl_rows], self.options
        digest = hashlib.sha256(json.dumps([list(ids) for ids in prompts]).encode()).hexdigest()[:16]
        facts = {"max_new": options.kl_tokens, "seed": options.kl_seed, "rows": digest}
        for row in rows:
            differing = [f"{k} = {row[k]!r}, not {v!r}" for k, v in facts.items() if row[k] != v]
            if differing and row["task"] == test.name:
                raise ValueError(
                    f"{self.kl.path} measured {test.name} with {'; '.join(differing)}: use the same --rows, "
                    "--data_dir, --kl_rows, --kl_tokens and --kl_seed, or another --out"
                )
        return prompts, facts

    def _continuations(self, name: str, base: Any) -> list[list[int]]:
        """The base model's continuations: sampled once and kept in evals/continuations/<task>.json."""
        path, (prompts, facts) = self.folder / "continuations" / f"{name}.json", self.kl_inputs[name]
        model, options = self.source.model, self.options
        known = {0: json.loads(path.read_bytes())} if processes.first() and path.exists() else {}
        content = processes.exchange(known).get(0, {})
        if content.get("facts") == facts:
            return content["tokens"]
        self.bar.set_description(f"continuations of {name}")
        tokens = sample(
            model.config, base, prompts, stop_token_ids=model.stop_token_ids, slots=self.engine.slots,
            max_new_tokens=options.kl_tokens, seed=options.kl_seed,
        )  # fmt: skip
        if processes.first():
            write_json(path, {"facts": facts, "tokens": tokens})
        return tokens
