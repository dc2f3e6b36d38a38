"""Do two machines make the same bits? sha256 digests of the weights of every step of a run, rebuilt from its seed log.

Command:  python -m benchmarks.replay_digests RUN [--cpu] [--json=FILE]
Cost:     that of the run's updates, without decoding.
Result:   a digest for each step. With --json=FILE they are written to the file; if it exists, they are compared with
          it, and the first step that differs is named.

Run it on two machines, or on one machine with and without --cpu, which rebuilds on the host's processors.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import jax
import numpy as np

from es_jax import replay
from es_jax.core.mesh import make_mesh


def digests(run: str, *, cpu: bool = False) -> dict[str, str]:
    """Step → sha256 of all leaves' bytes, in the order of the tree."""
    mesh = make_mesh(devices=jax.devices("cpu")[:1] if cpu else None)
    return {
        str(step): hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params))).hexdigest()
        for step, params in replay(run, mesh=mesh)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--cpu", action="store_true", help="rebuild on one CPU device")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result, device = digests(args.run, cpu=args.cpu), jax.devices("cpu" if args.cpu else None)[0].device_kind
    if args.json is None or not args.json.exists():
        text = json.dumps(result, indent=1) + "\n"
        print(text) if args.json is None else args.json.write_text(text)
        return
    other = json.loads(args.json.read_text())
    apart = [step for step in result if result[step] != other.get(step)]
    if apart:
        sys.exit(f"{device}: {len(apart)} of {len(result)} steps differ from {args.json}; the first is step {apart[0]}")
    print(f"{device}: all {len(result)} steps have the bits of {args.json}")


if __name__ == "__main__":
    main()
