"""The groups of fields of a run, each a frozen dataclass that refuses values out of range."""

import dataclasses
import math
from typing import Any

from es_jax.core import rng
from es_jax.core.names import unknown
from es_jax.core.rng import check_seed
from es_jax.es import theory
from es_jax.es.noise import NOISES
from es_jax.es.population import Population
from es_jax.es.shaping import SHAPINGS
from es_jax.optim.chains import OPTIMIZERS, OPTIONS
from es_jax.optim.schedules import parse
from es_jax.tasks import TASKS

MEMORIES = ("device", "pinned_host")
DTYPES = ("float32", "bfloat16", "float16")


def _positive(config: Any, group: str, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        if value is not None and value < 1:
            raise ValueError(f"{group}.{field} is {value}: it must be at least 1")


def check_schedule(field: str, text: str) -> None:
    """Raises ValueError with the field's name where the text is no schedule."""
    try:
        parse(text)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The model.

    Attributes:
      source: a Hugging Face folder, a .gguf file, or a hub name.
      dtype: what members compute in; "auto" is bfloat16 on accelerators and float32 on CPU.
      param_dtype: what the master weights and the anchor are kept in. Anything but float32 loses small updates.
    """

    source: str = ""
    dtype: str = "auto"
    param_dtype: str = "float32"

    def __post_init__(self):
        if self.dtype not in ("auto", *DTYPES):
            raise ValueError(unknown("model.dtype", self.dtype, ("auto", *DTYPES)))
        if self.param_dtype not in DTYPES:
            raise ValueError(unknown("model.param_dtype", self.param_dtype, DTYPES))


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """What the members are scored on.

    Attributes:
      name: a name of `es_jax.tasks.TASKS`.
      data_dir: a folder of rows, where the task is not to use its own; relative to the working directory.
      grader: "paper" or "strict", where the task has both.
      train_size: how many training prompts there are.
      prompts_per_step: how many of them a step scores its members on; None is all of them, every step.
      seed: of the rows, where the task generates them; None is the task's own default.
    """

    name: str = "countdown"
    data_dir: str | None = None
    grader: str | None = None
    train_size: int = 200
    prompts_per_step: int | None = None
    seed: int | None = None

    def __post_init__(self):
        _positive(self, "task", "train_size", "prompts_per_step")
        if self.prompts_per_step is not None and self.prompts_per_step > self.train_size:
            raise ValueError(
                f"task.prompts_per_step is {self.prompts_per_step} of task.train_size {self.train_size}: "
                "a step cannot use more prompts than there are; raise task.train_size"
            )


@dataclasses.dataclass(frozen=True)
class ESConfig:
    """The population.

    Attributes:
      population: N ≥ 2 members a step.
      sigma: σ > 0, the noise scale.
      schedule: what σ is multiplied by, step by step: `es_jax.optim.schedules`.
      antithetic: members are pairs θ ± σε; N even.
      noise: "gaussian", or "shared_seed" as published (equal-shaped parameters share noise; arithmetic in param_dtype).
      generator: what draws the noise: "threefry13", or "threefry" of jax.random, as runs without this field have it.
      shaping: "z_score" as published, or "centered_rank".
      rewards: "task", or "random" to draw them from a normal distribution instead: the control experiment that shows
        what the random walk does by itself. Members are still decoded and graded for the metrics.
      nan_rewards: "error", or "worst" to count a member whose reward is not finite as the worst of its step.
    """

    population: int = 30
    sigma: float = 1e-3
    schedule: str = "constant"
    antithetic: bool = False
    noise: str = "gaussian"
    generator: str = rng.DEFAULT
    shaping: str = "z_score"
    rewards: str = "task"
    nan_rewards: str = "error"

    def __post_init__(self):
        Population(self.population, seed=0, antithetic=self.antithetic)
        if not (self.sigma > 0 and math.isfinite(self.sigma)):
            raise ValueError(f"es.sigma is {self.sigma}: the noise scale must be above 0 (the papers use 1e-3)")
        check_schedule("es.schedule", self.schedule)
        if self.schedule.startswith(("linear", "cosine")) and not parse(self.schedule)[1] > 0:
            raise ValueError(f"es.schedule is {self.schedule!r}: σ must stay above 0, so give an end, as in linear:0.1")
        choices = {
            "noise": NOISES,
            "generator": rng.GENERATORS,
            "shaping": SHAPINGS,
            "rewards": ("task", "random"),
            "nan_rewards": ("error", "worst"),
        }
        for field, known in choices.items():
            if getattr(self, field) not in known:
                raise ValueError(unknown(f"es.{field}", getattr(self, field), known))


@dataclasses.dataclass(frozen=True)
class AnchorConfig:
    """Anchored weight decay.

    Attributes:
      penalty: "none", "l2" or "l1".
      strength: λ ≥ 0 of the paper (10 for l2, 0.01 for l1); or give `kappa`.
      kappa: κ > 0, how many σ a weight may drift in the long run; λ follows from it. Plain sgd only.
      schedule: what λ is multiplied by, step by step: `es_jax.optim.schedules`.
      source: the model to be pulled to, where it is not the one that training starts from (model.source): in a
        sequence of tasks, the base of the first.
      ema_decay: β of an anchor that follows the weights, an exponential average over about 1/(1 − β) steps; None: fixed.
      memory: where the starting weights are kept: "device", or "pinned_host" to bring them leaf by leaf each step.
    """

    penalty: str = "none"
    strength: float | None = None
    kappa: float | None = None
    schedule: str = "constant"
    source: str | None = None
    ema_decay: float | None = None
    memory: str = "device"

    def __post_init__(self):
        if self.memory not in MEMORIES:
            raise ValueError(unknown("optim.anchor.memory", self.memory, MEMORIES))
        if self.penalty not in theory.PENALTIES:
            raise ValueError(unknown("optim.anchor.penalty", self.penalty, theory.PENALTIES))
        given = [name for name in ("strength", "kappa") if getattr(self, name) is not None]
        if self.penalty == "none" and given:
            raise ValueError(
                f"optim.anchor.{given[0]} is set but optim.anchor.penalty is 'none': set the penalty to 'l2' or 'l1'"
            )
        if self.penalty != "none" and len(given) != 1:
            raise ValueError(
                f"optim.anchor.penalty is {self.penalty!r} with {' and '.join(given) or 'no strength'}: set either "
                "optim.anchor.strength (λ of the paper) or optim.anchor.kappa (κ, in σ per weight)"
            )
        moved = [name for name in ("source", "ema_decay") if getattr(self, name) is not None]
        if self.penalty == "none" and moved:
            raise ValueError(f"optim.anchor.{moved[0]} is set but optim.anchor.penalty is 'none': set that")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(
                f"optim.anchor.ema_decay is {self.ema_decay}: it must be at least 0 and below 1, such as 0.99"
            )
        if self.ema_decay is not None and self.kappa is not None:
            raise ValueError(
                f"optim.anchor.kappa is {self.kappa} with optim.anchor.ema_decay: weights that are pulled to their own "
                "average have no long-run drift; set optim.anchor.strength instead"
            )
        if self.ema_decay is not None and self.memory != "device":
            raise ValueError(f"optim.anchor.memory is {self.memory!r} with optim.anchor.ema_decay: set it to 'device'")
        check_schedule("optim.anchor.schedule", self.schedule)
        if self.strength is not None and not 0 <= self.strength < math.inf:
            raise ValueError(f"optim.anchor.strength is {self.strength}: it must be finite and not negative")
        if self.kappa is not None and not 0 < self.kappa < math.inf:
            raise ValueError(f"optim.anchor.kappa is {self.kappa}: it must be finite and above 0")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer.

    Attributes:
      name: one of `es_jax.optim.chains.OPTIMIZERS`; the papers' step is "sgd".
      learning_rate: α > 0, with the 1/σ of the gradient folded in, as in the papers.
      schedule: what α is multiplied by, step by step: `es_jax.optim.schedules`.
      b1, b2: in [0, 1), decay of the moments; None is optax's default. adam, adamw and lion.
      weight_decay: ≥ 0, decoupled, toward zero; None is optax's default. adamw and lion.
      max_grad_norm: > 0: gradients of a larger norm are scaled down to it; None does not clip.
      anchor: the pull toward the starting weights.
    """

    name: str = "sgd"
    learning_rate: float = 5e-4
    schedule: str = "constant"
    b1: float | None = None
    b2: float | None = None
    weight_decay: float | None = None
    max_grad_norm: float | None = None
    anchor: AnchorConfig = AnchorConfig()

    def __post_init__(self):
        if self.name not in OPTIMIZERS:
            raise ValueError(unknown("optim.name", self.name, OPTIMIZERS))
        check_schedule("optim.schedule", self.schedule)
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"optim.learning_rate is {self.learning_rate}: it must be finite and above 0")
        for field, most in {"b1": 1, "b2": 1, "weight_decay": math.inf}.items():
            value = getattr(self, field)
            if value is not None and not 0 <= value < most:
                raise ValueError(f"optim.{field} is {value}: it must be at least 0 and below {most}")
            if value is not None and field not in OPTIONS.get(self.name, ()):
                takers = " or ".join(repr(name) for name, taken in OPTIONS.items() if field in taken)
                raise ValueError(f"optim.{field} is {value}, but {self.name!r} has none: set optim.name to {takers}")
        if self.max_grad_norm is not None and not 0 < self.max_grad_norm < math.inf:
            raise ValueError(f"optim.max_grad_norm is {self.max_grad_norm}: it must be finite and above 0, or None")
        if self.anchor.kappa is not None and self.name != "sgd":
            raise ValueError(
                f"optim.anchor.kappa is {self.anchor.kappa} with optim.name {self.name!r}: the drift of a weight is "
                "known in closed form for 'sgd' alone; set optim.anchor.strength instead"
            )


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Generation.

    Attributes:
      max_prompt_tokens: the longest prompt allowed, in tokens.
      max_new_tokens: tokens after which a completion is cut.
      slots: prompts that a member decodes at once.
      members_at_once: members that a group of devices evaluates in one call; more than 1 pays for small models.
    """

    max_prompt_tokens: int = 512
    max_new_tokens: int = 1024
    slots: int = 64
    members_at_once: int = 1

    def __post_init__(self):
        _positive(self, "decode", "max_prompt_tokens", "max_new_tokens", "slots", "members_at_once")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop.

    Attributes:
      steps: iterations T.
      seed: of the noise and of the order of the prompts.
      checkpoint_every: steps between checkpoints; the last step has one too. Steps since are replayed on resume.
      keep_checkpoints: how many checkpoints stay.
      samples: completions of each step's first member that go to samples.jsonl.
      profile: (start, stop): a TensorBoard trace of steps start to stop − 1 is written to the run's tb folder.
        It ends with the last step of the run at the latest.
    """

    steps: int = 500
    seed: int = 0
    checkpoint_every: int = 25
    keep_checkpoints: int = 2
    samples: int = 2
    profile: tuple[int, ...] = ()

    def __post_init__(self):
        _positive(self, "train", "steps", "checkpoint_every", "keep_checkpoints")
        if self.profile and not (len(self.profile) == 2 and 1 <= self.profile[0] < self.profile[1]):
            raise ValueError(
                f"train.profile is {self.profile}: give the first step of the trace and the one behind its last, "
                "1 ≤ start < stop, such as (3, 5)"
            )
        if self.profile and self.profile[0] > self.steps:
            raise ValueError(
                f"train.profile is {self.profile}, but the last step is train.steps = {self.steps}: nothing would be "
                "traced; start earlier"
            )
        if self.samples < 0:
            raise ValueError(f"train.samples is {self.samples}: it must not be negative")
        try:
            check_seed(self.seed)
        except ValueError as error:
            raise ValueError(f"train.{error}") from None


@dataclasses.dataclass(frozen=True)
class EvalsConfig:
    """Evaluation of the unperturbed model on held-out rows, at step 0, every `every` steps and at the end.

    Attributes:
      every: steps between evaluations; 0 is never.
      rows: how many test rows, of each task.
      tasks: other tasks to evaluate besides the one that is trained.
      data_dir: a folder with a folder of rows for each of `tasks`, named like it (`-` may be `_`); None: the task's
        own, of the hub or made here. The laboratory's tasks always make theirs.
    """

    every: int = 25
    rows: int = 200
    tasks: tuple[str, ...] = ()
    data_dir: str | None = None

    def __post_init__(self):
        _positive(self, "evals", "rows")
        for name in self.tasks:
            if name not in TASKS:
                raise ValueError(unknown("task in evals.tasks", name, TASKS))
        if self.every < 0:
            raise ValueError(f"evals.every is {self.every}: it must be 0 (never) or more")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The device mesh: groups of devices that hold a member each, and devices in a group.

    Attributes:
      groups: groups; None is as many as there are devices for.
      model: devices that share one member, by its heads, MLP and vocabulary; None is the fewest with room for it.
    """

    groups: int | None = None
    model: int | None = None

    def __post_init__(self):
        _positive(self, "mesh", "groups", "model")
