#!/bin/bash
# jax.random.fold_in(key, i) is jax.random.split(key, n)[i]: the two ways to derive keys give the same keys.
#
# Expected: fold_in and split are two functions for two purposes (a number that is known, a count of new keys), and the
# rule is that a key which was used is not used again in the same way. So a program that splits the key of its seed for
# initial weights, and folds small constants into the same key for its other purposes, seems to have independent streams.
# What happens: with the threefry generator and its default layout, what a split gives at i is what folding i in gives.
# In the example the second of three keys that were split off for weights is the key that folding in 1 gives for noise,
# and what is derived from the two goes on to be the same: the noise equals the weights, number for number.
# With jax_threefry_partitionable=False, the default of older versions, they differ.
# Seen with JAX 0.10.2; other versions were not looked at. What avoids it: fold in numbers that no split counts up to,
# such as those from 2**31.
#
# Needs python3 of 3.11 or newer and the network; takes a minute. The exit status is 0 as long as this is so, and 1 when
# the behaviour has changed.
#
# Output seen:
#   jax 0.10.2
#     keys of split(key, 7) that fold_in gives too: 7 of 7
#     after two levels, and a draw: weights and noise are equal
#     without jax_threefry_partitionable: 0 of 7
#     folding in 2**31 + 1: among the keys of split(key, 100000): no
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.3.5 \
  2> "$folder/pip.log" || { cat "$folder/pip.log" >&2; exit 2; }

cat > "$folder/program.py" <<'PYTHON'
import jax
import numpy as np


def words(key):
    return np.asarray(jax.random.key_data(key)).tolist()


def equal(key, n):
    return sum(words(jax.random.fold_in(key, i)) == words(split) for i, split in enumerate(jax.random.split(key, n)))


key = jax.random.key(0)
print("jax", jax.__version__)
print(f"  keys of split(key, 7) that fold_in gives too: {equal(key, 7)} of 7")
for_weights = jax.random.split(jax.random.split(key, 3)[1], 4)  # of the four layers of a model
for_noise = jax.random.fold_in(key, 1)  # 1: the purpose
weights = [jax.random.normal(layer, (5,)) for layer in for_weights]
noise = [jax.random.normal(jax.random.fold_in(for_noise, step), (5,)) for step in range(4)]
same = "equal" if np.array_equal(weights, noise) else "different"
print(f"  after two levels, and a draw: weights and noise are {same}")
with jax.threefry_partitionable(False):
    print(f"  without jax_threefry_partitionable: {equal(key, 7)} of 7")
high = words(jax.random.fold_in(key, np.uint32(2**31 + 1)))
found = "yes" if high in words(jax.random.split(key, 100_000)) else "no"
print(f"  folding in 2**31 + 1: among the keys of split(key, 100000): {found}")
PYTHON

JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/program.py" > "$folder/out" 2> "$folder/log" ||
  { tail -5 "$folder/log" >&2; exit 2; }
cat "$folder/out"
sed -n '/^# Output seen:/,/^set/s/^# \{3\}\( *.*\)/\1/p' "$0" > "$folder/expected"
if ! diff "$folder/expected" "$folder/out"; then
  echo "changed: fold_in and split no longer do what this file says"
  exit 1
fi
echo "as expected: fold_in is split"
