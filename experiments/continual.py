"""Question: what does AWD do to AdamW, Muon, Lion and schedule-free AdamW when two tasks are trained in turn?

Plain gradients, a Flax MLP, and no ES. The first task is to read ten digits, which are drawn here from a seed with
random shifts, random strokes and noise. The second task is to read such digits after one permutation of their pixels.
Each optimizer has optax's defaults, and a learning rate α that is chosen on the first task alone: of LEARNING_RATES it
is the one with the lowest cross-entropy on validation rows, mean over seeds that are not reported. The second task
starts from the weights after the first, θ₀, with a new state of the optimizer and no rows of the first. The rate αλ of
AWD is the fraction of θ − θ₀ that is removed after every step.

Three comparisons: weight decay toward zero after the step, at the same rates, with AdamW alone; L2-SP, the penalty
½λ‖θ − θ₀‖² in the loss, with λ = αλ / α; and training on the second task that is stopped early.

Command:  python -m experiments.continual --docs=docs/awd
Cost:     112 s of CPU time with all compilation; 6 minutes on two cores that other work shared.
Result:   8 seeds, at 0.05 less accuracy on the second task, of the first are kept .49 with AdamW (.31 without AWD), .61
          with Muon (.39), .41 with Lion (.15), .55 with schedule-free AdamW (.28). L2-SP keeps .56, .59, .52 and .57,
          stopping early .37, .50, .15 and .34. Decay to zero keeps less than no decay does: docs/awd.md.
"""

import argparse
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from es_jax import anchored_weight_decay
from es_jax.plotting.figures import grid, legend, line
from experiments.runs import markdown, mean_se, report


def logarithmic(first: int, last: int, *, per_decade: int) -> tuple[float, ...]:
    """10^(first/per_decade) … 10^(last/per_decade), to two digits."""
    return tuple(float(f"{10 ** (k / per_decade):.2g}") for k in range(first, last + 1))


RATES = (0.0, *logarithmic(-12, -2, per_decade=4))  # αλ of AWD: 0.001 … 0.32
PENALTY_RATES = logarithmic(-20, -10, per_decade=4)  # αλ of L2-SP, which acts more strongly: 1e-5 … 3.2e-3
LEARNING_RATES = logarithmic(-7, -2, per_decade=2)  # 3.2e-4 … 0.1
COSTS = (0.02, 0.05, 0.1)  # of accuracy on the second task
CLASSES, SIDE = 10, 10
DIGITS = ("abcdef", "bc", "abdeg", "abcdg", "bcfg", "acdfg", "acdefg", "abc", "abcdefg", "abcdfg")
STROKES = {  # rows and columns, in a box of 7 by 4
    "a": (0, slice(0, 4)), "b": (slice(0, 4), 3), "c": (slice(3, 7), 3), "d": (6, slice(0, 4)),
    "e": (slice(3, 7), 0), "f": (slice(0, 4), 0), "g": (3, slice(0, 4)),
}  # fmt: skip
Params = Any
Rows = tuple[jax.Array, jax.Array]  # pixels [n, SIDE²], digits [n]


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is trained, and on how much."""

    steps: int = 300  # a task
    batch: int = 32
    train: int = 4000
    test: int = 500
    width: int = 48
    seeds: tuple[int, ...] = tuple(range(8))
    chosen_on: tuple[int, ...] = (100, 101, 102)  # seeds by which the learning rates are chosen
    rates: tuple[float, ...] = RATES
    penalty_rates: tuple[float, ...] = PENALTY_RATES
    learning_rates: tuple[float, ...] = LEARNING_RATES


class MLP(nn.Module):
    """Two hidden layers."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(self.width)(x))
        x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(CLASSES)(x)


def digits(rng: np.random.Generator, n: int) -> Rows:
    """Digits of seven strokes, each of random strength, shifted by up to a pixel or two, in noise."""
    label = rng.integers(CLASSES, size=n)
    images = rng.normal(0.0, 0.25, (n, SIDE, SIDE)).astype(np.float32)
    for image, digit in zip(images, label, strict=True):
        row, column = rng.integers(1, 4), rng.integers(2, 5)
        box = image[row : row + 7, column : column + 4]
        for stroke in DIGITS[digit]:
            box[STROKES[stroke]] += rng.uniform(0.6, 1.2)
    return jnp.asarray(images.reshape(n, -1)), jnp.asarray(label)


def tasks(seed: int, size: Size) -> dict[str, Rows]:
    """Training, validation and test rows of both tasks."""
    rng = np.random.default_rng(seed)
    permutation = rng.permutation(SIDE * SIDE)
    rows = {}
    for task in ("first", "second"):
        for split, n in (("train", size.train), ("validation", size.test), ("test", size.test)):
            pixels, label = digits(rng, n)
            rows[f"{task} {split}"] = (pixels if task == "first" else pixels[:, permutation], label)
    return rows


def schedule_free_adamw(alpha: Any, last: optax.GradientTransformation) -> optax.GradientTransformation:
    """`contrib.schedule_free_adamw(alpha)`, opened so that `last` follows the step inside it."""
    adam = optax.scale_by_rms(decay=0.999, eps=1e-8, eps_in_sqrt=False, bias_correction=True)
    return contrib.schedule_free(optax.chain(adam, optax.scale_by_learning_rate(alpha), last), alpha)


# Each makes a transformation of the learning rate and of what comes after its step.
OPTIMIZERS: dict[str, Callable[[Any, optax.GradientTransformation], optax.GradientTransformation]] = {
    "AdamW": lambda alpha, last: optax.chain(optax.adamw(alpha), last),
    "Muon": lambda alpha, last: optax.chain(contrib.muon(alpha), last),
    "Lion": lambda alpha, last: optax.chain(optax.lion(alpha), last),
    "schedule-free AdamW": schedule_free_adamw,
}
METHODS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "AWD": anchored_weight_decay,
    "decay to zero": lambda rate: optax.add_decayed_weights(-rate),
    "L2-SP": lambda rate: optax.identity(),
}


def evaluated(params: Params, state: Any) -> Params:
    """The weights that are evaluated: schedule-free trains at other ones."""
    is_free = isinstance(state, contrib.ScheduleFreeState)
    return contrib.schedule_free_eval_params(state, params) if is_free else params


def cross_entropy(params: Params, rows: Rows, model: MLP) -> jax.Array:
    pixels, label = rows
    return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, pixels), label).mean()


def accuracy(params: Params, rows: Rows, model: MLP) -> jax.Array:
    pixels, label = rows
    return jnp.mean(jnp.argmax(model.apply(params, pixels), axis=-1) == label)


def train(
    start: Params,
    rows: Rows,
    tx: optax.GradientTransformation,
    key: jax.Array,
    stops: Sequence[int],
    *,
    size: Size,
    strength: Any = 0.0,
) -> Params:
    """The weights after each of `stops` steps on random batches, along a first axis; `strength` is λ of L2-SP."""

    def loss(params: Params, batch: Rows) -> jax.Array:
        distance = optax.tree_utils.tree_norm(jax.tree.map(jnp.subtract, params, start), squared=True)
        return cross_entropy(params, batch, MLP(size.width)) + 0.5 * strength * distance

    def step(number: Any, carry: Any) -> Any:
        params, state = carry
        chosen = jax.random.randint(jax.random.fold_in(key, number), (size.batch,), 0, len(rows[0]))
        gradient = jax.grad(loss)(params, jax.tree.map(lambda x: x[chosen], rows))
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    def until(carry: Any, bounds: tuple[jax.Array, jax.Array]) -> tuple[Any, Params]:
        carry = jax.lax.fori_loop(*bounds, step, carry)
        return carry, evaluated(*carry)

    bounds = jnp.asarray([0, *stops[:-1]]), jnp.asarray(stops)
    return jax.lax.scan(until, (start, tx.init(start)), bounds)[1]


def first_task(name: str, alpha: Any, seed: jax.Array, rows: Mapping[str, Rows], size: Size) -> Params:
    """The weights after the first task, without AWD."""
    start = MLP(size.width).init(jax.random.key(seed), rows["first train"][0][:1])
    tx = OPTIMIZERS[name](alpha, optax.identity())
    found = train(start, rows["first train"], tx, jax.random.key(seed + 1000), [size.steps], size=size)
    return jax.tree.map(lambda x: x[0], found)


def stacked(seeds: Sequence[int], size: Size) -> tuple[jax.Array, dict[str, Rows]]:
    """The seeds, and their rows, along a first axis."""
    return jnp.asarray(seeds), jax.tree.map(lambda *x: jnp.stack(x), *[tasks(seed, size) for seed in seeds])


def learning_rate(name: str, size: Size) -> float:
    """The one of the lowest mean cross-entropy on validation rows of the first task."""

    def validated(alpha: jax.Array, seed: jax.Array, rows: Mapping[str, Rows]) -> jax.Array:
        params = first_task(name, alpha, seed, rows, size)
        return cross_entropy(params, rows["first validation"], MLP(size.width))

    over_seeds = jax.vmap(validated, in_axes=(None, 0, 0))
    losses = jax.jit(jax.vmap(over_seeds, in_axes=(0, None, None)))(
        jnp.asarray(size.learning_rates), *stacked(size.chosen_on, size)
    )
    means = np.nan_to_num(np.asarray(losses).mean(axis=1), nan=np.inf)
    print(name, dict(zip(size.learning_rates, means.round(3).tolist(), strict=True)), flush=True)
    return size.learning_rates[int(np.argmin(means))]


def stops_of(steps: int, method: str) -> list[int]:
    """The steps at which the second task is evaluated: the last, and with AWD also 1/16, 1/8, 1/4 and 1/2 of it."""
    return sorted({max(steps >> k, 1) for k in range(5 if method == "AWD" else 1)})


def measured(params: Params, start: Params, rows: Mapping[str, Rows], size: Size) -> dict[str, jax.Array]:
    """Accuracy on test rows of both tasks, and ‖θ − θ₀‖."""
    of = {task: accuracy(params, rows[f"{task} test"], MLP(size.width)) for task in ("first", "second")}
    return of | {"distance": optax.tree_utils.tree_norm(jax.tree.map(jnp.subtract, params, start))}


@functools.lru_cache(maxsize=1)
def after_first(name: str, alpha: float, size: Size) -> tuple[Params, jax.Array, dict[str, Rows]]:
    """The weights after the first task, the seeds and their rows."""
    seeds, rows = stacked(size.seeds, size)
    return jax.jit(jax.vmap(lambda seed, rows: first_task(name, alpha, seed, rows, size)))(seeds, rows), seeds, rows


def before_second(name: str, alpha: float, size: Size) -> list[dict[str, Any]]:
    """A line a seed, of the weights after the first task."""
    starts, _, rows = after_first(name, alpha, size)
    found = jax.jit(jax.vmap(lambda params, rows: measured(params, params, rows, size)))(starts, rows)
    labels = {"optimizer": name, "learning rate": alpha, "method": "before", "αλ": 0.0, "step": 0}
    return lines_of(labels, size.seeds, found)


def second_task(name: str, method: str, alpha: float, size: Size) -> list[dict[str, Any]]:
    """A line for each rate and seed, and with AWD for each step at which a run of rate 0 is stopped early."""
    starts, seeds, rows = after_first(name, alpha, size)
    stops, rates = stops_of(size.steps, method), size.penalty_rates if method == "L2-SP" else size.rates

    def one(rate: jax.Array, start: Params, seed: jax.Array, rows: Mapping[str, Rows]) -> dict[str, jax.Array]:
        tx = OPTIMIZERS[name](alpha, METHODS[method](rate))
        strength = rate / alpha if method == "L2-SP" else 0.0
        found = train(start, rows["second train"], tx, jax.random.key(seed + 2000), stops, size=size, strength=strength)
        return jax.vmap(lambda params: measured(params, start, rows, size))(found)

    over_seeds = jax.vmap(one, in_axes=(None, 0, 0, 0))
    over_rates = jax.jit(jax.vmap(over_seeds, in_axes=(0, None, None, None)))
    found = jax.tree.map(np.asarray, over_rates(jnp.asarray(rates), starts, seeds, rows))  # [rates, seeds, stops]
    lines = []
    for k, step in enumerate(stops):
        for i, rate in enumerate(rates if step == size.steps else rates[:1]):  # the first rate is 0
            label = method if step == size.steps else "stopped early"
            labels = {"optimizer": name, "learning rate": alpha, "method": label, "αλ": rate, "step": step}
            lines += lines_of(labels, size.seeds, {key: x[i, :, k] for key, x in found.items()})
    return lines


def lines_of(labels: Mapping[str, Any], seeds: Sequence[int], values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line a seed."""
    return [
        {**labels, "seed": seed} | {key: round(float(np.asarray(x)[i]), 4) for key, x in values.items()}
        for i, seed in enumerate(seeds)
    ]


def kept(path: Path, size: Size, make: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The lines that an earlier call with the same size left in the file, or those made now."""
    sizes = json.loads(json.dumps(dataclasses.asdict(size)))
    if path.exists() and (content := json.loads(path.read_text()))["size"] == sizes:
        return content["lines"]
    lines = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"size": sizes, "lines": lines}, ensure_ascii=False))
    return lines


def results(name: str, size: Size, out: Path) -> list[dict[str, Any]]:
    """All lines of an optimizer. What is finished is kept in the folder, a file for each method."""
    lines = kept(out / f"{name}, before.json", size, lambda: before_second(name, learning_rate(name, size), size))
    alpha = lines[0]["learning rate"]
    for method in [method for method in METHODS if method != "decay to zero" or name == "AdamW"]:
        make = functools.partial(second_task, name, method, alpha, size)
        lines = lines + kept(out / f"{name}, {method}.json", size, make)
    return lines


def mean_and_se(lines: Sequence[Mapping[str, Any]], column: str) -> tuple[float, float]:
    """Over seeds."""
    values = [line[column] for line in lines]
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def chosen(lines: Sequence[Mapping[str, Any]], **labels: Any) -> dict[tuple[float, int], list[Mapping[str, Any]]]:
    """The lines with these labels, by (αλ, step)."""
    found: dict[tuple[float, int], list[Mapping[str, Any]]] = {}
    for now in lines:
        if all(now[label] == value for label, value in labels.items()):
            found.setdefault((now["αλ"], now["step"]), []).append(now)
    return found


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: accuracy on the first task / on the second, mean ± standard error over seeds; a column an optimizer."""
    names = list(dict.fromkeys(now["optimizer"] for now in lines))
    alphas = {now["optimizer"]: now["learning rate"] for now in lines}
    cases = dict.fromkeys((now["method"], now["αλ"], now["step"]) for now in lines)
    rows = []
    for method, rate, step in cases:
        cells = [f"{method} {step} steps" if method == "stopped early" else f"{method} {rate:g}"]
        for name in names:
            same = chosen(lines, optimizer=name, method=method).get((rate, step), [])
            cells.append(
                " / ".join(mean_se(now[task] for now in same) for task in ("first", "second")) if same else "–"
            )
        rows.append(cells)
    return markdown(["", *(f"{name}, α = {alphas[name]:g}" for name in names)], rows)


def kept_at(cost: float, curve: Sequence[tuple[float, float]], free: float) -> float:
    """The highest first-task accuracy on the lines between points (second, first), where the second is free − cost."""
    x, found = free - cost, []
    for (low, first), (high, then) in itertools.pairwise(sorted(curve)):
        if low <= x <= high and low < high:
            found.append(first + (then - first) * (x - low) / (high - low))
    return max(found, default=float("nan"))


def equal_cost(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: how much of the first task each method keeps where it costs so much of the second, from mean curves."""
    methods = ("AWD", "L2-SP", "stopped early")
    head = ["optimizer", "nothing", *(f"{method}, {cost:g} lost" for cost in COSTS for method in methods)]
    rows = []
    for name in dict.fromkeys(now["optimizer"] for now in lines):
        curves = {}
        for method in ("before", *methods):
            points = chosen(lines, optimizer=name, method=method)
            curves[method] = {k: (mean_and_se(v, "second")[0], mean_and_se(v, "first")[0]) for k, v in points.items()}
        end = next(point for (rate, _), point in curves["AWD"].items() if rate == 0)
        curves["stopped early"] |= curves["before"]
        cells = [f"{kept_at(cost, [*curves[m].values(), end], end[0]):.2f}" for cost in COSTS for m in methods]
        rows.append([name, f"{end[1]:.2f}", *cells])
    return markdown(head, rows)


def figure(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Both tasks against αλ, a line an optimizer. A rate of 1 would leave the weights where they were."""
    drawing, panels = grid(2, columns=2, width=4.6, height=3.4)
    rates = sorted({now["αλ"] for now in lines if now["method"] == "AWD"})
    for i, name in enumerate(dict.fromkeys(now["optimizer"] for now in lines)):
        points = [
            *chosen(lines, optimizer=name, method="AWD").values(),
            *chosen(lines, optimizer=name, method="before").values(),
        ]
        for axes, task in zip(panels, ("first", "second"), strict=True):
            means, errors = zip(*(mean_and_se(point, task) for point in points), strict=True)
            axes.errorbar(range(len(points)), means, errors, capsize=2, label=name, **line(i))
    for axes, title in zip(panels, ("first task, after the second", "second task"), strict=True):
        axes.set(title=title, xlabel="rate αλ of AWD: the fraction of the way back, every step", ylim=(0, 1.0))
        axes.set_xticks(range(len(rates) + 1), [*(f"{rate:g}" for rate in rates), "1"], rotation=45, fontsize=7)
    panels[0].set_ylabel("accuracy on test rows")
    legend(drawing, panels[0], columns=4)
    drawing.savefig(path)


def trade_offs(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The first task against the second, a panel an optimizer, a line a method. Up and right is better."""
    names = list(dict.fromkeys(now["optimizer"] for now in lines))
    drawing, panels = grid(len(names), columns=2, width=4.6, height=3.4, ylabel="first task, after the second")
    for axes, name in zip(panels, names, strict=True):
        ends = {"before": chosen(lines, optimizer=name, method="before"), "free": {}}
        ends["free"] = {key: value for key, value in chosen(lines, optimizer=name, method="AWD").items() if not key[0]}
        for i, method in enumerate(("AWD", "L2-SP", "stopped early", "decay to zero")):
            points = list(chosen(lines, optimizer=name, method=method).values())
            if method == "stopped early":
                points = [*ends["before"].values(), *points, *ends["free"].values()]
            if points:
                x, y = ([mean_and_se(point, task) for point in points] for task in ("second", "first"))
                (x, x_errors), (y, y_errors) = (zip(*pairs, strict=True) for pairs in (x, y))
                axes.errorbar(x, y, y_errors, x_errors, capsize=2, label=method, **line(i))
        axes.set(title=name, xlabel="second task", ylim=(0, 1.0), xlim=(0, 1.0))
    legend(drawing, panels[0], columns=4)
    drawing.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/continual"), help="keeps each optimizer's finished results"
    )
    parser.add_argument("--docs", type=Path, help="where the report goes; the out folder by default")
    args = parser.parse_args()
    lines = [now for name in OPTIMIZERS for now in results(name, Size(), args.out)]
    docs = args.docs or args.out
    report(
        lines,
        docs,
        "continual",
        labels=("optimizer", "method"),
        figure=figure,
        text=f"{table(lines)}\n\n{equal_cost(lines)}",
    )
    trade_offs(lines, docs / "continual_methods.png")


if __name__ == "__main__":
    main()
