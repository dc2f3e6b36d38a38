"""Strict JAX for every test: eight fake CPU devices, checked annotations, no silent promotion, no network."""

import os
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
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
    """A model folder of about 6 thousand random weights: one layer, a tokenizer of bytes, a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from es_jax.models.config import TransformerConfig
    from es_jax.models.transformer import Transformer
    from es_jax.weights.model import Model, save_model

    words = ["<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_only = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token=words[1], pad_token=words[1])
    tokenizer.add_special_tokens({"additional_special_tokens": words[:2]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    config = TransformerConfig(
        family="llama", vocab_size=258, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp_dim=24,
        tied_embeddings=True,
    )  # fmt: skip
    params = jax.jit(Transformer(config).init)(jax.random.key(0))
    folder = tmp_path_factory.mktemp("tiny")
    params = jax.tree.map(lambda x: 4 * x, params)
    save_model(folder, Model(config, params, tokenizer, digest="", stop_token_ids=(1,)))
    return folder


_compiled: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **kwargs: _compiled.append(event) if event.endswith("backend_compile_duration") else None
)


@pytest.fixture
def compilations():
    """A function: how many programs this process has compiled, or fetched from the cache of compiled ones."""
    return lambda: len(_compiled)
