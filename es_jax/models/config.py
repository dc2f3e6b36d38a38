"""The shape of a decoder-only transformer: one frozen record that validates itself."""

import dataclasses

_POSITIVE = ("vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "mlp_dim", "max_positions")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Everything the forward pass needs to know besides the weights.

    Sizes are counts, `rope_theta` is the base of the rotary frequencies, `norm_eps` is added to a
    mean square.
    Raises ValueError that lists every field that is out of range.

    >>> config = TransformerConfig(family="llama", vocab_size=32, width=16, layers=2, heads=4, kv_heads=2,
    ...                            head_dim=8, mlp_dim=24)
    >>> config.heads_per_kv
    2
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

    def __post_init__(self) -> None:
        problems = [f"{n} = {getattr(self, n)!r} must be at least 1" for n in _POSITIVE if getattr(self, n) < 1]
        if not problems and self.heads % self.kv_heads:
            problems.append(f"kv_heads = {self.kv_heads} must divide heads = {self.heads}")
        if self.head_dim % 2:
            problems.append(f"head_dim = {self.head_dim} must be even: rotary embedding turns pairs")
        if not self.rope_theta > 0:
            problems.append(f"rope_theta = {self.rope_theta!r} must be positive")
        if not self.norm_eps >= 0:
            problems.append(f"norm_eps = {self.norm_eps!r} must not be negative")
        if problems:
            raise ValueError("TransformerConfig: " + "; ".join(problems))

    @property
    def heads_per_kv(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads
