"""python -m es_jax.weights.verify MODEL REFERENCE [--text=TEXT | --text-file=FILE] [--max-kl=NATS] [--json]

Compares a model as es_jax loads it (a folder, a .gguf file, a hub name) with what transformers computes from the folder
REFERENCE, in float32, on a text. If they differ by more than allowed, the exit code is 1 and the output names the layer
at which they diverge. Needs PyTorch: pip install 'es_jax[verify]'.

With --json one object is printed: tokens, same_tokens, logit_difference, mean_kl, max_kl, limit, kl (a list, by
position), layers (name → relative difference, from the embedding to the logits), parted (a name or null), passed.
"""

import argparse
import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from es_jax.models.transformer import Transformer
from es_jax.weights import tokenizer
from es_jax.weights.model import Model, load_model

TEXT = """The ferry leaves at 7:45 and again at 16:30, unless the wind is above 50 km/h. "Take the earlier one," said
Marta, "the other is full of schoolchildren on Fridays." So he set two alarms, packed bread, a map and one clean shirt,
and lay awake until three listening to the rain. In the morning the harbour was empty: no ship, no people, only a note
on the ticket window, which read: closed for the regatta, back on Monday."""


@dataclasses.dataclass(frozen=True)
class VerificationReport:
    """How far a model is from its reference on one text.

    Attributes:
      tokens: how many tokens were compared.
      same_tokens: whether the reference's tokenizer makes the same ids of the text.
      logit_difference: the largest absolute difference of two logits.
      kl: KL(reference ‖ model) of the next-token distributions in nats, one number for each position.
      limit: the largest KL that is allowed, in nats.
      layers: (name, difference) of "embedding", "layer 0", …, "final norm", "logits". A difference is the largest ‖ours
        − theirs‖ / ‖theirs‖ of a position.

    Examples:
      >>> report = VerificationReport(2, True, 0.5, (1e-9, 3e-9), 1e-6, (("embedding", 0.0), ("logits", 2e-3)))
      >>> report.passed, report.max_kl, report.parted
      (True, 3e-09, 'logits')
    """

    tokens: int  # how many tokens were compared
    same_tokens: bool  # whether the reference's tokenizer encodes the text to the same ids
    logit_difference: float  # the largest absolute difference of two logits
    kl: tuple[float, ...]  # KL(reference ‖ model) of the next-token distributions at each position, in nats
    limit: float  # the largest KL that is allowed
    layers: tuple[tuple[str, float], ...]

    @property
    def max_kl(self) -> float:
        """The largest KL of a position, in nats. It is NaN where one is NaN, and then nothing has passed."""
        return float(np.max(self.kl))

    @property
    def mean_kl(self) -> float:
        """The mean KL over positions, in nats."""
        return float(np.mean(self.kl))

    @property
    def parted(self) -> str | None:
        """The first of `layers` whose difference is above 1e-3 or not a number; None where there is none."""
        return next((name for name, difference in self.layers if not difference <= 1e-3), None)

    @property
    def passed(self) -> bool:
        """Whether the KL of every position is within the limit and the tokens are the same."""
        return self.same_tokens and self.max_kl <= self.limit

    def __str__(self) -> str:
        text = (
            f"{self.tokens} tokens: largest logit difference {self.logit_difference:.2e}, KL mean {self.mean_kl:.2e}, "
            f"largest {self.max_kl:.2e} nats at position {np.argmax(self.kl)} (allowed {self.limit:.2e})"
        )
        if self.parted is not None:
            text += f"; they diverge at {self.parted}, by {dict(self.layers)[self.parted]:.1e} of its norm"
        return text if self.same_tokens else f"{text}; the tokenizers encode the text differently"

    def to_json(self) -> dict[str, Any]:
        """Gives the fields, and what follows from them, as the command prints them with --json.

        Returns:
          A dict of what JSON can hold; its keys are documented in `es_jax.weights.verify`.
        """
        derived = {name: getattr(self, name) for name in ("max_kl", "mean_kl", "parted", "passed")}
        return {**dataclasses.asdict(self), **derived, "layers": dict(self.layers)}


class VerificationError(ValueError):
    """A model is further from its reference than allowed.

    Args:
      report: the numbers, which the error keeps as its attribute `report`.

    Examples:
      >>> report = VerificationReport(2, True, 9.0, (0.1, 0.2), 1e-6, (("logits", 0.5),))
      >>> VerificationError(report).report.passed
      False
    """

    def __init__(self, report: VerificationReport) -> None:
        super().__init__(f"the model does not match its reference: {report}")
        self.report = report


def verify_model(model: Model, reference: str | Path, *, max_kl: float, text: str = TEXT) -> VerificationReport:
    """Compares a loaded model with what transformers computes from a folder, in float32 and without compilation.

    The reference needs PyTorch: pip install 'es_jax[verify]'.

    Args:
      model: from `load_model`. Its parameters' dtype is the compute dtype.
      reference: a Hugging Face folder with safetensors and a tokenizer.
      max_kl: the largest KL(reference ‖ model) that is allowed at any position, in nats. Float32 against float32 stays
        below about 1e-8, and bfloat16 below about 1e-2. A quantised file is as far off as its quantisation.
      text: what the models read, from 2 tokens to the model's context.

    Returns:
      The report, if the model passed.

    Raises:
      VerificationError: the KL of a position is above `max_kl`, or the tokens differ. It says at which layer the models
        part.
      ValueError: PyTorch is not installed, the text is too short or too long, or the models differ in their sizes.
      FileNotFoundError: `reference` is not a model folder.

    Examples:
      >>> import tempfile
      >>> from es_jax.weights.model import save_model
      >>> lab, folder = load_model("lab"), tempfile.mkdtemp()
      >>> save_model(folder, lab)
      >>> verify_model(lab, folder, max_kl=1e-6, text="A37+48=85").passed  # doctest: +SKIP
      True
    """
    folder = Path(reference)
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"reference = {str(reference)!r} has no config.json: give a Hugging Face model folder")
    ids = np.array([model.tokenizer.encode(text)], np.int32)
    tokens, most = ids.shape[1], model.config.max_positions
    if not 2 <= tokens <= most:
        raise ValueError(f"text has {tokens} tokens: it must have 2 to {most}; give another")
    theirs, ours = _reference_stream(folder, ids), _stream(model, ids)
    wrong = [name for name in ours if name not in theirs or theirs[name].shape != ours[name].shape]
    if wrong or len(theirs) != len(ours):
        raise ValueError(
            f"the model and {reference} have different sizes: {', '.join(wrong) or 'fewer layers'} differs"
        )
    report = VerificationReport(
        tokens=tokens,
        same_tokens=tokenizer.from_folder(folder).encode(text) == ids[0].tolist(),
        logit_difference=float(np.abs(ours["logits"] - theirs["logits"]).max()),
        kl=_kl(theirs["logits"], ours["logits"]),
        limit=max_kl,
        layers=tuple((name, _relative(ours[name], theirs[name])) for name in ours),
    )
    if not report.passed:
        raise VerificationError(report)
    return report


def _stream(model: Model, ids: np.ndarray) -> dict[str, np.ndarray]:
    """The output of each stage, [T, D], and the logits, [T, V], float32."""
    transformer, tokens = Transformer(model.config), jnp.asarray(ids)
    embedded, *layers = jax.jit(transformer.trace)(model.params, tokens)
    normed = jax.jit(transformer.hidden)(model.params, tokens)[0]
    outputs = {"embedding": embedded, **{f"layer {i}": x for i, x in enumerate(layers)}, "final norm": normed}
    outputs["logits"] = jax.jit(transformer.logits)(model.params, normed)
    return {name: np.asarray(x[0].astype(jnp.float32)) for name, x in outputs.items()}


def _reference_stream(folder: Path, ids: np.ndarray) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        raise ValueError("verifying needs PyTorch: pip install 'es_jax[verify]'") from None
    from transformers import AutoModelForCausalLM

    reference: Any = AutoModelForCausalLM.from_pretrained(
        str(folder), attn_implementation="eager", local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    reference = reference.float().eval()
    outputs: dict[str, Any] = {}

    def record(name: str, module: Any, args: Any, output: Any) -> None:
        outputs[name] = output[0] if isinstance(output, tuple) else output

    def record_input(module: Any, args: Any, kwargs: Any) -> None:
        outputs["embedding"] = args[0] if args else kwargs["hidden_states"]

    layers = reference.model.layers
    layers[0].register_forward_pre_hook(record_input, with_kwargs=True)
    for i, layer in enumerate(layers):
        layer.register_forward_hook(functools.partial(record, f"layer {i}"))
    reference.model.norm.register_forward_hook(functools.partial(record, "final norm"))
    with torch.no_grad():
        outputs["logits"] = reference(torch.tensor(ids).long(), use_cache=False).logits
    return {name: x[0].numpy().copy() for name, x in outputs.items()}


def _kl(reference: np.ndarray, model: np.ndarray) -> tuple[float, ...]:
    """KL(reference ‖ model) of each row of logits [T, V], in float64."""
    wide = (logits.astype(np.float64) for logits in (reference, model))
    p, q = (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True) for logits in wide)
    return tuple(float(x) for x in np.maximum((np.exp(p) * (p - q)).sum(axis=1), 0.0))


def _relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    return float((np.linalg.norm(ours - theirs, axis=1) / np.maximum(np.linalg.norm(theirs, axis=1), 1e-30)).max())


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    usage, _, description = (__doc__ or "").partition("\n\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage=usage, description=description, formatter_class=raw)
    parser.add_argument("model")
    parser.add_argument("reference")
    texts = parser.add_mutually_exclusive_group()
    texts.add_argument("--text", default=TEXT, help="the text to compare on")
    texts.add_argument("--text-file", type=Path, help="a UTF-8 file with the text to compare on")
    parser.add_argument("--max-kl", type=float, default=1e-6, help="largest KL allowed at a position, in nats")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    try:
        text = arguments.text_file.read_text(encoding="utf-8") if arguments.text_file else arguments.text
        report = verify_model(load_model(arguments.model), arguments.reference, max_kl=arguments.max_kl, text=text)
    except VerificationError as error:
        report = error.report
    except (ValueError, OSError) as error:
        sys.exit(f"es_jax.weights.verify: {error}")
    print(json.dumps(report.to_json()) if arguments.json else f"{'passed' if report.passed else 'FAILED'}: {report}")
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
