"""A task of one's own from two methods: its rows, and a score."""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from es_jax.tasks.rows import check_field, examples_of, own_example
from es_jax.tasks.task import Example, Score, Splits, check_count


class SimpleTask(Splits):
    """The base class of a task of one's own. A subclass has the methods `rows` and `score`, and any fields it likes.

    Attributes:
      workers: how many processes score, at least 0. 0 is the run's own process, unless there is a timeout.
      timeout_seconds: how long the score of one completion may take, above 0. A process of its own then scores. None is
        no limit.

    Examples:
      >>> class Backwards(SimpleTask):
      ...     def rows(self, split):
      ...         words = ["pear", "plum"] if split == "train" else ["fig"]
      ...         return [{"prompt": f"Spell {word} backwards.", "answer": word[::-1]} for word in words]
      ...
      ...     def score(self, example, completion):
      ...         return float(completion.strip() == example.answer)
      >>> Backwards().train(1)
      [Example(id='0', prompt='Spell pear backwards.', answer='raep', meta={})]
    """

    workers: int = 0
    timeout_seconds: float | None = None

    def rows(self, split: str) -> Iterable[Any]:
        """Returns the rows of a split, the same ones at every call. A subclass defines it.

        Args:
          split: "train" or "test".

        Returns:
          Rows. A row is a mapping with `prompt` (text, or messages: a list of {role, content}), perhaps `answer` (text
            or a number) and `id`, and anything else, which becomes the example's `meta`. A pair (prompt, answer) and an
            `Example` are rows too.

        Raises:
          NotImplementedError: the subclass does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method rows: give it a method rows(self, split)")

    def score(self, example: Example, completion: str) -> Score | float:
        """Grades a completion. A subclass defines it.

        Args:
          example: the example that was asked.
          completion: what the model wrote.

        Returns:
          The reward, a number; at least 1 counts as a right answer. A `Score` says more than that.

        Raises:
          NotImplementedError: the subclass does not define it.
        """
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
