"""Reading HLO text: instructions, trips of loops, and FLOPs held against the jaxpr's."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bench import flops as jaxpr_flops
from collective_matmul.inspect.dots import flops
from collective_matmul.inspect.hlo import Array, arrays, parse
from collective_matmul.inspect.kernels import cost
from collective_matmul.inspect.products import convolution
from collective_matmul.inspect.sources import origin
from collective_matmul.inspect.total import total_flops
from collective_matmul.inspect.trips import trips


def entry(*lines, head="HloModule test, is_scheduled=true", before=""):
    """A module whose entry has these instructions."""
    body = "\n".join(f"  {line}" for line in lines)
    return parse(f"{head}\n\n{before}\nENTRY %main (p: f32[]) -> f32[] {{\n{body}\n}}\n")


def only(module, opcode):
    """The one instruction of the entry with an opcode."""
    (found,) = (each for each in module.main.instructions if each.opcode == opcode)
    return found


# ---- the text ----


def test_arrays_with_layouts_tiles_and_memory_spaces():
    text = (
        "((bf16[8,256]{1,0:T(8,128)(2,1)}), /*index=1*/f32[]{:T(128)S(6)}, u32[2]{0:S(2)}, s4[3])"
    )
    assert arrays(text) == (
        Array("bf16", (8, 256)),
        Array("f32", (), 6),
        Array("u32", (2,), 2),
        Array("s4", (3,)),
    )
    assert [array.bytes for array in arrays(text)] == [4096, 4, 8, 2]
    widths = {"pred": 1, "f8e4m3b11fnuz": 1, "c64": 8, "token": 0, "f4e2m1fn": 1, "s64": 8}
    assert {dtype: Array(dtype, ()).bytes for dtype in widths} == widths
    assert arrays("f32[<=8,2]") == (Array("f32", (8, 2)),)


def test_an_instruction_with_comments_strings_and_nested_braces():
    module = entry(
        "%a = f32[8]{0} parameter(0)",
        '%c = s32[2]{0} constant({1, 2}), metadata={op_name="jit(f)/a(\\"b\\"), c={1}" line=3}',
        "%t = (f32[8]{0}, /*index=1*/s32[2]{0}) tuple(%a, /*index=1*/%c)",
        "ROOT %f = f32[8]{0:T(8)S(1)} fusion(f32[8]{0} %a, %t), kind=kLoop, calls=%inner, "
        'backend_config={"window":{"estimated_cycles":"1930","x":["a{,","}"]},"y":1}, channel_id=7',
        before="%inner (x: f32[8]) -> f32[8] {\n  ROOT %x = f32[8]{0} parameter(0)\n}\n",
    )
    fusion = module.main.root
    assert (fusion.name, fusion.opcode, fusion.operands) == ("f", "fusion", ("a", "t"))
    assert list(fusion.attributes) == ["kind", "calls", "backend_config", "channel_id"]
    assert fusion.attributes["channel_id"] == "7"
    assert (fusion.called, fusion.cycles, fusion.result[0].memory) == (("inner",), 1930, 1)
    constant, packed = module.main.instructions[1:3]
    assert (constant.argument, constant.cycles) == ("{1, 2}", None)
    assert constant.op_name == r"jit(f)/a(\"b\"), c={1}"
    assert (packed.operands, packed.bytes) == (("a", "c"), 40)
    assert module.callees(fusion) == (module.computations["inner"],)
    assert module.callers["inner"] == (fusion,)


def test_what_the_head_says_and_what_is_no_hlo():
    module = entry(
        "ROOT %p = f32[] parameter(0)", head="HloModule jit_f, num_partitions=8, replica_count=2"
    )
    assert (module.name, module.scheduled, module.partitions) == ("jit_f", False, 8)
    assert (module.replicas, module.mesh) == (2, {})
    with pytest.raises(ValueError, match="begins with 'module @jit_f'"):
        parse("module @jit_f")
    with pytest.raises(ValueError, match="none of the 0 computations"):
        parse("HloModule empty\n")


def test_a_users_mesh_is_read_and_one_that_the_compiler_made_up_is_not():
    line = "ROOT %g = f32[4] all-gather(%p), replica_groups=mesh[{}] {{'{}'}}, dimensions={{0}}"
    shard = "%p = f32[1] parameter(0)"
    made_up = entry(shard, line.format("'axis_0'=2,'axis_1'=4", "axis_1"))
    users = entry(shard, line.format("'data'=2,'tensor'=4", "tensor"))
    assert (made_up.mesh, users.mesh) == ({}, {"data": 2, "tensor": 4})


def test_a_value_is_followed_through_copies_tuples_and_fusions():
    module = entry(
        "%p = f32[8] parameter(0)",
        "%n = f32[8] negate(%p)",
        "%b = f32[2,4] bitcast(%n)",
        "%f = (f32[2,4], f32[2,4]) fusion(%b), kind=kLoop, calls=%inner",
        "ROOT %g = f32[2,4] get-tuple-element(%f), index=1",
        before="%inner (x: f32[2,4]) -> (f32[2,4], f32[2,4]) {\n  %x = f32[2,4] parameter(0)\n"
        "  %e = f32[2,4] exponential(%x)\n  ROOT %t = (f32[2,4], f32[2,4]) tuple(%e, %x)\n}\n",
    )
    assert origin(module, module.main.root) is module.main.by_name["n"]


# ---- trips ----

LOOP = """
%cond (c: (s32[], s32[])) -> pred[] {{
  %c = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %bound = s32[] get-tuple-element(%c), index=1
  %copy = s32[] copy(%i)
  ROOT %compare = pred[] compare({sides}), direction={direction}
}}

%body (b: (s32[], s32[])) -> (s32[], s32[]) {{
  %b = (s32[], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%b), index=0
  %same = s32[] get-tuple-element(%b), index=1
  %step = s32[] constant({step})
  %next = s32[] add(%j, %step)
  ROOT %out = (s32[], s32[]) tuple(%next, %same)
}}
"""


@pytest.mark.parametrize(
    ("direction", "start", "bound", "step"),
    [
        *(("LT", 0, 12, 1), ("LT", 1, 12, 3), ("LE", 0, 12, 3), ("NE", 0, 12, 4)),
        *(("GT", 12, 0, -5), ("GE", 12, 0, -4), ("LT", 5, 5, 1), ("LT", 9, 5, 1)),
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_trips_from_the_counter_itself(direction, start, bound, step, swapped):
    """Against counting; the bound is carried through the loop, and may stand on either side."""
    holds = {
        "LT": lambda i: i < bound,
        "LE": lambda i: i <= bound,
        "GT": lambda i: i > bound,
        "GE": lambda i: i >= bound,
        "NE": lambda i: i != bound,
    }[direction]
    runs, i = 0, start
    while holds(i):
        runs, i = runs + 1, i + step
    mirrored = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE", "NE": "NE"}[direction]
    sides = "%bound, %copy" if swapped else "%copy, %bound"
    written = mirrored if swapped else direction
    module = entry(
        f"%first = s32[] constant({start})",
        f"%last = s32[] constant({bound})",
        "%t = (s32[], s32[]) tuple(%first, %last)",
        "ROOT %w = (s32[], s32[]) while(%t), condition=%cond, body=%body",
        before=LOOP.format(sides=sides, direction=written, step=step),
    )
    assert trips(module, only(module, "while")) == runs


def test_trips_that_no_one_can_tell():
    lines = (
        "%first = s32[] parameter(0)",
        "%last = s32[] constant(9)",
        "%t = (s32[], s32[]) tuple(%first, %last)",
        "ROOT %w = (s32[], s32[]) while(%t), condition=%cond, body=%body",
    )
    text = functools.partial(LOOP.format, sides="%copy, %bound", direction="LT")
    depends_on_data = entry(*lines, before=text(step=1))
    zero = (lines[0].replace("parameter", "constant"), *lines[1:])
    never_ends = entry(*zero, before=text(step=-1))
    assert trips(depends_on_data, only(depends_on_data, "while")) is None
    assert trips(never_ends, only(never_ends, "while")) is None
    said = (*lines[:3], lines[3] + ', backend_config={"known_trip_count":{"n":"7"},"x":1}')
    assert trips(entry(*said, before=text(step=1)), only(entry(*said), "while")) == 7


# ---- FLOPs ----


def test_flops_of_a_batched_dot_and_of_complex_numbers():
    line = "ROOT %d = {0}[5,2,7] dot(%a, %b), lhs_batch_dims={{0}}, lhs_contracting_dims={{2}}, "
    line += "rhs_batch_dims={{0}}, rhs_contracting_dims={{1}}"
    operands = "%a = {0}[5,2,3] parameter(0)", "%b = {0}[5,3,7] parameter(1)"
    for dtype, each in {"bf16": 2, "c64": 8}.items():
        module = entry(*(text.format(dtype) for text in (*operands, line)))
        assert flops(module, module.main.root) == each * 5 * 2 * 3 * 7


@pytest.mark.parametrize(
    ("window", "labels", "lhs", "rhs", "out", "expected"),
    [
        # A product of 12 heads: each place of the result meets one tap of 12 over padding.
        ("{size=12 pad=11_11 rhs_reversal=1}", "0bf_0io->0bf", (1, 8, 64), (12, 64, 128),
         (12, 8, 128), 2 * 12 * 8 * 64 * 128),
        # The heads are contracted.
        ("{size=1x12}", "0b1f_1io0->0bf1", (8, 256, 12, 128), (12, 128, 6144, 1),
         (8, 256, 6144, 1), 2 * 8 * 256 * 12 * 128 * 6144),
        # Batch and heads are spatial, spread by dilation, and every place meets one element.
        ("{size=32x12 stride=31x11 lhs_dilate=32x12}", "0b1f_0o1i->01bf", (32, 256, 12, 128),
         (32, 256, 12, 128), (32, 12, 256, 256), 2 * 32 * 12 * 256 * 256 * 128),
        # An ordinary 3 x 3 convolution of 8 x 8: 22 of 24 taps in each direction lie inside.
        ("{size=3x3 pad=1_1x1_1}", "b01f_01io->b01f", (1, 8, 8, 4), (3, 3, 4, 5), (1, 8, 8, 5),
         2 * 22 * 22 * 4 * 5),
        ("{}", "bf_io->bf", (6, 4), (4, 5), (6, 5), 2 * 6 * 4 * 5),
    ],
)  # fmt: skip
def test_flops_of_a_convolution_count_what_meets_an_element(
    window, labels, lhs, rhs, out, expected
):
    shapes = (Array("bf16", shape) for shape in (lhs, rhs, out))
    assert convolution(window, labels, *shapes) == expected


def test_flops_of_custom_calls_that_say_them():
    operands = "%a = bf16[64,32] parameter(0)", "%b = bf16[32,16] parameter(1)"
    gemm = entry(
        *operands,
        "ROOT %g = (bf16[64,16]{1,0}, s8[4096]{0}) custom-call(%a, %b), "
        'custom_call_target="__cublas$gemm", '
        'backend_config={"gemm_backend_config":{"alpha_real":1,"dot_dimension_numbers":{'
        '"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}',
    )
    assert flops(gemm, gemm.main.root) == 2 * 64 * 32 * 16
    pallas = entry(
        *operands,
        'ROOT %k = bf16[64,16] custom-call(%a, %b), custom_call_target="tpu_custom_call", '
        'backend_config={"custom_call_config":{"body":"TUzv","cost_estimate":{"flops":"123",'
        '"transcendentals":"0","bytes_accessed":"456"}}}',
    )
    assert cost(pallas, pallas.main.root) == (123, 456)
    silent = entry(
        *operands,
        'ROOT %k = bf16[64,16] custom-call(%a, %b), custom_call_target="tpu_custom_call"',
    )
    assert cost(silent, silent.main.root) is None
    assert total_flops(silent).uncounted == {
        "custom-call tpu_custom_call without a declared cost": 1
    }


def test_an_instruction_over_several_lines_is_one():
    module = entry(
        "%a = bf16[64,32] parameter(0)",
        '%k = bf16[64,16] custom-call(%a), custom_call_target="tpu_custom_call", '
        'frontend_attributes={kernel_metadata={\n"mesh_axes":"[\\"x\\"]"\n}}, '
        'backend_config={"custom_call_config":{"cost_estimate":{"flops":"12","bytes_accessed":"3"}}}',
        "ROOT %n = bf16[64,16] negate(%k)",
    )
    assert [each.name for each in module.main.instructions] == ["a", "k", "n"]
    assert cost(module, module.main.by_name["k"]) == (12, 3)
    assert "kernel_metadata" in module.main.by_name["k"].attributes["frontend_attributes"]


def test_a_product_on_the_vector_unit_counts_once():
    name = 'metadata={op_name="jit(f)/dot_general"}'
    inner = f"""%inner (a: f32[8,64], b: f32[8,64]) -> f32[8] {{
  %a = f32[8,64] parameter(0)
  %b = f32[8,64] parameter(1)
  %zero = f32[] constant(0)
  %m = f32[8,64] multiply(%a, %b), {name}
  ROOT %r = f32[8] reduce(%m, %zero), dimensions={{1}}, to_apply=%sum, {name}
}}
%sum (x: f32[], y: f32[]) -> f32[] {{
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %s = f32[] add(%x, %y)
}}"""
    fused = "ROOT %f = f32[8] fusion(%p, %p), kind=kLoop, calls=%inner"
    module = entry("%p = f32[8,64] parameter(0)", fused, before=inner)
    assert total_flops(module).flops == 2 * 8 * 64
    outer = entry("%p = f32[8,64] parameter(0)", f"ROOT %m = f32[8,64] multiply(%p, %p), {name}")
    assert total_flops(outer).flops == 2 * 8 * 64
    plain = entry("%p = f32[8,64] parameter(0)", "ROOT %m = f32[8,64] multiply(%p, %p)")
    assert total_flops(plain).flops == 0


def test_a_product_that_two_fusions_repeat_is_told_from_two_products():
    """A clone is a repetition; the same product of other operands or of another name is none."""
    inner = """%{0} (a: f32[8,8], b: f32[8,8]) -> f32[8,8] {{
  %{0}.a = f32[8,8] parameter(0)
  %{0}.b = f32[8,8] parameter(1)
  %{0}.d = f32[8,8] dot(%{0}.a, %{0}.b), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}, \
metadata={{op_name="{1}"}}
  ROOT %{0}.r = f32[8,8] {2}(%{0}.d)
}}
"""
    module = entry(
        "%p = f32[8,8] parameter(0)",
        "%q = f32[8,8] parameter(1)",
        "%copy = f32[8,8] copy(%q)",
        "%x = f32[8,8] fusion(%p, %q), kind=kLoop, calls=%one",
        "%y = f32[8,8] fusion(%p, %copy), kind=kLoop, calls=%clone",
        "%z = f32[8,8] fusion(%q, %p), kind=kLoop, calls=%swapped",
        "ROOT %w = f32[8,8] fusion(%p, %q), kind=kLoop, calls=%named",
        before=inner.format("one", "f/dot", "negate")
        + inner.format("clone", "f/dot", "exponential")
        + inner.format("swapped", "f/dot", "negate")
        + inner.format("named", "f/rematted/dot", "negate"),
    )
    found = total_flops(module)
    assert (found.flops, found.repeated, found.distinct) == (4096, 1024, 3072)


# ---- whole programs against their jaxprs ----


def loss(params, x):
    """Two rematerialised layers in a scan, then the square."""

    @jax.checkpoint
    def layer(carry, weights):
        up, down = weights
        return carry + jax.nn.gelu(carry @ up) @ down, None

    y, _ = lax.scan(layer, x, params)
    return (y.astype(jnp.float32) ** 2).sum()


def attention(q, k, v):
    """Attention with a softmax in float32."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits).astype(v.dtype)
    return (jnp.einsum("bhqk,bkhd->bqhd", weights, v).astype(jnp.float32) ** 2).sum()


def programs(devices):
    """(name, function, its arguments) on a mesh of data 2 and tensor over the rest."""
    sizes = (2, len(devices) // 2)
    mesh = Mesh(
        np.array(devices).reshape(sizes), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2
    )

    def arg(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*spec)))

    def gathered(x, w):
        x = lax.all_gather(x, "tensor", tiled=True)
        return lax.psum_scatter(x @ w @ w.T, "tensor", tiled=True)

    def ring(x, w):
        total = x @ w
        for _ in range(3):
            x = lax.ppermute(x, "tensor", [(i, (i + 1) % sizes[1]) for i in range(sizes[1])])
            total = total + x @ w
        return total

    rows = P(("data", "tensor"))
    shards = functools.partial(jax.shard_map, mesh=mesh, in_specs=(rows, P(None, "tensor")))
    x, w = arg((512, 256), ("data", "tensor")), arg((256, 512), None, "tensor")
    params = arg((2, 256, 512), None, None, "tensor"), arg((2, 512, 256), None, "tensor")
    head = arg((4, 128, 8, 64), "data", None, "tensor")
    yield "gathered", shards(gathered, out_specs=rows), (x, w)
    yield "ring", shards(ring, out_specs=P("data", "tensor")), (x, w)
    yield "remat", jax.grad(loss), (params, arg((256, 256), "data"))
    yield "attention", jax.grad(attention, (0, 1, 2)), (head, head, head)
    yield "vector", lambda a, b: a @ b, (x, arg((256,)))


def slices(name):
    """The devices of a TPU slice, for the compiler alone."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: no TPU program was compiled")
    options = {"chip_config_name": "megacore"} if name.startswith(("v4", "v5p")) else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices


@pytest.mark.parametrize("where", ["cpu", "v5e:2x4", "v4:2x2x1", "v6e:2x4"])
def test_flops_of_compiled_programs_are_those_of_the_jaxpr(where):
    devices = jax.devices()[:8] if where == "cpu" else slices(where)
    for name, function, args in programs(devices):
        text = jax.jit(function).lower(*args).compile().as_text()
        found = total_flops(parse(text))
        counted = jaxpr_flops.count(function, *args)
        assert not found.uncounted
        assert found.distinct * len(devices) == pytest.approx(counted.flops, rel=0.005), name


def test_loops_in_loops_and_branches_of_a_compiled_program():
    """3 x 5 trips in a scan of scans, 7 of a fori_loop, a branch, and a loop that data ends."""

    def program(x, w, flag):
        def inner(carry, _):
            return jnp.tanh(carry @ w), None

        y, _ = lax.scan(lambda c, _: (lax.scan(inner, c, None, length=5)[0], None), x, length=3)
        y = lax.fori_loop(0, 7, lambda _, c: jnp.tanh(c @ w), y)
        y = lax.cond(flag, lambda: y @ w, lambda: y)
        return lax.while_loop(lambda c: c.sum() < 100, lambda c: c @ w, y)

    args = jnp.ones((8, 16)), jnp.ones((16, 16)), jnp.array(True)
    found = total_flops(parse(jax.jit(program).lower(*args).compile().as_text()))
    one = 2 * 8 * 16 * 16
    assert found.flops == (3 * 5 + 7 + 1) * one
    unknown = f"while of {one:,} FLOPs a trip, and its number of trips is unknown"
    assert found.uncounted == {unknown: 1}
