"""What is evaluated: a run's steps, rebuilt from checkpoints or the seed log, or a model beside its base model."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from es_jax.core.tree import count
from es_jax.evals.drift import drift
from es_jax.training import workdir as rundir
from es_jax.training.checkpoint import saved_steps
from es_jax.training.config import RunConfig
from es_jax.training.export import restored
from es_jax.training.fields import ModelConfig
from es_jax.training.seedlog import SeedLog
from es_jax.training.state import load_anchor, load_base, replay
from es_jax.training.walk import Walk
from es_jax.weights.model import Model, load_outline

METHODS_WITHOUT_REPLAY = ("grpo",)


@dataclasses.dataclass(frozen=True)
class Subject:
    """Weights by step, step 0 the base model.

    Attributes:
      config: of the run; of a model, the defaults with its source.
      model: the base model without weights.
      last: the last step there is.
      saved: steps that need no replay.
      base: makes the base model's weights.
      weights: the weights of given steps, in their order; copy what is kept, the next step reuses their memory.
      predicted: ‖θ_t − θ₀‖ in exact arithmetic by step, up to a last step and from given θ₀, where theory knows it.
    """

    config: RunConfig
    model: Model
    last: int
    saved: tuple[int, ...]
    base: Callable[[], Any]
    weights: Callable[[Sequence[int]], Iterator[tuple[int, Any]]]
    predicted: Callable[[int, Any], dict[int, float | None]]


def is_run(path: Path) -> bool:
    """Whether a folder is a run's directory, by its config.json."""
    try:
        return "digest" in json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def of_run(workdir: Path, mesh: Mesh) -> Subject:
    """A run's steps; nothing in its directory is changed.

    Raises:
      ValueError, OSError: no run there, a damaged one, or base weights that are not the run's.
    """
    config, log = rundir.read_config(workdir), SeedLog(workdir, writable=False)
    model = load_outline(config.model.source)
    rundir.check_base(workdir, config.model.source, model.digest)
    replayable, saved = config.method not in METHODS_WITHOUT_REPLAY, saved_steps(workdir)

    def base() -> Any:
        return load_base(config, mesh).params

    def weights(steps: Sequence[int]) -> Iterator[tuple[int, Any]]:
        missing = [step for step in steps if step not in saved and (step or replayable)]
        if missing and not replayable:
            raise ValueError(
                f"steps {missing} of {workdir} have no checkpoint and a run of this method cannot be "
                f"replayed: choose of {[0, *saved]}, or train with a larger train.keep"
            )
        rebuilt = replay(workdir, steps=missing, mesh=mesh) if replayable else iter([(0, base())])
        for step in steps:
            yield step, restored(workdir, config, model, step, mesh=mesh) if step in saved else next(rebuilt)[1]

    def predicted(last: int, start: Any) -> dict[int, float | None]:
        offset = drift(start, load_anchor(config, mesh, start))["norm"] if config.optim.anchor.source else 0.0
        walk, found = Walk(config, count(start), offset=offset), {}
        for entry in log.entries[:last] if replayable else ():
            walk.add(entry)
            found[entry.step] = walk.norm
        return found

    return Subject(config, model, len(log.entries), tuple(saved), base, weights, predicted)


def of_model(source: str, base: str | None, mesh: Mesh) -> Subject:
    """A model, as step 1 beside its base model as step 0; without a base model it is step 0 itself.

    Args:
      source, base: folders, .gguf files or hub names.

    Raises:
      ValueError: the two have different shapes or vocabularies.
    """
    first = RunConfig(model=ModelConfig(source=base or source))
    second = RunConfig(model=ModelConfig(source=source))
    model, other = load_outline(first.model.source), load_outline(source)
    if model.config != other.config or model.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        raise ValueError(f"{source} and {base} differ in shape or vocabulary: give the model it was trained from")
    configs = {0: first, 1: second}

    def weights(steps: Sequence[int]) -> Iterator[tuple[int, Any]]:
        for step in steps:
            yield step, load_base(configs[step], mesh).params

    def made() -> Any:
        return load_base(first, mesh).params

    return Subject(second, model, int(base is not None), (), made, weights, lambda last, start: {})
