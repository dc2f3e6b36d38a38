"""Turns tokens into scores, on the host."""

import dataclasses
import functools
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from es_jax.core import processes
from es_jax.profiling.clock import host
from es_jax.scoring.workers import Submit
from es_jax.tasks.task import Example, Score
from es_jax.weights.boundary import PromptEnd, completion_texts, prompt_end, silent_token_ids
from es_jax.weights.model import Model


@dataclasses.dataclass(frozen=True)
class Graded:
    """A completion: its text (without the tokens of `silent_token_ids`), its score, its number of tokens, and whether
    max_new_tokens cut it."""

    example: Example
    text: str
    score: Score
    length: int
    truncated: bool


COLUMNS = ("step", "n", "task", "rows", "max_new", "reward", "mean_length", "truncated", "well_formed")
Pending = Callable[[], Graded]  # waits for the score


@dataclasses.dataclass(frozen=True)
class Grader:
    """Grades completions of a list of examples, and shares the results with the other processes of the run.

    `prompts` are the examples' prompts as token ids; None encodes them by `Model.encode`.
    """

    model: Model
    examples: Sequence[Example]
    submit: Submit
    prompts: Sequence[Sequence[int]] | None = None

    def __call__(self, indices: Sequence[int], tokens: np.ndarray, length: np.ndarray) -> list[Pending]:
        """Grade completions of the examples with those indices: tokens [B, L], length [B].

        A completion that another member already gave to the same example is not graded again.
        """
        with host("grade"):
            rows = [row[:n] for _, row, n in zip(indices, tokens, length, strict=False)]
            keys = [(int(i), row.tobytes()) for i, row in zip(indices, rows, strict=True)]
            new = {key: row for key, row in zip(keys, rows, strict=True) if key not in self._pending}
            self._pending.update(zip(new, self._graded([i for i, _ in new], list(new.values())), strict=True))
            return [self._pending[key] for key in keys]

    def _graded(self, indices: Sequence[int], rows: Sequence[np.ndarray]) -> Iterator[Pending]:
        tokenizer, stops = self.model.tokenizer, self.model.stop_token_ids
        silent = silent_token_ids(tokenizer, stops)
        spoken = [[token for token in row.tolist() if token not in silent] for row in rows]
        texts = completion_texts(tokenizer, [self._prompt_ends[i] for i in indices], spoken)
        for i, text, row in zip(indices, texts, rows, strict=True):
            stopped = len(row) > 0 and row[-1] in stops
            yield self._scored(self.examples[i], text, len(row), truncated=not stopped)

    @functools.cached_property
    def _pending(self) -> dict[tuple[int, bytes], Pending]:
        return {}

    @functools.cached_property
    def _prompt_ends(self) -> list[PromptEnd]:
        prompts = [self.model.encode(e.prompt) for e in self.examples] if self.prompts is None else self.prompts
        return [prompt_end(self.model.tokenizer, prompt) for prompt in prompts]

    def _scored(self, example: Example, text: str, length: int, *, truncated: bool) -> Pending:
        score = self.submit(example, text)
        return lambda: Graded(example, text, score(), length, truncated)

    def shared(
        self, pending: Mapping[int, tuple[Sequence[int], list[Pending]]], *, texts: Container[int] = (0,)
    ) -> dict[int, list[Graded]]:
        """What all processes graded, in the order of the numbers; each process gives its own, with the indices of its
        examples.

        All processes call it, and wait for the scores. Only the texts of the numbers in `texts` are sent; on other
        processes the remaining texts are empty.
        """
        with host("grade"):
            own = processes.wait(lambda: {n: (at, [one() for one in ones]) for n, (at, ones) in pending.items()})
        if jax.process_count() == 1:
            return check_parts({n: own[n][1] for n in sorted(own)})
        packed = {
            n: [
                [i, g.text if n in texts else "", g.score.reward, dict(g.score.parts), g.length, g.truncated]
                for i, g in zip(at, graded, strict=True)
            ]
            for n, (at, graded) in own.items()
        }
        everyone = processes.exchange(packed).items()
        return check_parts({n: own[n][1] if n in own else list(map(self._unpacked, rows)) for n, rows in everyone})

    def _unpacked(self, row: list[Any]) -> Graded:
        i, text, reward, parts, length, truncated = row
        return Graded(self.examples[i], text, Score(reward, parts), length, truncated)


def check_parts(graded: dict[int, list[Graded]]) -> dict[int, list[Graded]]:
    """Returns what all graded. Raises ValueError, which names the row, if scores have different parts, or a part has
    the name of another column."""
    ones = [one for of_number in graded.values() for one in of_number]
    names = ones[0].score.parts.keys() if ones else set()
    for one in ones:
        if one.score.parts.keys() != names:
            raise ValueError(
                f"the score of row {one.example.id!r} has the parts {', '.join(one.score.parts)}, but the score of "
                f"row {ones[0].example.id!r} has {', '.join(names)}: give all scores of a task the same parts"
            )
    if taken := [name for name in names if name in COLUMNS]:
        raise ValueError(
            f"the score of row {ones[0].example.id!r} has a part {taken[0]!r}, a name that a run's files use for "
            "another column: rename it"
        )
    return graded


def check_scores(graded: Iterable[Graded], task: str, *, remedy: str = "correct the task's score") -> None:
    """Raises ValueError, which names rows and numbers, if a reward or a part of a score is NaN or infinite."""
    bad = {}
    for one in graded:
        numbers = {"reward": one.score.reward, **one.score.parts}
        if wrong := [f"{name} {x}" for name, x in numbers.items() if not math.isfinite(x)]:
            bad[one.example.id] = f"row {one.example.id!r} ({', '.join(wrong)})"
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ValueError(
            f"task {task!r} has scores that are not finite: {', '.join([*bad.values()][:5])}{more}; {remedy}"
        )


def means(graded: Sequence[Graded]) -> dict[str, float]:
    """The mean of each part of the score, the mean length, and the share cut at max_new_tokens."""
    rows = [{**g.score.parts, "mean_length": g.length, "truncated": g.truncated} for g in graded]
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
