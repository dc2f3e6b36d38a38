"""Accelerators: published peak speeds and sizes, by the name that JAX gives a device.

A JAX device is one chip; on TPU7x it is one of a chip's two halves. A time computed from peaks is a bound that no run
beats, never a prediction. Sources, read in November 2026: docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e and tpu7x
(tables of key specifications; v4's interconnect: 6 links of 50 GB/s, arXiv 2304.01433); NVIDIA's data sheets of the
A100 80GB SXM and the H100 SXM (dense bfloat16). `memory` of a TPU is what the compiler of libtpu 0.0.42 lets a program
have, as its out-of-memory error says it; of a GPU, the size in the data sheet, 10⁹ bytes a GB.
"""

import dataclasses

from es_jax.core.names import unknown

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    name: str  # what a topology calls it: "v5e" in "v5e:4x4"
    kind: str  # `jax.Device.device_kind`
    flops: float  # peak bfloat16 floating-point operations a second, dense
    bandwidth: float  # of its memory, bytes a second
    memory: int  # of a program, bytes
    interconnect: float  # between devices of a slice or node, bytes a second sent by one device over all its links


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
    """The chip of a device by its `device_kind`; None for one that is not in the table, such as a CPU."""
    return next((chip for chip in CHIPS if chip.kind == kind), None)


def chip(name: str) -> Chip:
    """The chip that topologies call `name`. Raises ValueError for one that is not in the table."""
    by_name = {chip.name: chip for chip in CHIPS}
    if name not in by_name:
        raise ValueError(unknown("chip", name, by_name))
    return by_name[name]
