#!/bin/bash
# A loop's body reads a buffer of its carry and then updates one place of it. On XLA's CPU backend the whole buffer is
# copied in every turn, and jax.lax.optimization_barrier between the read and the write changes nothing.
#
# Expected: an update in place. A decoder with a key/value cache is written so: the step attends the cache as it is, and
# then writes the new token's key and value. Nothing needs the old buffer after the read, and the barrier, which is there
# to say so, makes the written value wait for what was read: the compiler may not move operations across it.
# What happens: all of the buffer is copied twice a turn, and the program holds it twice, as without the barrier. Where
# the write's index depends on the value that was read, in a way that cannot be simplified, there is no copy. (So it
# looks as if barriers are gone by the time that copies are inserted; XLA's passes were not read.)
# Seen with JAX 0.10.2 on an x86-64 CPU; other versions and backends were not looked at.
#
# Needs python3 of 3.11 or newer and the network; takes half a minute. The exit status is 0 as long as this is so, and 1
# when the behaviour has changed.
#
# Output seen:
#   jax 0.10.2
#     plain: the buffer 2.03 times in temporary memory, 2 copies of it a turn
#     barrier: the buffer 2.03 times in temporary memory, 2 copies of it a turn
#     index that depends on what was read: the buffer 1.03 times in temporary memory, 0 copies of it a turn
#   as expected: a barrier leaves the copies, a dependent index does not
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.3.5 \
  2> "$folder/pip.log" || { cat "$folder/pip.log" >&2; exit 2; }

cat > "$folder/program.py" <<'PYTHON'
import re

import jax
import jax.numpy as jnp
from jax import lax

ROWS, PLACES, WIDTH = 64, 1024, 64


def compiled(kind):
    def turn(i, state):
        cache, query = state
        weights = jax.nn.softmax(jnp.einsum("npw,nw->np", cache, query))
        mixed = jnp.einsum("np,npw->nw", weights, cache)
        token, place = query[:, None], i
        if kind == "barrier":
            mixed, token = lax.optimization_barrier((mixed, token))
        if kind == "dependent":
            place = jnp.minimum(i, i + jnp.any(mixed > 0).astype(jnp.int32))  # which is i
        return lax.dynamic_update_slice(cache, token, (0, place, 0)), mixed

    def run(query):
        return lax.fori_loop(0, PLACES, turn, (jnp.zeros((ROWS, PLACES, WIDTH)), query))[1]

    program = jax.jit(run).lower(jnp.ones((ROWS, WIDTH))).compile()
    held = program.memory_analysis().temp_size_in_bytes / (4 * ROWS * PLACES * WIDTH)
    return held, len(re.findall(rf"f32\[{ROWS},{PLACES},{WIDTH}\]\S* copy\(", program.as_text()))


print("jax", jax.__version__)
names = {"plain": "plain", "barrier": "barrier", "dependent": "index that depends on what was read"}
found = {kind: compiled(kind) for kind in names}
for kind, (held, copies) in found.items():
    print(f"  {names[kind]}: the buffer {held:.2f} times in temporary memory, {copies} copies of it a turn")
as_seen = found["barrier"] == found["plain"] and found["plain"][1] > 0 and found["dependent"][1] == 0
print("as expected: a barrier leaves the copies, a dependent index does not" if as_seen else "the behaviour has changed")
raise SystemExit(not as_seen)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/program.py"
