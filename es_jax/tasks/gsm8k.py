"""GSM8K: word problems of grade school whose answer is a number (arXiv 2110.14168; data openai/gsm8k)."""

import re
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import ClassVar

from es_jax.tasks.rows import Hub, PublishedTask, Row, check_field, text_field
from es_jax.tasks.task import Example, Score, messages, response_text, two_views

ASK = (
    "{question}\n\nWork the problem out in short steps. Close with a line of its own that holds four number signs, a "
    "space and the result as a bare number, like this:\n#### 42"
)
TAIL = 4096  # characters that the paper's grader looks at, and of a number; below Python's limit for converting digits
TOLERANCE = Fraction(1, 1_000_000)
DIGITS = r"(?:[0-9][0-9,]*(?:\.[0-9]+)?|(?<![.\w])\.[0-9]+)"  # the last dot of "so...72" and of "No.5" is not a point
# A pattern of what `number` understands:
NUMBER = rf"(?:[-+]?(?:\\?\$ ?)?|\$[-+]){DIGITS}(?:\\?%)?(?: ?/ ?(?:\\?\$)?{DIGITS})?"
PLAIN = r"(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
BARE = re.compile(rf"[-+]?{PLAIN}(?:/{PLAIN})?")
START = re.compile(rf"[\s\\{{$%*]*({NUMBER})")  # what follows a marker
FIRST = re.compile(rf"(?<![0-9A-Za-z]){NUMBER}|{DIGITS}")  # a sign counts unless it hangs on a word, as in covid-19
FORM = re.compile(rf"#### ([-+]?{DIGITS}(?:/{DIGITS})?)")


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
      grader: "paper" or "strict"; docs/tasks.md has the rules of both, with examples.

    >>> GSM8K().score(Example("0", "", "72"), "48 + 24 = 72\\n#### 72")
    Score(reward=1.1, parts={'answer': 1.0, 'format': 1.0, 'strict': 1.0})
    """

    name: ClassVar[str] = "gsm8k"
    source = (Hub("openai/gsm8k", "main"), _native, _checked)

    def score(self, example: Example, completion: str) -> Score:
        """Paper: `final_number` within 1e-6. Format: the last line is #### and a number. Strict: that number alone.

        The last line is the last one that is not empty, without the white space around it.
        """
        response, answer = response_text(example, completion), number(example.answer)
        if answer is None:
            raise ValueError(f"example {example.id!r} has the answer {example.answer!r}: gsm8k needs a number")
        last = FORM.fullmatch(response.rstrip()[-TAIL:].rpartition("\n")[2].strip())
        asked = number(last[1]) if last else None
        paper, strict = (x is not None and abs(x - answer) <= TOLERANCE for x in (final_number(response), asked))
        return two_views(self.grader, paper=paper, strict=strict, form=asked is not None)


def final_number(response: str) -> Fraction | None:
    """The number that the paper's grader reads out of a response, or None.

    Only the last 4096 characters count, and only what follows the last </think>. In that text: the last `#### x`, be it
    of four number signs or more; else the last `\\boxed{x}`; else the last `<answer>x</answer>`; else the first number.
    A marker that no number follows is not one.

    >>> final_number("#### 1,000 and then \\\\boxed{3}")
    Fraction(1000, 1)
    >>> final_number("3 of 4 are <answer> 75% </answer>")
    Fraction(75, 1)
    """
    tail = response.rpartition("</think>")[2][-TAIL:]
    boxes = [piece.partition("}") for piece in tail.split("\\boxed{")[1:]]
    answers = [piece.rpartition("<answer>") for piece in tail.split("</answer>")[:-1]]
    marked = (re.split("#{4,}", tail)[1:], [x for x, end, _ in boxes if end], [x for _, tag, x in answers if tag])
    written = (match[1] for texts in marked for text in reversed(texts) if (match := START.match(text)))
    values = map(number, chain(written, (match[0] for match in FIRST.finditer(tail))))
    return next((value for value in values if value is not None), None)
