"""lm-evaluation-harness on the steps of a run, or on a model: each of its tasks and steps once, in evals/lm_eval.jsonl.

The library (the extra [lm_eval]) is imported when it is needed. It makes the requests and the figures; the model that
answers is `es_jax.evals.harness_model`.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import json
import logging
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from tqdm.auto import tqdm

from es_jax.core.extras import require
from es_jax.evals.harness_model import Decoding, HarnessModel
from es_jax.evals.runner import chosen_steps, opened, run_and_steps
from es_jax.evals.weight_source import Fields, check_folder, claim_folder
from es_jax.rundir.metrics import Jsonl, read_rows
from es_jax.scoring.heldout import cast
from es_jax.training.sizes import SLOTS
from es_jax.training.state import compute_dtype
from es_jax.weights import chat_template
from es_jax.weights.model import Model

logger = logging.getLogger(__name__)

FILE = "lm_eval.jsonl"
RANDOM_SEED, OTHER_SEED = 0, 1234  # the library's own, of Python's numbers and of NumPy's and the examples in prompts
MEND = "name the column in doc_to_target, without braces, or keep all references in a column of lists"
BOOTSTRAPS = 1000  # resamples for the error of a metric that has no formula: the error itself is then good to 2 %


@dataclasses.dataclass(frozen=True)
class HarnessOptions:
    """How lm-evaluation-harness evaluates; what is None is as in the task's file.

    Attributes:
      include: a folder of task files of one's own, besides the library's.
      limit: rows of each task, its first ones.
      num_fewshot: solved examples in each prompt; a task whose file says 0 keeps 0.
      apply_chat_template: put prompts through the model's chat template, examples as turns of their own.
      max_length: tokens of context that are used; the model's own by default.
      slots: texts generated at once; the run's by default.
      template_date: the day that the chat template sees; the run's by default.
    """

    include: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    max_length: int | None = None
    slots: int | None = None
    template_date: str | None = None

    def __post_init__(self) -> None:
        for field, least in (("limit", 1), ("num_fewshot", 0), ("max_length", 2), ("slots", 1)):
            value = getattr(self, field)
            if value is not None and value < least:
                raise ValueError(f"{field} is {value}: it must be at least {least}")
        if self.include is not None and not any(Path(self.include).rglob("*.yaml")):
            raise ValueError(f"include is {self.include!r}: it must be a folder with .yaml files of tasks")


def evaluate_harness(
    workdir: str | Path,
    tasks: Sequence[str],
    *,
    every: int | None = None,
    steps: Sequence[int | str] | None = None,
    base: str | None = None,
    out: str | Path | None = None,
    options: HarnessOptions = HarnessOptions(),
    mesh: Mesh | None = None,
) -> Fields:
    """Evaluate steps of a run, or a model, on tasks of lm-evaluation-harness, and write evals/lm_eval.jsonl.

    Step 0, the base model, is always evaluated. A finished (task, step) is not done again.

    Args:
      workdir, every, steps, base, out, mesh: as of `evaluate_run`.
      tasks: names of tasks, groups or tags; or paths of their files.
      options: see there.

    Returns:
      {"out": folder, "warnings": […], "lm_eval": rows of the chosen steps}.

    Raises:
      ImportError: the extra [lm_eval] is not installed.
      ValueError, OSError: what is asked for does not exist or does not fit, before anything is computed.
    """
    require("lm_eval")
    if jax.process_count() > 1:
        raise ValueError(
            f"lm_eval works in one process, and there are {jax.process_count()}: evaluate with lm_eval on one host"
        )
    workdir, steps = run_and_steps(workdir, base, steps)
    with opened(workdir, base=base, out=out, date=options.template_date, mesh=mesh) as (source, folder, _):
        chosen, slots = chosen_steps(source, every, steps), options.slots or source.config.decode.slots or SLOTS
        subject = HarnessModel(source.model, None, slots=slots, max_length=options.max_length)
        units = _load(tasks, subject, options)
        check_folder(folder, source)
        file = Jsonl(folder / FILE)
        rows = read_rows(file.path)
        for unit in units:
            unit.check(rows, file.path)
        due = {step: own for step in chosen if (own := [unit for unit in units if not unit.done(rows, step)])}
        claim_folder(folder, source)
        told = [*dict.fromkeys(text for unit in units for text in unit.warnings)]
        for text in told:
            logger.warning(text)
        total, dtype = sum(unit.requests for own in due.values() for unit in own), compute_dtype(source.config)
        with tqdm(total=total, unit="request", dynamic_ncols=True, disable=not due) as bar:
            for step, params in source.weights([*due]) if due else ():
                model = dataclasses.replace(subject, params=cast(params, dtype), done=bar.update)
                for unit in due[step]:
                    bar.set_description(f"step {step}, {unit.name}")
                    file.write(*({"step": step, **row} for row in unit.evaluate(as_lm(model), options)))
        names = {name for unit in units for name in unit.names}
        last = {_key(row): row for row in read_rows(file.path)}
        chosen_rows = [row for row in last.values() if row["step"] in chosen and row["task"] in names]
        return {"out": str(folder), "warnings": told + subject.warnings, "lm_eval": sorted(chosen_rows, key=_key)}


def _key(row: Fields) -> tuple:
    return row["step"], row["task"], row["metric"], row["filter"]


def harness_lm(
    model: Model, *, dtype: DTypeLike | None = None, slots: int = SLOTS, max_length: int | None = None, seed: int = 0
) -> Any:
    """The model as lm-evaluation-harness takes one: `lm_eval.simple_evaluate(model=harness_lm(model), tasks=[…])`.

    Args:
      model: of `load_model`.
      dtype: that it computes in; by default that of its weights.
      slots: texts generated at once.
      max_length: tokens of context that are used; the model's own by default.
      seed: of what is sampled.

    Raises ImportError where the extra [lm_eval] is not installed.
    """
    require("lm_eval")
    params = model.params if dtype is None else cast(model.params, dtype)
    return as_lm(HarnessModel(model, params, slots=slots, max_length=max_length, seed=seed))


def as_lm(model: HarnessModel) -> Any:
    """An lm_eval.api.model.LM that answers as `model` does."""
    from lm_eval.api.model import LM

    class EsJaxLM(LM):
        tokenizer, max_length = model.tokenizer, model.longest
        eot_token_id = model.tokenizer.eos_token_id
        tokenizer_name = str(model.tokenizer.name_or_path).replace("/", "__")

        def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            groups: dict[tuple, list[int]] = {}  # the options of a row are scored together
            for i, request in enumerate(requests):
                groups.setdefault((request.task_name, request.doc_id, request.args[0]), []).append(i)
            rows = [(key[2], [requests[i].args[1] for i in members]) for key, members in groups.items()]
            found: dict[int, tuple[float, bool]] = {}
            for members, scores in zip(groups.values(), model.loglikelihoods(rows), strict=True):
                found |= zip(members, scores, strict=True)
            return [found[i] for i in range(len(requests))]

        def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
            return model.rolling([request.args[0] for request in requests])

        def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
            return model.generate([request.args[:2] for request in requests])

        def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
            try:
                return chat_template.apply(model.tokenizer, chat_history)
            except ValueError as error:
                rest = [message for message in chat_history if message["role"] != "system"]
                if len(rest) == len(chat_history):
                    raise
                model.warn(f"the system message is left out, which the chat template does not take ({error})")
                return chat_template.apply(model.tokenizer, rest)

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            return model.tokenizer.get_chat_template() if chat_template else None

    return EsJaxLM()


@dataclasses.dataclass
class _Unit:
    """A name that was asked for, with its tasks; of a group there are several.

    Attributes:
      name: as it was asked for.
      loaded: what the library's TaskManager gives.
      digests: of the requests and references of each task, and of each group.
      requests: how many there are.
      warnings: what a reader of the figures must know.
    """

    name: str
    loaded: Any
    digests: dict[str, str]
    requests: int
    warnings: list[str]

    @property
    def names(self) -> list[str]:
        return [*self.digests]

    def check(self, rows: Sequence[Fields], path: Path) -> None:
        """Raises ValueError where the file's rows of a task were made from others than now."""
        for row in rows:
            if row.get("rows") != self.digests.get(row["task"], row.get("rows")):
                raise ValueError(
                    f"{path} has {row['task']} with other prompts, references or metrics (digest {row.get('rows')!r}, "
                    f"now {self.digests[row['task']]!r}): use the same limit, num_fewshot, chat template and rows, or "
                    "another --out"
                )

    def done(self, rows: Sequence[Fields], step: int) -> bool:
        counts = {
            name: [row["of"] for row in rows if (row["step"], row["task"]) == (step, name)] for name in self.names
        }
        return all(own and len(own) >= own[0] for own in counts.values())

    def evaluate(self, lm: Any, options: HarnessOptions) -> Iterator[Fields]:
        """The rows of a step."""
        import lm_eval

        _seed(self.loaded["tasks"].values())
        with _quiet():
            results = lm_eval.evaluate(
                lm, self.loaded, limit=options.limit, bootstrap_iters=BOOTSTRAPS, log_samples=False,
                apply_chat_template=options.apply_chat_template, fewshot_as_multiturn=options.apply_chat_template,
            )  # fmt: skip
        every = results["results"] | results.get("groups", {})
        for name in self.names:
            metrics = {tuple(key.split(",", 1)): value for key, value in every.get(name, {}).items() if "," in key}
            values = {key: value for key, value in metrics.items() if not key[0].endswith("_stderr")}
            for (metric, filter_name), value in values.items():
                error = metrics.get((f"{metric}_stderr", filter_name))
                yield {
                    "task": name, "metric": metric, "filter": filter_name, "value": _number(value),
                    "stderr": _number(error), "n": every[name].get("sample_len"), "of": len(values),
                    "higher_is_better": results["higher_is_better"].get(name, {}).get(metric),
                    "num_fewshot": results["n-shot"].get(name), "version": results["versions"].get(name),
                    "lm_eval": lm_eval.__version__, "rows": self.digests[name],
                }  # fmt: skip


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float | np.number) else None


def _load(names: Sequence[str], model: HarnessModel, options: HarnessOptions) -> list[_Unit]:
    """The tasks that were asked for, checked. ValueError for one that there is not, or that does not fit."""
    from lm_eval.tasks import TaskManager

    _seed([])
    with _quiet():
        manager = TaskManager(include_path=options.include)
    for name in names:
        if name not in manager.all_tasks and not Path(name).is_file():
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"lm_eval has no task, group or tag {name!r}{hint}: see `lm_eval ls tasks`, and include for files of "
                "your own"
            )
    with _quiet():
        return [_unit(name, manager.load([name]), model, options) for name in dict.fromkeys(names)]


def _unit(name: str, loaded: Any, model: HarnessModel, options: HarnessOptions) -> _Unit:
    lm, tasks, requests = as_lm(model), loaded["tasks"], 0
    digests: dict[str, str] = {}
    warnings: list[str] = []
    for label, task in tasks.items():
        for flag, reason in (("UNSAFE_CODE", "runs what the model writes"), ("MULTIMODAL", "needs images or sound")):
            if getattr(task, flag, False):
                raise ValueError(f"the task {label!r} of lm_eval {reason}, which is not done here: leave it out")
        own = task.get_config("num_fewshot")
        if options.num_fewshot is not None and own != 0:
            task.set_config("num_fewshot", options.num_fewshot)
        elif own is None:
            task.set_config("num_fewshot", 0)
    _seed(tasks.values())
    for label, task in tasks.items():
        task.build_all_requests(
            limit=options.limit, apply_chat_template=options.apply_chat_template,
            fewshot_as_multiturn=options.apply_chat_template,
            chat_template=lm.apply_chat_template if options.apply_chat_template else None,
            tokenizer_name=lm.tokenizer_name if options.apply_chat_template else "",
        )  # fmt: skip
        for request in task.instances:
            _check(label, request, model)
        docs = [doc for _, doc in task.doc_iterator(rank=0, limit=options.limit, world_size=1)]
        targets = [task.doc_to_target(doc) for doc in docs]
        warnings += reference_warnings(label, task, docs, targets)
        asked = [[request.request_type, *request.args] for request in task.instances]
        scored = [task.VERSION, *(task.get_config(key) for key in ("metric_list", "filter_list", "repeats"))]
        digests[label] = _digest([asked, targets, scored])
        requests += sum(request.repeats or 1 for request in task.instances)
    for label, group in loaded["groups"].items():
        if group.has_aggregation:
            digests[label] = _digest(sorted(digests[task.task_name] for task in group.get_all_tasks()))
    return _Unit(name, loaded, digests, requests, warnings)


def _check(label: str, request: Any, model: HarnessModel) -> None:
    """Raises ValueError for a request that cannot be answered."""
    if request.request_type == "generate_until":
        try:
            model.room(Decoding.of(request.args[1]))
        except ValueError as error:
            raise ValueError(f"the task {label!r} of lm_eval: {error}") from None
    elif not all(isinstance(text, str) for text in request.args):
        raise ValueError(
            f"the task {label!r} of lm_eval asks for the likelihood of {request.args[-1]!r} in row {request.doc_id}, "
            f"which is not a text (lm_eval reads a text that looks like a list as one): {MEND}"
        )


def _digest(content: Any) -> str:
    named = lambda x: getattr(x, "__qualname__", None) or (repr(x) if isinstance(x, bytes) else type(x).__name__)  # noqa: E731
    return hashlib.sha256(json.dumps(content, default=named, sort_keys=True).encode()).hexdigest()[:16]


def reference_warnings(label: str, task: Any, docs: Sequence[Mapping[str, Any]], targets: Sequence[Any]) -> list[str]:
    """Sentences about references that lm_eval 0.4.13 may read otherwise than they are meant.

    It reads the text of a doc_to_target template that looks like a list as a list, of which every element counts as
    right. And its first row tells whether all rows have lists: if so, a text is taken apart into characters; if not, a
    list becomes one text, in Python's spelling.
    """
    lists, decided = [isinstance(target, list) for target in targets], bool(getattr(task, "multiple_target", 0))
    template = task.config.doc_to_target
    meant = not isinstance(template, str) or "[" in template  # a function's list, or one that the template writes
    read = [i for i, found in enumerate(lists) if found and not meant and not _has(docs[i], targets[i])]
    other = [i for i, found in enumerate(lists) if found != decided]
    texts = []
    if read:
        texts.append(
            f"task {label!r}: lm_eval reads the reference of {len(read)} of {len(docs)} rows as a list, though it is a "
            f"text (row {read[0]}: {str(targets[read[0]])[:60]}), and each element of it counts as right: {MEND}"
        )
    if other:
        effect = "a text is taken apart into characters, each of which counts as right" if decided else "is one text"
        texts.append(
            f"task {label!r}: the reference of the first row is {'' if decided else 'not '}a list, and lm_eval takes "
            f"that for all: of {len(other)} of {len(docs)} rows (row {other[0]}: {str(targets[other[0]])[:60]}) "
            f"{'' if decided else 'a list '}{effect}: {MEND}"
        )
    return texts


def _has(value: Any, target: list) -> bool:
    """Whether a row has the list itself in one of its columns."""
    return value == target or (isinstance(value, Mapping) and any(_has(own, target) for own in value.values()))


def _seed(tasks: Any) -> None:
    """What the library draws is then what its own command draws: examples in prompts, and rows that a task mixes."""
    random.seed(RANDOM_SEED)
    np.random.seed(OTHER_SEED)
    for task in tasks:
        task.set_fewshot_seed(seed=OTHER_SEED)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What the library prints goes to standard error, and it starts no processes: forks of JAX may hang."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before
