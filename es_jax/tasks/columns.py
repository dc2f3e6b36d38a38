"""The task `rows`: any data set, described by a template for the prompt, the answer's column, and a grader."""

import json
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from es_jax.core.names import unknown
from es_jax.tasks.gsm8k import TOLERANCE, final_number, number
from es_jax.tasks.outside import is_reference, load
from es_jax.tasks.robust import stated_choice, stated_number
from es_jax.tasks.rows import FieldError, Hub, Row, check_field, examples_of, open_split, own_example
from es_jax.tasks.task import Example, Score, Splits, as_score, check_count, check_known, response_text

GRADERS = ("exact", "number", "choice", "contains")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SLOT = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")  # of a template
SCALARS = (str, int, float)


@dataclass(frozen=True, kw_only=True)
class Columns(Splits):
    """The task `rows`: reward 1 for a right answer, else 0; or the reward of your own function.

    Args:
      hub: a data set on the Hugging Face hub, "owner/name".
      data_dir: alternatively, a folder with its splits as .parquet, .jsonl, .json or .csv.
      prompt: a template: text in which {column} stands for a row's value, and {{ and }} for braces; or messages, a list
        of {role, content} in which each content is a template (as JSON if given as text).
      answer: the column with the reference answer; a function as grader may not need it.
      grader: "exact", "number", "choice", "contains", or your own function, "FILE.py:NAME" or "package.module:NAME". It
        is called with an example and a completion and returns the reward. The example's `meta` holds the row's columns.
      choices_column: the column with a row's options, for the grader "choice"; the prompt lists them with letters.
      subset: the data set's config, if it has several.
      train_split, test_split: the names of its splits; on the hub also slices, "train[:90%]".
      test_rows: use this many rows at the end of the train split for testing instead of a test split.
      revision: a branch or commit on the hub.

    >>> task = Columns(data_dir="rows", prompt="{question}\\nAnswer with a number.", answer="result", grader="number")
    >>> task.score(Example("0", "", "72"), "48 + 24 = 72").reward
    1.0
    """

    hub: str | None = None
    data_dir: str | Path | None = None
    prompt: Any = None
    answer: str | None = None
    grader: str = "exact"
    choices_column: str | None = None
    subset: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    test_rows: int | None = None
    revision: str | None = None
    functions: tuple[Callable[..., Any], ...] = field(init=False, repr=False, compare=False)  # the user's own function

    name: ClassVar[str] = "rows"

    def __post_init__(self) -> None:
        if (self.hub is None) == (self.data_dir is None):
            raise ValueError(
                f"the task 'rows' has hub {self.hub!r} and data_dir {self.data_dir!r}: set exactly one of them, hub "
                "to owner/name or data_dir to a folder of rows"
            )
        if self.hub is not None and not (re.fullmatch(r"[\w.-]+/[\w.-]+", self.hub) or Path(self.hub).is_dir()):
            raise ValueError(f"hub is {self.hub!r}: it should be owner/name")
        outside = isinstance(self.grader, str) and is_reference(self.grader)
        if not outside:
            check_known("grader of the task 'rows'", self.grader, (*GRADERS, "FILE.py:NAME"))
        if self.answer is None and not outside:
            raise ValueError(f"the grader {self.grader!r} needs answer: set it to the column with the reference answer")
        if self.test_rows is not None and check_count(self.test_rows) and self.test_split != "test":
            raise ValueError(
                f"test_rows is {self.test_rows} and test_split {self.test_split!r}: set exactly one of them"
            )
        if self.test_rows is None and self.train_split == self.test_split:
            raise ValueError(
                f"train_split and test_split are both {self.test_split!r}: set test_rows, or another split"
            )
        object.__setattr__(self, "prompt", template(self.prompt))
        object.__setattr__(self, "functions", (load(self.grader),) if outside else ())

    def _examples(self, split: str, n: int | None) -> list[Example]:
        held = self.test_rows
        hub = Hub(self.hub or "", self.subset, self.train_split, self.test_split, self.revision)
        whole, source = open_split(hub, split if held is None else "train", self.data_dir)
        rows: Iterable[Row] = whole
        if held is not None:
            size = len(whole)  # type: ignore[arg-type]
            if held >= size:
                raise ValueError(f"test_rows is {held}, but {source} has {size} rows: leave some to train on")
            part = range(size - held) if split == "train" else range(size - held, size)
            rows, source = (whole[i] for i in part), f"the {split} rows of {source}"  # type: ignore[index]
        return examples_of(islice(rows, None if n is None else check_count(n)), source, self._example, n)

    def _example(self, row: Row, number: int) -> Example:
        prompt = self.prompt
        if isinstance(prompt, str):
            prompt = self._filled(prompt, row, "prompt")
        else:
            prompt = [
                {"role": message["role"], "content": self._filled(message["content"], row, f"prompt[{at}].content")}
                for at, message in enumerate(prompt)
            ]
        answer = None if self.answer is None else _value(row, self.answer, "answer")
        meta: dict[str, Any] = {}
        if self.functions:
            meta = {name: value for name, value in row.items() if _plain(value)}
            answer = answer if isinstance(answer, SCALARS) else None
        elif self.grader == "choice":
            meta["options"] = options = self._options(row)[0]
            answer = self._label(answer, row, options)
        else:
            valid = isinstance(answer, SCALARS) and str(answer).strip()
            check_field(valid, str(self.answer), answer, "the answer, text that is not empty or a number")
            if self.grader == "number":
                found = number_of(str(answer))
                wanted = "a number such as '72', or text that ends in #### 72"
                check_field(found is not None, str(self.answer), answer, wanted)
        return own_example(prompt, answer, _id(row, number), meta)

    def _filled(self, template: str, row: Row, name: str) -> str:
        """A template filled with a row's values. The values are plain text and never parsed as templates."""

        def value(match: re.Match[str]) -> str:
            column = match[1]
            if column is None:
                return match[0][0]
            if column == self.choices_column:
                return "\n".join(map("{}. {}".format, LETTERS, self._options(row)[0]))
            return _text(column, _value(row, column, name))

        return SLOT.sub(value, template)

    def _options(self, row: Row) -> tuple[tuple[str, ...], Sequence[str]]:
        """A row's options and the data set's labels for them; for a row without options, the letters."""
        if self.choices_column is None:
            return (), LETTERS[:10]
        found = _value(row, self.choices_column, "choices_column")
        named = found if isinstance(found, Mapping) else {"text": found}
        texts: Any = named.get("text")
        labels: Any = named.get("label")
        valid = isinstance(texts, list | tuple) and 2 <= len(texts) <= len(LETTERS)
        valid = valid and all(isinstance(text, SCALARS) for text in texts)
        check_field(valid, self.choices_column, found, "a list of 2 to 26 options")
        return tuple(map(str, texts)), list(map(str, labels)) if labels else LETTERS[: len(texts)]

    def _label(self, answer: Any, row: Row, options: Sequence[str]) -> str:
        """The letter of the right option, given by the data set's label, by its text, or by its number from 0."""
        labels, text = [*self._options(row)[1]], str(answer).strip()
        at = -1
        if isinstance(answer, int) and options:
            at = answer
        elif text in labels or text.upper() in labels:
            at = labels.index(text if text in labels else text.upper())
        elif text in options:
            at = options.index(text)
        elif text.isdecimal() and options:
            at = int(text)
        more = (
            ", an option's text or its number from 0"
            if options
            else "; set choices_column if the answer is not a letter"
        )
        check_field(0 <= at < len(labels), str(self.answer), answer, f"a letter{more}")
        return LETTERS[at]

    def score(self, example: Example, completion: str) -> Score:
        """Exact: the text after the last </think> equals the answer, apart from white space around them. Contains: it
        contains the answer, in upper or lower case. Number: `robust.stated_number` within 1e-6. Choice:
        `robust.stated_choice`."""
        return as_score(self.functions[0](example, completion) if self.functions else self._right(example, completion))

    @property
    def extract_answer(self) -> Callable[[Example, str], str | None] | None:
        """The function that reads the answer from a completion; None for graders without one, "contains" and
        functions."""
        return self._read if self.grader in ("exact", "number", "choice") else None

    def _read(self, example: Example, completion: str) -> str | None:
        if self.grader == "exact":
            return completion.rpartition("</think>")[2].strip()
        opening = response_text(example, "")
        if self.grader == "number":
            found = stated_number(completion, opening)
            return None if found is None else str(found)
        return stated_choice(completion, opening, self._labels(example), example.meta.get("options", ()))

    @staticmethod
    def _labels(example: Example) -> str:
        return LETTERS[: len(example.meta.get("options", ())) or 10]

    def _right(self, example: Example, completion: str) -> bool:
        answer = str(example.answer).strip()
        if self.grader == "contains":
            return answer.casefold() in completion.rpartition("</think>")[2].casefold()
        said = self._read(example, completion)
        if self.grader != "number":
            return said == answer
        wanted = number_of(answer)
        return said is not None and wanted is not None and abs(Fraction(said) - wanted) <= TOLERANCE


def number_of(answer: str) -> Any:
    """The number of a reference answer, which is a number or ends in #### and a number; otherwise None."""
    return number(answer) if "####" not in answer else final_number(answer)


def template(prompt: Any) -> Any:
    """The template as text, or as messages with text. Raises ValueError if it is neither."""
    if isinstance(prompt, str) and re.match(r"\s*\[\s*\{\s*\"", prompt):
        try:
            prompt = json.loads(prompt)
        except ValueError as error:
            raise ValueError(
                f"prompt is {prompt!r}: it begins like messages but is not JSON ({error}); correct it"
            ) from None
    messages = prompt if isinstance(prompt, list | tuple) else [{"role": "user", "content": prompt}]
    valid = messages and all(
        isinstance(message, Mapping) and sorted(message) == ["content", "role"] and isinstance(message["content"], str)
        for message in messages
    )
    if not valid or not any(message["content"] for message in messages):
        raise ValueError(
            f"prompt is {reprlib.repr(prompt)}: it should be a template such as 'Question: {{question}}', in which "
            "{column} stands for a row's value, or a list of messages {role, content} with templates"
        )
    texts = [message["content"] for message in messages]
    for text in texts:
        for match in SLOT.finditer(text):
            if match[0] in ("{", "}") or match[0] == "{}":
                raise ValueError(
                    f"prompt is {text!r}: its {match[0]!r} names no column; double a brace that is meant literally"
                )
    if not any(match[1] for text in texts for match in SLOT.finditer(text)):
        raise ValueError(
            f"prompt is {texts[0]!r}: it contains no {{column}}, so all rows would have the same prompt; add one"
        )
    return prompt


def _value(row: Row, column: str, name: str) -> Any:
    if column not in row:
        raise FieldError(f"{name}: {unknown('column', column, row)}")
    return row[column]


def _text(column: str, value: Any) -> str:
    """A value as text for a prompt; the items of a list are joined by commas."""
    parts = value if isinstance(value, list | tuple) else [value]
    valid = all(isinstance(part, SCALARS) for part in parts) and len(parts) > 0
    check_field(valid, column, value, "text, a number, or a list of them, for use in a prompt")
    return ", ".join(map(str, parts))


def _plain(value: Any) -> bool:
    """Whether a value can be kept with an example: text, numbers, or lists and mappings of these."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _id(row: Row, number: int) -> str | int:
    name = row.get("id")
    return name if isinstance(name, str | int) and not isinstance(name, bool) else number
