"""JSON facts: write two facts from a sentence as one JSON object and nothing else; a small model succeeds about half of
the time."""

import json
import random
from dataclasses import dataclass
from itertools import permutations
from typing import Any, ClassVar

from es_jax.tasks.task import Example, Score, Splits, check_count, messages, response_text

# The test uses names and cities that are not in training.
NAMES = {
    "train": "Ana Ben Carl Dora Emma Felix Greta Hans Ivan Jane Karl Laura Maria Nina Oscar Paul Rosa Sam Tina Victor",
    "test": "Alice Bruno Clara David Eva Frank Helen Jack Kate Leo Martha Peter Sarah Tom",
}
CITIES = {
    "train": "Athens Berlin Boston Cairo Dallas Delhi Dublin Geneva Lisbon London Madrid Miami Moscow Oslo Paris Rome",
    "test": "Chicago Denver Houston Milan Munich Prague Seattle Sydney Tokyo Vienna Warsaw Zurich",
}
AGES = range(18, 80)
PAIRS = tuple(permutations(("name", "city", "age"), 2))  # pairs of keys that a row may ask for
DEFAULT = {"train": 500, "test": 200}  # rows
DECODER = json.JSONDecoder(object_pairs_hook=tuple)  # a duplicate key counts twice


@dataclass(frozen=True)
class JsonFacts(Splits):
    """The task of JSON facts: reward = (share of the keys that are right) · (share of the text that is the object).

    It is 1 for the requested object and nothing else, and 0 without an object. It is in between for a wrong value, an
    extra key, or words and code fences around the object. A completion is parsed as JSON and never evaluated.

    Args:
      seed: of the rows that `train` and `test` draw: distinct ones, 500 and 200 unless `n` says otherwise. Names and
        cities of the test are not those of training.

    >>> task = JsonFacts()
    >>> example = Example("0", "Tom is 47. JSON with the keys name and age?", '{"name": "Tom", "age": 47}')
    >>> task.score(example, '{"name": "Tom", "age": 47}')
    Score(reward=1.0, parts={'answer': 1.0, 'keys': 1.0, 'object': 1.0})
    >>> task.score(example, 'Of course: {"name": "Tim", "age": 47}!').reward < 0.5
    True
    """

    seed: int = 0

    name: ClassVar[str] = "json-facts"

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed is {self.seed!r}: it should be a whole number")

    def _examples(self, split: str, n: int | None) -> list[Example]:
        count = check_count(DEFAULT[split] if n is None else n)
        names, cities = NAMES[split].split(), CITIES[split].split()
        if count > (most := len(names) * len(cities) * len(AGES) * len(PAIRS)):
            raise ValueError(f"n is {n}, but {self.name} has {most} {split} rows: ask for at most {most}")
        draw, rows = random.Random(f"{self.name} {split} {self.seed}"), dict[str, Example]()
        while len(rows) < count:
            facts = {"name": draw.choice(names), "city": draw.choice(cities), "age": draw.choice(AGES)}
            keys = draw.choice(PAIRS)
            name = "-".join(map(str, (*facts.values(), *keys)))
            question = '{name} lives in {city} and is {age}. JSON with the keys "{0}" and "{1}"?'.format(*keys, **facts)
            rows[name] = Example(name, messages(user=question), json.dumps({key: facts[key] for key in keys}))
        return list(rows.values())

    def score(self, example: Example, completion: str) -> Score:
        """Compares the text's first object with the reference, `example.answer`. Parts: `answer`, whether the reward is
        1; `keys`, the number of keys with the right value over the number of requested or present keys, whichever is
        larger; `object`, the share of the text, without white space around it, that is the object."""
        wanted, text = json.loads(example.answer or "{}"), response_text(example, completion).strip()
        if not isinstance(wanted, dict) or not wanted:
            raise ValueError(f"example {example.id!r} has the answer {example.answer!r}: it must be a JSON object")
        start = text.find("{")
        try:
            pairs, end = DECODER.raw_decode(text, start) if start >= 0 else ((), start)
        except (ValueError, RecursionError):  # no JSON, or nested too deeply
            return Score(0.0, {"answer": 0.0, "keys": 0.0, "object": 0.0})
        right = sum(_same(dict(pairs).get(key), value) for key, value in wanted.items())
        keys, share = right / max(len(pairs), len(wanted)), (end - start) / max(len(text), 1)
        return Score(keys * share, {"answer": float(keys * share == 1), "keys": keys, "object": share})


def _same(value: Any, wanted: Any) -> bool:
    """Whether it equals the value, or is the number as text."""
    return value == wanted or (isinstance(wanted, int) and value == str(wanted))
