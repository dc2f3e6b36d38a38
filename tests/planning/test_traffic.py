"""Bytes and kernels of programs that are written by hand, so that what they move is known, and of compiled ones."""

import jax
import jax.numpy as jnp
import pytest

from es_jax.planning.traffic import Traffic, TrafficCounter, arrays


def count(text, *, turns=None, **options):
    return TrafficCounter(text, turns=turns or {}, **options).program()


def entry(*lines, before=""):
    """A program whose last line is its result; x is f32[10,100], or 4000 bytes, y f32[1,100] and i a whole number."""
    parameters = ["%x = f32[10,100]{1,0} parameter(0)", "%y = f32[1,100]{1,0} parameter(1)", "%i = s32[] parameter(2)"]
    lines = [*parameters, *lines[:-1], f"ROOT {lines[-1]}"]
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule m, is_scheduled=true\n{before}\nENTRY %main (x: f32[10,100], i: s32[]) -> f32[] {{\n{body}\n}}\n"


def computation(name, *lines):
    body = "\n".join(f"  {line}" for line in [*lines[:-1], f"ROOT {lines[-1]}"])
    return f"\n%{name} (p: f32[10,100]) -> f32[] {{\n{body}\n}}\n"


P, Q, I = (f"%{name} = {shape} parameter({i})" for i, (name, shape) in enumerate(  # noqa: E741
    [("p", "f32[10,100]{1,0}"), ("q", "f32[1,100]{1,0}"), ("i", "s32[]")]
))  # fmt: skip
SLICE = "%s = f32[1,100]{1,0} dynamic-slice(%p, %i, %i), dynamic_slice_sizes={1,100}"
UPDATE = "%u = f32[10,100]{1,0} dynamic-update-slice(%p, %q, %i, %i)"


BRANCHES = "".join(
    computation(name, "%p = f32[10,100]{1,0} parameter(0)", *lines)
    for name, lines in {
        "small": ["%r = f32[1,100]{1,0} slice(%p), slice={[0:1], [0:100]}"],
        "large": ["%r = f32[10,100]{1,0} copy(%p)"],
        "middle": ["%r = f32[4,100]{1,0} slice(%p), slice={[0:4], [0:100]}"],
    }.items()
)


@pytest.mark.parametrize(("line", "moved", "kernels"), [
    ("%r = f32[10,100]{1,0} copy(%x)", 8000, 1),
    ("%r = f32[1000]{0} bitcast(%x)", 0, 0),
    ("%r = f32[10,100]{1,0} add(%x, %y)", 8400, 1),
    ("%r = f32[1,100]{1,0} dynamic-slice(%x, %i, %i), dynamic_slice_sizes={1,100}", 400 + 400 + 8, 1),
    ("%r = f32[2,100]{1,0} slice(%x), slice={[1:3], [0:100]}", 800 + 800, 1),
    ("%r = f32[10,100]{1,0} dynamic-update-slice(%x, %y, %i, %i)", 400 + 400 + 8, 1),
    ("%r = f32[5,100]{1,0} gather(%x, %i), offset_dims={1}, slice_sizes={1,100}", 2000 + 2000 + 4, 1),
    ("%r = f32[] reduce(%x, %i), dimensions={0,1}, to_apply=%add", 4000 + 4 + 4, 1),
    ("%r = f32[10,100]{1,0} after-all()", 0, 0),
])  # fmt: skip
def test_what_one_instruction_moves(line, moved, kernels):
    assert count(entry(line)) == Traffic(moved, kernels)


@pytest.mark.parametrize(("lines", "moved"), [
    ((P, Q, I, SLICE, "%r = f32[1,100]{1,0} add(%s, %q)"), 400 + 400 + 4 + 400),  # reads a slice of p
    ((P, Q, I, "%n = f32[10,100]{1,0} negate(%p)", SLICE.replace("%p", "%n"), "%r = f32[1,100]{1,0} add(%s, %q)"),
     400 + 400 + 4 + 400),  # and of what is made of it
    ((P, Q, I, SLICE, "%t = f32[2,100]{1,0} slice(%p), slice={[0:2], [0:100]}",
      "%r = f32[3,100]{1,0} concatenate(%s, %t), dimensions={0}"), 1200 + 4 + 1200),  # two pieces, and no q
    ((P, Q, I, SLICE, "%b = f32[10,100]{1,0} broadcast(%s), dimensions={0,1}", "%r = f32[10,100]{1,0} add(%p, %b)"),
     4000 + 4 + 4000),  # the whole holds the piece
    ((P, Q, I, "%g = f32[5,100]{1,0} gather(%p, %i), slice_sizes={1,100}", "%r = f32[5,100]{1,0} negate(%g)"),
     2000 + 4 + 2000),
    ((P, Q, I, "%d = f32[10,1]{1,0} dot(%p, %q), rhs_contracting_dims={1}", "%r = f32[1,1]{1,0} slice(%d)"),
     4000 + 400 + 4),  # a product needs all, and nobody asks for i
    ((P, Q, I, "%b = f32[10,100]{1,0} broadcast(%q), dimensions={0,1}", SLICE.replace("%p", "%b")), 400 + 4 + 400),
    ((P, Q, I, "%n = f32[10,100]{1,0} negate(%p)", "%e = f32[10,100]{1,0} add(%p, %n)", SLICE.replace("%p", "%e")),
     400 + 4 + 400),  # the same row, used twice
    ((P, Q, I, "%s = f32[1,100]{1,0} fusion(%p, %q, %i), kind=kLoop, calls=%first",
      "%t = f32[1,100]{1,0} fusion(%p, %q, %i), kind=kLoop, calls=%first", "%r = f32[1,100]{1,0} add(%s, %t)"),
     800 + 4 + 400),  # fusions in a fusion, each with a row of its own
])  # fmt: skip
def test_what_a_fusion_reads(lines, moved):
    shape = lines[-1].split()[2]
    before = computation("first", P, Q, I, SLICE) + computation("f", *lines)
    text = entry(f"%r = {shape} fusion(%x, %y, %i), kind=kLoop, calls=%f", before=before)
    assert count(text) == Traffic(moved, 1)


@pytest.mark.parametrize(("lines", "shape", "moved"), [
    ((P, Q, I, UPDATE), "f32[10,100]{1,0}", 400 + 4 + 400),
    ((P, Q, I, UPDATE, "%r = f32[1000]{0} bitcast(%u)"), "f32[1000]{0}", 400 + 4 + 400),
    ((P, Q, I, SLICE, UPDATE.replace("%q", "%s")), "f32[10,100]{1,0}", 400 + 4 + 400),  # reads what it overwrites
    ((P, Q, I, UPDATE, UPDATE.replace("%p", "%u").replace("%u =", "%v =")), "f32[10,100]{1,0}", 400 + 4 + 800),
    ((P, Q, I, UPDATE, SLICE, "%r = (f32[10,100]{1,0}, f32[1,100]{1,0}) tuple(%u, %s)"),
     "(f32[10,100]{1,0}, f32[1,100]{1,0})", 400 + 400 + 4 + 400 + 400),
    ((P, Q, I, "%n = f32[10,100]{1,0} negate(%p)", UPDATE.replace("%p", "%n")), "f32[10,100]{1,0}",
     4000 + 400 + 4 + 4000),  # of something new: all of it is written
    ((P, Q, I, UPDATE, "%r = f32[10,100]{1,0} negate(%u)"), "f32[10,100]{1,0}", 4000 + 400 + 4 + 4000),
])  # fmt: skip
def test_an_update_in_place_counts_what_it_writes(lines, shape, moved):
    text = entry(f"%r = {shape} fusion(%x, %y, %i), kind=kLoop, calls=%f", before=computation("f", *lines))
    assert count(text) == Traffic(moved, 1)


@pytest.mark.parametrize(("combined", "moved"), [("%b", 400 + 4 + 400), ("%a", 400 + 4 + 800), ("%c", 400 + 4 + 800)])
def test_a_scatter_that_combines_reads_what_was_there(combined, moved):
    lines = ["%a = f32[] parameter(0)", "%b = f32[] parameter(1)", "%c = f32[] add(%a, %b)"]
    lines = [line for line in lines if combined not in line] + [line for line in lines if combined in line][:1]
    text = entry("%r = f32[10,100]{1,0} scatter(%x, %i, %y), to_apply=%new", before=computation("new", *lines))
    assert count(text) == Traffic(moved, 1)


def loop(body, *, condition=(), attributes="", inside=""):
    """Over (f32[10,100], s32[])."""
    carry = "(f32[10,100]{1,0}, s32[])"
    get = f"%c = {carry} parameter(0)", "%p = f32[10,100]{1,0} get-tuple-element(%c), index=0"
    get += ("%i = s32[] get-tuple-element(%c), index=1",)
    before = inside + computation("body", *get, *body, f"%t = {carry} tuple(%u, %i)")
    before += computation("condition", *get, *condition, "%l = pred[] compare(%i, %i), direction=NE")
    lines = f"%t = {carry} tuple(%x, %i)", f"%w = {carry} while(%t), condition=%condition, body=%body{attributes}"
    return entry(*lines, "%r = f32[10,100]{1,0} get-tuple-element(%w), index=0", before=before)


WRITE = "%v = f32[1,100]{1,0} constant({...})", UPDATE.replace("%q", "%v")
KNOWN = ', backend_config={"known_trip_count":{"n":"7"},"known_init_step":{"init":"0","step":"1"}}'


def test_a_loop_counts_its_turns():
    """An update of one row in each of seven turns; the condition is not computed where their number is known."""
    assert count(loop(WRITE, attributes=KNOWN), turns={"": 100}) == Traffic(7 * 808, 7)


@pytest.mark.parametrize(("scope", "turns"), [("fill", 3), ("steps", 32), ("layers", 5)])
def test_a_loop_of_unknown_length_turns_as_often_as_its_scope_says(scope, turns):
    """The condition reads two numbers, and writes a boolean."""
    text = loop(WRITE, attributes=f', metadata={{op_name="jit(f)/{scope}/while"}}')
    assert count(text, turns={"": 5, "fill": 3, "steps": 32}) == Traffic(turns * (808 + 9), turns * 2)


def test_a_bound_in_the_condition_is_read():
    text = loop(WRITE).replace("%l = pred[] compare(%i, %i), direction=NE",
                               "%l = pred[] compare(%i, %n), direction=LT")  # fmt: skip
    text = text.replace("  ROOT %l", "  %n = s32[] constant(4)\n  ROOT %l")
    assert count(text, turns={"": 100}) == Traffic(4 * (808 + 9), 8)


def test_a_turn_of_the_loop_in_a_scope():
    text = loop(WRITE, attributes=', metadata={op_name="jit(f)/while/body/cond/branch_1_fun/steps/while"}')
    counter = TrafficCounter(text, turns={"": 9, "steps": 1000})
    assert counter.turn("steps") == Traffic(808 + 9, 2)
    assert counter.turn("fill") is None
    inner = TrafficCounter(text.replace("steps/while", "steps/while/body/part/while"), turns={"part": 3, "steps": 5})
    assert inner.turn("steps") is None and inner.turn("part") == Traffic(808 + 9, 2)


@pytest.mark.parametrize("order", [("small", "large"), ("large", "small"), ("large", "middle")])
def test_of_several_loops_in_a_scope_the_one_that_moves_most_counts(order):
    bodies = BRANCHES + computation("condition", "%p = f32[10,100]{1,0} parameter(0)", "%l = pred[] constant(true)")
    loops = [
        f"%{name} = f32[10,100]{{1,0}} while(%x), condition=%condition, body=%{name}, "
        f'metadata={{op_name="jit(f)/steps/while"}}' for name in order
    ]  # fmt: skip
    assert TrafficCounter(entry(*loops, before=bodies), turns={}).turn("steps") == Traffic(8000, 1)


def test_a_part_that_does_not_run_does_not_count():
    unknown = '%u = f32[10,100]{1,0} custom-call(%p), custom_call_target="nobody_knows"'
    text = loop([unknown], attributes=', metadata={op_name="jit(f)/steps/while"}')
    assert count(text, turns={"steps": 0}) == Traffic()
    assert count(text, turns={"steps": 1}).bytes is None


@pytest.mark.parametrize(("branches", "moved"), [
    ({}, 8000), ({"": 0}, 800), ({"": -1}, 3200), ({"chunk": 0}, 800), ({"chunk": 2, "": 0}, 3200), ({"fill": 0}, 8000)
])  # fmt: skip
def test_of_branches_the_named_one_counts_or_the_largest(branches, moved):
    names = "branch_computations={%small, %large, %middle}"
    line = f'%r = f32[10,100]{{1,0}} conditional(%i, %x, %x, %x), {names}, metadata={{op_name="jit(f)/chunk/cond"}}'
    assert count(entry(line, before=BRANCHES), branches=branches) == Traffic(moved, 1)
    two = line.replace(names, "true_computation=%middle, false_computation=%small")
    assert count(entry(two, before=BRANCHES)) == Traffic(3200, 1)


PRODUCT = '%r = (f32[10,10]{1,0}, s8[4096]{0}) custom-call(%x, %y), custom_call_target="TARGET"'


@pytest.mark.parametrize("target", ["__cublas$gemm", "__cublas$lt$matmul", "__cudnn$fmhaSoftmax", "tpu_custom_call"])
def test_a_call_counts_operands_results_and_workspace(target):
    assert count(entry(PRODUCT.replace("TARGET", target))) == Traffic(4000 + 400 + 400 + 4096, 1)


@pytest.mark.parametrize("target", ["nobody_knows", "cublas", "my__cublas$gemm"])
def test_an_unknown_call_is_listed_and_its_program_has_no_figure(target):
    """In a fusion, too, and beside what is known."""
    call = PRODUCT.replace("TARGET", target)
    moved = count(entry("%c = f32[10,100]{1,0} copy(%x)", call))
    assert moved.bytes is None and moved.unknown == {target} and moved.kernels == 2
    fused = computation("f", P, f'%r = f32[10,100]{{1,0}} custom-call(%p), custom_call_target="{target}"')
    moved = count(entry("%r = f32[10,100]{1,0} fusion(%x), kind=kCustom, calls=%f", before=fused))
    assert moved.bytes is None and moved.unknown == {target}


def test_a_kernel_with_a_grid_counts_what_its_caller_says():
    """Sixteen heads share two of keys and values: with a block a head, each is fetched eight times."""
    call = PRODUCT.replace("TARGET", "__gpu$xla.gpu.triton") + ', backend_config={name = "decode_heads"}'
    kernels = {"decode_heads": lambda operands, results: 8 * operands[0] + operands[1] + results[0]}
    assert count(entry(call), kernels=kernels) == Traffic(8 * 4000 + 400 + 400, 1)
    assert count(entry(call), kernels={"another": lambda operands, results: 0}).bytes == 4000 + 400 + 400 + 4096


TPU = """HloModule jit_f, is_scheduled=true

%fused (p.0: bf16[4,16,128], p.1: s32[]) -> bf16[16,128] {
  %p.0 = bf16[4,16,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = s32[]{:T(128)} parameter(1)
  %s = bf16[1,16,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p.0, %p.1, %p.1, %p.1), dynamic_slice_sizes={1,16,128}
  ROOT %r.1 = bf16[16,128]{1,0:T(8,128)(2,1)S(1)} bitcast(%s)
}

ENTRY %main (w: bf16[4,16,128], h: bf16[8,4], i: s32[]) -> bf16[16,128] {
  %w = bf16[4,16,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %h = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(1)
  %i = s32[]{:T(128)S(6)} parameter(2)
  %a = bf16[16,128]{1,0:T(8,128)(2,1)S(1)} fusion(%w, %i), kind=kLoop, calls=%fused
  %b = bf16[16,128]{1,0:T(8,128)(2,1)S(1)} copy(%a)
  %c.1 = (bf16[8,4]{1,0:T(8,128)(2,1)S(1)}, bf16[8,4]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%h)
  %c.2 = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} copy-done(%c.1)
  %s.1 = ((bf16[4,16,128]{2,1,0:T(8,128)(2,1)}), bf16[2,16,128]{2,1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%w)
  %s.2 = bf16[2,16,128]{2,1,0:T(8,128)(2,1)S(1)} slice-done(%s.1)
  %n = bf16[8,4]{1,0:T(8,128)(2,1)} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %d = bf16[16,128]{1,0:T(8,128)(2,1)} copy(%b)
}
"""


def test_on_a_tpu_its_own_fast_memory_is_free_and_tiles_are_whole():
    """A layer's slice into fast memory, a copy there, a prefetch of [8, 4] that lies as [8, 128], a prefetch of half of
    the layers, and a copy out."""
    assert count(TPU) == Traffic(4096 + 0 + 2048 + 8192 + 4096, 5)


@pytest.mark.parametrize(("shape", "size"), [
    ("f32[3,5]{1,0}", 60),
    ("f32[3,5]{1,0:T(8,128)}", 8 * 128 * 4),
    ("bf16[100,7]{0,1:T(8,128)(2,1)}", 8 * 128 * 2),  # the first axis runs fastest
    ("pred[64]{0:T(512)(128)(4,1)}", 512),
    ("s4[16]{0}", 8),
    ("f8e4m3fn[16,2]{1,0}", 32),
    ("f32[8]{0:S(5)}", 0),  # the host's
    ("f32[8]{0:S(1)}", 32),  # of a GPU, memory for exchanges
    ("(f32[2], (s32[], c64[3]))", 8 + 4 + 24),
    ("token[]", 0),
])  # fmt: skip
def test_sizes(shape, size):
    assert sum(array.bytes for array in arrays(shape)) == size


def test_an_exchange_that_is_started_and_ended_counts_once():
    """What arrives of an all-gather has ten times the size of what leaves."""
    started = "%s = (f32[1,100]{1,0}, f32[10,100]{1,0}) all-gather-start(%y), replica_groups=[1,10]<=[10]"
    done = "%r = f32[10,100]{1,0} all-gather-done(%s)"
    assert count(entry(started, done)) == Traffic(400 + 4000, 1)
    started = "%s = f32[1,100]{1,0} all-reduce-start(%y), replica_groups=[1,10]<=[10], to_apply=%add"
    assert count(entry(started, done.replace("all-gather", "all-reduce"))) == Traffic(400 + 400, 1)


def compiled(fn, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(fn, donate_argnums=0).lower(*arguments).compile().as_text()


def test_a_compiled_program_of_one_kernel():
    moved = count(compiled(lambda x, y: jnp.sin(x) * y, (1000, 64), (1000, 64)))
    assert moved == Traffic(3 * 256_000, 1)


def test_a_compiled_loop_writes_rows_in_place():
    """Each turn writes a row of 64 KiB to an array of 100 rows: with numbers and small things, less than three rows a
    turn, where 100 of the whole array would be 10,000 rows."""

    def fill(x, row):
        write = lambda i, x: jax.lax.dynamic_update_slice(x, jnp.sin(row + i)[None], (i, 0))  # noqa: E731
        return jax.lax.fori_loop(0, 100, write, x)

    text, row = compiled(fill, (100, 16384), (16384,)), 65536
    moved = count(text)
    assert moved.unknown == frozenset() and 2 * 100 * row <= moved.bytes < 3 * 100 * row
