"""Times our code and a peer in turn, and prints medians, ratios and JSON."""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def in_turn(sides: Mapping[str, Callable[[], Any]], *, repeats: int) -> dict[str, list[float]]:
    """Seconds of every call: each side runs once to warm up, then A B A B."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, call in sides.items():
            began = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def report(title: str, seconds: Mapping[str, list[float]], *, ours: str, json_to: str | None, **more: Any) -> None:
    """Print medians, and the factor by which each other side takes longer than ours; with JSON as in `add_json`."""
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
    """Add the option --json: print the results as JSON on one line instead of the text, or also write them to a
    file."""
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="print JSON, or write it to this file")


def write_json(result: Any, where: str | None) -> bool:
    """Print JSON if asked for; returns whether nothing else should be printed."""
    if where == "-":
        print(json.dumps(result))
    elif where is not None:
        Path(where).parent.mkdir(parents=True, exist_ok=True)
        Path(where).write_text(json.dumps(result) + "\n")
    return where == "-"


def arguments(doc: str | None, **defaults: Any) -> argparse.Namespace:
    """A parser with --json and an integer option for each default."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    add_json(parser)
    return parser.parse_args()
