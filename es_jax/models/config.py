"""The shape of a decoder-only transformer: a frozen dataclass that validates itself."""

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
    """How rotary frequencies are stretched for contexts longer than the first training saw.

    `linear` divides every frequency by `factor`. `llama3` divides those whose wavelength is above
    original_positions / low_freq_factor, keeps those below original_positions / high_freq_factor, and goes over
    smoothly between. Raises ValueError that lists every field that is out of range.
    """

    kind: str  # one of ROPE_SCALINGS
    factor: float
    low_freq_factor: float = 1.0  # this and the rest: llama3 alone
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
    """Everything the forward pass needs to know besides the weights.

    Sizes are counts, `rope_theta` is the base of the rotary frequencies, `norm_eps` is added to a mean square.
    `rope_layers` and `local_layers` are patterns that repeat over the layers: (True, True, False) holds for layers 0,
    1, 3, 4, 6, … Raises ValueError that lists every field that is out of range.

    >>> TransformerConfig(family="llama", vocab_size=32, width=16, layers=2, heads=4, kv_heads=2, head_dim=8,
    ...                   mlp_dim=24).tied_embeddings
    True
    """

    family: str  # a name in es_jax.models.families.FAMILIES; says how files name and lay out the weights
    vocab_size: int  # V
    width: int  # D, of the residual stream
    layers: int  # L
    heads: int  # H query heads
    kv_heads: int  # KH key/value heads; divides heads
    head_dim: int  # hd, even; heads * head_dim need not be the width
    mlp_dim: int  # F
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    tied_embeddings: bool = True  # the output head is the transposed embedding
    max_positions: int = 2048  # the context the weights were trained for; the forward pass does not enforce it
    rope_scaling: RopeScaling | None = None
    rope_layers: tuple[bool, ...] = (True,)  # which layers turn queries and keys by their positions
    sliding_window: int | None = None  # in local layers a query at p attends p - sliding_window + 1 … p
    local_layers: tuple[bool, ...] = (True,)  # where the window holds, if there is one
    local_rope_theta: float | None = None  # local layers have this base and no scaling; None: as the others
    qk_norm: bool = False  # norms over head_dim on queries and keys, before they are turned
    post_norms: bool = False  # norms after attention and MLP too, before the residual sum
    norm_plus_one: bool = False  # norms multiply by 1 + scale
    activation: str = "silu"  # of the MLP's gate; one of ACTIVATIONS
    scale_embeddings: bool = False  # times sqrt(width), rounded to the compute dtype
    query_pre_attn_scalar: float | None = None  # scores are divided by its root; None: head_dim
    attn_softcap: float | None = None  # scores become c * tanh(scores / c)
    final_softcap: float | None = None  # the same for logits

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
        """(local, rope) of each of the L layers."""
        local = (False,) if self.sliding_window is None else self.local_layers
        return tuple((local[i % len(local)], self.rope_layers[i % len(self.rope_layers)]) for i in range(self.layers))


def shortest_pattern(values: Sequence[bool]) -> tuple[bool, ...]:
    """The shortest tuple that, repeated, begins with `values`.

    >>> shortest_pattern([True, False, True, False, True])
    (True, False)
    """
    periods = (n for n in range(1, len(values)) if all(value == values[i % n] for i, value in enumerate(values)))
    return tuple(values[: next(periods, len(values))])
