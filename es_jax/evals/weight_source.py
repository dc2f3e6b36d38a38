"""What is evaluated: a run's steps, rebuilt from checkpoints or the seed log, or a model beside its base model.

evals/subject.json tells whose weights the rows of a folder are of, so that rows of two sources are not mixed.
"""

import dataclasses
import datetime
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from es_jax.core import processes
from es_jax.core.names import RENAMED
from es_jax.rundir import directory, seed_log
from es_jax.rundir.metrics import read_jsonl
from es_jax.rundir.places import CODE, MODELS
from es_jax.rundir.seed_log import read_entries
from es_jax.tasks.outside import label
from es_jax.training.config import RunConfig, freeze, read_config
from es_jax.training.config_groups import ModelConfig, check_date
from es_jax.training.method import METHODS
from es_jax.training.predicted_drift import PredictedDrift
from es_jax.training.start import outline, outline_of, weights_of
from es_jax.training.state import anchor_offset, load_anchor, load_base, perturbed_count
from es_jax.training.weights_at import weights_at
from es_jax.weights.chat_template import set_date
from es_jax.weights.model import Model

Fields = dict[str, Any]  # as JSON has them
MARKS = "subject.json"  # as in the directories of earlier versions
SHORT = 16  # characters of a digest
# What may differ between two runs with the same weights at each step. Digests stand for the paths.
WITHOUT_MARK = (*directory.CHANGEABLE, *directory.SIZES, *directory.PATHS, directory.DATE)


class WeightSource(NamedTuple):
    """Weights by step, step 0 the base model.

    Attributes:
      name: for messages.
      marks: what tells its weights of the first so many steps from those of other sources; "base" is of step 0.
      config: of the run; of a model, the defaults with its source.
      facts: what else a run's config.json holds; {} of a model.
      model: the base model without weights.
      base: makes the base model's weights.
      weights: the weights of ascending steps; copy what is kept, the next step reuses their memory.
      predicted: ‖θ_t − θ₀‖ in exact arithmetic by step, up to a last step and from given θ₀, where theory knows it.
      sigma: σ of a step ≥ 1, where it is known.
      workdir: the run's directory; None of a model.
    """

    name: str
    marks: Callable[[int], Fields]
    config: RunConfig
    facts: Fields
    model: Model
    last: int
    base: Callable[[], Any]
    weights: Callable[[Sequence[int]], Iterator[tuple[int, Any]]]
    predicted: Callable[[int, Any], dict[int, float | None]]
    sigma: Callable[[int], float | None]
    workdir: Path | None = None


def of_run(workdir: Path, mesh: Mesh) -> WeightSource:
    """A run's steps; nothing in its directory is changed."""
    config, entries = read_config(workdir, needs=MODELS), read_entries(workdir)
    model = outline_of(workdir)
    perturbs = METHODS[config.method].perturbs

    def marks(steps: int) -> Fields:
        """A longer run keeps its marks of the first steps; the seed log tells what the fields do not, such as rates
        that followed a schedule over another number of steps."""
        steps, facts = min(steps, len(entries)), directory.read(workdir)
        named = {name: facts[name][:SHORT] for name in ("rows", "compute_dtype", "anchor_digest") if name in facts}
        given, log = freeze(facts["config"], begun=True), seed_log.digest(workdir, steps)[:SHORT]
        return {"base": model.digest[:SHORT]} | _fields(given) | named | {"steps": steps, "seedlog": log}

    def predicted(last: int, start: Any) -> dict[int, float | None]:
        offset = anchor_offset(config, load_anchor(config, mesh, start), start) if config.optim.anchor.source else 0.0
        prediction, norms = PredictedDrift(config, perturbed_count(config, start), offset=offset), {}
        for entry in entries[:last] if perturbs else ():
            prediction.add(entry)
            norms[entry.step] = prediction.norm
        return norms

    return WeightSource(
        name=f"the run {workdir}",
        marks=marks,
        config=config,
        facts=directory.read(workdir),
        model=model,
        last=len(entries),
        base=lambda: load_base(config, mesh).params,
        weights=lambda steps: weights_at(workdir, steps, mesh=mesh),
        predicted=predicted,
        sigma=lambda step: config.logged_rates(entries[step - 1]).sigma if perturbs else None,
        workdir=workdir,
    )


def _fields(config: RunConfig) -> Fields:
    fields = flatten_dict(json.loads(json.dumps(dataclasses.asdict(config))), sep=".")
    return _marked(fields)


def _marked(fields: Fields) -> Fields:
    """Of fields those that are marks; a file's path is none, as its place may change."""
    marks = {name: value for name, value in fields.items() if not name.startswith(WITHOUT_MARK)}
    return marks | {name: label(text) for name in CODE if isinstance(text := marks.get(name), str)}


DEFAULTS = _fields(RunConfig())  # of what a mark from before a field was there lacks


def of_model(source: str, base: str | None, mesh: Mesh) -> WeightSource:
    """A model, or RUN@STEP, as step 1, beside its base model as step 0; without a base model it is step 0 itself.
    Raises ValueError where the two have different shapes or vocabularies."""
    config, sources = RunConfig(model=ModelConfig(source=source)), (base or source, source)
    model, other = map(outline, sources)
    if model.config != other.config or model.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        raise ValueError(f"{source} and {base} differ in shape or vocabulary: give the model it was trained from")
    marks = {"base": model.digest[:SHORT]} | ({} if base is None else {"model": other.digest[:SHORT]})
    return WeightSource(
        name=f"the model {source}" + ("" if base is None else f" beside its base model {base}"),
        marks=lambda steps: marks,
        config=config,
        facts={},
        model=model,
        last=int(base is not None),
        base=lambda: weights_of(sources[0], config, mesh),
        weights=lambda steps: ((step, weights_of(sources[step], config, mesh)) for step in steps),
        predicted=lambda last, start: {},
        sigma=lambda step: None,
    )


def with_date(source: WeightSource, folder: Path, date: str | None, *, run: bool) -> WeightSource:
    """The source with the day that its chat template sees: `date`, else the run's, else that of the folder's rows, else
    today. A run and rows from before the day was written down have none: the template sees the clock's. Process 0
    decides."""
    if processes.first():
        date = date or source.config.model.template_date or _read_subject(folder).template_date
        if date is None and not run and not any(folder.glob("*.jsonl")):
            date = datetime.date.today().isoformat()
    date = processes.exchange({0: date} if processes.first() else {})[0]
    set_date(source.model.tokenizer, date)
    return source._replace(config=source.config.with_date(date))


def check_folder(folder: Path, source: WeightSource) -> None:
    """Raises ValueError where the folder's rows are of other weights than the source's.

    A folder without subject.json, of training or of an earlier version, is taken as it is. Rows of step 0 are of the
    base model: while there are no others, any source with the same base may go on with them.
    """
    name, marks, _ = _read_subject(folder)
    if marks is None:
        return
    marks = _marked(marks)
    then, now = DEFAULTS | marks, DEFAULTS | source.marks(marks.get("steps", 0))
    differing = [field for field in {**then, **now} if then.get(field) != now.get(field)]
    beyond = any(row["step"] for path in sorted(folder.glob("*.jsonl")) for row in read_jsonl(path))
    if "base" in differing or (differing and beyond):
        pairs = [f"{field} {then.get(field)!r} there and {now.get(field)!r} here" for field in differing]
        raise ValueError(
            f"{folder} has rows of {name} and this evaluation is of {source.name}, with other weights "
            f"({'; '.join(pairs[:5])}): use another --out"
        )


def claim_folder(folder: Path, source: WeightSource) -> None:
    """Write subject.json, unless it tells of the same weights; to call after `check_folder`."""
    subject = Subject(source.name, source.marks(source.last), source.config.model.template_date)
    if _read_subject(folder)[1:] != subject[1:]:
        directory.write_json(folder / MARKS, subject._asdict())


class Subject(NamedTuple):
    """What subject.json tells: a source's name and marks (None without the file), and the day that its chat template
    saw, where that is known."""

    name: str
    marks: Fields | None
    template_date: str | None


def _read_subject(folder: Path) -> Subject:
    """With the fields' names of today."""
    path = folder / MARKS
    try:
        content = json.loads(path.read_bytes())
        marks = {RENAMED.get(name, name): value for name, value in content["marks"].items()}
        check_date("template_date", date := content.get("template_date"))
        return Subject(content["name"], marks, date)
    except FileNotFoundError:
        return Subject("", None, None)
    except (AttributeError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}): use another --out, or delete it where you know whose rows they are"
        ) from None
