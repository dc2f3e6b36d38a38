#!/bin/bash
# XLA's float32 square root on NVIDIA GPUs is not the IEEE one, and the option for more accuracy does not change that.
#
# Expected: a float32 square root is rounded to nearest, as IEEE 754 asks for, as XLA does it on CPUs and nvcc by
# default. Where it is not, `jax.lax.sqrt(x, accuracy=jax.lax.AccuracyMode.HIGHEST)` should give the accurate one.
# What happens: both become the PTX instruction sqrt.approx.f32, an approximation that is not always the nearest. So a
# program that has the same bits on every CPU gets other bits on a GPU, with no fused multiply-add and no other order of
# sums to blame. Products and sums do become mul.rn.f32 and add.rn.f32. LLVM has a switch that gives sqrt.rn.f32, but
# only through XLA_FLAGS, for the whole process.
# Seen with JAX 0.10.2 (CUDA 12) and 0.11.2 (CUDA 13), compiled for an H100; older versions were not looked at.
#
# No GPU is needed: the programs are compiled ahead of time and their PTX is read. Needs Python 3.12 or newer and the
# network; takes a minute or two. The exit status is 0 as long as this is so, and 1 when the behaviour has changed.
#
# Output seen:
#   jax 0.10.2, cuda12
#     jnp.sqrt                     : sqrt.approx.f32
#     AccuracyMode.HIGHEST         : sqrt.approx.f32
#     jnp.sqrt, with LLVM's switch : sqrt.rn.f32
#   jax 0.11.2, cuda13
#     jnp.sqrt                     : sqrt.approx.f32
#     AccuracyMode.HIGHEST         : sqrt.approx.f32
#     jnp.sqrt, with LLVM's switch : sqrt.rn.f32
#   as expected: the square root is approximate
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/program.py" <<'PYTHON'
import sys
import jax
import jax.numpy as jnp
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
device = topologies.get_topology_desc(
    platform="cuda", topology_name="h100", topology="1x1x1", target_config=H100
).devices[0]
x = jax.ShapeDtypeStruct((1024,), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device))
highest = jax.lax.AccuracyMode.HIGHEST
root = jnp.sqrt if sys.argv[1] == "default" else lambda x: jax.lax.sqrt(x, accuracy=highest)
jax.jit(root).lower(x).compile()
PYTHON

instructions() { # python, accuracy, more flags: the square roots in the PTX of the program
  rm -rf "$folder/dump"
  XLA_FLAGS="--xla_dump_to=$folder/dump --xla_dump_emitter_re=.* $3" JAX_PLATFORMS=cpu \
    "$1" "$folder/program.py" "$2" > "$folder/log" 2>&1 || { tail -5 "$folder/log" >&2; return 2; }
  cat "$folder"/dump/*.ptx | { grep -oE '\bsqrt\.[a-z.]+f32' || echo none; } | sort -u | tr '\n' ' ' | sed 's/ $//'
}

changed=0
show() { # what, expected, seen
  printf '  %-29s: %s\n' "$1" "$3"
  [ "$2" = "$3" ] || changed=1
}

for pair in 0.10.2:12 0.11.2:13; do
  version=${pair%:*} cuda=cuda${pair#*:}
  python3 -m venv "$folder/$cuda"
  "$folder/$cuda/bin/pip" install --quiet --disable-pip-version-check \
    "jax==$version" "jaxlib==$version" "jax-$cuda-plugin==$version" "jax-$cuda-pjrt==$version" 2> "$folder/pip.log" ||
    { cat "$folder/pip.log" >&2; exit 2; }
  python=$folder/$cuda/bin/python
  echo "jax $("$python" -c 'import jax; print(jax.__version__)'), $cuda"
  switch="--xla_backend_extra_options=-nvvm-reflect-add=__CUDA_PREC_SQRT=1"
  show "jnp.sqrt" sqrt.approx.f32 "$(instructions "$python" default "")"
  show "AccuracyMode.HIGHEST" sqrt.approx.f32 "$(instructions "$python" highest "")"
  show "jnp.sqrt, with LLVM's switch" sqrt.rn.f32 "$(instructions "$python" default "$switch")"
done
if [ "$changed" = 1 ]; then
  echo "changed: the square root is no longer what this file says"
  exit 1
fi
echo "as expected: the square root is approximate"
