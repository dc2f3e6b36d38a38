"""The kit for a day with a chip, at a small size on CPU."""

import json
import math
import sys
from pathlib import Path

import jax
import pytest

from benchmarks import chip, chip_bits
from es_jax.core import threefry_normal

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.unchecked  # `lower` puts descriptions where arrays stand


def measured(tmp_path, monkeypatch, *options):
    """What the kit writes, run here with those options."""
    where = tmp_path / "chip.json"
    monkeypatch.setattr(sys, "argv", ["chip", "--tiny", f"--json={where}", *options])
    chip.main()
    return json.loads(where.read_text())


@pytest.mark.filterwarnings("ignore")  # of what reads the traces
def test_all_that_one_process_measures(tmp_path, monkeypatch):
    found = measured(tmp_path, monkeypatch, "--parts=card,decode,members,iteration")
    assert found["model"] == "tiny" and found["seconds"].keys() == {"card", "decode", "members", "iteration"}
    assert found["card"]["copy_bytes_per_s"] > 0 and found["card"]["flops"] > 0
    assert [*found["decode"]] == ["as it is", "layers in a scan"]
    for engine in found["decode"].values():
        rows = engine["3 rows"]
        assert rows["tokens_per_s"] == pytest.approx(3 * 4 / rows["seconds"])
        assert rows["step_times_bound"] == pytest.approx(
            rows["step_s"] * found["card"]["copy_bytes_per_s"] / rows["step_bytes_least"]
        )
    weights = found["members"]["weights"]
    assert weights == 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 64 + 2 * 32 + 3 * 64 + 512 * 64
    places = 3 * (12 + 4 // 2) * 2 * 2 * 16  # numbers of keys and values
    assert rows["step_bytes_least"] == 2 * (weights + places)
    step = found["iteration"]
    assert step["share_outside_prefill_and_decode"] == pytest.approx(1 - step["seconds_decode"] / step["seconds"])
    assert step["trace"]["parts"]["prefill"] > 0 and step["trace"]["operations"] > 100
    assert step["trace"]["busy_s"] + step["trace"]["idle_s"] == pytest.approx(step["trace"]["seconds"])
    assert math.isfinite(step["share_anchored_weight_decay"])


def test_noise_has_the_bits_of_the_digests(tmp_path, monkeypatch):
    found = measured(tmp_path, monkeypatch, "--parts=noise")["noise"]
    assert all(row["equal"] for row in found["digests"].values()) and len(found["digests"]) == 6
    assert all(stage["different"] == 0 for stage in found["stages"].values())


def test_noise_of_other_bits_is_told(monkeypatch):
    """A device whose cosine is a few units in the last place off."""
    known, exact = json.loads(chip.DIGESTS.read_text())["digests"], threefry_normal._cosine
    monkeypatch.setattr(threefry_normal, "_cosine", lambda word: exact(word) * (1 + 2.0**-21))
    monkeypatch.setattr(chip_bits, "KINDS", {})  # whose programs may have been compiled before
    made = chip_bits.digests(jax.devices()[0])
    assert len(made) == 2 and not any(made[name] == known[name] for name in made)


@pytest.mark.slow
def test_two_processes_decode_the_same_tokens_and_a_law_runs(tmp_path, monkeypatch):
    found = measured(tmp_path, monkeypatch, "--parts=processes,laws")
    both = found["processes"]
    assert both["compiled_again_equal"] and both["with_its_programs_equal"] and both["first"]["distinct_tokens"] > 2
    assert found["laws"] == {"passed": 1, "failures": []}


def test_torch_is_measured_where_it_is(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    found = measured(tmp_path, monkeypatch, "--parts=torch")["torch"]
    assert found["device"] == "cpu" and found["3 rows"]["tokens_per_s"] > 0


def test_what_does_not_work_leaves_the_rest_and_says_so(tmp_path, monkeypatch):
    def fails(kit):
        raise RuntimeError("on purpose")

    monkeypatch.setitem(chip.PARTS, "members", fails)
    found = measured(tmp_path, monkeypatch, "--parts=members,card")
    assert found["members"] == {"failed": "RuntimeError: on purpose"} and found["card"]["flops"] > 0


def test_an_unknown_part_is_named(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        measured(tmp_path, monkeypatch, "--parts=card,decod")
    assert "--parts has decod: choose among card, noise, decode" in capsys.readouterr().err


@pytest.mark.parametrize("law", sorted({*chip.LAWS, *chip.TINY_LAWS}))
def test_the_laws_that_it_runs_are_there(law):
    file, name = law.split("::")
    assert f"\ndef {name}(" in (ROOT / "tests/laws" / file).read_text()
