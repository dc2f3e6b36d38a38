"""Published peak speeds and memory sizes of accelerators, by JAX's name of the device.

A JAX device is one chip; on TPU7x it is one half of a chip. A time computed from peaks is a lower bound, never a
prediction. Sources, read in November 2026: docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e and tpu7x (tables of key
specifications; v4's interconnect: 6 links of 50 GB/s, arXiv 2304.01433); NVIDIA's data sheets of the A100 80GB SXM and
the H100 SXM (dense bfloat16). For a TPU, `memory` is what the compiler of libtpu 0.0.42 gives a program, according to
its out-of-memory error; for a GPU it is the size in the data sheet, with 10⁹ bytes per GB.
"""

import dataclasses

from es_jax.core.names import unknown

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    name: str  # its name in a topology: "v5e" in "v5e:4x4"
    kind: str  # `jax.Device.device_kind`
    flops: float  # peak dense bfloat16 floating-point operations per second
    bandwidth: float  # of its memory, bytes per second
    memory: int  # bytes for a program
    interconnect: float  # between devices of a slice or node: bytes per second that a device sends over all its links


CHIPS = (
    Chip("v4", "TPU v4", 275e12, 1.2e12, int(30.75 * GIB), 300e9),
    Chip("v5e", "TPU v5 lite", 197e12, 819e9, int(15.75 * GIB), 200e9),
    Chip("v5p", "TPU v5", 459e12, 2765e9, int(95.74 * GIB), 600e9),
    Chip("v6e", "TPU v6 lite", 918e12, 1638e9, int(31.25 * GIB), 400e9),
    Chip("tpu7x", "TPU7x", 2307e12 / 2, 7380e9 / 2, int(94.75 * GIB), 600e9 / 2),
    Chip("a100", "NVIDIA A100-SXM4-80GB", 312e12, 2039e9, 80 * 10**9, 300e9),
    Chip("h100", "NVIDIA H100 80GB HBM3", 989.4e12, 3350e9, 80 * 10**9, 450e9),
)


def find_chip(kind: str) -> Chip | None:
    """The chip of a device by its `device_kind`; None if it is not in the table, such as a CPU."""
    return next((chip for chip in CHIPS if chip.kind == kind), None)


def chip(name: str) -> Chip:
    """The chip with the topology name `name`. Raises ValueError if it is not in the table."""
    by_name = {chip.name: chip for chip in CHIPS}
    if name not in by_name:
        raise ValueError(unknown("chip", name, by_name))
    return by_name[name]
