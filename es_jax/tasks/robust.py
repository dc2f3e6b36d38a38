"""The readers of the robust grader: they find what a careful person would read as the answer. docs/grading.md has the
rules.

A reader looks at the last 4096 characters of the text after the last </think>. It prefers the last statement that says
what the answer is to anything else that may be an answer. Text after a line that begins with "Question:" is read only
if there is no answer before it, since a model that was not stopped goes on to ask itself questions.
"""

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cache, lru_cache
from unicodedata import decomposition, normalize

from es_jax.tasks.arithmetic import Expression, parse
from es_jax.tasks.task import last_line

TAIL = 4096
LONGEST = 100  # characters of a number
THOUGHT = re.compile(r"</think(?:ing)?\s*>", re.IGNORECASE)
OPEN = re.compile(r"<think(?:ing)?\s*>", re.IGNORECASE)
SPECIAL = re.compile(r"</?think(?:ing)?\s*>|<\|[^|<>\n]{1,40}\|>|</s>|<eos>|<end_of_turn>")
NEXT = re.compile(r"^[^\w\n]*(?:question|problem|q)\s*+\d*+\s*+:", re.IGNORECASE | re.MULTILINE)
BLANKS = "\u00a0\u2000\u2001\u2002\u2003\u2007\u2008\u2009\u200a\u202f"
SIGNS = str.maketrans(
    {
        **dict.fromkeys("−–‐‑﹣", "-"), **dict.fromkeys(BLANKS, " "),
        "⁄": "/", "∕": "/", "÷": "/", "·": "×", "⋅": "×", "∙": "×", "’": "'", "‘": "'", "“": '"', "”": '"', "İ": "I",
    }
)  # fmt: skip
POWERS = re.compile("(?:\0.)+")
FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
LATEX = (
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"(?:\{\\[,;:! ]\}|\\[,;:! ]|~)(?=\d)"), " "),
    (re.compile(r"\\(?:times|cdot)(?![a-z])"), "×"),
    (re.compile(r"\\div(?![a-z])"), "/"),
    (re.compile(r"\\(?:approx|simeq)(?![a-z])"), "≈"),
    (re.compile(r"\\(?:text|math|left|right|displaystyle|quad|phantom)[a-z]*"), ""),
    (re.compile(r"\\(?!\w)"), ""),
    (re.compile(r"(?:[Nn]egative (?<!\w.{9})|[Mm]inus (?<!\w.{6})(?<![\d)}] .{6}))(?=[$€£]?\.?\d)"), "-"),
    (re.compile(r"[Aa]nswer is(?=[A-Z](?![^\W_]))"), "answer is "),  # some tokenizers lose the space
)  # fmt: skip


@lru_cache(maxsize=10_000)
def _plain(sign: str) -> str:
    """The text with wide, circled or bold characters as the usual ones, ½ as 1/2, and ² marked as a power."""
    kind = decomposition(sign).partition(" ")[0]
    if kind in ("<wide>", "<circle>", "<font>"):
        return normalize("NFKC", sign)
    if kind == "<fraction>":
        return f" {normalize('NFKC', sign)} "
    return f"\0{normalize('NFKC', sign)}" if kind == "<super>" else sign


def _parts(opening: str, completion: str, *, fraction: str = r" \1\2/\3\4 ") -> tuple[list[str], bool]:
    """The parts of a completion to read, in usual characters: the text up to the next question, the text after it, and
    so on. Also whether they are in a thought that never ends; `opening`, the prompt's part of the turn, may have begun
    it."""
    completion = completion.rstrip()
    text = THOUGHT.split(opening + completion)[-1]
    thinks = OPEN.search(text) is not None
    text = text[max(0, len(text) - min(len(completion), TAIL)) :]
    text = SPECIAL.sub("\n", text)
    if not text.isascii():
        text = "".join(map(_plain, text))[-TAIL:].translate(SIGNS)
    text = POWERS.sub(lambda match: "^" + match[0].replace("\0", ""), text)
    for pattern, sign in ((FRACTION, fraction), *LATEX):
        text = pattern.sub(sign, text)
    return NEXT.split(text), thinks


# Numbers

MONEY = "[$€£¥₹]"
SIGN = r"(?<![\w)\]%])(?<![\d)\]%] )[-+] ?"
CONTINENTAL = r"\d{1,3}(?:\.\d{3})+,\d{1,2}|\d{1,3}(?:\.\d{3}){2,}|\d+,(?:\d{1,2}|\d{4,})"  # 1.250,50 1.234.567 0,5
GROUPED = r"\d{1,3}(?:,\d{2,3})*,\d{3}|\d{1,3}(?: \d{3})+|\d{1,3}(?:['_]\d{3})+"
DECIMAL = rf"(?:{CONTINENTAL}|(?:{GROUPED}|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)(?!\d|[.,]\d)"
NUMBER = re.compile(
    rf"(?P<sign>{SIGN})?(?:{MONEY} ?)?(?P<inner>(?<={MONEY})[-+]|(?<={MONEY} )[-+])?"
    rf"(?<![^\W_])(?<!\d[.,:/])(?<!\^)(?<!\^\{{)"
    rf"(?:10 ?(?:\^|\*\*) ?\{{? ?(?P<ten>[-+]?\d{{1,3}})(?!\d)"
    r"|(?P<whole>\d+)(?: and)? +(?P<over>\d+) ?/ ?(?P<under>\d+)(?!\d|[.,]\d)"
    rf"|(?P<top>{DECIMAL})(?: ?/ ?{MONEY}?(?P<bottom>{DECIMAL})"
    r"|[eE](?P<e>[-+]?\d{1,3})(?![^\W_])"
    r"| ?[×*x] ?10 ?(?:\^|\*\*) ?\{? ?(?P<power>[-+]?\d{1,3})(?!\d)"
    r"| ?(?P<scale>(?i:hundred|thousand|million|billion)\b|[kK](?![^\W_])))?)"
    r"(?!(?:st|nd|rd|th)\b)(?![xX:]\d)"
)
OPERATOR = re.compile(r"[})\]]* ?(?:\*\*|[-+*×x/^]) ?[({]*\d")
OTHER = re.compile(r"[^\n.;\d]{0,20}\bor [^\n.;\d]{0,10}")
SCALES = {"hundred": 100, "thousand": 1000, "k": 1000, "million": 10**6, "billion": 10**9}
ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
WORDS = {word: value for value, word in enumerate(ONES)} | {word: 10 * value for value, word in enumerate(TENS, 2)}
WORD = rf"\b(?:{'|'.join(sorted([*WORDS, *SCALES], key=len, reverse=True))})\b"
SPELLED = re.compile(rf"{WORD}(?:[ -](?:and )?{WORD})*", re.IGNORECASE)
MARKER = re.compile(
    r"(?:(?P<box>\\boxed\s*\{)|(?P<block><answer>)|(?P<line>#{4,}+)"
    r"|answer(?<!\w.{6})(?:\s+is|\s*[:=]|[-–—])(?!\s*not\b))[\s:=*_]*"
)  # for a text in lower case
BRACE = re.compile(r"(\\boxed\s*)?\{|\}", re.IGNORECASE)
HEADING = re.compile(r"\W*(?:step|part|case|solution)\b|\W*\d{1,2}[.):]\s+[A-Za-z]", re.IGNORECASE)
VERB = re.compile(r"\b(?:is|are|was|equals?|makes?|totals?)\b|:", re.IGNORECASE)
DECORATION = re.compile(r"[\s*_`~\\(\[{\"'<>#]*")
LINES = 8  # statements to look at, and lines of each
LINE = 300  # characters per line


def stated_number(completion: str, opening: str = "") -> Fraction | None:
    """The number that a completion gives as its answer, or None; `opening` is the beginning of the turn in the prompt.

    >>> stated_number("so \\\\boxed{9{,}500} dollars"), stated_number("#### 2 1/2"), stated_number("48 + 24 is 72.")
    (Fraction(9500, 1), Fraction(5, 2), Fraction(72, 1))
    """
    parts, thinks = _parts(opening, completion)
    finders = (_stated_numbers,) if thinks else (_stated_numbers, _last_numbers)
    return next((value for find in finders for part in parts for value in find(part)), None)


def _statements(part: str) -> Iterator[str]:
    """The lines that state the answer, last one first."""
    ends: dict[int, int] = {}  # of boxes
    opened: list[int] = []
    for brace in BRACE.finditer(part) if "oxed" in part else ():
        if brace[0] != "}":
            opened.append(brace.end())
        elif opened:
            ends[opened.pop()] = brace.start()
    for marker in [*MARKER.finditer(part.lower())][: -LINES - 1 : -1]:
        text = part[marker.end() :]
        if marker["box"]:
            text = part[marker.end() : ends.get(marker.end("box"), len(part))]
        if marker["block"]:
            text = re.split("</answer>", text, maxsplit=1, flags=re.IGNORECASE)[0]
        if marker["box"] or marker["block"]:
            yield from [line[:LINE] for line in text.splitlines() if line.strip()][: -LINES - 1 : -1]
            continue
        line = text.partition("\n")[0][:LINE]
        if not (marker["line"] and HEADING.match(line)):
            yield re.split(r"[.;!?](?:\s|$)", line, maxsplit=1)[0]


def _stated_numbers(part: str) -> Iterator[Fraction | None]:
    for line in _statements(part):
        yield from _read(line)


def _read(line: str) -> list[Fraction | None]:
    """The number that a line states: after its last =, at its start, after its last verb, or its first number. [] for
    none, and [None] for something that is not a single number."""
    matches: list[re.Match[str]] = []
    for side in reversed(re.split("[=≈]", line)):
        starts = [0, *(verb.end() for verb in VERB.finditer(side))][::-1]
        decorated = (DECORATION.match(side, start) for start in starts)
        at_once = (NUMBER.match(side, match.end()) for match in decorated if match)
        match = next(filter(None, at_once), None) or NUMBER.search(side)
        if match and not OPERATOR.match(side, match.end()):
            other = OTHER.match(side, match.end())
            second = NUMBER.match(side, other.end()) if other else None
            return [_value(match) if second is None or _value(second) == _value(match) else None]
        matches += [match] if match else []
    spelled = SPELLED.search(line)
    return [None] if matches else [_spelled(spelled[0].lower())] if spelled else []


def _last_numbers(part: str) -> list[Fraction | None]:
    """The last number, or the last line if it is a number in words."""
    if any(marker["box"] or marker["block"] for marker in MARKER.finditer(part.lower())):
        return [None]  # an answer that is not a number
    last = next((at for at in range(len(part) - 1, -1, -1) if part[at].isdecimal()), 0)
    matches = [*NUMBER.finditer(part[max(0, last - 2 * LONGEST) : last + LONGEST // 2])]
    spelled = SPELLED.fullmatch(last_line(part).strip(" *_.\"'")[:LINE])
    return [_value(matches[-1])] if matches else [_spelled(spelled[0].lower())] if spelled else []


def _value(match: re.Match[str]) -> Fraction | None:
    """The value of a match of NUMBER; None for a division by zero, or too many digits."""
    if len(match[0]) > LONGEST or match.end() == LINE:  # the line was cut there
        return None
    try:
        if match["ten"]:
            value = Fraction(10) ** int(match["ten"])
        elif match["whole"]:
            value = int(match["whole"]) + Fraction(int(match["over"]), int(match["under"]))
        else:
            value = _decimal(match["top"]) / _decimal(match["bottom"] or "1")
            value *= Fraction(10) ** int(match["e"] or match["power"] or 0) * SCALES.get(
                (match["scale"] or "").lower(), 1
            )
    except ZeroDivisionError:
        return None
    return -value if "-" in f"{match['sign']}{match['inner']}" else value


def _decimal(text: str) -> Fraction:
    if re.fullmatch(CONTINENTAL, text):
        text = text.replace(".", "").replace(",", ".")
    return Fraction(re.sub("[, '_]", "", text))


def _spelled(words: str) -> Fraction:
    """The value of a number in words.

    >>> _spelled("two thousand and seventy-two")
    Fraction(2072, 1)
    """
    total = group = 0
    for word in re.findall("[a-z]+", words):
        scale = SCALES.get(word, 1)
        if scale == 100:
            group = max(group, 1) * 100
        elif scale > 100:
            total, group = total + max(group, 1) * scale, 0
        else:
            group += WORDS.get(word, 0)  # "and"
    return Fraction(total + group)


# Expressions


def expressions(response: str) -> list[Expression]:
    """The sides of the equation that a response gives as its answer, or its only expression; none if their values
    differ.

    >>> [x.numbers for x in expressions("<answer>98 = 44 \\\\times [19 − 17] + 10</answer>")]
    [(98,), (44, 19, 17, 10)]
    """
    parts, thinks = _parts("", response, fraction=r"(\1\2)/(\3\4)")
    stated = (line for part in parts for line in _statements(part))
    line = next(stated, "" if thinks else last_line(parts[0]).rpartition(":")[2])
    if len(line) >= LINE:
        return []
    line = re.sub(r"(?<=[\d)]) ?[x×] ?(?=[\d(])", "*", line.translate(str.maketrans("[]{}\t", "()() ")))
    line = re.sub(r"(?<=[\d)]) ?(?=\()", "*", line)
    sides = [parse(side.strip(" *`$.,\"'")) for side in re.split("[=≈]", line)]
    found = [side for side in sides if side]
    return found if all(abs(side.value - found[0].value) < Fraction(1, 100_000) for side in found) else []


# Labels

CUE = re.compile(
    r"#{4,}+|\\boxed\b|<answer>|(?:answers?|correct (?:option|choice|ending|letter|one|way|solution)"
    r"|choose|chose|pick|select|go with|going with|opt for)\b"
)  # in lower case
FILL = (
    r"(?:[\s*_`\"'$(\[{<>:=,\-–—]{1,40}+|\b(?:is|was|are|be|would|must|should|has|appears?|seems?|to|the|that|of|course|most"
    r"|\w{1,20}ly|option|choice|letter|number|ending|way|solution|correct|right|best|better|one|final|therefore|thus|so"
    r"|then|indeed|answer)\b){0,12}+"
)
KIND = r"\b(?:option|choice|ending|way|solution|letter|number|answer)\b"
WRONG = (
    r"(?![)\]}*_\"'.:]*\s*(?:(?:is|was|does|do|seems|looks|would be|can be)\s+"
    r"(?:not|wrong|incorrect|false|impossible|too|out)\b|(?:isn|doesn|wasn|won|can)'t\b|cannot\b|contradicts\b|fails\b))"
)
CALLED = re.compile(
    r"(?:is|seems|must be|would be|was|looks)\s+(?:the\s+|a\s+)?(?:\w{1,20}ly\s+|most\s+|only\s+)?"
    r"(?:correct|right|best|better|answer)\b"
)  # in lower case
RIGHT = rf"[)\]}}*_\"']*\s+{CALLED.pattern}"
EDGE = r"(?:[^\w\n]|_)*+"  # what may surround a label on its line
SPELLED_DIGIT = re.compile(
    rf"(^{EDGE}|{KIND}(?: is)?{EDGE})(zero|one|two|three)\b(?={EDGE}$)", re.IGNORECASE | re.MULTILINE
)


@cache
def _choice_patterns(labels: str) -> list[re.Pattern[str]]:
    """Patterns: a label after a cue, a label that is called right, a whole completion; then, in order, other possible
    choices."""
    if labels.isalpha():  # "a stone" and "I think" contain no label
        words = "".join(x for x in labels if x in "AI") + labels.lower()
        bold = "".join(x for x in labels if x not in "AI")
        after = r"(?!\s+(?!(?:because|since|as|for|and|which|but|or|due|is|was)\b)(?-i:[a-z]))"
        label = rf"(?<![^\W_])(?<!\w')(?<!not )(?-i:[{bold}]|[{words}](?!\.\w){after})(?![^\W_]|'\w)"
    else:
        label = rf"(?<![^\W_])(?<!\d[.,/])(?<!not )(?<!\^)[{labels}](?![^\W_]|%|[.,/]\d)"
    named = f"(?P<label>{label})"
    other = rf"(?P<hedge>[)\]}}*_\"']*\s*(?:\bor\b|\band\b|/)[\s*_(\[]*(?:option\s+)?{label}{WRONG})?"
    cued, judged = rf"{FILL}{named}{WRONG}{other}", rf"{named}{RIGHT}"
    whole = rf"\A\s*+{EDGE}{named}{EDGE}\s*\Z"
    alone = rf"^{EDGE}(?:{KIND}{EDGE})?{named}{EDGE}$"
    kind = rf"(?<!not )(?<!than )(?:{KIND}{EDGE}|\(){named}{WRONG}{other}"
    first = rf"\A\s*+{EDGE}{named}(?:[*_\"']*[.,:;)\]]|\s+(?:because|since|as|for)\b)(?![\s\S]*^{EDGE}{label}[.,:;)])"
    end = rf"(?<!or )(?<!and ){named}{EDGE}$"
    patterns = (cued, judged, whole, alone, kind, first, end)
    return [re.compile(pattern, re.IGNORECASE | re.MULTILINE) for pattern in patterns]


def stated_choice(completion: str, opening: str, labels: str, options: Sequence[str] = ()) -> str | None:
    """The label that a completion gives as its answer, or None; `opening` is as in `stated_number`.

    Args:
      labels: one character per option, letters or digits.
      options: their texts, if known: an answer in the words of an option counts as that option.

    >>> stated_choice("A stone sinks, so the answer is clearly **B**.", "", "ABCDE")
    'B'
    >>> stated_choice("A stone sinks.", "", "ABCDE") is None
    True
    """
    parts, thinks = _parts(opening, completion)
    if labels.isdecimal():
        parts = [SPELLED_DIGIT.sub(lambda match: match[1] + str(WORDS[match[2].lower()]), part) for part in parts]
    cued, judged, whole, *others = _choice_patterns(labels)
    found = None
    for part in parts:
        low = part.lower()
        cues = (cued.match(part, cue.end()) for cue in CUE.finditer(low))
        matches = [*filter(None, cues), *whole.finditer(part), *(judged.finditer(part) if CALLED.search(low) else ())]
        found = _last(matches) if found is None else found
    if found is None and len(set(map(str.casefold, options))) == len(options):
        labelled = {_words(text): label for text, label in zip(options, labels, strict=False)}
        said = (_words(line) for part in parts for line in (*_statements(part), last_line(part)))
        found = next((labelled[words] for words in said if words in labelled), None)
    for pattern in [] if thinks else others:
        for part in parts if found is None else ():
            found = _last([*pattern.finditer(part)]) if found is None else found
    return found or None


def _words(text: str) -> str:
    """A text without the markup around it."""
    return text.strip(" \t*_`\"'$(){}[].:,").casefold()


def _last(matches: Sequence[re.Match[str]]) -> str | None:
    """The label of the last match; "" if it names two labels, None if nothing matches."""
    if not matches:
        return None
    last = max(matches, key=lambda match: match.start("label"))
    return "" if last.groupdict().get("hedge") else last["label"].upper()


# Truth

UNSURE = r"un(?:known|determined|certain|decided|decidable|provable)|indeterminate|neither true nor false"
UNSURE += r"|(?:can(?:not|'t| not)|could not) be (?:determined|proved|proven|inferred|decided|known)"
TRUTH = re.compile(rf"\b(?:(?P<unknown>{UNSURE})|(?<!not )(?<!n't )(?<!never )(?P<known>true|false))\b", re.IGNORECASE)
STATEMENT = re.compile(
    rf"\b(?:statement|conclusion|claim)\s+(?:is|must be|can be)\s+(?:(?!not\b)\w+\s+){{0,2}}{TRUTH.pattern}",
    re.IGNORECASE,
)
HEDGE = re.compile(r"[)\]}*_\"']*\s*(?:\bor\b|/)\s*(?:true|false|unknown)\b", re.IGNORECASE)
ONE_WORD = re.compile(r"[^\w\n]*[A-Za-z]+[^\w\n]*")


def stated_truth(completion: str, opening: str = "") -> str | None:
    """The answer of a completion, True, False or Unknown in lower case, or None; `opening` is as in `stated_number`.

    >>> stated_truth("So the answer is **False**."), stated_truth("It cannot be proved."), stated_truth("untrue")
    ('false', 'unknown', None)
    """
    parts, thinks = _parts(opening, completion)
    for line in (line for part in parts for line in _statements(part)):
        match = TRUTH.search(line)
        if match or ONE_WORD.fullmatch(line):
            return _truth(match) if match and not HEDGE.match(line, match.end()) else None
    finders = () if thinks else (STATEMENT, TRUTH)
    matches = next(filter(None, ([*find.finditer(part)] for find in finders for part in parts)), ())
    return _truth(matches[-1]) if matches else None


def _truth(match: re.Match[str]) -> str:
    return "unknown" if match["unknown"] else match["known"].lower()
