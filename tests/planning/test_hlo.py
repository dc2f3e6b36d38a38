"""Collectives read from the text of compiled programs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from es_jax.core.mesh import make_mesh
from es_jax.planning.hlo import Collective, collectives

AXES = {"groups": 2, "model": 4}


def program(fn, *specs, shape=(64, 64)):
    mesh = make_mesh(2, 4)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)) for spec in specs]
    return jax.jit(fn, out_shardings=NamedSharding(mesh, PartitionSpec())).lower(*arrays).compile().as_text()


@pytest.mark.parametrize(("axis", "groups", "size"), [("groups", 4, 2), ("model", 2, 4), (("groups", "model"), 1, 8)])
def test_the_axes_and_groups_of_a_gather(axis, groups, size):
    """A [64, 64] float32 array is gathered whole: 16 KiB arrive, along the axes that it was cut over."""
    along = (axis,) if isinstance(axis, str) else axis
    assert collectives(program(lambda x: x, PartitionSpec(axis)), AXES, turns={}) == [
        Collective("all-gather", 64 * 64 * 4, 1, along, groups, size)
    ]


def test_loops_count_their_turns():
    """A product cut along what it sums over is exchanged in each of the 5 turns of a scan."""

    def five(x, y):
        return jax.lax.scan(lambda carry, _: (jnp.tanh(carry @ y), None), x, length=5)[0]

    text = program(five, PartitionSpec(None, "model"), PartitionSpec("model", None))
    inside = [kind for kind in collectives(text, AXES, turns={"": 1000}) if kind.times > 1]
    assert inside and {kind.times for kind in inside} == {5} and {kind.axes for kind in inside} == {("model",)}


def test_a_loop_of_unknown_length_turns_as_often_as_told():
    halves = NamedSharding(make_mesh(2, 4), PartitionSpec("groups"))

    def until(x):
        total = lambda x: jnp.sum(jax.lax.with_sharding_constraint(x, halves))  # noqa: E731
        return jax.lax.while_loop(lambda x: total(x) < 1e9, lambda x: x * 2, x)

    text = program(until, PartitionSpec("groups"))
    counts = [sum(kind.times for kind in collectives(text, AXES, turns={"": turns})) for turns in (1, 11)]
    assert counts[1] > counts[0] + 8


def test_loops_turn_by_the_scope_that_they_are_in():
    halves, whole = (NamedSharding(make_mesh(2, 4), PartitionSpec(part)) for part in ("groups", None))
    hold = jax.lax.with_sharding_constraint

    def until(x):
        swap = lambda x: hold(hold(x, halves) * 2, whole)  # noqa: E731
        x = jax.lax.while_loop(lambda x: x[0, 0] < 1e9, swap, x)
        with jax.named_scope("fill"):
            return jax.lax.while_loop(lambda x: x[0, 0] < 1e9, swap, x + 1)

    text = program(until, PartitionSpec())

    def times(rest, **turns):
        return sum(kind.times for kind in collectives(text, AXES, turns={"": rest} | turns))

    base = times(rest=7, fill=3)
    assert times(rest=7, fill=5) > base and times(rest=9, fill=3) > base
    assert times(rest=7) == times(rest=7, fill=7)


def test_of_branches_the_one_that_sends_most_counts():
    branches = BRANCHES.replace("ONE", "%dear, %cheap"), BRANCHES.replace("ONE", "%cheap, %dear")
    assert [collectives(text, AXES, turns={}) for text in branches] == [
        [Collective("all-reduce", 400, 1, ("model",), 2, 4)]
    ] * 2


BRANCHES = """HloModule jit_g

%cheap (p: f32[100]) -> f32[100] {
  ROOT %r = f32[10]{0} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%add
}

%dear (p: f32[100]) -> f32[100] {
  ROOT %r = f32[100]{0} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%add
}

ENTRY %main (x: f32[100]) -> f32[100] {
  ROOT %c = f32[100]{0} conditional(%i, %x, %x), branch_computations={ONE}
}
"""

TPU = """HloModule jit_f, is_scheduled=true

%cond (p: (s32[], f32[8])) -> pred[] {
  %c.1 = s32[]{:T(128)} constant(28), metadata={op_name="x"}
  %p = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %c.1), direction=LT
}

%body (p.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %ar = bf16[64,1,3584]{2,0,1:T(8,128)(2,1)S(1)} all-reduce(%z), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  %ag = (f32[2]{0}, f32[8]{0}) all-gather-start(%y), replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  %one = f32[8]{0} all-reduce(%z), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]{0}) while(%t), condition=%cond, body=%body, backend_config={"flag_configs":[]}
  %rs = f32[2]{0} reduce-scatter(%v), replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}, to_apply=%add
  %aa = f32[4]{0} all-to-all(%v), replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}
  %cp = f32[2]{0} collective-permute(%v), source_target_pairs={{0,4},{4,0}}
}
"""


def test_the_text_of_a_tpu_program():
    """Loops without a written count; groups as a list, an iota and axes of a mesh in two orders, and of one device."""
    assert collectives(TPU, AXES, turns={}) == [
        Collective("all-reduce", 64 * 3584 * 2, 28, ("model",), 2, 4),
        Collective("all-gather", 32, 28, ("model",), 2, 4),
        Collective("all-to-all", 16, 1, ("groups",), 4, 2),
        Collective("reduce-scatter", 8, 1, ("groups",), 4, 2),
        Collective("collective-permute", 8, 1, ("groups",), 2, 2),
    ]


@pytest.mark.parametrize(
    ("op", "sent"), [("all-gather", 75), ("all-reduce", 150), ("reduce-scatter", 300), ("collective-permute", 100)]
)
def test_what_a_device_sends(op, sent):
    """Of 100 bytes that arrive in a group of 4."""
    assert Collective(op, 100, 1, ("groups",), 1, 4).sent == sent


def test_groups_in_an_unknown_form_are_refused():
    with pytest.raises(ValueError, match="cannot read the device groups"):
        collectives(TPU.replace("replica_groups=[2,4]<=[8]", "replica_groups=all"), AXES, turns={})
