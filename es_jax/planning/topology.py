"""Absent devices to compile for: a TPU slice or a GPU node by name.

TPUs: "v5e:4x4" is a slice of that shape, as Cloud TPU names it. GPUs: "h100:1x1x8" is slices × hosts × GPUs. The
compilers come from PyPI: libtpu (the extra `plan`), and jax-cuda12-plugin with jax-cuda12-pjrt.
"""

import dataclasses
import importlib.util
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from es_jax.core.chips import GIB, Chip, chip

# Without these, libtpu takes the machine for a worker of a slice, requests its metadata and logs. Values that are
# already set are kept.
_QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_MIN_LOG_LEVEL": "4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # with several processes each would claim the chips
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices for which programs can be compiled."""

    shape: str  # "v5e:4x4"
    chip: Chip
    devices: tuple[Any, ...]  # for a mesh; they compute nothing
    slices: int = 1  # of that shape

    @property
    def name(self) -> str:
        return self.shape if self.slices == 1 else f"{self.slices} slices of {self.shape}"


def topology(name: str, *, slices: int = 1) -> Topology:
    """The devices of a name: a chip of `es_jax.core.chips` and a shape, such as "v5p:4x4x4" or "h100:1x1x8".

    `slices`: TPU slices of that shape, joined by the data-centre network.

    Raises:
      ValueError: the chip is unknown, the compiler does not take the shape, or the compiler is not installed.
    """
    kind, colon, shape = name.partition(":")
    if not colon or not re.fullmatch(r"\d+(x\d+){0,2}", shape):
        raise ValueError(f"topology is {name!r}: it must be a chip and a shape, such as v5e:4x4, v5p:4x4x4, h100:1x1x8")
    device = chip(kind)
    options = (_gpus if device.kind.startswith("NVIDIA") else _tpus)(device, name, shape, slices)
    try:
        devices = topologies.get_topology_desc(topology_name=name, **options).devices
    except RuntimeError as error:  # also JAX's own, and NotImplementedError
        reason = str(error).splitlines()[0]
        raise ValueError(f"topology is {name!r}, which the compiler refuses: {reason}") from error
    return Topology(name, device, tuple(devices), slices)


def _tpus(device: Chip, name: str, shape: str, slices: int) -> dict[str, Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"topology is {name!r}, but its compiler, libtpu, is not installed: pip install 'es_jax[plan]'"
        )
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    joined = {} if slices == 1 else {"num_slices": slices}
    cores = {"chip_config_name": "megacore"} if device.name == "v4" else {}
    return {"platform": "tpu"} | joined | cores


def _gpus(device: Chip, name: str, shape: str, slices: int) -> dict[str, Any]:
    if not (importlib.util.find_spec("jax_plugins") and importlib.util.find_spec("jax_plugins.xla_cuda12")):
        raise ValueError(
            f"topology is {name!r}, but the CUDA compiler is not installed: pip install --no-deps "
            f"jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=={jax.__version__}"
        )
    if slices != 1 or len(shape.split("x")) != 3:
        raise ValueError(
            f"topology is {name!r}: for GPUs it must be slices × hosts × GPUs, such as {device.name}:1x1x8"
        )
    return {"platform": "cuda", "topology": shape, "target_config": _target(device)}


def _target(device: Chip) -> str:
    """XLA's description of the GPU, with values from the tables of limits in NVIDIA's Ampere and Hopper tuning
    guides."""
    limits = {"a100": (108, 164, 163, 40, 1.41, 8, 64), "h100": (132, 228, 227, 50, 1.98, 9, 128)}
    cores, shared, block, cache, clock, major, units = limits[device.name]
    return f"""
      gpu_device_info {{
        cuda_compute_capability {{ major: {major} minor: 0 }}
        threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
        shared_memory_per_core: {shared << 10}
        shared_memory_per_block: 49152 shared_memory_per_block_optin: {block << 10}
        core_count: {cores} fpus_per_core: {units}
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        registers_per_core_limit: 65536 registers_per_block_limit: 65536
        memory_bandwidth: {int(device.bandwidth)} l2_cache_size: {cache << 20} clock_rate_ghz: {clock}
        device_memory_size: {80 * GIB}
      }}
      platform_name: "CUDA"
      dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
      runtime_version {{ major: 12 minor: 9 patch: 0 }}
      device_description_str: "{device.kind}"
    """
