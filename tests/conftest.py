"""Strict JAX for every test: eight fake CPU devices, checked annotations, no silent promotion, no network."""

import gc
import os
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = os.environ.get(
    "ES_JAX_TEST_PLATFORMS", "cpu"
)  # a few laws run on a chip: benchmarks.chip
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# What one test, process or run of the tests has compiled, the others need not.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".pytest_cache/jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax
import jaxtyping
import pytest

import tests.typechecker
from tests.fast import FAST

# Before the first module of es_jax is imported.
jaxtyping.install_import_hook("es_jax", f"{tests.typechecker.__name__}.checked")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items):
    """Marks what is fast."""
    for item in items:
        names = FAST.get(str(item.path.relative_to(ROOT / "tests")))
        if names == () or (names and item.name.startswith(names)):
            item.add_marker("fast")


@pytest.fixture(autouse=True)
def annotations(request):
    """They are checked, but not where a test marked `unchecked` gives what they forbid."""
    jaxtyping.config.update("jaxtyping_disable", request.node.get_closest_marker("unchecked") is not None)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Path of SmolLM2-135M-Instruct's GGUF: $ES_JAX_SMOLLM2, or what `make smollm2` fetched into models/."""
    found = os.environ.get("ES_JAX_SMOLLM2") or next(iter((ROOT / "models").rglob("*.gguf")), None)
    if found is None or not Path(found).exists():
        pytest.skip("SmolLM2 is not here: run `make smollm2`, or set ES_JAX_SMOLLM2 to the .gguf")
    return Path(found)


@pytest.fixture(scope="session")
def countdown_rows() -> Path:
    """The folder of real Countdown rows, in the verl layout: $ES_JAX_COUNTDOWN or ../shared/data/countdown."""
    folder = Path(os.environ.get("ES_JAX_COUNTDOWN", ROOT.parent / "shared/data/countdown"))
    if not folder.exists():
        pytest.skip(f"no Countdown rows at {folder}: set ES_JAX_COUNTDOWN to a folder with train and test parquet")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """The folder of `helpers.tiny_model`."""
    from tests.helpers import tiny_model  # after the annotations are checked

    return tiny_model(tmp_path_factory.mktemp("tiny"))


MAPPINGS = 16_000  # of memory: a process may have 65,530 of them, and each compiled program keeps some


@pytest.fixture(scope="module", autouse=True)
def mappings():
    """A process that has compiled thousands of programs lets them go: at the limit the next one crashes it."""
    yield
    known = Path("/proc/self/maps")
    if known.exists() and known.read_bytes().count(b"\n") > MAPPINGS:
        jax.clear_caches()
        gc.collect()


_compiled: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **kwargs: _compiled.append(event) if event.endswith("backend_compile_duration") else None
)


@pytest.fixture
def compilations():
    """A function: how many programs this process has compiled, or fetched from the cache of compiled ones."""
    return lambda: len(_compiled)
