"""Measures this code on the accelerator of this machine: one command, no hub, random weights of a published shape.

Command:  python -m benchmarks.chip --json=chip.json [--model=HuggingFaceTB/SmolLM2-135M] [--parts=decode,…] [--tiny]
          python -m benchmarks.chip --record      (on a CPU: makes chip_digests.json anew)
Needs:    jax for the device; torch and transformers for `torch`, pytest for `laws` (each part reports what is missing).
Cost:     at most --seconds (240): unfinished parts are left out, and the JSON says so.
Result:   the whole kit has run on CPUs only, with --tiny; docs/speed.md has the results of some parts on an H100.

card: a large copy and a large product. noise: digests of noise, estimates and updates, compared with those from a CPU,
and each stage of a number. decode: the run's own program with 128 prompt tokens and 256 new ones, without stops; a
step's time is that of 255 new tokens beyond a prefill. The bound of a step is each weight, key and value read once at
the copy's rate; that of a prefill is its operations at the product's rate. members: perturb and update. iteration: two
members, after one iteration that compiles; its parts, and the kernels and gaps of a traced iteration. torch: `generate`
with a static cache in bfloat16 (torch_compiled: compiled, which takes minutes, so it runs only if --parts names it).
processes: whether two processes that compile separately, and a third that has the first one's programs, decode the same
tokens. laws: tests of noise and engine on the device, with exact float32 products.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch and child processes need memory, too

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import chip_bits
from benchmarks.compare import add_json, write_json
from es_jax.core.mesh import make_mesh, over_groups, to_devices
from es_jax.core.tree import count
from es_jax.es.population import Members, Population
from es_jax.generate.engine import Engine
from es_jax.models.config import TransformerConfig
from es_jax.models.hf_config import to_hf
from es_jax.models.known_configs import PUBLISHED, published
from es_jax.models.sharding import param_shardings
from es_jax.models.transformer import Transformer
from es_jax.planning.costs import cache_bytes, forward_flops
from es_jax.profiling import trace
from es_jax.profiling.clock import Clock, split
from es_jax.rundir.directory import compilation_cache
from es_jax.rundir.seed_log import Entry
from es_jax.scoring.grading import Grader
from es_jax.scoring.workers import at_once
from es_jax.tasks import get_task
from es_jax.training.config import RunConfig, freeze
from es_jax.training.es import Evaluator, Evolution
from es_jax.training.state import State, update_on
from es_jax.weights.model import Model

ROOT = Path(__file__).resolve().parents[1]
DIGESTS = Path(__file__).with_name("chip_digests.json")
Call = Callable[[], Any]


class Variant(NamedTuple):
    """An engine to measure: fields of `Engine`, and options of XLA's compiler."""

    fields: dict[str, Any]
    options: dict[str, str] = {}  # noqa: RUF012 - never changed


def fields_of_engine(**fields: Any) -> dict[str, Any]:
    """The engines to measure."""
    return {name: value for name, value in fields.items() if name in Engine.__dataclass_fields__}


AS_IT_IS = "as it is"  # what a run has
VARIANTS = {AS_IT_IS: Variant({}), "layers in a scan": Variant(fields_of_engine(unroll=False, in_place=False))}
LAWS = [
    *("test_noise.py::test_estimate_equals_the_brute_force_sum", "test_noise.py::test_antithetic_pairs_sum_to_zero"),
    "test_noise.py::test_moments_and_independence_of_members_and_steps",
    *("test_battery.py::test_words_are_the_published_ones", "test_streams.py::test_the_numbers_of_both_versions_stay"),
    "test_engine.py::test_greedy_equals_a_naive_full_forward",
    "test_engine.py::test_a_neighbour_never_changes_a_row_and_slots_equal_one_by_one",
    "test_engine.py::test_a_queue_longer_than_the_slots_equals_decoding_one_by_one",
    "test_engine.py::test_a_shared_prefix_is_computed_once_and_changes_nothing",
    "test_engine.py::test_sampling_is_keyed_by_row_and_not_by_slot",
]
TINY_LAWS = ["test_battery.py::test_words_are_the_published_ones"]
TINY = TransformerConfig(
    family="qwen2", vocab_size=512, width=64, layers=1, heads=4, kv_heads=2, head_dim=16, mlp_dim=128, qkv_bias=True
)


@dataclasses.dataclass(frozen=True)
class Kit:
    """What the parts measure, and the sizes."""

    name: str
    parts: tuple[str, ...]
    tiny: bool = False
    ends: float = float("inf")  # time.monotonic() of the deadline

    def __post_init__(self):
        sizes = ((3,), 12, 4, 2) if self.tiny else ((32, 64, 200), 128, 256, 30)
        for name, value in zip(("rows", "prompt", "new", "population"), sizes, strict=True):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "model", TINY if self.tiny else published(self.name))
        object.__setattr__(self, "mesh", make_mesh(1, 1, devices=jax.devices()[:1]))

    @property
    def left(self) -> float:
        """Seconds that a child process may take."""
        return max(self.ends - time.monotonic() - 1, 1)

    def run_config(self, *, population: int = 2, penalty: str = "l2") -> RunConfig:
        anchor = {"penalty": penalty} | ({} if penalty == "none" else {"strength": 10.0})
        es, optim = {"population": population, "sigma": 1e-3}, {"learning_rate": 5e-4, "anchor": anchor}
        return freeze({"model": {"dtype": "bfloat16"}, "es": es, "optim": optim, "evals": {"every": 0}})

    def prompts(self, rows: int) -> list[list[int]]:
        rng = np.random.default_rng(0)
        return [rng.integers(5, self.model.vocab_size - 5, self.prompt).tolist() for _ in range(rows)]

    def evaluator(self, rows: int, new: int, variant: str = AS_IT_IS, model: Any = None) -> Evaluator:
        sizes = {"slots": rows, "max_prompt_tokens": self.prompt, "max_new_tokens": new}
        engine = Engine(model or self.model, **sizes, stop_token_ids=(), **VARIANTS[variant].fields)
        return Evaluator.of(self.run_config(), engine, self.mesh)

    def init(self, model: Any = None) -> Any:
        return jax.jit(Transformer(model or self.model).init)(jax.random.key(0))

    @functools.cache  # noqa: B019 - there is only one kit
    def state(self, penalty: str = "l2") -> State:
        params = self.init()
        params = jax.device_put(params, param_shardings(self.mesh, params))  # like a run's, which share one program
        return State(self.run_config(penalty=penalty), self.mesh, params)

    @property
    def params(self) -> Any:
        return self.state().params

    @functools.cached_property
    def lane(self) -> Members:
        """A round of one member, placed as in a run."""
        return to_devices(Population(2, seed=0).members(1)[np.arange(1)], over_groups(self.mesh))

    @functools.cached_property
    def card(self) -> dict[str, Any]:
        numbers, size = (2**20, 512) if self.tiny else (2**29, 8192)
        x, a = jnp.ones(numbers, jnp.bfloat16), jnp.ones((size, size), jnp.bfloat16)
        copy = median(functools.partial(jax.jit(lambda x: x + jnp.bfloat16(1)), x))
        product = median(functools.partial(jax.jit(lambda a: a @ a), a))
        memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
        return {"copy_bytes_per_s": 4 * numbers / copy, "flops": 2 * size**3 / product, "memory_bytes": memory}

    @functools.cached_property
    def weights(self) -> dict[str, Any]:
        """A member's weights, in the layout of each variant's engine."""
        makers = {variant: self.evaluator(1, 1, variant) for variant in self.variants}
        return {name: jax.block_until_ready(e.perturb(self.params, self.lane)) for name, e in makers.items()}

    @functools.cached_property
    def variants(self) -> list[str]:
        """The programs that are compiled separately."""
        kinds = {}
        for name, variant in VARIANTS.items():
            engine = self.evaluator(1, 1, name).engine
            how = (engine.unrolled, getattr(engine, "writes_in_place", False), str(variant.options))
            kinds.setdefault(how, name)
        return list(kinds.values())

    @functools.cached_property
    def programs(self) -> dict[tuple, Any]:
        """Compiles in parallel the programs of all parts: a program, or the reason why there is none."""
        jobs: dict[tuple, Callable[[], Any]] = {}
        for variant, weights in self.weights.items() if "decode" in self.parts else ():
            for rows, new in itertools.product(self.rows, (1, self.new)):
                lower = functools.partial(self._decode, rows, new, variant, weights)
                jobs[variant, rows, new] = lambda f=lower, v=variant: f().compile(VARIANTS[v].options or None)
        for kind in ("l2", "none") if {"members", "iteration"} & {*self.parts} else ():
            update = functools.partial(self._update, self.state(kind))
            jobs["update", kind] = lambda f=update: f(self.population).compile()
            if kind == "l2" and self.population != 2:  # `iteration` then finds it in the cache
                jobs["update", 2] = lambda f=update: f(2).compile()
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            return dict(zip(jobs, pool.map(attempt, jobs.values()), strict=True))

    def _decode(self, rows: int, new: int, variant: str, weights: Any) -> Any:
        evaluator = self.evaluator(rows, new, variant)
        return Evaluator._decode.lower(evaluator, weights, self.packed(evaluator))

    def packed(self, evaluator: Evaluator) -> Any:
        """The prompts of an evaluator's slots on the device."""
        prompts = self.prompts(evaluator.engine.slots)
        tokens, positions, prefix = evaluator.engine.packing(prompts).pack(prompts, rows=len(prompts))
        return evaluator._rows(tokens[None], positions[None], prefix)

    def _update(self, state: State, population: int) -> Any:
        return update_on(self.mesh).lower(*state.update_arguments(entry_of(population)))

    @functools.cached_property
    def updates(self) -> dict[str, float]:
        """Seconds, by the anchor's penalty."""
        seconds, entry = {}, entry_of(self.population)
        for kind in ("l2", "none"):
            state, program = self.state(kind), self.program("update", kind)

            def call(state: State = state, program: Any = program) -> Any:
                state.params, state.opt_state, squares = program(*state.update_arguments(entry)[2:])
                return squares

            seconds[kind] = median(call)
        return seconds

    def program(self, *key: Any) -> Any:
        if isinstance(found := self.programs[key], dict):
            raise RuntimeError(f"{key} does not compile: {found['failed']}")
        return found


def attempt(call: Call) -> Any:
    """The part's result, or {"failed": why}; a failed part does not stop the others."""
    try:
        return call()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:500]}


def median(call: Call, repeats: int = 3) -> float:
    """Seconds per call, without the first call."""
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds[1:]))


def entry_of(population: int) -> Entry:
    weights = np.random.default_rng(0).standard_normal(population)
    return Entry.of(1, Population(population, seed=0).members(1), rewards=weights, weights=weights.astype(np.float32))


def noise(kit: Kit) -> dict[str, Any]:
    device, host = jax.devices()[0], jax.devices("cpu")[0]
    made, known = chip_bits.digests(device), json.loads(DIGESTS.read_text())["digests"]
    rows = {name: {"digest": made[name], "equal": made[name] == known[name]} for name in known}
    stages = chip_bits.stages(device, host, 2**12 if kit.tiny else 2**22)
    return {"digests": rows, "stages": {name: attempt(part) for name, part in stages.items()}}


def decode(kit: Kit) -> dict[str, Any]:
    return {v: {f"{rows} rows": attempt(lambda v=v, n=rows: _decode(kit, v, n)) for rows in kit.rows}
            for v in kit.variants}  # fmt: skip


def _decode(kit: Kit, variant: str, rows: int) -> dict[str, float]:
    seconds, model, weights = {}, kit.model, kit.weights[variant]
    for new in (1, kit.new):
        evaluator = kit.evaluator(rows, new, variant)
        program, arguments = kit.program(variant, rows, new), kit.packed(evaluator)
        seconds[new] = median(lambda p=program, w=weights, a=arguments: p(w, a), 2)
    prefill, whole = seconds[1], seconds[kit.new]
    used = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    used -= 0 if model.tied_embeddings else 2 * model.width * model.vocab_size  # only some of its rows are read
    least = used + cache_bytes(model, rows * (kit.prompt + kit.new // 2), 2)
    step, flops = (whole - prefill) / (kit.new - 1), forward_flops(model, rows, kit.prompt, logits=1)
    return {
        "tokens_per_s": rows * kit.new / whole, "seconds": whole, "step_s": step, "step_bytes_least": least,
        "step_times_bound": step * kit.card["copy_bytes_per_s"] / least, "prefill_s": prefill,
        "prefill_flops": flops, "prefill_times_bound": prefill * kit.card["flops"] / flops,
    }  # fmt: skip


def in_torch(kit: Kit, *, compiled: bool = False) -> dict[str, Any]:
    if missing := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
        return {"failed": f"not installed: {', '.join(missing)}"}
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = transformers.AutoConfig.for_model(**to_hf(kit.model))
    with torch.device(device):
        net = transformers.AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).eval()
    result: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__, "device": device}

    def generate(ids: Any) -> Any:
        out = net.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=kit.new, max_new_tokens=kit.new,
            pad_token_id=0, eos_token_id=1, cache_implementation="static", disable_compile=not compiled,
        )  # fmt: skip
        return out.cpu()  # when it is there

    for rows in kit.rows[::-1]:
        seconds = median(functools.partial(generate, torch.tensor(kit.prompts(rows), device=device)), 1)
        result[f"{rows} rows"] = {"seconds": seconds, "tokens_per_s": rows * kit.new / seconds}
    return result


def members(kit: Kit) -> dict[str, Any]:
    evaluator, d, bandwidth = kit.evaluator(1, 1), count(kit.params), kit.card["copy_bytes_per_s"]
    perturb = median(lambda: evaluator.perturb(kit.params, kit.lane))
    update, free = kit.updates["l2"], kit.updates["none"]
    return {
        "weights": d, "perturb_s": perturb, "perturb_times_bound": perturb * bandwidth / (6 * d),
        "population": kit.population, "update_s": update, "update_without_anchor_s": free,
        "update_times_bound": update * bandwidth / (12 * d),  # reads and writes θ, reads the anchor
    }  # fmt: skip


def iteration(kit: Kit) -> dict[str, Any]:
    """Two members on the largest number of rows: seconds by part, and kernels and gaps of a traced iteration."""
    anchored, free = kit.updates["l2"], kit.updates["none"]
    rows, config = max(kit.rows), kit.run_config()
    task, prompts, evaluator = get_task("countdown"), kit.prompts(rows), kit.evaluator(rows, kit.new)
    model = Model(kit.model, {}, words(kit.model.vocab_size), digest="", stop_token_ids=())
    state = kit.state()
    method = Evolution(config, evaluator, state, evaluator.engine.packing(prompts))

    def step(number: int) -> dict[str, float]:
        grader = Grader(model, task.train(rows), at_once(task), prompts)
        with Clock() as clock, jax.profiler.StepTraceAnnotation("step", step_num=number):
            began = time.monotonic()
            method.step(number, prompts, grader, lambda done: None)
            float(state.drift)
            total = time.monotonic() - began
            return {"seconds": total, **split(clock.seconds(), total=total)}

    step(1)
    result: dict[str, Any] = {"members": 2, "rows": rows, **step(2)}
    result["share_outside_prefill_and_decode"] = 1 - result["share_decode"]
    result["share_anchored_weight_decay"] = (anchored - free) / result["seconds"]
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            traced = step(3)["seconds"]
        result["trace"] = attempt(lambda: {"seconds": traced, **kernels(Path(folder), traced)})
    return result


def words(size: int) -> Any:
    """A tokenizer with so many words, one token each."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {f"w{i}": i for i in range(size)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="w0")))


def kernels(folder: Path, total: float) -> dict[str, Any]:
    """Seconds of the parts, seconds in which the device was busy and idle, and the longest operations."""
    path = next(folder.rglob("*.xplane.pb"))
    spans, times = [], defaultdict(list)
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        lines = list(plane.lines)
        for line in [line for line in lines if line.name.startswith("Stream")] or lines:  # on a GPU the rest is derived
            for event in line.events:
                if "hlo_op" in dict(event.stats):
                    spans.append(trace._span(event))
                    times[event.name].append(event.duration_ns / 1e9)
    busy = trace._covered(spans)
    longest = sorted(times.items(), key=lambda item: -sum(item[1]))[:15]
    return {
        "parts": trace.part_seconds(folder), "busy_s": busy, "idle_s": total - busy, "operations": len(spans),
        "longest": [{"name": name[:120], "count": len(own), "seconds": sum(own)} for name, own in longest],
    }  # fmt: skip


def child(kit: Kit) -> dict[str, Any]:
    """The digest of the tokens that this process decodes, with four layers and the middle number of rows."""
    model = dataclasses.replace(kit.model, layers=min(4, kit.model.layers))
    evaluator = kit.evaluator(kit.rows[len(kit.rows) // 2], min(kit.new, 64), model=model)
    began = time.perf_counter()
    sharp = jax.tree.map(lambda leaf: 4 * leaf, kit.init(model))  # so that the likeliest token varies
    weights = evaluator.perturb(sharp, kit.lane)
    tokens = np.asarray(evaluator._decode(weights, kit.packed(evaluator))[0])
    return {
        "digest": hashlib.sha256(tokens.tobytes()).hexdigest()[:16],
        "distinct_tokens": len(np.unique(tokens)),
        "seconds": time.perf_counter() - began,
    }


def processes(kit: Kit) -> dict[str, Any]:
    def decoded(folder: Path) -> dict[str, Any]:
        env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        command = [sys.executable, "-m", "benchmarks.chip", "--child", f"--model={kit.name}", *["--tiny"] * kit.tiny]
        run = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=kit.left)
        return json.loads(run.stdout.splitlines()[-1]) if not run.returncode else {"failed": run.stderr[-500:]}

    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor() as pool:
        one, two = pool.map(decoded, [Path(folder) / "one", Path(folder) / "two"])
        third = decoded(Path(folder) / "one")
    same = {f"{name}_equal": "digest" in other and one.get("digest") == other["digest"]
            for name, other in (("compiled_again", two), ("with_its_programs", third))}  # fmt: skip
    return {"first": one, "compiled_again": two, "with_its_programs": third, **same}


def laws(kit: Kit) -> dict[str, Any]:
    backend = jax.default_backend()
    env = os.environ | {"ES_JAX_TEST_PLATFORMS": {"gpu": "cuda,cpu", "cpu": "cpu"}.get(backend, f"{backend},cpu")}
    env["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
    chosen = [f"tests/laws/{law}" for law in (TINY_LAWS if kit.tiny else LAWS)]
    command = [sys.executable, "-m", "pytest", "-W", "default", "--tb=line", "-rf", *chosen]
    command += [f"-n{0 if kit.tiny else 4}"]
    run = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=kit.left)
    counts = {name: int(n) for n, name in re.findall(r"(\d+) (passed|failed|errors?)\b", run.stdout)}
    failed = re.findall(r"^FAILED (.*)", run.stdout, flags=re.M)
    return counts | {"failures": failed} if counts else {"failed": (run.stdout + run.stderr)[-500:]}


PARTS: dict[str, Callable[[Kit], Any]] = {
    "card": lambda kit: kit.card,
    "noise": noise,
    "decode": decode,
    "members": members,
    "iteration": iteration,
    "torch": in_torch,
    "processes": processes,
    "laws": laws,
    "torch_compiled": functools.partial(in_torch, compiled=True),
}


def measure(kit: Kit, result: dict[str, Any], where: str | None) -> None:
    """Runs all parts in sequence; each result is written when it is ready."""

    def cut() -> None:
        left = [name for name in kit.parts if name not in result]
        result.update((name, {"failed": "left out: the time ran out"}) for name in left)
        write_json(result, where)
        os._exit(0)

    watch = threading.Timer(kit.ends - time.monotonic(), cut)
    watch.daemon = True
    watch.start()
    for name in kit.parts:
        began = time.monotonic()
        result[name] = attempt(lambda name=name: PARTS[name](kit))
        result["seconds"][name] = round(time.monotonic() - began, 1)
        if where != "-":
            print(name, json.dumps(result[name]), flush=True)
            write_json(result, where)
    watch.cancel()
    write_json(result, where)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-1.5B", choices=PUBLISHED)
    parser.add_argument("--parts", default=",".join([*PARTS][:-1]), help=f"parts to run, among {', '.join(PARTS)}")
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--tiny", action="store_true", help="use a small model, to check on a CPU that it runs")
    parser.add_argument("--record", action="store_true", help="write the digests of this CPU's noise")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    add_json(parser)
    args = parser.parse_args()
    parts = tuple(args.parts.split(","))
    if unknown := set(parts) - PARTS.keys():
        parser.error(f"--parts has {', '.join(sorted(unknown))}: choose among {', '.join(PARTS)}")
    kit = Kit(args.model, parts, tiny=args.tiny, ends=time.monotonic() + args.seconds)
    about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    if args.child:
        print(json.dumps(child(kit)))
    elif args.record:
        content = {
            "command": "python -m benchmarks.chip --record",
            **about,
            "digests": chip_bits.digests(jax.devices()[0]),
        }
        DIGESTS.write_text(json.dumps(content, indent=1) + "\n")
    else:
        what = {"model": "tiny" if args.tiny else args.model, "prompt": kit.prompt, "new": kit.new}
        with tempfile.TemporaryDirectory() as folder, compilation_cache(Path(folder)):
            measure(kit, {**about, **what, "seconds": {}}, args.json)


if __name__ == "__main__":
    main()
