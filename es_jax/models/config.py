"""The shape of a decoder-only transformer: one frozen record that validates itself."""

import dataclasses
from collections.abc import Sequence

from es_jax.core.names import unknown

ACTIVATIONS = ("silu", "gelu_tanh")
ROPE_SCALINGS = ("linear", "llama3")
MOST_LAYERS = 10_000
_COUNTS = ("vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "mlp_dim", "max_positions")
_POSITIVE_IF_GIVEN = ("sliding_window", "local_rope_theta", "query_pre_attn_scalar", "attn_softcap", "final_softcap")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than those of the first training.

    "linear" divides every frequency by `factor`. "llama3" divides those whose wavelength is above original_positions /
    low_freq_factor, keeps those below original_positions / high_freq_factor, and changes smoothly in between.

    Args:
      kind: "linear" or "llama3".
      factor: how much slower the stretched frequencies turn, above 0.
      low_freq_factor: above 0, for llama3 alone.
      high_freq_factor: above `low_freq_factor`, for llama3 alone.
      original_positions: the context of the first training in tokens, above 0, for llama3 alone.

    Raises:
      ValueError: a field is out of range. The message lists all of them.

    Examples:
      >>> RopeScaling("linear", 4.0).factor
      4.0
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192

    def __post_init__(self) -> None:
        problems = [] if self.kind in ROPE_SCALINGS else [unknown("rope_scaling.kind", self.kind, ROPE_SCALINGS)]
        positive = ("factor", "low_freq_factor", "original_positions")
        problems += [f"{n} = {getattr(self, n)!r} must be positive" for n in positive if not getattr(self, n) > 0]
        if not self.high_freq_factor > self.low_freq_factor:
            problems.append(
                f"high_freq_factor = {self.high_freq_factor!r} must be above low_freq_factor = {self.low_freq_factor!r}"
            )
        if problems:
            raise ValueError("RopeScaling: " + "; ".join(problems))


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Everything that the forward pass needs to know besides the weights.

    `rope_layers` and `local_layers` are patterns that repeat over the layers: (True, True, False) holds for layers 0,
    1, 3, 4, 6, …

    Args:
      family: a key of `es_jax.models.families.FAMILIES`. It says how files name and lay out the weights.
      vocab_size: V, at least 1.
      width: D of the residual stream, at least 1.
      layers: L, 1 to 10,000.
      heads: H, the query heads, at least 1.
      kv_heads: KH, the key and value heads, a divisor of H.
      head_dim: hd, even. H·hd need not be D.
      mlp_dim: F, at least 1.
      rope_theta: the base of the rotary frequencies, above 0.
      norm_eps: what norms add to a mean square, at least 0.
      qkv_bias: whether queries, keys and values have biases.
      tied_embeddings: whether the output head is the transposed embedding.
      max_positions: the context that the weights were trained for, in tokens. The forward pass does not enforce it.
      rope_scaling: how rotary frequencies are stretched; None leaves them.
      rope_layers: which layers turn queries and keys by their positions.
      sliding_window: in local layers a query at position p attends to positions p − sliding_window + 1 … p. None is no
        window.
      local_layers: which layers have the window, if there is one.
      local_rope_theta: the base in local layers, without scaling. None is the same as in the others.
      qk_norm: whether queries and keys are normed over hd before they are turned.
      post_norms: whether attention and MLP have norms after them too, before the residual sum.
      norm_plus_one: whether norms multiply by 1 + scale.
      activation: of the MLP's gate, "silu" or "gelu_tanh".
      scale_embeddings: whether embeddings are multiplied by √D, rounded to the compute dtype.
      query_pre_attn_scalar: attention scores are divided by its root. None is hd.
      attn_softcap: c > 0, attention scores become c·tanh(scores / c). None does nothing.
      final_softcap: the same for the logits.

    Raises:
      ValueError: a field is out of range. The message lists all of them.

    Examples:
      >>> TransformerConfig(family="llama", vocab_size=32, width=16, layers=2, heads=4, kv_heads=2, head_dim=8,
      ...                   mlp_dim=24).tied_embeddings
      True
    """

    family: str
    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_dim: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    tied_embeddings: bool = True
    max_positions: int = 2048
    rope_scaling: RopeScaling | None = None
    rope_layers: tuple[bool, ...] = (True,)
    sliding_window: int | None = None
    local_layers: tuple[bool, ...] = (True,)
    local_rope_theta: float | None = None
    qk_norm: bool = False
    post_norms: bool = False
    norm_plus_one: bool = False
    activation: str = "silu"
    scale_embeddings: bool = False
    query_pre_attn_scalar: float | None = None
    attn_softcap: float | None = None
    final_softcap: float | None = None

    def __post_init__(self) -> None:
        values = vars(self)
        problems = [f"{n} = {values[n]!r} must be at least 1" for n in _COUNTS if values[n] < 1]
        if self.layers > MOST_LAYERS:
            problems.append(f"layers = {self.layers!r} must be at most {MOST_LAYERS}")
        if not problems and self.heads % self.kv_heads:
            problems.append(f"kv_heads = {self.kv_heads} must divide heads = {self.heads}")
        if self.head_dim % 2:
            problems.append(f"head_dim = {self.head_dim} must be even: rotary embedding rotates pairs")
        if not self.rope_theta > 0:
            problems.append(f"rope_theta = {self.rope_theta!r} must be positive")
        if not self.norm_eps >= 0:
            problems.append(f"norm_eps = {self.norm_eps!r} must not be negative")
        given = [n for n in _POSITIVE_IF_GIVEN if values[n] is not None]
        problems += [f"{n} = {values[n]!r} must be positive, or None for none" for n in given if not values[n] > 0]
        patterns = ("rope_layers", "local_layers")
        problems += [f"{n} = () must have at least one entry" for n in patterns if not values[n]]
        if self.activation not in ACTIVATIONS:
            problems.append(unknown("activation", self.activation, ACTIVATIONS))
        if problems:
            raise ValueError("TransformerConfig: " + "; ".join(problems))

    @property
    def layer_kinds(self) -> tuple[tuple[bool, bool], ...]:
        """(local, rope) of each of the L layers: whether it has the window, and whether it turns queries and keys."""
        local = (False,) if self.sliding_window is None else self.local_layers
        return tuple((local[i % len(local)], self.rope_layers[i % len(self.rope_layers)]) for i in range(self.layers))


def shortest_pattern(values: Sequence[bool]) -> tuple[bool, ...]:
    """Finds the shortest tuple that, repeated, begins with `values`.

    Args:
      values: one boolean for each layer.

    Returns:
      The pattern.

    Examples:
      >>> shortest_pattern([True, False, True, False, True])
      (True, False)
    """
    periods = (n for n in range(1, len(values)) if all(value == values[i % n] for i, value in enumerate(values)))
    return tuple(values[: next(periods, len(values))])
