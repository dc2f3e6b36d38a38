"""A package with the names of reasoning-gym, for tests where that is not installed: two data sets and their scorers."""

import importlib.util
from pathlib import Path

REAL = importlib.util.find_spec("reasoning_gym") is not None
FACTORY = """
import random
from dataclasses import dataclass


@dataclass
class Config:
    min_terms: int = 2
    max_terms: int = 6
    seed: int = 0
    size: int = 500

    def validate(self):
        assert self.max_terms >= self.min_terms, "max_terms must be >= min_terms"


class Data:
    def __init__(self, config):
        self.config = config

    def __getitem__(self, i):
        rng = random.Random(self.config.seed + i)
        n = rng.randint(self.config.min_terms, self.config.max_terms)
        terms = [rng.randint(10, 99) for _ in range(n)]
        return {"question": self.ask(terms), "answer": self.solve(terms), "metadata": {"terms": tuple(terms)}}

    def score_answer(self, answer, entry):
        return float(answer == entry["answer"])


class Sum(Data):
    def ask(self, terms):
        return " + ".join(map(str, terms)) + " ="

    def solve(self, terms):
        return str(sum(terms))


class Sort(Data):
    def ask(self, terms):
        return f"Sort {terms}"

    def solve(self, terms):
        return ", ".join(map(str, sorted(terms)))

    def score_answer(self, answer, entry):
        assert isinstance(entry["metadata"]["terms"], tuple)
        if answer == "raise":
            raise KeyError("raise")
        return 2.0 * (answer == entry["answer"])


DATASETS = {"chain_sum": (Sum, Config), "word_sorting": (Sort, Config)}
"""


def write(folder: Path, version: str) -> Path:
    """Write the package and its version; the folder belongs on sys.path."""
    (folder / "reasoning_gym").mkdir(parents=True)
    (folder / "reasoning_gym/__init__.py").write_text("")
    (folder / "reasoning_gym/factory.py").write_text(FACTORY)
    facts = folder / f"reasoning_gym-{version}.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: reasoning-gym\nVersion: {version}\n")
    return folder
