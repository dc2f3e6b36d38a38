"""Tasks for a small model: those of the package with one part of their reward, a shorter answer, or other splits.

`CANDIDATES` has, for each model, what experiments/screen.py looks at. A run's config names a class by
`experiments.targets:NAME`, so its rows and rewards can be had again from Python and by the commands.
"""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from es_jax.tasks import Choices, Example, Score, get_task
from es_jax.tasks.proofwriter import LABELS
from es_jax.tasks.rows import rows_folder
from es_jax.tasks.task import Splits, Task, messages, take


@dataclasses.dataclass(frozen=True)
class Variant(Splits):
    """A task of the package, changed by its subclass. All that is graded there is graded here, too.

    Args:
      data_dir: its rows; None: the data set from the hub.
      rows: None, or the one split that a folder has, "train" or "test": training gets its odd rows, the test its even
        ones.

    >>> task = GSM8KFormat()
    >>> task.score(Example("0", "", "72"), "It may be\\n#### 7").reward
    1.0
    """

    data_dir: str | Path | None = None
    rows: str | None = None

    kind: ClassVar[str]  # the task
    options: ClassVar[dict[str, Any]] = {}  # of it
    part: ClassVar[str | None] = None  # of its score, which is the reward
    opening: ClassVar[str | None] = None  # of the assistant's turn, in place of the rows' own
    labels: ClassVar[tuple[str, ...]] = ()  # the answers that likelihood compares

    def __post_init__(self) -> None:
        if self.rows not in (None, "train", "test"):
            raise ValueError(f"rows is {self.rows!r}: it must be 'train' or 'test', or left out")

    @property
    def _task(self) -> Any:
        return get_task(self.kind, data_dir=self.data_dir, **self.options)

    def _examples(self, split: str, n: int | None) -> list[Example]:
        if self.rows is None:
            examples = getattr(self._task, split)(n)
        else:
            whole = getattr(self._task, self.rows)()
            examples = take(whole[split == "train" :: 2], n, source=f"every other {self.rows} row of {self.kind}")
        return examples if self.opening is None else [self._with_opening(example) for example in examples]

    def _with_opening(self, example: Example) -> Example:
        asked = [message for message in example.prompt if message["role"] != "assistant"]  # type: ignore[index]
        return dataclasses.replace(example, prompt=(*asked, *messages(assistant=self.opening)))

    def score(self, example: Example, completion: str) -> Score:
        """The task's, with `part` of it as the reward where the class names one."""
        score = self._task.score(example, completion)
        return score if self.part is None else Score(score.parts[self.part], score.parts)

    @property
    def choices(self) -> Any:
        """The options of a row, for the likelihood view; None for a task without options."""
        if self.labels:
            return self._choices
        return getattr(self._task, "choices", None)

    def _choices(self, example: Example) -> Choices:
        options = tuple(f" {label}" for label in self.labels)
        return Choices(example.prompt, options, self.labels.index(str(example.answer)))


class GSM8KFormat(Variant):
    """GSM8K, rewarded for its last line alone."""

    kind, part = "gsm8k", "format"


class GSM8KAnswer(Variant):
    """GSM8K, rewarded for the number alone."""

    kind, part = "gsm8k", "answer"


class ProofWriterLabel(Variant):
    """ProofWriter without reasoning: the answer line is begun, and a label is left to write."""

    kind, part, opening, labels = "proofwriter", "answer", "Answer:", LABELS


class ARCLabel(Variant):
    """ARC-Challenge; of the asked form the letter is left to write."""

    kind, part, opening = "arc-challenge", "answer", "The answer is ("


class ARCText(Variant):
    """ARC-Challenge as a prior: likelihood compares the options' own words."""

    kind, options = "arc-challenge", {"continuation": "text"}


class PIQALabel(Variant):
    """PIQA, answered by a digit."""

    kind, part = "piqa", "answer"


class PIQAText(Variant):
    """PIQA as a prior: likelihood compares the options' own words."""

    kind, options = "piqa", {"continuation": "text"}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What may be a target, a prior, or both.

    Attributes:
      task: its name.
      new_tokens: tokens after which a completion is cut.
      use: what it is looked at as, "target", "prior" or "both".
      folder: of its rows in the folder of folders --data; None: it makes its own.
      rows: where that folder has one split alone, which; see `Variant`.
    """

    task: str
    new_tokens: int
    use: str = "both"
    folder: str | None = None
    rows: str | None = None

    def options(self, data: str | None) -> dict[str, Any]:
        """The options of the task, with rows from the folder of folders `data`, or from the hub."""
        if self.folder is None or data is None:
            return {}
        return {"data_dir": str(rows_folder(data, self.folder)), **({"rows": self.rows} if self.rows else {})}

    def fields(self, data: str | None) -> dict[str, Any]:
        """The same as fields of a config's group `task`."""
        options = self.options(data)
        return {"name": self.task, "data_dir": options.pop("data_dir", None), "options": options}

    def make(self, data: str | None) -> Task:
        return get_task(self.task, **self.options(data))

    def most(self, split: str, n: int, data: str | None) -> int:
        """n, or how many rows the split has where that is less."""
        try:
            return len(getattr(self.make(data), split)(n))
        except ValueError:  # it has fewer
            return len(getattr(self.make(data), split)())


HERE = "experiments.targets"
CANDIDATES: dict[str, dict[str, Candidate]] = {
    "smollm2": {
        "json-facts": Candidate("json-facts", 24),
        "conciseness": Candidate("conciseness", 24),
        "gsm8k-format": Candidate(f"{HERE}:GSM8KFormat", 192, "target", "gsm8k"),
        "gsm8k-answer": Candidate(f"{HERE}:GSM8KAnswer", 192, "both", "gsm8k"),
        "proofwriter": Candidate(f"{HERE}:ProofWriterLabel", 4, "both", "proofwriter", "train"),
        "arc-challenge": Candidate(f"{HERE}:ARCLabel", 4, "both", "arc_challenge", "test"),
        "arc-challenge-text": Candidate(f"{HERE}:ARCText", 12, "prior", "arc_challenge"),
        "piqa": Candidate(f"{HERE}:PIQALabel", 4, "both", "piqa", "test"),
        "piqa-text": Candidate(f"{HERE}:PIQAText", 4, "prior", "piqa"),
    },
    "lab": {
        "lab-countdown": Candidate("lab-countdown", 6, "target"),
        "lab-add": Candidate("lab-add", 6),
        "lab-compare": Candidate("lab-compare", 6, "prior"),
    },
}
