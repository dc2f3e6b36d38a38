#!/bin/bash
# One jitted program, read from JAX's persistent compilation cache, and a trace of it by jax.profiler.
#
# Expected: the trace holds every program (its HLO, with the scopes of each operation) under a number, as "jit_work(38)",
# and each operation's event tells the number of its program in `program_id`. The two are the same, so that an event
# can be joined to its operation even where two programs have one name.
# What happens: that is so for a program that this process compiled. For one that came from the compilation cache, the
# events tell the number that it had in the process that compiled it, and the trace's HLO has a new one. The old number
# may be that of another program of the process. So the join finds nothing, or the wrong program, from the second start on.
# Seen with JAX 0.10.2 and 0.12.0.1, on CPUs; GPUs and TPUs were not looked at.
#
# Needs python3 of 3.11 or newer and the network; takes a minute. The exit status is 0 as long as this is so, and 1 when
# the behaviour has changed.
#
# Output seen:
#   jax 0.10.2
#     compiled here: the events' number is that of the program
#     from the cache: the events' number is another, the one it had where it was compiled
#   as expected: a cached program is traced under its old number
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.3.5 \
  protobuf==6.33.0 2> "$folder/pip.log" || { cat "$folder/pip.log" >&2; exit 2; }

cat > "$folder/program.py" <<'PYTHON'
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from google.protobuf.empty_pb2 import Empty
from google.protobuf.unknown_fields import UnknownFieldSet
from jax.profiler import ProfileData


def fields(message, number):
    return [f.data for f in UnknownFieldSet(Empty.FromString(message)) if (f.field_number, f.wire_type) == (number, 2)]


@jax.jit
def work(x):
    return jnp.sin(x) @ x


others, folder = int(sys.argv[1]), Path(sys.argv[2])
for n in range(others):  # this process has made other programs before
    jax.jit(lambda x, n=n: x * n + 1)(jnp.ones(n + 2)).block_until_ready()
x = jnp.ones((64, 64))
work(x).block_until_ready()
with jax.profiler.trace(folder):
    work(x).block_until_ready()
data = next(folder.rglob("*.xplane.pb")).read_bytes()
stats = [dict(e.stats) for p in ProfileData.from_serialized_xspace(data).planes for line in p.lines for e in line.events]
(event,) = {each["program_id"] for each in stats if each.get("hlo_module") == "jit_work"}
values = [value for plane in fields(data, 1) for entry in fields(plane, 4) for value in fields(entry, 2)]
names = [b"".join(fields(value, 2)).decode() for value in values]  # XSpace.planes.event_metadata.value.name
(number,) = {int(match[1]) for name in names if (match := re.fullmatch(r"jit_work\((\d+)\)", name))}
print(event, number, jax.__version__)
PYTHON

export JAX_PLATFORMS=cpu JAX_COMPILATION_CACHE_DIR="$folder/cache" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
run() { "$folder/venv/bin/python" "$folder/program.py" "$1" "$folder/trace$1" 2> "$folder/log" || { tail -5 "$folder/log" >&2; exit 2; }; }
read -r event number version <<< "$(run 0)"
read -r cached_event cached_number _ <<< "$(run 5)"
echo "jax $version"
if [ "$event" = "$number" ]; then echo "  compiled here: the events' number is that of the program"; fi
if [ "$cached_event" = "$event" ] && [ "$cached_number" != "$event" ]; then
  echo "  from the cache: the events' number is another, the one it had where it was compiled"
  if [ "$event" = "$number" ]; then echo "as expected: a cached program is traced under its old number"; exit 0; fi
fi
echo "changed: $event and $number, from the cache $cached_event and $cached_number"
exit 1
