#!/bin/bash
# One jitted float32 program, x * y + z: XLA's CPU backend makes one fused multiply-add of it, its GPU backend does not.
#
# Expected: the other way round, if at all. nvcc fuses a product and a sum by default, compilers for CPUs are known to be
# careful, and jax.jit is not expected to change the result of arithmetic that NumPy and eager JAX agree on.
# What happens: under jit, the CPU's result is that of a fused multiply-add (the product is not rounded), and differs
# from eager JAX and NumPy in the last bits. The PTX that XLA makes for an H100 has mul.rn.f32 and add.rn.f32 and no fma.
# So the bits of a CPU and a GPU part at every product that is added, and the CPU is the one that fuses.
# Seen with JAX 0.10.2, on an x86-64 CPU with FMA and compiled for an H100; other versions were not looked at.
#
# No GPU is needed: the GPU's program is compiled ahead of time and read. Needs python3 of 3.11 or newer and the network;
# takes a minute. The exit status is 0 as long as this is so, and 1 when the behaviour has changed.
#
# Output seen:
#   jax 0.10.2
#     CPU, eager: 0 of 4096 differ from NumPy
#     CPU, jit: all as a fused multiply-add, and some differ from NumPy
#     H100: add.rn.f32 mul.rn.f32
#   as expected: the CPU fuses, the GPU does not
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.3.5 \
  jax-cuda12-plugin==0.10.2 jax-cuda12-pjrt==0.10.2 2> "$folder/pip.log" || { cat "$folder/pip.log" >&2; exit 2; }

cat > "$folder/program.py" <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_core: 233472 shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 3350000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 85899345920
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 patch: 0 }
runtime_version { major: 12 minor: 9 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def program(x, y, z):
    return x * y + z


x, y, z = np.random.default_rng(0).standard_normal((3, 4096)).astype(np.float32)
rounded = x * y + z
fused = (x.astype(np.float64) * y + z).astype(np.float32)  # the product is exact in float64
eager, jitted = (np.asarray(call(*map(jnp.asarray, (x, y, z)))) for call in (program, jax.jit(program)))
print("jax", jax.__version__)
print(f"  CPU, eager: {(eager != rounded).sum()} of 4096 differ from NumPy")
as_fused = "all as a fused multiply-add" if (jitted == fused).all() else "not a fused multiply-add"
print(f"  CPU, jit: {as_fused}, and {'some differ' if (jitted != rounded).any() else 'none differs'} from NumPy")
device = topologies.get_topology_desc(platform="cuda", topology_name="h100", topology="1x1x1", target_config=H100).devices[0]
shape = jax.ShapeDtypeStruct((4096,), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device))
jax.jit(program).lower(shape, shape, shape).compile()
PYTHON

XLA_FLAGS="--xla_dump_to=$folder/dump" JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/program.py" \
  > "$folder/out" 2> "$folder/log" || { tail -5 "$folder/log" >&2; exit 2; }
echo "  H100: $(cat "$folder"/dump/*.ptx | grep -oE '\b(fma|mul|add)\.rn\.f32' | sort -u | tr '\n' ' ' | sed 's/ $//')" >> "$folder/out"
cat "$folder/out"
sed -n 's/^# \{3\}\( *.*\)/\1/p' "$0" | head -4 > "$folder/expected"
if ! diff <(sed 's/^ *//' "$folder/expected") <(sed 's/^ *//' "$folder/out"); then
  echo "changed: CPU or GPU no longer do what this file says"
  exit 1
fi
echo "as expected: the CPU fuses, the GPU does not"
