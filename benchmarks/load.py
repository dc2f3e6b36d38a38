"""Loading a model: seconds, GB/s, and the peak host memory beyond the placed weights.

Command:  python -m benchmarks.load [--gigabytes=2] [--dtype=float32] [--source=FOLDER or FILE.gguf] [--repeats=3]
          [--json]
Cost:     two minutes for 2 GB of float32, three for 2 GB of bfloat16, 20 s for SmolLM2's GGUF.
Result:   2 CPU cores, busy with other work; MB are 10⁶ bytes. Reading includes the sha256 of the files.

                         file MB   seconds    placed MB   largest tensor MB   beyond at most MB   over the largest
    --dtype=float32       1967.3      12.7       1967.3               262.1               264.3              1.008
    --dtype=bfloat16      1975.7      27.7       3951.4               262.1               265.4              1.012
    SmolLM2, Q4_1           98.4       1.3        538.1               113.2               135.3              1.195

    Most of the small model's remainder, 22 MB, is its tokenizer, which stays.

Without --source it makes a Llama of that size (as --dtype on disk) in a temporary folder; with --source it loads that
model. The model is loaded --repeats times, and once more for `arrays_at_most`. Each load runs in a fresh process with
one CPU device that has opened the model before without its weights, so that imports and the tracing of the model's
shapes, which do not grow with the weights, do not count. `seconds` is the median, the others are maxima:

- resident_beyond: the peak memory of the process while a leaf is placed, minus its memory at the start and the leaves
  placed so far. A CPU device's memory is the host's, so this is what the host needs beyond the weights.
- arrays_at_most: the peak size of NumPy's arrays, which no device ever sees (Python's tracemalloc).

The larger of the two, divided by the largest tensor (in float32), should stay below 1.2 for 2 GB. If the file was just
made, its pages are in the cache.
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path


def make_model(folder: Path, *, gigabytes: float, dtype: str) -> None:
    """A Llama folder with about that many 10⁹ bytes of random tensors, written tensor by tensor."""
    import ml_dtypes
    import numpy as np
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from es_jax.models.config import TransformerConfig
    from es_jax.models.hf_config import to_hf
    from es_jax.models.transformer import param_shapes
    from es_jax.weights import convert, safetensors

    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    config = TransformerConfig(
        family="llama", vocab_size=32000, width=2048, layers=1, heads=16, kv_heads=4, head_dim=128, mlp_dim=5632,
        tied_embeddings=False,
    )  # fmt: skip
    sizes = [np.prod(shape) * kind.itemsize for path, shape in param_shapes(config).items() if "layers/" in path]
    head = 2 * config.vocab_size * config.width * kind.itemsize
    config = dataclasses.replace(config, layers=max(round((gigabytes * 1e9 - head) / sum(sizes)), 1))
    shapes, _ = convert.hf_tensors({}, config=config)
    draw = np.random.default_rng(0)
    (folder / "config.json").write_text(json.dumps(to_hf(config)))
    words = Tokenizer(models.WordLevel({"<end>": 0}, unk_token="<end>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(str(folder))

    def tensor(key: str) -> np.ndarray:
        return draw.standard_normal(shapes[key], np.float32)

    safetensors.write_folder(folder, shapes, tensor, dtype=kind, max_shard_bytes=10**9)


def load(source: str) -> dict[str, float]:
    """Load once, in this process: seconds, and resident memory leaf by leaf."""
    import jax

    from es_jax.core.tree import named_leaves
    from es_jax.models.transformer import param_shapes
    from es_jax.weights.model import load_model, load_outline

    param_shapes(load_outline(source).config)
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    jax.block_until_ready(jax.device_put(0.0, where))
    Path("/proc/self/clear_refs").write_text("5")  # the peak is measured from here
    before, placed, beyond = memory("VmRSS"), [0], [0]

    def leaf_by_leaf(path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
        beyond.append(memory("VmHWM") - before - placed[-1])
        Path("/proc/self/clear_refs").write_text("5")
        placed.append(placed[-1] + 4 * math.prod(shape))
        return where

    began = time.monotonic()
    model = load_model(source, shardings=leaf_by_leaf)
    jax.block_until_ready(model.params)
    seconds = time.monotonic() - began
    beyond.append(memory("VmHWM") - before - placed[-1])
    leaves = named_leaves(model.params)
    tensors = [leaf.nbytes // (leaf.shape[0] if name.startswith("layers/") else 1) for name, leaf in leaves]
    return {
        "seconds": seconds,
        "placed_bytes": placed[-1],
        "resident_beyond_bytes": max(beyond),
        "largest_tensor_bytes": max(tensors),
        "largest_leaf_bytes": max(leaf.nbytes for _, leaf in leaves),
    }


def trace(source: str) -> dict[str, float]:
    """Load once, in this process: the peak bytes of Python's and NumPy's objects."""
    from es_jax.models.transformer import param_shapes
    from es_jax.weights.model import load_model, load_outline

    param_shapes(load_outline(source).config)
    tracemalloc.start()
    load_model(source)
    return {"arrays_at_most_bytes": tracemalloc.get_traced_memory()[1]}


CHILDREN = {"load": load, "trace": trace}


def memory(field: str) -> int:
    """Bytes of this process from a field of Linux's /proc: VmRSS is the current value, VmHWM the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field + ":"))) * 1024


def in_child(name: str, source: str) -> dict[str, float]:
    """Run a function of CHILDREN in a fresh process with one CPU device."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "benchmarks.load", f"--child={name}", f"--source={source}"]
    out = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(out.stdout.splitlines()[-1])


def bytes_of(source: Path) -> int:
    """Size of the weight files."""
    files = [source] if source.is_file() else sorted(source.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files)


def report(source: Path, *, repeats: int) -> dict[str, float]:
    """The children's results and derived values: the loads' median seconds and peak memory."""
    loads = [in_child("load", str(source)) for _ in range(repeats)]
    size, result = bytes_of(source), {key: max(load[key] for load in loads) for key in loads[0]}
    result |= {"seconds": statistics.median(load["seconds"] for load in loads)} | in_child("trace", str(source))
    beyond = max(result["resident_beyond_bytes"], result["arrays_at_most_bytes"])
    return {
        "file_bytes": size,
        **result,
        "file_gigabytes_per_second": size / 1e9 / result["seconds"],
        "beyond_over_largest_tensor": beyond / result["largest_tensor_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--source", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return print(json.dumps(CHILDREN[args.child](str(args.source))))
    if args.source:
        result = report(args.source, repeats=args.repeats)
    else:
        with tempfile.TemporaryDirectory() as folder:
            make_model(Path(folder), gigabytes=args.gigabytes, dtype=args.dtype)
            result = report(Path(folder), repeats=args.repeats)
    if args.json:
        return print(json.dumps(result))
    for name, value in result.items():
        megabytes = name.endswith("_bytes")
        print(f"{name.replace('_bytes', '_megabytes')} {value / 1e6 if megabytes else value:.3f}")


if __name__ == "__main__":
    main()
