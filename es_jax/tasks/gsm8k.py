"""GSM8K: grade-school word problems with a number as the answer (arXiv 2110.14168; data openai/gsm8k)."""

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from es_jax.tasks.robust import stated_number
from es_jax.tasks.rows import Hub, PublishedTask, Row, check_field, text_field
from es_jax.tasks.task import Example, Score, all_views, last_block, last_line, messages, response_text

ASK = (
    "{question}\n\nWork the problem out in short steps. Close with a line of its own that holds four number signs, a "
    "space and the result as a bare number, like this:\n#### 42"
)
TAIL = 4096  # characters that the paper's grader reads, and of a number; below Python's limit for converting digits
TOLERANCE = Fraction(1, 1_000_000)
PLAIN = r"(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
BARE = re.compile(rf"[-+]?{PLAIN}(?:/{PLAIN})?")
DIGITS = r"(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)"
ASKED = re.compile(rf"#### ([-+]?{DIGITS}(?:/{DIGITS})?)")  # the strict grader's last line
MARKER = re.compile(r"####\s*([0-9.,-]+)")
BOX = re.compile(r"\\boxed\s*\{([^}]*)\}", re.IGNORECASE)
WHOLES = re.compile(r"(-?\d+)/(\d+)")
FIRST = re.compile(r"-?\d+(?:\.\d+)?")


def number(text: str | None) -> Fraction | None:
    """The exact value of a decimal or of a/b, with commas, dollars and per cent signs ignored; otherwise None.

    >>> number("$1,250.50"), number("-3/4"), number("1/0"), number("NaN")
    (Fraction(2501, 2), Fraction(-3, 4), None, None)
    """
    bare = re.sub(r"[,$%\\ ]", "", text or "")
    if len(bare) > TAIL or not BARE.fullmatch(bare):
        return None
    above, _, below = bare.partition("/")
    divisor = Fraction(below or "1")
    return Fraction(above) / divisor if divisor else None


def _checked(answer: str, name: str) -> str:
    check_field(number(answer) is not None, name, answer, "a number such as '72' or '1,250.5'")
    return answer


def _native(row: Row) -> Example:
    question, solution = text_field(row, "question"), text_field(row, "answer")
    answer = solution.rpartition("####")[2].strip()
    valid = number(answer) is not None
    check_field(valid, "answer", solution, "a solution that ends in #### and a number, or the number alone")
    return Example("", messages(user=ASK.format(question=question)), answer, {"solution": solution})


@dataclass(frozen=True)
class GSM8K(PublishedTask):
    """The GSM8K task: reward = answer + 0.1 · format.

    Args:
      data_dir: folder with train and test rows, in the verl layout (`reward_model.ground_truth` a number) or with the
        fields `question` and `answer` ("… #### 72", or "72"). None: openai/gsm8k from the hub.
      grader: "paper", "strict" or "robust"; docs/grading.md has the rules, with examples.

    >>> GSM8K().score(Example("0", "", "72"), "48 + 24 = 72\\n#### 72").reward
    1.1
    """

    name: ClassVar[str] = "gsm8k"
    source = (Hub("openai/gsm8k", "main"), _native, _checked)

    def extract_answer(self, example: Example, completion: str) -> str | None:
        """The number that the published grader reads, as a fraction."""
        value = final_number(completion)
        return None if value is None else str(value)

    def score(self, example: Example, completion: str) -> Score:
        """Paper: `final_number` of the completion within 1e-6. Format: its last line is #### and a run of 0-9 . , -.
        Strict: its last line is #### and that number alone. Robust: `stated_number`.

        The last line is the last one that is not blank, without the white space around it. For format and strict it may
        begin in the prompt's opening of the turn.
        """
        turn, answer = response_text(example, completion), number(example.answer)
        if answer is None:
            raise ValueError(f"example {example.id!r} has the answer {example.answer!r}: it must be a number for gsm8k")
        turn = turn if completion.strip() else ""  # the prompt's opening alone is not an answer
        final = ASKED.fullmatch(turn.rstrip()[-TAIL:].rpartition("\n")[2].strip())
        read = (
            final_number(completion),
            number(final[1]) if final else None,
            stated_number(completion, response_text(example, "")),
        )
        paper, strict, careful = (x is not None and abs(x - answer) <= TOLERANCE for x in read)
        lines = {last_line(completion), last_line(turn)}
        form = any(MARKER.fullmatch(line) and any(map(str.isdecimal, line)) for line in lines)
        return all_views(self.grader, paper=paper, strict=strict, robust=careful, form=form)


def final_number(completion: str) -> Fraction | None:
    """The number that the paper's grader reads out of a completion, or None.

    Of the last 4096 characters only what follows the last </think> counts. In that text the first of these that is
    there decides, even if it holds no number: the last `#### x`, x being a run of 0-9 . , -; the last `\\boxed{x}`, up
    to the first closing brace; the last `<answer>x</answer>`; the text itself.

    >>> final_number("#### 1,000 and then \\\\boxed{3}")
    Fraction(1000, 1)
    >>> final_number("3 of 4 are <answer> 75% </answer>")
    Fraction(75, 1)
    """
    tail = completion[-TAIL:].rpartition("</think>")[2]
    closed = tail[: tail.rfind("}") + 1]  # so that an unclosed box is not searched to the end
    for texts in (MARKER.findall(tail), BOX.findall(closed), [last_block(tail)]):
        if texts and texts[-1] is not None:
            return _reading(texts[-1])
    return _reading(tail)


def _reading(text: str) -> Fraction | None:
    """Whole/whole, or the first number, after the last #### in a text whose , $ and % are removed."""
    text = re.sub("[,$%]", "", text.rpartition("####")[2])
    if wholes := WHOLES.fullmatch(text.strip()):
        return Fraction(int(wholes[1]), int(wholes[2])) if int(wholes[2]) else None
    first = FIRST.search(text)
    return Fraction(first[0]) if first else None
