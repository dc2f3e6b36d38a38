"""Several sampled completions of each held-out row: pass@k, and the vote of the majority (docs/evaluate.md)."""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from es_jax.core import rng
from es_jax.generate.prompts import Prompts
from es_jax.generate.sampling import Sampler, sampler_of
from es_jax.scoring.grading import Graded, Grader, Pending, check_scores
from es_jax.scoring.heldout import Decoder, HeldOut, results_of
from es_jax.scoring.row_results import EvalsFile, change_columns, standard_error
from es_jax.scoring.workers import workers_of
from es_jax.tasks.task import VotingTask
from es_jax.weights.model import Model

AT_ONCE = 4  # times the slots: rows of one call, of which the last ones leave slots empty
GRADERS = {"right": "", "strict": "strict_", "robust": "robust_"}  # result → prefix of its columns


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How held-out rows are sampled.

    Attributes:
      samples: n ≥ 1 completions of each row.
      temperature: > 0.
      top_p: in (0, 1]: tokens are drawn from the smallest set of likeliest ones with this probability.
      seed: of the draws. The key of a token is a function of (seed, row, sample, place).

    Raises:
      ValueError: a number out of range.

    >>> Sampling(16, 0.7).name
    'n16-t0.7'
    """

    samples: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.samples < 1:
            raise ValueError(f"samples is {self.samples}: it must be at least 1")
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature is {self.temperature:g}: it must be finite and above 0, for greedy samples are all the "
                "same; leave samples out for greedy decoding"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p:g}: it must be above 0 and at most 1")
        try:
            rng.check_seed(self.seed)
        except ValueError as error:
            raise ValueError(f"sample_{error}") from None

    @property
    def name(self) -> str:
        """Of the folder that has the rows of this setting."""
        top_p = "" if self.top_p == 1 else f"-p{float(self.top_p)}"
        return f"n{self.samples}-t{float(self.temperature)}{top_p}" + f"-s{self.seed}" * bool(self.seed)

    @property
    def sampler(self) -> Sampler:
        return sampler_of(float(self.temperature), float(self.top_p))


def pass_at_k(passed: Bool[np.ndarray, "R n"]) -> Float[np.ndarray, "R n"]:
    """For each row and k = 1..n the probability that k of its n samples, drawn without replacement, hold one that
    passed: 1 − C(n − c, k) / C(n, k) where c of them did. An unbiased estimate of that for k new samples.

    >>> pass_at_k(np.array([[True, False, False], [True, True, False]])).round(3).tolist()
    [[0.333, 0.667, 1.0], [0.667, 1.0, 1.0]]
    """
    n = passed.shape[1]
    by_count = [[1 - math.comb(n - c, k) / math.comb(n, k) for k in range(1, n + 1)] for c in range(n + 1)]
    return np.array(by_count)[passed.sum(axis=1)]


def majority(right: Iterable[float], answers: Sequence[str | None]) -> float:
    """Whether the answer that most samples of a row give is right, 0 to 1; samples without an answer do not vote. Of
    answers with equally many votes the mean counts, which is what a choice by lot earns. 0 where nobody votes.

    >>> majority([0, 0, 1, 0], ["7", "7", "8", None]), majority([0, 1], ["7", "8"]), majority([0], [None])
    (0.0, 0.5, 0.0)
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = [answer for answer, count in votes.items() if count == most]
    return float(
        np.mean([np.mean([r for r, a in zip(right, answers, strict=True) if a == winner]) for winner in winners])
    )


@dataclasses.dataclass(frozen=True)
class SampledResults:
    """The results of n samples of each of R rows of a task, in their order.

    Attributes:
      right, strict, robust, truncated, length, reward: [R, n], as in `RowResults`.
      answers: [R][n], the answer that the published grader reads from each completion, None where it finds none; None
        for a task that does not tell (`extract_answer`).
    """

    right: np.ndarray
    strict: np.ndarray
    robust: np.ndarray
    truncated: np.ndarray
    length: np.ndarray
    reward: np.ndarray
    answers: Sequence[Sequence[str | None]] | None

    def to_json(self) -> dict[str, Any]:
        return {name: x.tolist() if isinstance(x, np.ndarray) else x for name, x in vars(self).items()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "SampledResults":
        names = (field.name for field in dataclasses.fields(cls) if field.name != "answers")
        return cls(**{name: np.array(fields[name], float) for name in names}, answers=fields["answers"])

    @property
    def voted(self) -> np.ndarray | None:
        """[R]: `majority` of each row; None for a task that does not tell answers."""
        if self.answers is None:
            return None
        return np.array([majority(*of_row) for of_row in zip(self.right.tolist(), self.answers, strict=True)])


def summary(step: int, now: SampledResults, base: SampledResults | None) -> dict[str, Any]:
    """A row of evals/samples/<setting>/<task>.jsonl. `base`: the base model's results on the same rows, with the same
    keys, if they are known."""
    row: dict[str, Any] = {"step": step, "n": len(now.right)}
    for view, prefix in GRADERS.items():
        of_base: Iterable[np.ndarray] = [] if base is None else pass_at_k(getattr(base, view) >= 1).T
        pairs = itertools.zip_longest(pass_at_k(getattr(now, view) >= 1).T, of_base)
        columns = [_estimate("pass_at_k", own, before) for own, before in pairs]
        row |= {prefix + name: [column[name] for column in columns] for name in columns[0]}
    voted, before = now.voted, None if base is None else base.voted
    row |= {"majority": None} if voted is None else _estimate("majority", voted, before)
    if now.answers is not None:
        row["voting"] = float(np.mean([answer is not None for answers in now.answers for answer in answers]))
    row |= _estimate("reward", now.reward.mean(axis=1), None if base is None else base.reward.mean(axis=1))
    return row | {"truncated": float(now.truncated.mean()), "mean_length": float(now.length.mean())}


def _estimate(name: str, now: np.ndarray, base: np.ndarray | None) -> dict[str, float | None]:
    """The mean over rows [R] and its standard error; the change against the base's, row by row, and its own."""
    columns: dict[str, float | None] = {name: float(now.mean()), f"{name}_se": standard_error(now)}
    return columns if base is None else columns | change_columns(name, now, base)


class SampledFile(EvalsFile):
    """The sampled evaluations of one task and one setting: as `EvalsFile`, in evals/samples/<setting>."""

    results = SampledResults

    def __init__(self, folder: Path, task: str, sampling: Sampling):
        super().__init__(folder / "samples" / sampling.name, task)
        self._sampling = sampling

    def summary(self, step: int, now: SampledResults, base: SampledResults | None) -> dict[str, Any]:  # type: ignore[override]
        return summary(step, now, base) | dataclasses.asdict(self._sampling)


def sample_rows(
    evaluator: Decoder,
    model: Model,
    params: Any,
    tasks: Sequence[HeldOut],
    sampling: Sampling,
    *,
    done: Callable[[int], None] = lambda completions: None,
) -> Iterator[tuple[HeldOut, SampledResults]]:
    """Samples of all tasks' rows by an evaluator whose engine has the setting's sampler, graded; a task while the
    others decode. `done` is called with how many more completions are there."""
    engine, n = evaluator.engine, sampling.samples
    queues: list[Prompts] = []
    keys: list[np.ndarray] = []
    for held in tasks:
        rows, each = len(held.prompts), _at_once(len(held.prompts), n, evaluator.lanes * engine.slots)
        tokens, positions, prefix = engine.packing(held.prompts).pack(held.prompts, rows=rows)
        queues += [Prompts(np.tile(tokens, (each, 1)), np.tile(positions, (each, 1)), prefix)] * (n // each)
        keys += [*rng.evaluation_keys(sampling.seed, rows, n).reshape(n // each, each * rows, 2)]
    decoded = evaluator.unperturbed(params, queues, keys)
    for held in tasks:
        rows, each = len(held.prompts), _at_once(len(held.prompts), n, evaluator.lanes * engine.slots)
        with workers_of(held.task, held.timeout_seconds) as submit:
            grader = Grader(model, held.examples, submit, held.prompts)
            own: dict[int, tuple[list[int], list[Pending]]] = {}
            for first in range(0, n * rows, each * rows):
                for places, tokens, length in next(decoded).values():
                    pending = grader([place % rows for place in places], tokens, length)
                    own |= {first + at: ([at % rows], [one]) for at, one in zip(places, pending, strict=True)}
                done(each * rows)
            graded = [one for (one,) in grader.shared(own, texts=range(n * rows)).values()]
        check_scores(graded, held.name)
        yield held, _results(held, graded, n)


def _at_once(rows: int, samples: int, slots: int) -> int:
    """How many samples of all rows are decoded in one call: a divisor of their number, so that all calls are alike."""
    enough = (each for each in range(1, samples) if samples % each == 0 and each * rows >= AT_ONCE * slots)
    return next(enough, samples)


def _results(held: HeldOut, graded: Sequence[Graded], n: int) -> SampledResults:
    """Of completions sample by sample, each of all rows."""
    results, task = results_of(graded, None), held.task
    names = [field.name for field in dataclasses.fields(SampledResults) if field.name != "answers"]
    arrays = {name: getattr(results, name).reshape(n, -1).T for name in names}
    answers = None
    if isinstance(task, VotingTask) and callable(task.extract_answer):  # a task's options may leave none to read
        told = [_answer(held, task, one) for one in graded]
        answers = [told[row :: len(held.examples)] for row in range(len(held.examples))]
    return SampledResults(**arrays, answers=answers)


def _answer(held: HeldOut, task: VotingTask, one: Graded) -> str | None:
    try:
        answer = task.extract_answer(one.example, one.text)
        if answer is not None and not isinstance(answer, str):
            raise TypeError(f"it returned {answer!r:.80}, neither text nor None")
    except Exception as error:
        raise ValueError(
            f"extract_answer of task {held.name!r} failed on a completion of row {one.example.id!r}: "
            f"{type(error).__name__}: {error}"
        ) from error
    return answer
