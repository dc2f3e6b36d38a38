"""The fields of GRPO, a frozen dataclass that refuses values out of range."""

import dataclasses
import math

from es_jax.core.names import unknown

AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
    """GRPO (arXiv 2402.03300), for method="grpo"; the defaults are the settings that arXiv 2605.30148 compares with.

    Attributes:
      rollouts: n ≥ 2 completions of each prompt a step.
      temperature: > 0, of the rollouts and of the log-probabilities.
      mini_batch: prompts an optimizer step learns from; a step's last mini-batch may be smaller.
      micro_batch: rows that a device differentiates at once; a matter of memory alone.
      clip_low, clip_high: ε: the ratio counts within 1 − clip_low .. 1 + clip_high.
      dual_clip: c > 1: a token of negative advantage loses at most c times its advantage.
      kl_coef: ≥ 0, of the k3 estimate of KL(π ‖ π_ref) in the loss; at 0 no reference is scored.
      entropy: of the entropy bonus.
      aggregation: how tokens' losses become one; see `grpo_step.token_weights`.
      scale_by_std: divide advantages by their group's std; False is Dr. GRPO (arXiv 2503.20783).
      std_eps: ≥ 0, added to that std.
      log_ratio_limit: > 0: log-ratios are clamped to ± this before they are raised.
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
        if self.aggregation not in AGGREGATIONS:
            raise ValueError(unknown("grpo.aggregation", self.aggregation, AGGREGATIONS))
        least = {
            "rollouts": 2,
            "mini_batch": 1,
            "micro_batch": 1,
            "kl_coef": 0,
            "std_eps": 0,
            "clip_low": 0,
            "clip_high": 0,
        }
        for field, low in least.items():
            if not low <= getattr(self, field) < math.inf:
                raise ValueError(f"grpo.{field} is {getattr(self, field)}: it must be finite and at least {low}")
        above = {"temperature": 0, "dual_clip": 1, "log_ratio_limit": 0, "kl_limit": 0}
        for field, low in above.items():
            if not low < getattr(self, field) < math.inf:
                raise ValueError(f"grpo.{field} is {getattr(self, field)}: it must be finite and above {low}")
        if self.clip_low > 1:
            raise ValueError(f"grpo.clip_low is {self.clip_low}: it must be at most 1, for a ratio is never negative")
        if not math.isfinite(self.entropy):
            raise ValueError(f"grpo.entropy is {self.entropy}: it must be finite")
