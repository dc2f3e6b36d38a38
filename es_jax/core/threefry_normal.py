"""Normal random numbers as a pure function of a key and a position: a short chain of 32-bit operations for each number.

No intermediate array is larger than the output, and no number depends on another. So a compiler fuses all of it into
the code that uses the numbers, and a device makes only its slice of a leaf.

The bits are Threefry-2x32 with 13 rounds, the block cipher of Salmon et al., "Parallel random numbers: as easy as 1, 2,
3" (SC 2011, section 4.2 and table 2; rotations and key parity from there). 13 is its smallest number of rounds that
passes TestU01's BigCrush. `jax.random` uses 20; noise does not need that margin. Two words make one number by the
transformation of Box and Muller (1958), in float32:

    z = √(−2 ln u) · cos φ,    u in (0, 1] of 32 bits,    φ uniform on the circle, of 32 bits

so that |z| reaches √(66 ln 2) = 6.76. The logarithm and the sine are polynomials written out here (minimax in relative
error on their interval, about 1e-6), since a library's code may depend on the vector width. Every product that enters a
sum passes through `rounded`. So the random words have the same bits on every backend. The normal numbers have the same
bits wherever float32 products and sums are rounded as in IEEE 754, and a square root is exact or one step off.
"""

import math
from collections.abc import Iterable, Iterator

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, UInt32

ROUNDS = 13
_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
_PARITY = 0x1BD11BDA
_SQRT_HALF = 0x3F3504F3  # bits of the float32 √½
_SCALE = 2.0**20  # the unit of −2 ln u, in which 2 ln 2 is a whole number to 1 part in 10⁷
_TWO_LOG_TWO = round(2 * math.log(2) * _SCALE)
# −2 ln(1 + f) / f for 1 + f in √½..√2, and sin(π q / 2) / q for q² in 0..1; lowest power first
_LOG = (-2.0000019, 1.0000223, -0.66629016, 0.49819487, -0.40992662, 0.3733572, -0.23792213)
_SIN = (1.57079482, -0.64592099, 0.07948767, -0.00436247)

Words = UInt32[Array, "..."]
Numbers = Float32[Array, "..."]


def threefry(key: tuple[Words, Words], counter: tuple[Words, Words], *, rounds: int = ROUNDS) -> tuple[Words, Words]:
    """Two random words from two key words and two counter words; all broadcast together.

    >>> [hex(word) for word in threefry((jnp.uint32(0),) * 2, (jnp.uint32(0),) * 2)]
    ['0x9d1c5ec6', '0x8bd50731']
    """
    keys = (*key, key[0] ^ key[1] ^ jnp.uint32(_PARITY))
    x, y = counter[0] + keys[0], counter[1] + keys[1]
    for i in range(rounds):
        x = x + y
        turn = _ROTATIONS[i % 8]
        y = ((y << jnp.uint32(turn)) | (y >> jnp.uint32(32 - turn))) ^ x
        if i % 4 == 3:
            j = i // 4 + 1
            x, y = x + keys[j % 3], y + (keys[(j + 1) % 3] + jnp.uint32(j))
    return x, y


def positions(shape: tuple[int, ...], rows: tuple[Array | int, int] | None = None) -> tuple[Words, Words]:
    """The counter of every element of an array, see `counters`. With `rows` (first, count) only those rows, [count,
    …]."""

    def along(axis: int) -> Words:
        index = lax.broadcasted_iota(jnp.uint32, shape if rows is None else (rows[1], *shape[1:]), axis)
        return index + jnp.asarray(rows[0], jnp.uint32) if axis == 0 and rows is not None else index

    return counters(shape, map(along, range(len(shape))))


def counters(shape: tuple[int, ...], index: Iterable[Words]) -> tuple[Words, Words]:
    """The counter of the element with that index along each axis: its position among the leading axes, and among the
    trailing axes.

    The trailing axes are as many as together have at most 2**32 elements, so every element of a larger array gets its
    own pair. Raises ValueError for more than 2**32 leading positions, or a longer axis.
    """
    cut = len(shape)
    while cut and math.prod(shape[cut - 1 :]) <= 2**32:
        cut -= 1
    if math.prod(shape[:cut]) > 2**32 or max(shape, default=0) > 2**32:
        raise ValueError(f"an array of shape {shape} has more elements than two 32-bit words can count: split the leaf")
    index = iter(index)
    return _place(shape[:cut], index), _place(shape[cut:], index)


def _place(shape: tuple[int, ...], index: Iterator[Words]) -> Words:
    place = next(index) if shape else jnp.uint32(0)
    for size, along in zip(shape[1:], index, strict=False):
        place = along + place * jnp.uint32(size)
    return place


def box_muller(radius: Words, angle: Words, *, in_kernel: bool = False) -> Numbers:
    """One N(0, 1) number from two random words; `in_kernel` is for Pallas kernels, which cannot query the platform."""
    square = _minus_two_log(radius)
    if in_kernel:
        return _exact_sqrt(square) * _cosine(angle)
    root = lax.platform_dependent(square, cpu=jnp.sqrt, default=_exact_sqrt)  # a CPU's root is already exact
    return root * _cosine(angle)


def _exact_sqrt(x: Numbers) -> Numbers:
    return _nearest_root(x, jnp.sqrt(x))


def _nearest_root(x: Numbers, root: Numbers) -> Numbers:
    """√x rounded to nearest, from a root that is at most one unit in the last place off; x is 0 or normal.

    On GPUs XLA only approximates the square root, whatever accuracy is asked for. Integer arithmetic corrects it. Write
    the root as s, of 24 bits, and x as X, in the unit of s squared. √X is above s + ½ where X − s² > s, and below s − ½
    where X − s² ≤ −s. X and s² have 48 bits, but their difference is small, so 32 bits that wrap around hold it. Each
    sign bit is one step of the root. A root of 0 stays 0: there s is 2²³, and X − s² wraps to 0. A root on the other
    side of a power of 2 from √x is corrected too, although s² has another unit; `tests/laws/test_root.py` tries every
    mantissa.
    """
    bits, near = (lax.bitcast_convert_type(number, jnp.int32) for number in (x, root))
    odd = (bits & jnp.int32(0x800000)) != 0  # the biased exponent's parity: 1 if x's is even; X then has one bit less
    s = (near & jnp.int32(0x7FFFFF)) | jnp.int32(0x800000)
    rest = (bits << jnp.where(odd, jnp.int32(23), jnp.int32(24))) - s * s
    up = lax.shift_right_logical(s - rest, jnp.int32(31))
    down = (rest + s - jnp.int32(1)) >> 31
    return lax.bitcast_convert_type(near + up + down, jnp.float32)


def _minus_two_log(word: Words) -> Numbers:
    """−2 ln u in units of 1 / _SCALE, for u = (word + ½) / 2³²; at least 0, since the largest words round to u = 1."""
    bits = lax.bitcast_convert_type(word.astype(jnp.float32) + jnp.float32(0.5), jnp.int32) - jnp.int32(_SQRT_HALF)
    mantissa = (bits & jnp.int32(0x7FFFFF)) + jnp.int32(_SQRT_HALF)
    f = lax.bitcast_convert_type(mantissa, jnp.float32) - jnp.float32(1)
    octaves = (jnp.int32(32) - (bits >> 23)) * jnp.int32(_TWO_LOG_TWO)
    return octaves.astype(jnp.float32) + rounded(f * _polynomial(_LOG, f, scale=_SCALE))


def _cosine(word: Words) -> Numbers:
    """cos φ / √_SCALE for a uniform φ: the top bit gives the sign, the rest the sine of an angle within a quarter
    turn."""
    q = (word & jnp.uint32(0x7FFFFFFF)).astype(jnp.int32).astype(jnp.float32) * jnp.float32(2**-31)
    sine = q * _polynomial(_SIN, q * q, scale=_SCALE**-0.5)
    sign = word & jnp.uint32(0x80000000)
    return lax.bitcast_convert_type(lax.bitcast_convert_type(sine, jnp.uint32) | sign, jnp.float32)


def _polynomial(coefficients: tuple[float, ...], x: Numbers, *, scale: float) -> Numbers:
    total = jnp.float32(coefficients[-1] * scale)
    for coefficient in coefficients[-2::-1]:
        total = rounded(total * x) + jnp.float32(coefficient * scale)
    return total


def rounded(product: Numbers) -> Numbers:
    """The product without the last of its 24 bits, so that no compiler can fuse it into the sum after it.

    A compiler for CPUs or GPUs fuses a product into a sum, unrounded, if it sees the two together. That depends on how
    a loop was split, and so on the shape of a device's slice. One bit operation keeps them apart.
    """
    bits = lax.bitcast_convert_type(product, jnp.uint32) & jnp.uint32(0xFFFFFFFE)
    return lax.bitcast_convert_type(bits, jnp.float32)
