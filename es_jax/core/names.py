"""Errors for unknown names, which say what the writer may have meant."""

import difflib
from collections.abc import Iterable


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """One sentence: what was not known, the nearest names to it, and all that are.

    >>> unknown("task", "countdwon", ["countdown", "gsm8k"])
    "unknown task 'countdwon': did you mean 'countdown'? Known: countdown, gsm8k"
    """
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f": did you mean {' or '.join(map(repr, near))}?" if near else "."
    return f"unknown {kind} {name!r}{hint} Known: {', '.join(known)}"
