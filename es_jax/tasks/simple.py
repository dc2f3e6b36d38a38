"""A task of one's own from two methods: rows, and a score."""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from es_jax.tasks.rows import check_field, examples_of, own_example
from es_jax.tasks.task import Example, Score, Splits, check_count


class SimpleTask(Splits):
    """The base of a task of one's own: a subclass has `rows` and `score`, and whatever fields it likes.

    >>> class Backwards(SimpleTask):
    ...     def rows(self, split):
    ...         words = ["pear", "plum"] if split == "train" else ["fig"]
    ...         return [{"prompt": f"Spell {word} backwards.", "answer": word[::-1]} for word in words]
    ...
    ...     def score(self, example, completion):
    ...         return float(completion.strip() == example.answer)
    >>> Backwards().train(1)
    [Example(id='0', prompt='Spell pear backwards.', answer='raep', meta={})]

    Attributes:
      workers: so many processes score; 0: the run's own, unless there is a timeout.
      timeout_seconds: the most that the score of a completion may take; a process of its own scores then.
    """

    workers: int = 0
    timeout_seconds: float | None = None

    def rows(self, split: str) -> Iterable[Any]:
        """The rows of "train" or "test", the same ones at every call.

        A row is a mapping: `prompt` (text, or messages: a list of {role, content}), `answer` (text or a number, or left
        out), perhaps `id`, and anything else, which becomes the example's `meta`. Or a pair (prompt, answer), or an
        Example.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method rows: give it a method rows(self, split)")

    def score(self, example: Example, completion: str) -> Score | float:
        """The reward of a completion, a number; at least 1 counts as a right answer. A Score says more than that."""
        raise NotImplementedError(
            f"{type(self).__name__} has no method score: give it a method score(self, example, completion)"
        )

    def _examples(self, split: str, n: int | None) -> list[Example]:
        rows = islice(self.rows(split), None if n is None else check_count(n))
        return examples_of(rows, f"the {split} rows of {type(self).__name__}", _example, n)


def _example(row: Any, number: int) -> Example:
    if isinstance(row, Example):
        return row
    if isinstance(row, tuple) and len(row) == 2:
        row = dict(zip(("prompt", "answer"), row, strict=True))
    check_field(isinstance(row, Mapping), "row", row, "a mapping with `prompt`, a pair (prompt, answer), or an Example")
    meta = {name: value for name, value in row.items() if name not in ("id", "prompt", "answer")}
    name = row.get("id")
    return own_example(row.get("prompt"), row.get("answer"), number if name is None else name, meta)
