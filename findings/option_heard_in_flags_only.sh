#!/bin/bash
# jax.jit takes xla_cpu_enable_concurrency_optimized_scheduler in compiler_options, and nothing comes of it; in XLA_FLAGS
# the same option with the same value takes effect.
#
# Expected: compiler_options sets, for one program, what XLA_FLAGS sets for all. An option that does nothing there is
# refused, as an unknown name is ("No such compile option").
# What happens: the program holds its eight sums at once (36 MiB of temporaries) with the option on or off, and one at a
# time (8 MiB) with the option off in XLA_FLAGS. Another option, xla_cpu_scheduler_type, does in compiler_options what
# this one does in the flags. So whoever tries an option in XLA_FLAGS and then confines it to one program loses it without
# a word. With JAX 0.9.0 the first option works in both places, and the second is unknown.
# Seen with JAX 0.10.2 and 0.12.0.1, on CPUs; what the programs hold is the compiler's own figure, memory_analysis().
#
# Needs python3 of 3.11 or newer and the network; takes a minute. The exit status is 0 as long as this is so, and 1 when
# the behaviour has changed.
#
# Output seen:
#   jax 0.10.2, MiB of temporaries
#     no option: 36
#     compiler_options, concurrency-optimized scheduler off: 36
#     compiler_options, scheduler type memory-optimized: 8
#     XLA_FLAGS, concurrency-optimized scheduler off: 8
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.3.5 \
  2> "$folder/pip.log" || { cat "$folder/pip.log" >&2; exit 2; }

cat > "$folder/program.py" <<'PYTHON'
import sys

import jax
import jax.numpy as jnp


def program(arrays):
    sums = [jax.lax.fori_loop(0, 4, lambda i, t, x=x: t + jnp.sin(x * i), jnp.zeros_like(x)) for x in arrays]
    return [x - total for x, total in zip(arrays, sums, strict=True)]


arrays = [jax.ShapeDtypeStruct((1 << 20,), jnp.float32)] * 8
option = {
    "off": {"xla_cpu_enable_concurrency_optimized_scheduler": False},
    "type": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"},
}.get(sys.argv[1])
compiled = jax.jit(program, donate_argnums=0, compiler_options=option).lower(arrays).compile()
print(compiled.memory_analysis().temp_size_in_bytes >> 20)
PYTHON

run() { JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/program.py" "$1"; }
none=$(run none)
off=$(run off)
type=$(run type)
flag=$(XLA_FLAGS=--xla_cpu_enable_concurrency_optimized_scheduler=false run none)
cat <<TEXT
jax 0.10.2, MiB of temporaries
  no option: $none
  compiler_options, concurrency-optimized scheduler off: $off
  compiler_options, scheduler type memory-optimized: $type
  XLA_FLAGS, concurrency-optimized scheduler off: $flag
TEXT
if [ "$off" = "$none" ] && [ "$flag" -lt "$none" ] && [ "$type" = "$flag" ]; then exit 0; fi
echo "the behaviour has changed"
exit 1
