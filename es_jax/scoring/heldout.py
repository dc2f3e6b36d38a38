"""Evaluates the unperturbed model on held-out rows: all tasks of a step together, with one set of programs."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from es_jax.generate.engine import Engine
from es_jax.generate.prompts import Prompts
from es_jax.generate.score import score_options
from es_jax.models.config import TransformerConfig
from es_jax.scoring.grading import Graded, Grader, check_scores
from es_jax.scoring.row_results import RowResults
from es_jax.scoring.workers import workers_of
from es_jax.tasks.task import RULES, ChoiceTask, Example, Task, name_of
from es_jax.weights.boundary import encode_options
from es_jax.weights.model import Model


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The held-out rows of a task.

    Attributes:
      task: the task that grades the rows.
      examples, prompts: the n rows and the token ids of their prompts.
      options: for a task with options: each row's prompt, its continuations (token ids) and the index of the right one.
      label: the task's name in files and figures; None is its own name.
      timeout_seconds: the time limit for one score, see `workers_of`.
    """

    task: Task
    examples: Sequence[Example]
    prompts: Sequence[Sequence[int]]
    options: Sequence[tuple[list[int], list[list[int]], int]] | None = None
    label: str | None = None
    timeout_seconds: float | None = None

    @classmethod
    def of(
        cls,
        task: Task,
        examples: Sequence[Example],
        model: Model,
        *,
        max_prompt_tokens: int,
        label: str | None = None,
        timeout_seconds: float | None = None,
    ) -> "HeldOut":
        """The held-out rows. Raises ValueError, which names the row, for a prompt of more than `max_prompt_tokens`
        tokens."""
        name = label or name_of(task)
        prompts = [checked_prompt(model, name, example, max_prompt_tokens) for example in examples]
        options = None
        if isinstance(task, ChoiceTask) and callable(task.choices):  # a field may have that name
            options = [_options(task, example, model) for example in examples]
        return cls(task, examples, prompts, options, label, timeout_seconds)

    @property
    def name(self) -> str:
        return self.label or name_of(self.task)

    @property
    def digest(self) -> str:
        """A digest of the rows, their tokens and the graders' rules. Two evaluations are comparable if it is equal."""
        rows = [[e.prompt, e.answer, dict(e.meta)] for e in self.examples]
        rules = [RULES] if hasattr(self.task, "grader") else []  # only these tasks' verdicts ever changed
        content = json.dumps([rows, [list(ids) for ids in self.prompts], *rules], default=str, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def checked_prompt(model: Model, task: str, example: Example, max_prompt_tokens: int) -> list[int]:
    """The token ids of an example's prompt. Raises ValueError if there are none, or too many."""
    ids = model.encode(example.prompt)
    if not 1 <= len(ids) <= max_prompt_tokens:
        raise ValueError(
            f"prompt {example.id!r} of task {task!r} has {len(ids)} tokens: it must have 1 to "
            f"decode.max_prompt_tokens = {max_prompt_tokens}; raise decode.max_prompt_tokens or take the row out"
        )
    return ids


@runtime_checkable
class Decoder(Protocol):
    """An object that decodes with θ itself, such as `es_jax.training.es.Evaluator`."""

    @property
    def engine(self) -> Engine: ...
    @property
    def mesh(self) -> Mesh: ...
    @property
    def dtype(self) -> DTypeLike: ...
    @property
    def lanes(self) -> int: ...
    def unperturbed(
        self, params: Any, queues: Iterable[Prompts], keys: Iterable[np.ndarray] = ()
    ) -> Iterator[dict[int, tuple[range, np.ndarray, np.ndarray]]]: ...


def evaluate(
    evaluator: Decoder,
    model: Model,
    params: Any,
    tasks: Sequence[HeldOut],
    *,
    done: Callable[[int], None] = lambda rows: None,
) -> Iterator[tuple[HeldOut, RowResults]]:
    """Graded greedy completions of all tasks' rows, and the likelihoods of options. A task is graded while the next
    ones decode. `done` is called with the number of newly graded rows."""
    engine = evaluator.engine
    queues = [engine.packing(held.prompts).pack(held.prompts, rows=len(held.prompts)) for held in tasks]
    decoded = evaluator.unperturbed(params, queues)
    for held in tasks:
        with workers_of(held.task, held.timeout_seconds) as submit:  # the workers start while the devices decode
            grader = Grader(model, held.examples, submit, held.prompts)
            own = {
                row: ([row], [pending])
                for rows, tokens, length in next(decoded).values()
                for row, pending in zip(rows, grader(rows, tokens, length), strict=True)
            }
            graded = [one for (one,) in grader.shared(own).values()]
        check_scores(graded, held.name)
        loglik = None
        if held.options is not None:
            names = [f"{example.id!r} of task {held.name!r}" for example in held.examples]
            loglik = likeliest(
                model.config, params, held.options, dtype=evaluator.dtype, mesh=evaluator.mesh, names=names
            )
        done(len(graded))
        yield held, results_of(graded, loglik)


def results_of(graded: Sequence[Graded], loglik: np.ndarray | None) -> RowResults:
    """The results of graded completions, in their order."""
    parts = {name: np.array([g.score.parts[name] for g in graded], float) for name in graded[0].score.parts}
    answer = parts.pop("answer")
    right = parts.pop("paper", answer)
    truncated, length, reward = np.array([[g.truncated, g.length, g.score.reward] for g in graded], float).T
    return RowResults(
        right=right,
        strict=parts.pop("strict", right),
        robust=parts.pop("robust", right),
        loglik=loglik,
        well_formed=(parts["format"] >= 1).astype(float) if "format" in parts else None,
        truncated=truncated,
        length=length,
        reward=reward,
        parts=parts,
    )


def _options(task: ChoiceTask, example: Example, model: Model) -> tuple[list[int], list[list[int]], int]:
    choices = task.choices(example)
    prompt, options = encode_options(model.tokenizer, choices.prompt, choices.options)
    if not prompt or not all(choices.options) or not all(options):
        raise ValueError(
            f"row {example.id!r} of task {name_of(task)!r} has an option or a prompt without tokens: take the row out"
        )
    longest, context = max(map(len, options)), model.config.max_positions
    if len(prompt) + longest > context:
        raise ValueError(
            f"row {example.id!r} of task {name_of(task)!r} has a prompt of {len(prompt)} tokens and options of up to "
            f"{longest}, more than the model's context of {context}: take the row out"
        )
    return prompt, options, choices.right


cast = jax.jit(optax.tree_utils.tree_cast, static_argnums=1)  # the weights in the compute dtype


def likeliest(
    config: TransformerConfig,
    params: Any,
    rows: Sequence[tuple[list[int], list[list[int]], int]],
    *,
    dtype: DTypeLike,
    mesh: Mesh | None = None,
    names: Sequence[str] = (),
) -> np.ndarray:
    """Whether the right option has the highest log-probability (the sum over its tokens): [n] 0 or 1. Of equal options
    the first counts as the highest. It computes in `dtype`. Raises ValueError as `score_options` if a log-probability
    is not finite."""
    prompts = [(prompt, options) for prompt, options, _ in rows]
    scores = score_options(config, cast(params, dtype), prompts, mesh=mesh, names=names)
    return np.array([float(np.argmax(own) == right) for own, (_, _, right) in zip(scores, rows, strict=True)])
