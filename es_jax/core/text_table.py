"""Tables for terminals."""

from collections.abc import Callable, Sequence


def aligned(cells: Sequence[Sequence[str]], justify: Callable[[str, int], str] = str.ljust) -> list[str]:
    """The lines of a table, from its cells row by row: each column is as wide as its widest cell.

    >>> aligned([("step", "drift"), ("100", "5.8")])
    ['step  drift', '100   5.8']
    """
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(justify, row, widths)).rstrip() for row in cells]
