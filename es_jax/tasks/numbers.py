"""Numbers as people write them, in untrusted text: exact values, and no work out of proportion to the text's length."""

import re
from fractions import Fraction

MAX_LENGTH = 4096  # characters of a number; below Python's limit for converting digits
DIGITS = r"(?:[0-9][0-9,]*(?:\.[0-9]+)?|(?<![.\w])\.[0-9]+)"  # the last dot of "so...72" and of "No.5" is no point
# A pattern of what `number` understands:
NUMBER = rf"(?:[-+]?(?:\\?\$ ?)?|\$[-+]){DIGITS}(?:\\?%)?(?: ?/ ?(?:\\?\$)?{DIGITS})?"
PLAIN = r"(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
BARE = re.compile(rf"[-+]?{PLAIN}(?:/{PLAIN})?")


def number(text: str) -> Fraction | None:
    """The exact value of a decimal or of a/b, with commas, dollars and per cent signs ignored; otherwise None.

    >>> number("$1,250.50"), number("-3/4"), number("1/0"), number("NaN")
    (Fraction(2501, 2), Fraction(-3, 4), None, None)
    """
    bare = re.sub(r"[,$%\\ ]", "", text)
    if len(bare) > MAX_LENGTH or not BARE.fullmatch(bare):
        return None
    above, _, below = bare.partition("/")
    divisor = Fraction(below or "1")
    return Fraction(above) / divisor if divisor else None
