"""The training loop. A step t = 1..T of Evolution Strategies with Anchored Weight Decay (θ₀ the base weights):

    seeds and signs of N members               a function of (run seed, t): Population.members
    for each round of members:                 Evaluator.members in es.py, a group of devices a member
        θ + signₙ σ εₙ                         made where it decodes: es/noise.py
        completions of the step's prompts      greedy, on the group: generate/
        rₙ, their mean reward                  on the host, while the next round decodes: scoring/grading.py
    wₙ, the shaped rewards                     z-scores, on the host: es/shaping.py
    g = −1/N Σ wₙ signₙ εₙ                     state.update: each device makes ε again for its own slice of θ, and
    θ ← θ − α g;  θ ← θ₀ + (1 − αλ)(θ − θ₀)    nothing is sent: optim/chains.py, and optim/anchored.py for the anchor
    metrics.jsonl, samples.jsonl, tb/          the first process: recorder.py
    seedlog.jsonl: seeds, rewards, weights     on disk: now the step is finished, and a kill does not undo it
    ckpt/ and evals/, where they are due       with the last step in any case

GRPO (grpo.py) takes the place of what comes before the metrics. A killed run goes on as weights_at.resume says.
"""

import dataclasses
import datetime
import functools
import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import config_dict

from es_jax.core import processes, rng
from es_jax.core.tree import count
from es_jax.generate.engine import Engine, engine_for
from es_jax.models.sharding import param_shardings
from es_jax.profiling.clock import Clock, split
from es_jax.profiling.trace import Profile
from es_jax.profiling.utilisation import utilisation
from es_jax.rundir import directory
from es_jax.rundir.checkpoints import Checkpoints, nbytes
from es_jax.rundir.directory import compilation_cache
from es_jax.rundir.metrics import say
from es_jax.rundir.seed_log import SeedLog, steps_done
from es_jax.rundir.tracker import Tracker
from es_jax.scoring.grading import Graded, Grader
from es_jax.scoring.heldout import checked_prompt, evaluate
from es_jax.scoring.row_results import EvalsFile, set_aside
from es_jax.scoring.workers import Submit, workers_of
from es_jax.tasks.outside import label
from es_jax.tasks.task import Example, Task
from es_jax.training import kept_rows
from es_jax.training.best_step import BestStep, check_metric
from es_jax.training.config import RunConfig, freeze
from es_jax.training.es import Evaluator
from es_jax.training.method import StepResult
from es_jax.training.recorder import Recorder, StepRecord
from es_jax.training.run_tasks import (
    by_label,
    held_out,
    make_task,
    other_task,
    rows_of,
    source_digests,
    with_task,
)
from es_jax.training.sizes import choose_slots, members_at_once, prompts_of_member, why_not_in_place
from es_jax.training.start import Start, start_of, with_weights
from es_jax.training.state import (
    State,
    base_config,
    check_finite,
    choose_mesh,
    compute_dtype,
    load_base,
    perturbed_count,
)
from es_jax.training.weights_at import check_steps, resume
from es_jax.weights.files import small_sums
from es_jax.weights.model import load_outline

# Fields of `decode` that may be None; a run chooses their numbers when it starts.
CHOSEN = ("slots", "members_at_once")


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What `run` returns.

    Attributes:
      workdir: the run's directory.
      step: the last finished step.
      params: the weights after it, in model.param_dtype, sharded over the devices.
      reward: the mean reward of the last step's members; None if no step is finished.
      heldout: the last row of evals/<task>.jsonl; None without evaluation.

    Examples:
      >>> RunResult(Path("runs/lab"), step=2, params={}, reward=0.5, heldout=None).reward
      0.5
    """

    workdir: Path
    step: int
    params: Any
    reward: float | None
    heldout: dict[str, Any] | None


def run(
    config: RunConfig | config_dict.ConfigDict | dict,
    workdir: str | Path,
    *,
    task: Task | str | None = None,
    branch_from: str | None = None,
    callback: Callable[[StepRecord], Any] | None = None,
) -> RunResult:
    """Trains a model, from the start or from where the directory's run stopped. The bits are the same either way.

    Args:
      config: a `RunConfig`, the ConfigDict of a config file, or a dict of groups and their fields. A field that is left
        out has its default.
      workdir: the run's directory, which is made if it does not exist.
      task: used instead of task.name: a name, or a task itself. config.json keeps the name and options that make the
        task again, if its class tells them. If it does not, give the task again to go on with the run or to evaluate
        it.
      branch_from: RUN@STEP or RUN, to start the new run from a step of that run (docs/resume.md).
      callback: called with a `StepRecord` after each step that this call finishes, once the step and its evaluation, if
        one is due, are on disk. Each process of the run calls it. Its result is ignored. An exception in it ends the
        run and is raised here. Finished steps stay, that one among them, and the same call goes on after them.

    Returns:
      The last finished step, its weights and its results.

    Raises:
      ValueError: fields, rows, weights or prompts are wrong, or the directory has another run; before any work starts.
        Or scores or weights are not finite; at their step.
      OSError: files are missing, before any work starts; or the disk is full, at its step. Finished steps stay.
      es_jax.core.processes.Preempted: SIGTERM came. The last finished step has a checkpoint.

    Examples:
      >>> import tempfile
      >>> config = {
      ...     "model": {"source": "lab"},
      ...     "task": {"name": "lab-add", "train_size": 8},
      ...     "es": {"population": 4, "sigma": 0.01},
      ...     "optim": {"learning_rate": 0.005, "anchor": {"penalty": "l2", "kappa": 1.0}},
      ...     "decode": {"max_prompt_tokens": 16, "max_new_tokens": 6},
      ...     "train": {"steps": 2},
      ...     "evals": {"rows": 8},
      ... }
      >>> result = run(config, tempfile.mkdtemp())
      >>> result.step, result.heldout["n"]
      (2, 8)
    """
    began = time.monotonic()
    config, workdir = config if isinstance(config, RunConfig) else freeze(config), Path(workdir)
    start = start_of(config if task is None else with_task(config, task), workdir, branch_from)
    config = start.config
    trained = make_task(config) if task is None or isinstance(task, str) else task
    others = ((name, other_task(config, name)) for name in config.evals.tasks if name != config.task.name)
    tasks = by_label([*others, (config.task.name, trained)])
    kept = [workdir / kept_rows.FOLDER]
    if start.parent and start.parent["branch"]:  # it takes its parent's rows, and keeps them itself
        kept.append(Path(start.parent["path"]) / kept_rows.FOLDER)
    train = rows_of(trained, "train", config.task.train_size, config.task.name, kept)
    every, size = config.evals.every, config.evals.rows
    tests = {name: rows_of(one, "test", size, name, kept) for name, one in tasks.items()} if every else {}
    workers = workers_of(trained, config.task.timeout_seconds)
    with processes.stoppable(), directory.claim(workdir), compilation_cache(workdir / "cache"), workers as submit:
        check_steps(config, workdir)
        with Tracker(config.train.tracker, workdir) as tracker:
            start = with_weights(start, workdir)
            result = _Run(start, workdir, tasks, train, tests, submit).train(began, tracker, callback)
        if config.train.tracker and jax.process_count() > 1:
            processes.barrier()  # a process that ends waits 30 s for the others, but uploading rows may take longer
        return result


def with_date(config: RunConfig, workdir: Path) -> RunConfig:
    """The config with the date that the run's chat template sees: the config's, or that of the run in the directory, or
    today. A run from before the field existed has none, and its template sees the clock's date. Process 0 decides."""
    if processes.first():
        date: str | None = datetime.date.today().isoformat()
        if (workdir / "config.json").exists():
            there = directory.read(workdir)["config"]
            begun = there.get("model", {}).get("template_date")
            fields = json.loads(json.dumps(dataclasses.asdict(config.with_date(begun))))
            for name in CHOSEN:
                if fields["decode"][name] is None:
                    fields["decode"][name] = there.get("decode", {}).get(name)
            same = there == fields
            date = begun if same or steps_done(workdir) else date
    date = processes.exchange({0: date} if processes.first() else {})[0]
    return config.with_date(config.model.template_date or date)


def with_numbers(config: RunConfig, engine: Engine, mesh: Mesh, known: Mapping[str, Any]) -> tuple[RunConfig, Engine]:
    """Both configs with decode.slots and decode.members_at_once: the config's values, those `known` from when the run
    began, or chosen ones."""
    slots, at_once = config.decode.slots, config.decode.members_at_once
    if slots is None:
        slots, why = known.get("slots"), f"decode.slots: {known.get('slots')}, the number from when the run began"
        if slots is None:
            slots, why = choose_slots(config, engine, mesh)
        say(why)
    engine = dataclasses.replace(engine, slots=min(slots, engine.slots))
    if at_once is None:
        at_once = known.get("members_at_once") or members_at_once(config, engine, mesh)
        at_once = processes.exchange({0: at_once} if processes.first() else {})[0]  # hosts may have different memory
    decode = dataclasses.replace(config.decode, slots=slots, members_at_once=at_once)
    return dataclasses.replace(config, decode=decode), engine


class _Run:
    """One process's run of the loop. `__init__` checks and loads everything, and brings the state to the last step."""

    def __init__(
        self,
        start: Start,
        workdir: Path,
        tasks: dict[str, Task],
        train: list[Example],
        tests: dict,
        submit: Submit,
    ):
        facts, config = directory.read(workdir) if steps_done(workdir) else {}, start.config
        self.mesh, why = choose_mesh(config, base_config(config), before=facts.get("mesh", {}).get("model"))
        if self.mesh.size > 1:
            say(why)
        processes.connect(self.mesh)
        config = config.with_date(with_date(start.given, workdir).model.template_date)
        self.config, self.workdir, self.tasks, self.examples, self.submit = config, workdir, tasks, train, submit
        self.parent = start.parent
        model = load_base(config, self.mesh)
        param_shardings(self.mesh, model.params, log=True)
        self.dim = count(model.params)
        self.model = dataclasses.replace(model, params={})  # only the state holds weights: updates donate them
        limit = config.decode.max_prompt_tokens
        self.prompts = [checked_prompt(self.model, config.task.name, example, limit) for example in train]
        self.tests = check_metric(config, held_out(config, tasks, tests, self.model, limit))
        self.log = SeedLog(workdir)
        self.streams = facts.get("streams", rng.STREAMS)
        engine = engine_for(
            model.config,
            [*self.prompts, *(ids for test in self.tests for ids in test.prompts)],
            slots=prompts_of_member(config),
            max_new_tokens=config.decode.max_new_tokens,
            stop_token_ids=model.stop_token_ids,
            field="decode.max_new_tokens",
        )
        config, engine = with_numbers(config, engine, self.mesh, facts.get("config", {}).get("decode", {}))
        self.config = config
        self._settle(start)
        self.evaluator = Evaluator.of(config, engine, self.mesh)
        self.checkpoints = Checkpoints(workdir, keep=config.train.keep_checkpoints)
        self.state = State(config, self.mesh, model.params, self.streams)
        del model
        longest = max(map(len, self.prompts))  # no step depends on held-out rows, so they may change
        self.packing = dataclasses.replace(engine, max_prompt_tokens=longest).packing(self.prompts)
        self.method = config.record.make(config, self.evaluator, self.state, self.packing, self.streams)
        resume(config, workdir, self.state, self.log, self.checkpoints)
        directory.check_space(workdir, nbytes(self.state.params, self.state.opt_state))
        self._check_evals()
        self.recorder = Recorder(
            config, workdir, dim=perturbed_count(config, self.state.params), finished=self.log.entries,
            tests=self.tests, unit=self.method.unit, offset=self.state.offset,
        )  # fmt: skip
        self.best = BestStep(config, workdir, self.checkpoints, begin=len(self.log.entries))
        self.profile = Profile(config.train.profile, workdir, last=config.train.steps)
        say(f"{self.dim:,} weights, {self.mesh.size} devices, {self.state.sentence}")
        slow = why_not_in_place(config, engine, self.mesh, self.evaluator.at_once)
        if slow and jax.default_backend() == "gpu":
            say(f"{slow}: so each decode step copies weights and caches, and moves about 3 times as many bytes")

    def _settle(self, start: Start) -> None:
        """Write config.json, or check that the directory holds this run."""
        fields, places = start.written(self.config, self.workdir)
        directory.settle(
            self.workdir, fields, identity=self._identity(), started=bool(self.log.entries),
            mesh=dict(self.mesh.shape), places=places, log=self.log.resize,
        )  # fmt: skip

    def _check_evals(self) -> None:
        """Move evaluations on other held-out rows away. Raises ValueError for evaluations with another limit."""
        folder, limit = self.workdir / "evals", self.config.decode.max_new_tokens
        if processes.first():
            for text in filter(None, (set_aside(folder, test.name, test.digest) for test in self.tests)):
                say(text)
        processes.barrier()
        for test in self.tests:
            file = EvalsFile(folder, test.name, last_step=len(self.log.entries))
            file.check(digest=test.digest, max_new_tokens=limit, n=len(test.examples))

    def train(self, began: float, tracker: Tracker, callback: Callable[[StepRecord], Any] | None) -> RunResult:
        """Run the loop to its end; everything open is closed, however it ends. `began` is when the run was asked
        for."""
        self._keep_rows()
        tracker.config(dataclasses.asdict(self.config))

        def finish(step: int, row: dict[str, Any]) -> None:
            heldout: dict[str, dict[str, Any]] = {}
            try:
                heldout = self._finish_step(step)
            finally:  # even if that ends early: the step is on disk
                tracker.write(step, {"train": row} | {f"evals/{name}": one for name, one in heldout.items()})
            if callback and row:  # an evaluation before the first step has none
                callback(StepRecord(step, row, heldout, lambda: self.state.params))

        try:
            with Clock() as clock:
                self._loop(clock, began, finish)
            step = len(self.log.entries)
            if processes.first():
                (self.workdir / "DONE").write_text(f"{step}\n")
        except processes.Preempted:
            processes.saving()
            self._save(step := len(self.log.entries))
            saved = f"step {step} is saved, and the same command continues from there"
            none = "no step is finished, and the same command starts again"
            raise processes.Preempted(f"terminated; {saved if step else none}") from None
        finally:
            self.profile.close()
            self.checkpoints.close()
            self.recorder.close()
        heldout = self.recorder.heldout[label(self.config.task.name)].last
        return RunResult(self.workdir, step, self.state.params, self.recorder.reward, heldout)

    def _keep_rows(self) -> None:
        own, kept = label(self.config.task.name), (self.workdir / kept_rows.FOLDER,)
        kept_rows.keep(self.tasks[own], "train", own, self.examples, kept)
        for test in self.tests:
            kept_rows.keep(test.task, "test", test.name, test.examples, kept)

    def _loop(self, clock: Clock, began_run: float, finish: Callable[[int, dict], None]) -> None:
        if processes.first():
            (self.workdir / "DONE").unlink(missing_ok=True)
        start = len(self.log.entries)
        finish(start, {})
        self.best.update(start, self._save)  # even if the run ended between an evaluation and this
        if start == self.config.train.steps:
            say(f"all {start} steps are finished: to continue, set train.steps higher")
        for step in range(start + 1, self.config.train.steps + 1):
            clock.restart()
            with self.profile.step(step):
                began = time.monotonic()
                entry, graded, metrics = self._step(step)
                drift = float(self.state.drift)
                now = time.monotonic()
            self._check_finite(step, drift, metrics)
            first = {"seconds_to_first_step": now - began_run} if step == start + 1 else {}
            timings = self._timings(step, clock.seconds(), graded, total=now - began)
            row = self.recorder.step(entry, graded, drift, metrics, timings | first)
            self.log.append(entry)
            if message := self.profile.done(step, timings, functools.partial(self.method.seconds_alone, entry)):
                say(message)
            finish(step, row)

    def _check_finite(self, step: int, drift: float, metrics: Mapping[str, float | None]) -> None:
        """Raises ValueError if the step's weights, or numbers of its update, are not finite; the step is then in
        neither the seed log nor a checkpoint. The drift shows it, since it sums the squares of all weights' changes."""
        wrong = {name: x for name, x in {"drift": drift, **metrics}.items() if x is not None and not math.isfinite(x)}
        if not wrong:
            return
        rate, dtype = self.config.optim.learning_rate, self.config.model.param_dtype
        wider = f", or set model.param_dtype ({dtype!r}) to 'float32'" * (dtype != "float32")
        remedy = (
            f"the step is discarded, and the steps before it are kept; lower optim.learning_rate ({rate:g}){wider}, "
            "in another --workdir"
        )
        check_finite(self.state.params, f"step {step}: its", remedy)
        raise ValueError(f"step {step}: {', '.join(f'{name} is {x}' for name, x in wrong.items())}: {remedy}")

    def _timings(
        self, step: int, seconds: dict[str, float], graded: list[list[Graded]], *, total: float
    ) -> dict[str, Any]:
        """Where a step's time went, and how well it used the machine."""
        prompts, engine = [self.prompts[i] for i in self._rows(step)], self.evaluator.engine
        times, models = sum(map(len, graded)) // len(prompts), self.method.models  # how often each prompt is completed
        prompt, new = times * sum(map(len, prompts)), sum(one.length for one in itertools.chain(*graded))
        used = utilisation(
            engine.config,
            itemsize=compute_dtype(self.config).itemsize,
            slots=engine.slots,
            devices=self.mesh.size,
            prefill=self.packing.prefilled(prompts, times=times, models=models),
            new=new,
            completions=times * len(prompts),
            models=models,
            seconds=seconds.get("decode", 0.0),
        )
        return {
            "tokens": new,
            "prompt_tokens": prompt,
            "tokens_per_second": new / total,
            "prompt_tokens_per_second": prompt / total,
            **used,
            "seconds": total,
            **split(seconds, total=total),
        }

    def _step(self, step: int) -> StepResult:
        """The method's step on the prompts whose turn it is."""
        rows = self._rows(step)
        prompts = [self.prompts[i] for i in rows]
        grader = Grader(self.model, [self.examples[i] for i in rows], self.submit, prompts)
        return self.method.step(step, prompts, grader, self.recorder.progress.advance)

    def _identity(self) -> dict[str, Any]:
        """What identifies a run besides its fields, as kept in config.json."""
        rows = [[e.prompt, e.answer, dict(e.meta)] for e in self.examples]
        tests, anchor = {test.name: test.prompts for test in self.tests}, self.config.optim.anchor.source

        def digest(*content: Any) -> str:
            return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()

        return {
            "digest": self.model.digest,
            "files": small_sums(self.config.model.source),
            directory.ROWS: digest(rows, self.prompts, tests),
            directory.TRAINING_ROWS: digest(rows, self.prompts),
            directory.TEST_ROWS: {test.name: test.digest for test in self.tests},
            "compute_dtype": str(compute_dtype(self.config)),
            "parameters": self.dim,
            "stop_ids": list(self.model.stop_token_ids),
            "streams": rng.check_streams(self.streams),
            **source_digests(self.tasks),
            **({} if anchor is None else {"anchor_digest": load_outline(anchor).digest}),
            **({} if self.parent is None else {"parent": self.parent}),
        }

    def _rows(self, step: int) -> Sequence[int]:
        """The examples that a step uses: all, or the next ones of a seeded order that visits all in turn."""
        n, size = self.config.task.prompts_per_step, len(self.examples)
        if n is None:
            return range(size)
        turns = [divmod(turn, size) for turn in range((step - 1) * n, step * n)]
        orders = {epoch: rng.row_order(self.config.train.seed, epoch, size) for epoch, _ in turns}
        return [orders[epoch][i] for epoch, i in turns]

    def _save(self, step: int) -> None:
        if (self.checkpoints.latest() or 0) < step:
            self.checkpoints.save(step, self.state.params, self.state.opt_state)

    def _finish_step(self, step: int) -> dict[str, dict[str, Any]]:
        """Make the checkpoint and the held-out evaluation if they are due and not done yet; returns the evaluation's
        rows."""
        train, every = self.config.train, self.config.evals.every
        final = step == train.steps
        if final or step % train.checkpoint_every == 0:
            self._save(step)
        due = [test for test in self.tests if step not in self.recorder.heldout[test.name].steps]
        if due and (final or step % every == 0):
            if not any(self.recorder.heldout[test.name].steps for test in due):
                names = ", ".join(test.name for test in due)
                say(f"evaluating step {step} on held-out rows of {names}; the first time compiles, too")
            rows = self.recorder.evaluations(step, evaluate(self.evaluator, self.model, self.state.params, due))
            self.best.update(step, self._save)
            return rows
        return {}
