"""The config of a run. Config files and flags use ml_collections; inside the package it is frozen dataclasses."""

import dataclasses
import operator
import types
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import config_dict

from es_jax.core.fields import Fields
from es_jax.core.names import unknown
from es_jax.es import theory
from es_jax.es.population import check_deal
from es_jax.optim.schedules import largest, make_schedule, parse
from es_jax.rundir import directory
from es_jax.rundir.places import locate
from es_jax.rundir.seed_log import Entry
from es_jax.scoring.row_results import VIEWS
from es_jax.tasks import check_name
from es_jax.tasks.outside import label
from es_jax.training.config_groups import (
    RULES,
    DecodeConfig,
    ESConfig,
    EvalsConfig,
    GRPOConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TaskConfig,
    TrainConfig,
)
from es_jax.training.method import METHODS, MethodRecord

METRICS = (*VIEWS, "reward")  # the metrics that train.keep_best may name


class Rates(NamedTuple):
    """The rates α, σ and λ of a step."""

    learning_rate: float
    sigma: float
    strength: float


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run, except the bytes of its base weights. Each group documents its fields.

    Attributes:
      method: "es", Evolution Strategies, which reads the group es; or "grpo", which reads the group grpo.
    """

    method: str = "es"
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    es: ESConfig = ESConfig()
    grpo: GRPOConfig = GRPOConfig()
    optim: OptimConfig = OptimConfig()
    decode: DecodeConfig = DecodeConfig()
    train: TrainConfig = TrainConfig()
    evals: EvalsConfig = EvalsConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(unknown("method", self.method, METHODS))
        _ = self.best_metric
        if not self.record.perturbs:
            self._check_gradients()
        elif self.es.prompts_per_member is not None:
            prompts = self.task.prompts_per_step or self.task.train_size
            check_deal(self.es.population, prompts, self.es.prompts_per_member, antithetic=self.es.antithetic)
        for field, text in self.schedules.items():
            try:
                make_schedule(text, self.train.steps)
            except ValueError as error:
                raise ValueError(f"{field}: {error}") from None
        text = self.es.schedule
        if text.startswith(("linear", "cosine")) and not parse(text)[1] > 0:
            raise ValueError(f"es.schedule is {text!r}: σ must stay above 0, so give an end, as in linear:0.1")
        highest = largest(self.optim.schedule) * largest(self.optim.anchor.schedule)
        rate = self.optim.learning_rate * self.anchor_strength * highest
        if self.optim.anchor.penalty == "l2" and not rate < 1:
            raise ValueError(
                f"αλ is {self.optim.learning_rate:g} × {self.anchor_strength:g} = {rate / highest:g}"
                + (f", times {highest:g} by its schedules" if highest > 1 else "")
                + ": the l2 anchor needs it below 1; lower optim.anchor.strength, or raise optim.anchor.kappa"
            )

    @property
    def best_metric(self) -> tuple[str, str] | None:
        """The task, under its name in files, and the metric column that train.keep_best names. Raises ValueError."""
        if (text := self.train.keep_best) is None:
            return None
        task, colon, metric = text.rpartition(":")
        names = {label(name): f"{name}:" for name in self.evals.tasks} | {label(self.task.name): ""}
        task = label(task) if colon else label(self.task.name)
        if task not in names or metric not in METRICS:
            known = [prefix + name for prefix in names.values() for name in METRICS]
            raise ValueError(unknown("train.keep_best", text, known))
        if not self.evals.every:
            raise ValueError(
                f"train.keep_best is {text!r} with evals.every 0, so no step is evaluated: set evals.every above 0"
            )
        return task, metric

    def _check_gradients(self) -> None:
        if self.model.param_dtype != "float32":
            raise ValueError(
                f"model.param_dtype is {self.model.param_dtype!r} with method {self.method!r}: gradients, moments and "
                "weights are kept in float32; set model.dtype to choose the dtype of the computation"
            )
        if self.optim.anchor.kappa is not None:
            raise ValueError(
                f"optim.anchor.kappa is {self.optim.anchor.kappa} with method {self.method!r}: the drift of a weight "
                "is known in closed form for ES alone; set optim.anchor.strength instead"
            )
        if self.decode.temperature:
            raise ValueError(
                f"decode.temperature is {self.decode.temperature:g} with method {self.method!r}: it applies to ES "
                "members only; set grpo.temperature for rollouts, and decode.temperature back to 0"
            )
        for field, text in self.schedules.items():
            if text != "constant":
                raise ValueError(
                    f"{field} is {text!r} with method {self.method!r}: schedules are for ES; set it to 'constant'"
                )

    def with_date(self, date: str | None) -> "RunConfig":
        """The same config with another model.template_date."""
        return dataclasses.replace(self, model=dataclasses.replace(self.model, template_date=date))

    @property
    def record(self) -> MethodRecord:
        return METHODS[self.method]

    @property
    def schedules(self) -> dict[str, str]:
        """The schedules of α, σ and λ, by field."""
        groups: dict[str, Any] = {"optim": self.optim, "es": self.es, "optim.anchor": self.optim.anchor}
        return {f"{name}.schedule": group.schedule for name, group in groups.items()}

    def rates(self, step: int) -> Rates:
        """The rates of step 1..T, by the schedules."""
        factors = (make_schedule(text, self.train.steps)(step) for text in self.schedules.values())
        return Rates(*map(operator.mul, self._constants, factors))

    def logged_rates(self, entry: Entry) -> Rates:
        """The rates of a step in the seed log; the config's constants if an old log does not record them."""
        rates = (entry.learning_rate, entry.sigma, entry.strength)
        return self._constants if None in rates else Rates(*rates)  # type: ignore[arg-type]

    @property
    def _constants(self) -> Rates:
        return Rates(self.optim.learning_rate, self.es.sigma, self.anchor_strength)

    @property
    def anchor_strength(self) -> float:
        """λ as set, or the λ that gives the wanted drift κ; 0 without an anchor."""
        anchor = self.optim.anchor
        return anchor.strength or 0.0 if anchor.kappa is None else self._theory(theory.strength_for_kappa, anchor.kappa)

    @property
    def anchor_kappa(self) -> float | None:
        """κ, the long-run drift of a weight in units of σ; None if the weights walk freely or κ is not known."""
        optim, strength = self.optim, self.anchor_strength
        moving = optim.name != "sgd" or not self.record.perturbs or optim.anchor.ema_decay is not None
        if not strength or moving:
            return None
        return optim.anchor.kappa or self._theory(theory.kappa_for_strength, strength)

    def _theory(self, formula: Any, value: float) -> float:
        return formula(
            value,
            learning_rate=self.optim.learning_rate,
            sigma=self.es.sigma,
            population=self.es.population,
            penalty=self.optim.anchor.penalty,
        )


FIELDS = Fields.of(RunConfig, rules=RULES)


def default_config() -> config_dict.ConfigDict:
    """All fields with their defaults, as the locked ConfigDict that config files start from."""

    def convert(group: Any) -> config_dict.ConfigDict:
        fields = config_dict.ConfigDict()
        for name, hint in typing.get_type_hints(type(group)).items():
            default = getattr(group, name)
            if isinstance(hint, types.UnionType):
                kinds = typing.get_args(hint)
                default = config_dict.placeholder(object if list in kinds else kinds[0])
            fields[name] = convert(default) if dataclasses.is_dataclass(hint) else default
        return fields.lock()

    config = convert(RunConfig())
    config.task.options.unlock()  # any name may be set
    return config


def freeze(config: config_dict.ConfigDict | dict, *, begun: bool = False) -> RunConfig:
    """The validated RunConfig of a ConfigDict or of plain nested dicts. With `begun` it is that of a run's config.json,
    whose tasks need not exist any more.

    Raises:
      ValueError: one message lists every unknown field (with the nearest known one) and every field of the wrong type;
        otherwise it names the first value out of range.

    >>> freeze({"es": {"population": 8}}).es.population
    8
    """
    frozen = FIELDS.build(RunConfig, config.to_dict() if isinstance(config, config_dict.ConfigDict) else config)
    for name in () if begun else frozen.evals.tasks:
        try:
            check_name(name)
        except ValueError as error:
            raise ValueError(f"evals.tasks: {error}") from None
    return frozen


def read_config(workdir: Path, *, needs: Collection[str] = ()) -> RunConfig:
    """The config that the run in the directory was started with; each path is resolved from the working directory.
    Raises FileNotFoundError if a path of a field in `needs` cannot be found."""
    facts = directory.read(workdir)
    return freeze(locate(facts["config"], facts, Path(workdir), needs=needs), begun=True)
