"""Question: does 16-bit arithmetic explain the published norms ‖θ_500 − θ₀‖ (arXiv 2605.30148)?

It simulates pure-noise fitness on weights N(0, 0.025²), 500 steps, α = 5e-4, σ = 1e-3, for the weights of one of 8
engines, in the published order of operations. For each of the engine's members, σε is added in place and later
subtracted. z·ε is accumulated over the population, and α/N of it is added. Then the anchor is subtracted, the
difference is shrunk, and the anchor is added. Every result is rounded to the dtype. Norms are scaled to d = 3.397e9,
the published model's number of weights.

Command:  python -m experiments.precision [--json]
Cost:     96 s of one CPU core.
Result:   float16 118.7, 93.6, 68.1, 58.4, 43.5; published 119.2, 92.1, 67.7, 58.6, 42.1;
          bfloat16 131.7, 127.5, 118.6, 77.0, 64.1; float32 within 1 % of the closed form: docs/study.md.
"""

import argparse
import json
import math
from collections.abc import Callable

import numpy as np

from es_jax.es import theory
from es_jax.es.shaping import z_score

RATE, SIGMA, STD, STEPS, ENGINES, DIM = 5e-4, 1e-3, 0.025, 500, 8, 3_397_000_000
SETTINGS = {  # name: N, penalty, strength, published norm
    "N = 30": (30, "none", 0.0, 119.2),
    "N = 30, AWD l1 0.01": (30, "l1", 0.01, 92.1),
    "N = 30, AWD l2 10": (30, "l2", 10.0, 67.7),
    "N = 128": (128, "none", 0.0, 58.6),
    "N = 256": (256, "none", 0.0, 42.1),
}
Rounding = Callable[[np.ndarray], np.ndarray]


def float16(x: np.ndarray) -> np.ndarray:
    """Rounds to float16, returned as float32; subnormals are kept, as on a GPU."""
    return x.astype(np.float16).astype(np.float32)


def bfloat16(x: np.ndarray) -> np.ndarray:
    """Rounds to bfloat16, ties to even, returned as float32.

    >>> bfloat16(np.float32([1.00390625, 1.01171875])).tolist()
    [1.0, 1.015625]
    """
    bits = x.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) & np.uint32(0xFFFF0000)).view(np.float32)


DTYPES: dict[str, Rounding] = {"float16": float16, "bfloat16": bfloat16, "float32": lambda x: x}


class Weights:
    """The weights of one engine in one dtype, under one penalty."""

    def __init__(self, start: np.ndarray, rounded: Rounding, *, penalty: str, strength: float, population: int):
        self.rounded, self.penalty, self.population = rounded, penalty, population
        self.pull = np.float32(RATE * strength)
        self.anchor = rounded(start)
        self.now, self.sum = self.anchor.copy(), np.zeros_like(start)

    def member(self, noise: np.ndarray, z: np.float32, *, own: bool) -> None:
        """One member: perturbed and restored in place if the engine evaluates it, and added to the sum."""
        r = self.rounded
        eps = r(noise)
        if own:
            step = r(np.float32(SIGMA) * eps)
            self.now = r(r(self.now + step) - step)
        self.sum = r(self.sum + r(z * eps))

    def update(self) -> None:
        """Make the step, then the decay."""
        r = self.rounded
        self.now = r(self.now + r(np.float32(RATE / self.population) * self.sum))
        self.sum = np.zeros_like(self.sum)
        if self.penalty == "none":
            return
        moved = r(self.now - self.anchor)
        if self.penalty == "l2":
            moved = r((1 - self.pull) * moved)
        else:
            moved = np.sign(moved) * np.maximum(r(np.abs(moved) - self.pull), np.float32(0))
        self.now = r(self.anchor + moved)

    @property
    def norm(self) -> float:
        """‖θ − θ₀‖, scaled to the published number of weights."""
        moved = self.now.astype(np.float64) - self.anchor
        return float(np.linalg.norm(moved)) * math.sqrt(DIM / len(moved))


def random_walk(population: int, size: int, seed: int, engines: int = ENGINES) -> dict[tuple[str, str], float]:
    """(setting, dtype) → norm, for all settings with that population, on the same noise."""
    draw = np.random.default_rng([seed, population])
    start = (STD * draw.standard_normal(size)).astype(np.float32)
    all_weights = {
        (name, dtype): Weights(start, rounded, penalty=penalty, strength=strength, population=population)
        for name, (n, penalty, strength, _) in SETTINGS.items()
        if n == population
        for dtype, rounded in DTYPES.items()
    }
    own = math.ceil(population / engines) if engines else 0
    for _ in range(STEPS):
        z = z_score(draw.standard_normal(population)).astype(np.float32)
        for n in range(population):
            noise = draw.standard_normal(size, dtype=np.float32)
            for weights in all_weights.values():
                weights.member(noise, z[n], own=n < own)
        for weights in all_weights.values():
            weights.update()
    return {key: weights.norm for key, weights in all_weights.items()}


def exact(population: int, penalty: str, strength: float, *, steps: int = STEPS) -> float:
    """The norm from the closed form."""
    return theory.anchored_norm(
        learning_rate=RATE, dim=DIM, steps=steps, population=population, strength=strength, penalty=penalty
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=20_000, help="number of weights; a norm varies by 1/√(2·size)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--engines",
        type=int,
        default=ENGINES,
        help="engines that each perturb N/engines members in place; 0: no perturbation in place",
    )
    parser.add_argument("--json", action="store_true", help="one line: {setting: {dtype: norm, exact, published}}")
    args = parser.parse_args()
    norms: dict[str, dict[str, float]] = {}
    for population in dict.fromkeys(n for n, *_ in SETTINGS.values()):
        for (name, dtype), norm in random_walk(population, args.size, args.seed, args.engines).items():
            norms.setdefault(name, {})[dtype] = norm
    for name, (n, penalty, strength, published) in SETTINGS.items():
        norms[name] |= {"exact": exact(n, penalty, strength), "published": published}
    if args.json:
        print(json.dumps(norms))
        return
    print("| setting | float16 | bfloat16 | float32 | exact | published | float16 / published |")
    print("|---|---|---|---|---|---|---|")
    for name, row in norms.items():
        cells = " | ".join(f"{row[c]:.1f}" for c in (*DTYPES, "exact", "published"))
        print(f"| {name} | {cells} | {row['float16'] / row['published']:.3f} |")


if __name__ == "__main__":
    main()
