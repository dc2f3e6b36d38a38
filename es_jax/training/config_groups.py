"""The groups of a run's config: frozen dataclasses that refuse values out of range."""

import contextlib
import dataclasses
import datetime
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from es_jax.core import rng
from es_jax.core.names import unknown
from es_jax.es import theory
from es_jax.es.low_rank import VECTORS
from es_jax.es.noise import NOISES
from es_jax.es.population import Population
from es_jax.es.shaping import SHAPINGS
from es_jax.optim.chains import OPTIMIZERS, OPTIONS
from es_jax.rundir.tracker import TRACKERS

MEMORIES = ("device", "pinned_host")
DTYPES = ("float32", "bfloat16", "float16")
AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


RULES: dict[str, list[str]] = {}  # full name of a field → what its checks require, recorded when they run


def _rule(field: str, must: str) -> None:
    if must not in (rules := RULES.setdefault(field, [])):
        rules.append(must)


def _at_least(low: float) -> Callable[[Any], bool]:
    return lambda x: low <= x < math.inf


def _above(low: float) -> Callable[[Any], bool]:
    return lambda x: low < x < math.inf


def check_date(field: str, text: Any) -> None:
    """Raises ValueError unless it is a day, YYYY-MM-DD, or None."""
    with contextlib.suppress(ValueError, TypeError):
        if text is None or datetime.date.fromisoformat(text).isoformat() == text:
            return
    raise ValueError(f"{field} is {text!r}: it must be a day such as 2026-11-27")


def _require(config: Any, group: str, must: str, holds: Callable[[Any], bool], *fields: str) -> None:
    """Raises ValueError for the first field that is set to a value out of range."""
    for field in fields:
        value = getattr(config, field)
        _rule(f"{group}.{field}", must)
        if value is not None and not holds(value):
            raise ValueError(f"{group}.{field} is {value}: it must be {must}")


def _choose(config: Any, group: str, **known: Iterable[str]) -> None:
    """Raises ValueError for the first field whose value is not a known one."""
    for field, names in known.items():
        _rule(f"{group}.{field}", f"one of {', '.join(names)}")
        if (value := getattr(config, field)) not in names:
            raise ValueError(unknown(f"{group}.{field}", value, names))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The model.

    Attributes:
      source: a Hugging Face folder, a .gguf file or a hub name; or RUN@STEP for the weights of a run at that step.
      dtype: the dtype that members compute in; "auto" is bfloat16 on accelerators and float32 on CPU.
      param_dtype: the dtype of the master weights and the anchor. Anything but float32 loses small updates.
      template_date: the date that the chat template sees, such as "2026-11-27"; None is the day on which the run
        begins, which config.json then records.
    """

    source: str = ""
    dtype: str = "auto"
    param_dtype: str = "float32"
    template_date: str | None = None

    def __post_init__(self):
        check_date("model.template_date", self.template_date)
        _choose(self, "model", dtype=("auto", *DTYPES), param_dtype=DTYPES)


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """The task that members are scored on.

    Attributes:
      name: a name that `es_jax.tasks.get_task` takes: "countdown", …; "rows"; reasoning_gym:NAME; FILE.py:NAME or
        package.module:NAME.
      data_dir: a folder of rows to use instead of the task's own; relative to the working directory.
      hub: a data set on the hub, "owner/name", for countdown and rows.
      prompt, answer: for the task rows: a template (text or a list of messages) and a column; see
        `es_jax.tasks.columns.Columns`. For reasoning_gym:NAME, prompt is a template with {question}.
      grader: "paper", "strict" or "robust" if the task has graders; "exact", "number", "choice", "contains",
        FILE.py:NAME or package.module:NAME for the task rows; "tags" or "whole" for reasoning_gym:NAME.
      options: other fields of the task, by name; values are those of JSON.
      train_size: how many training prompts there are.
      prompts_per_step: how many training prompts a step scores its members on; None is all of them at every step.
      seed: the seed of the rows if the task generates them; None is the task's own default.
      timeout_seconds: the time limit for scoring one completion. It holds for the trained task and for tasks from
        outside the package, which are then scored in a worker process. None is the limit that the task's class sets,
        which is 10 for reasoning_gym:NAME.
    """

    name: str = "countdown"
    data_dir: str | None = None
    hub: str | None = None
    prompt: str | list | None = None
    answer: str | None = None
    grader: str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    train_size: int = 200
    prompts_per_step: int | None = None
    seed: int | None = None
    timeout_seconds: float | None = None

    def __post_init__(self):
        _require(self, "task", "at least 1", _at_least(1), "train_size", "prompts_per_step")
        _require(self, "task", "finite and above 0", _above(0), "timeout_seconds")
        if (self.prompts_per_step or 0) > self.train_size:
            raise ValueError(
                f"task.prompts_per_step is {self.prompts_per_step} with task.train_size {self.train_size}: a step "
                "cannot use more prompts than there are; raise task.train_size"
            )


@dataclasses.dataclass(frozen=True)
class ESConfig:
    """The population.

    Attributes:
      population: N ≥ 2 members a step.
      sigma: σ > 0, the noise scale.
      schedule: what σ is multiplied by, step by step: "constant", "linear" or "cosine",
        with an end and a warm-up as in "cosine:0.1:20" (`es_jax.optim.schedules`).
      antithetic: members are pairs θ ± σε, so N must be even.
      noise: "gaussian"; "low_rank", which lets all members share one set of weights in one batch (arXiv 2511.16652); or
        "shared_seed" as published (equal-shaped parameters share noise; arithmetic in param_dtype).
      rank: r ≥ 1, the rank of the low_rank noise.
      vectors: for the low_rank noise: "gaussian" gives norm scales and biases full noise; "frozen" keeps them fixed, so
        that neither an optimizer's own decay nor an anchor elsewhere moves them.
      prompts_per_member: how many of a step's prompts each member sees, dealt evenly; None is all of them. A member is
        then compared with the members that saw the same prompts.
      generator: the noise generator: "threefry13", or "threefry" (jax.random), which runs from before this field used.
      shaping: "z_score" as published, or "centered_rank".
      rewards: "task", or "random" to draw them from a normal distribution instead: the control experiment that shows
        what the random walk does by itself. Members are still decoded and graded for the metrics.
      nan_rewards: "error", or "worst" to count a member with a reward that is not finite as the worst of its step.
    """

    population: int = 30
    sigma: float = 1e-3
    schedule: str = "constant"
    antithetic: bool = False
    noise: str = "gaussian"
    rank: int = 1
    vectors: str = "gaussian"
    prompts_per_member: int | None = None
    generator: str = rng.DEFAULT
    shaping: str = "z_score"
    rewards: str = "task"
    nan_rewards: str = "error"

    def __post_init__(self):
        Population(self.population, seed=0, antithetic=self.antithetic)
        if not (self.sigma > 0 and math.isfinite(self.sigma)):
            raise ValueError(f"es.sigma is {self.sigma}: the noise scale must be above 0 (the papers use 1e-3)")
        _choose(self, "es", noise=(*NOISES, "low_rank"), generator=rng.GENERATORS, shaping=SHAPINGS)
        _choose(self, "es", rewards=("task", "random"), nan_rewards=("error", "worst"), vectors=VECTORS)
        _require(self, "es", "at least 1", _at_least(1), "rank", "prompts_per_member")
        if self.noise != "low_rank" and (self.rank, self.vectors) != (1, "gaussian"):
            raise ValueError(
                f"es.rank is {self.rank} and es.vectors {self.vectors!r} with es.noise {self.noise!r}: both apply "
                "only to es.noise 'low_rank'; set es.noise to 'low_rank', or set the two back to their defaults"
            )


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
    """GRPO (arXiv 2402.03300), for method="grpo"; the defaults are the settings that arXiv 2605.30148 compares with.

    Attributes:
      rollouts: n ≥ 2 completions of each prompt a step.
      temperature: > 0, of the rollouts and of the log-probabilities.
      mini_batch: prompts per optimizer step; the last mini-batch of a step may be smaller.
      micro_batch: rows that a device differentiates at once; it affects memory only.
      clip_low, clip_high: ε: the ratio is clipped to 1 − clip_low .. 1 + clip_high.
      dual_clip: c > 1: the loss of a token with a negative advantage is at most c times that advantage.
      kl_coef: ≥ 0, the weight of the k3 estimate of KL(π ‖ π_ref) in the loss; at 0 no reference is scored.
      entropy: the weight of the entropy bonus.
      aggregation: how the losses of tokens are averaged; see `grpo.token_weights`.
      scale_by_std: divide advantages by their group's std; False is Dr. GRPO (arXiv 2503.20783).
      std_eps: ≥ 0, added to that std.
      log_ratio_limit: > 0: log-ratios are clamped to ± this before exp is taken.
      kl_limit: > 0: the estimate of a token's KL is clamped to ± this.
    """

    rollouts: int = 30
    temperature: float = 1.0
    mini_batch: int = 32
    micro_batch: int = 8
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 3.0
    kl_coef: float = 1e-3
    entropy: float = 0.0
    aggregation: str = "token-mean"
    scale_by_std: bool = True
    std_eps: float = 1e-6
    log_ratio_limit: float = 20.0
    kl_limit: float = 10.0

    def __post_init__(self):
        _choose(self, "grpo", aggregation=AGGREGATIONS)
        _require(self, "grpo", "finite and at least 2", _at_least(2), "rollouts")
        _require(self, "grpo", "finite and at least 1", _at_least(1), "mini_batch", "micro_batch")
        not_negative = ("kl_coef", "std_eps", "clip_low", "clip_high")
        _require(self, "grpo", "finite and at least 0", _at_least(0), *not_negative)
        _require(self, "grpo", "finite and above 0", _above(0), "temperature", "log_ratio_limit", "kl_limit")
        _require(self, "grpo", "finite and above 1", _above(1), "dual_clip")
        _require(self, "grpo", "at most 1, since a ratio is never negative", lambda x: x <= 1, "clip_low")
        _require(self, "grpo", "finite", math.isfinite, "entropy")


@dataclasses.dataclass(frozen=True)
class AnchorConfig:
    """Anchored weight decay.

    Attributes:
      penalty: "none", "l2" or "l1".
      strength: λ ≥ 0 of the paper (10 for l2, 0.01 for l1); or give `kappa`.
      kappa: κ > 0, how many σ a weight may drift in the long run; λ follows from it. Plain sgd only.
      schedule: what λ is multiplied by, step by step: "constant", "linear" or "cosine",
        with an end and a warm-up as in "cosine:0.1:20" (`es_jax.optim.schedules`).
      source: the model, or RUN@STEP, to pull toward if it is not model.source, where training starts. In a sequence of
        tasks it is the base model of the first task; a branch takes that by default.
      ema_decay: β of an anchor that follows the weights as their exponential average over about 1/(1 − β) steps; None
        keeps the anchor fixed.
      memory: where the starting weights are kept: "device", or "pinned_host" to copy them to the devices leaf by leaf
        in each step.
    """

    penalty: str = "none"
    strength: float | None = None
    kappa: float | None = None
    schedule: str = "constant"
    source: str | None = None
    ema_decay: float | None = None
    memory: str = "device"

    def __post_init__(self):
        _choose(self, "optim.anchor", memory=MEMORIES, penalty=theory.PENALTIES)
        strengths, moving = (
            [name for name in names if getattr(self, name) is not None]
            for names in (("strength", "kappa"), ("source", "ema_decay"))
        )
        if self.penalty == "none" and strengths:
            raise ValueError(
                f"optim.anchor.{strengths[0]} is set but optim.anchor.penalty is 'none': set the penalty to 'l2' or "
                "'l1'"
            )
        if self.penalty != "none" and len(strengths) != 1:
            raise ValueError(
                f"optim.anchor.penalty is {self.penalty!r} with {' and '.join(strengths) or 'no strength'}: set either "
                "optim.anchor.strength (λ of the paper) or optim.anchor.kappa (κ, in σ per weight)"
            )
        if self.penalty == "none" and moving:
            raise ValueError(
                f"optim.anchor.{moving[0]} is set but optim.anchor.penalty is 'none': set the penalty to 'l2' or 'l1'"
            )
        _require(self, "optim.anchor", "at least 0 and below 1, such as 0.99", lambda x: 0 <= x < 1, "ema_decay")
        if self.ema_decay is not None and self.kappa is not None:
            raise ValueError(
                f"optim.anchor.kappa is {self.kappa} with optim.anchor.ema_decay: weights that are pulled to their "
                "own average have no finite long-run drift; set optim.anchor.strength instead"
            )
        if self.ema_decay is not None and self.memory != "device":
            raise ValueError(f"optim.anchor.memory is {self.memory!r} with optim.anchor.ema_decay: set it to 'device'")
        _require(self, "optim.anchor", "finite and not negative", _at_least(0), "strength")
        _require(self, "optim.anchor", "finite and above 0", _above(0), "kappa")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer.

    Attributes:
      name: one of `es_jax.optim.chains.OPTIMIZERS`; the papers' step is "sgd".
      learning_rate: α > 0, with the 1/σ of the gradient folded in, as in the papers.
      schedule: what α is multiplied by, step by step: "constant", "linear" or "cosine",
        with an end and a warm-up as in "cosine:0.1:20" (`es_jax.optim.schedules`).
      b1, b2: in [0, 1), decay of the moments, for adam, adamw and lion; None is optax's default.
      weight_decay: ≥ 0, decoupled decay toward zero, for adamw and lion; None is optax's default.
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
        _choose(self, "optim", name=OPTIMIZERS)
        _require(self, "optim", "finite and above 0", _above(0), "learning_rate")
        _require(self, "optim", "at least 0 and below 1", lambda x: 0 <= x < 1, "b1", "b2")
        _require(self, "optim", "at least 0 and below inf", _at_least(0), "weight_decay")
        for field in ("b1", "b2", "weight_decay"):
            if (value := getattr(self, field)) is not None and field not in OPTIONS.get(self.name, ()):
                takers = " or ".join(repr(name) for name, taken in OPTIONS.items() if field in taken)
                raise ValueError(
                    f"optim.{field} is {value}, but the optimizer {self.name!r} does not take it: set optim.name to "
                    f"{takers}"
                )
        _require(self, "optim", "finite and above 0, or None", _above(0), "max_grad_norm")
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
      slots: prompts that a member decodes at once. None: as many as fit into the devices' memory, chosen when a run
        starts and kept in its config.json; 64 if the devices do not report their memory, as on CPU.
      temperature: temperature of the completions that ES members are scored on; 0 is greedy decoding, as published. All
        members of a step sample with the same keys. Held-out rows are always decoded greedily.
      members_at_once: members that a group of devices evaluates in one call. None: with es.noise = "low_rank" as many
        as fit into the memory, chosen when a run starts and kept in its config.json; otherwise 1. More than 1 is faster
        for small models.
    """

    max_prompt_tokens: int = 512
    max_new_tokens: int = 1024
    slots: int | None = None
    members_at_once: int | None = None
    temperature: float = 0.0

    def __post_init__(self):
        sizes = ("max_prompt_tokens", "max_new_tokens", "slots", "members_at_once")
        _require(self, "decode", "at least 1", _at_least(1), *sizes)
        _require(self, "decode", "finite and at least 0, where 0 is greedy", _at_least(0), "temperature")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop.

    Attributes:
      steps: iterations T.
      seed: 0 to 2³² − 1, the seed of the noise and of the order of the prompts.
      checkpoint_every: steps between checkpoints; the last step gets one too. On resume the steps after the last
        checkpoint are replayed.
      keep_checkpoints: how many checkpoints stay.
      keep_best: a held-out metric: "accuracy", "strict", "robust", "loglik" or "reward" of the trained task, or
        "TASK:METRIC" for another task of evals.tasks. The checkpoint of the step with the highest value is kept too,
        and best.json names that step. It needs evals.every. None keeps no such checkpoint.
      samples: how many completions of each step's first member are written to samples.jsonl.
      profile: (start, stop): a TensorBoard trace of steps start to stop − 1 is written to the run's tb folder.
        It ends with the last step of the run at the latest.
      tracker: "wandb" also logs the run to Weights & Biases (docs/records.md); None uses no tracker.
    """

    steps: int = 500
    seed: int = 0
    checkpoint_every: int = 25
    keep_checkpoints: int = 2
    keep_best: str | None = None
    samples: int = 2
    profile: tuple[int, ...] = ()
    tracker: str | None = None

    def __post_init__(self):
        _require(self, "train", "at least 1", _at_least(1), "steps", "checkpoint_every", "keep_checkpoints")
        if self.profile and not (len(self.profile) == 2 and 1 <= self.profile[0] < self.profile[1]):
            raise ValueError(
                f"train.profile is {self.profile}: give the first step of the trace and the step after its last one, "
                "1 ≤ start < stop, such as (3, 5)"
            )
        if self.profile and self.profile[0] > self.steps:
            raise ValueError(
                f"train.profile is {self.profile}, but the last step is train.steps = {self.steps}: nothing would be "
                "traced; start earlier"
            )
        _rule("train.tracker", f"one of {', '.join(TRACKERS)}")
        if self.tracker not in (None, *TRACKERS):
            raise ValueError(unknown("train.tracker", self.tracker, TRACKERS))
        if self.samples < 0:
            raise ValueError(f"train.samples is {self.samples}: it must not be negative")
        try:
            rng.check_seed(self.seed)
        except ValueError as error:
            raise ValueError(f"train.{error}") from None


@dataclasses.dataclass(frozen=True)
class EvalsConfig:
    """Evaluation of the unperturbed model on held-out rows, at step 0, every `every` steps and at the end.

    Attributes:
      every: steps between evaluations; 0 is never.
      rows: how many test rows of each task are evaluated.
      tasks: other tasks to evaluate, in addition to the trained one.
      data_dir: a folder that holds a folder of rows for each of `tasks`, named like the task (`-` may be `_`). None
        uses the task's own rows, from the hub or generated. The laboratory's tasks always generate theirs.
    """

    every: int = 25
    rows: int = 200
    tasks: tuple[str, ...] = ()
    data_dir: str | None = None

    def __post_init__(self):
        _require(self, "evals", "at least 1", _at_least(1), "rows")
        _require(self, "evals", "0 (never) or more", _at_least(0), "every")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The device mesh: groups of devices that hold a member each, and devices in a group.

    Attributes:
      groups: number of groups; None is as many as the devices allow.
      model: devices per member, which is sharded by heads, MLP and vocabulary; None is the fewest that have room for
        it, or as many as when the run began if that is more. The run logs the sizes, and `mesh` in config.json records
        them.
    """

    groups: int | None = None
    model: int | None = None

    def __post_init__(self):
        _require(self, "mesh", "at least 1", _at_least(1), "groups", "model")
