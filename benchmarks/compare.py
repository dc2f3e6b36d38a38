"""Ours and the peer in turn, and what a comparison prints: medians, ratios, JSON."""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def in_turn(sides: Mapping[str, Callable[[], Any]], *, repeats: int) -> dict[str, list[float]]:
    """Seconds of every call: each side once to warm up, then A B A B."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, call in sides.items():
            began = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def report(title: str, seconds: Mapping[str, list[float]], *, ours: str, json_to: str | None, **more: Any) -> None:
    """Print medians, and how many times longer each other side takes than ours; JSON as `add_json` says."""
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = {name: medians[name] / medians[ours] for name in medians if name != ours}
    result = {"what": title, "seconds": dict(seconds), "medians": medians, "ratios": ratios, **more}
    if write_json(result, json_to):
        return
    print(title)
    for name, median in medians.items():
        spread = f"{min(seconds[name]):.3f} to {max(seconds[name]):.3f}"
        ratio = f"  {ratios[name]:5.2f} × {ours}" if name in ratios else ""
        print(f"  {name:24} {median:8.3f} s  ({spread}){ratio}")
    for name, value in more.items():
        print(f"  {name}: {value}")


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option --json: of what was measured, on a line instead of the text, or beside it in a file."""
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="print JSON, or write it to the file")


def write_json(result: Any, where: str | None) -> bool:
    """Whether JSON was printed and nothing else is to be."""
    if where == "-":
        print(json.dumps(result))
    elif where is not None:
        Path(where).parent.mkdir(parents=True, exist_ok=True)
        Path(where).write_text(json.dumps(result) + "\n")
    return where == "-"


def arguments(doc: str | None, **defaults: Any) -> argparse.Namespace:
    """--json and an integer option for each default."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    add_json(parser)
    return parser.parse_args()
