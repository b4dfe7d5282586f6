"""Collectives in HLO text: who takes part, how many bytes, what begins and ends each."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from collective_matmul.inspect.collectives import (
    Collective,
    Copy,
    collective,
    copy,
    start_of,
    unmatched,
    wire_bytes,
)
from collective_matmul.inspect.groups import groups, pairs
from collective_matmul.inspect.hlo import parse


def entry(text, before="", partitions=8):
    """A module of some partitions whose entry has these lines."""
    head = f"HloModule test, is_scheduled=true, num_partitions={partitions}"
    return parse(f"{head}\n\n{before}\nENTRY %main (p: f32[]) -> f32[] {{\n{text}\n}}\n")


def found(module):
    """{name: what it runs} of the collectives of the entry."""
    every = {each.name: collective(module, each) for each in module.main.instructions}
    return {name: value for name, value in every.items() if value is not None}


# ---- who takes part ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{0,2},{1,3}}", ((0, 2), (1, 3))),
        ("{}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("{{0,1,2,3,4,5,6,7}}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['data'=2,'tensor'=4] {'tensor'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("mesh['data'=2,'fsdp'=1,'tensor'=4] {'data'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['data'=2,'tensor'=4] {'data','tensor'}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("mesh['t'=8] {'t':(1)2}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['t'=8] {'t':(4)2}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        (
            "mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_0'}",
            ((0, 1, 2, 3), (4, 5, 6, 7)),
        ),
        ("mesh['x'=2,'y'=2], device_ids=(0,1,3,2) {'y'}", ((0, 1), (3, 2))),
    ],
)
def test_groups_in_every_notation(text, expected):
    assert groups(text, 8) == expected


def test_groups_in_no_notation_are_refused():
    with pytest.raises(ValueError, match=r"replica_groups=<2 x 4> is in no notation"):
        groups("<2 x 4>", 8)


def test_pairs():
    assert pairs("{{0,1},{1,2},{2,0}}") == ((0, 1), (1, 2), (2, 0))
    assert pairs("{}") == ()


# ---- how many bytes ----


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("all-gather", 3 * 1200),
        ("reduce-scatter", 900),
        ("all-reduce", 1800),
        ("all-to-all", 900),
        ("collective-broadcast", 1200),
    ],
)
def test_wire_bytes_of_four_devices(kind, expected):
    assert wire_bytes(Collective(kind, 1200, groups=((0, 1, 2, 3),))) == expected
    assert wire_bytes(Collective(kind, 1200, groups=((0,), (1,)))) == 0


def test_wire_bytes_of_a_permute():
    assert wire_bytes(Collective("collective-permute", 64, pairs=((0, 1), (1, 0)))) == 64
    assert wire_bytes(Collective("collective-permute", 64, pairs=((0, 0), (1, 1)))) == 0


# ---- what the text says ----


def test_synchronous_collectives_and_tuples():
    module = entry("""
  %a = bf16[8,16]{1,0} parameter(0)
  %b = f32[3]{0} parameter(1)
  %g = bf16[32,16]{1,0} all-gather(%a), replica_groups=[2,4]<=[8], dimensions={0}
  %r = (bf16[8,16]{1,0}, f32[3]{0}) all-reduce(%a, %b), replica_groups={}, to_apply=%sum
  %s = bf16[2,16]{1,0} reduce-scatter(%a), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  ROOT %m = bf16[8,16]{1,0} collective-permute(%a), source_target_pairs={{0,1},{1,0}}""")
    two = ((0, 1, 2, 3), (4, 5, 6, 7))
    assert found(module) == {
        "g": Collective("all-gather", 256, groups=two),
        "r": Collective("all-reduce", 268, groups=(tuple(range(8)),)),
        "s": Collective("reduce-scatter", 256, groups=two),
        "m": Collective("collective-permute", 256, pairs=((0, 1), (1, 0))),
    }
    assert start_of(module, module.main) == {}


def test_the_two_halves_of_every_kind():
    """As XLA writes them for GPUs, with the computation of an async-start and without."""
    module = entry(
        """
  %a = bf16[8,16]{1,0} parameter(0)
  %gs = (bf16[8,16]{1,0}, bf16[32,16]{1,0}) all-gather-start(%a), replica_groups=[2,4]<=[8]
  %rs = ((bf16[8,16]{1,0}), bf16[2,16]{1,0}) async-start(%a), calls=%wrapped
  %ps = (bf16[8,16]{1,0}, bf16[8,16]{1,0}) collective-permute-start(%a), source_target_pairs={{0,1}}
  %ru = ((bf16[8,16]{1,0}), bf16[2,16]{1,0}) async-update(%rs)
  %fs = ((bf16[8,16]{1,0}), bf16[4,4]{1,0}) reduce-scatter-start(%a), replica_groups=[4,2]<=[8]
  %ss = (bf16[8,16]{1,0}, u32[], token[]) send(%a, %a), channel_id=1, \
frontend_attributes={_xla_send_recv_source_target_pairs={{0,1},{1,2}}}
  %gd = bf16[32,16]{1,0} all-gather-done(%gs)
  %rd = bf16[2,16]{1,0} async-done(%ru)
  %fd = bf16[4,4]{1,0} reduce-scatter-done(%fs)
  %sd = token[] send-done(%ss)
  ROOT %pd = bf16[8,16]{1,0} collective-permute-done(%ps)""",
        before="""%wrapped (x: bf16[8,16]) -> bf16[2,16] {
  %x = bf16[8,16]{1,0} parameter(0)
  ROOT %s = bf16[2,16]{1,0} reduce-scatter(%x), replica_groups=[2,4]<=[8], dimensions={0}
}""",
    )
    two = ((0, 1, 2, 3), (4, 5, 6, 7))
    every = found(module)
    assert all(each.asynchronous for each in every.values())
    assert {name: (each.kind, each.groups or each.pairs) for name, each in every.items()} == {
        "gs": ("all-gather", two),
        "rs": ("reduce-scatter", two),
        "ps": ("collective-permute", ((0, 1),)),
        "fs": ("reduce-scatter", ((0, 1), (2, 3), (4, 5), (6, 7))),
        "ss": ("send-recv", ((0, 1), (1, 2))),
    }
    begun = {"gd": "gs", "rd": "rs", "fd": "fs", "sd": "ss", "pd": "ps"}
    assert start_of(module, module.main) == begun
    assert unmatched(module, module.main) == ()


def test_an_end_whose_beginning_is_elsewhere_is_listed():
    module = entry("""
  %a = (f32[4], f32[4]) parameter(0)
  %x = f32[4] parameter(1)
  %s = (f32[4], f32[4], u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}
  ROOT %d = f32[4] collective-permute-done(%a)""")
    assert start_of(module, module.main) == {}
    assert unmatched(module, module.main) == ("d", "s")


def test_another_core_gets_its_data_later():
    """The collective stands where the data is handed over, not where the core is woken."""
    module = entry(
        """
  %a = bf16[8,16]{1,0} parameter(0)
  %wake = ((), (), s32[1]{0}) custom-call-start(), \
custom_call_target="offloaded", called_computations={%inner}
  %give = ((bf16[8,16]{1,0}), bf16[32,16]{1,0}, s32[1]{0}) custom-call-update(%wake, %a)
  ROOT %done = bf16[32,16]{1,0} custom-call-done(%give)""",
        before="""%inner (x: bf16[8,16]) -> bf16[32,16] {
  %x = bf16[8,16]{1,0} parameter(0)
  ROOT %g = bf16[32,16]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
}, execution_thread="sparsecore"
""",
    )
    assert list(found(module)) == ["give"]
    assert found(module)["give"].shard_bytes == 256
    assert start_of(module, module.main) == {"done": "give"}


FUSIONS = """%start (p: f32[4]) -> (f32[4], f32[16], u32[]) {
  %p = f32[4] parameter(0)
  %g0 = f32[16] all-gather(%p), replica_groups=[2,4]<=[8], \
backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}
  ROOT %c0 = (f32[4], f32[16], u32[]) custom-call(%g0), custom_call_target="AsyncCollectiveStart"
}

%step (q: f32[4], r: f32[16], f: u32[], w: f32[8,8]) -> (f32[8,8], f32[4], f32[16], u32[]) {
  %q = f32[4] parameter(0)
  %r = f32[16] parameter(1)
  %f = u32[] parameter(2)
  %w = f32[8,8] parameter(3)
  %n = f32[8,8] dot(%w, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %g1 = f32[16] all-gather(%q), replica_groups=[2,4]<=[8], \
backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
  ROOT %t1 = (f32[8,8], f32[4], f32[16], u32[]) tuple(%n, %q, %g1, %f)
}

%end (u: f32[4], v: f32[16], h: u32[]) -> f32[16] {
  %u = f32[4] parameter(0)
  %v = f32[16] parameter(1)
  %h = u32[] parameter(2)
  %g2 = f32[16] all-gather(%u), replica_groups=[2,4]<=[8], \
backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
  ROOT %c2 = f32[16] custom-call(%u, %v, %g2, %h), custom_call_target="AsyncCollectiveDone"
}
"""


def test_asynchronous_fusions_of_the_tpu_compiler_are_one_collective():
    module = entry(
        """
  %a = f32[4] parameter(0)
  %b = f32[8,8] parameter(1)
  %s = (f32[4], f32[16], u32[]) fusion(%a), kind=kCustom, calls=%start
  %s0 = f32[4] get-tuple-element(%s), index=0
  %s1 = f32[16] get-tuple-element(%s), index=1
  %s2 = u32[] get-tuple-element(%s), index=2
  %k = (f32[8,8], f32[4], f32[16], u32[]) fusion(%s0, %s1, %s2, %b), kind=kCustom, calls=%step
  %k1 = f32[4] get-tuple-element(%k), index=1
  %k2 = f32[16] get-tuple-element(%k), index=2
  %k3 = u32[] get-tuple-element(%k), index=3
  ROOT %e = f32[16] fusion(%k1, %k2, %k3), kind=kCustom, calls=%end""",
        before=FUSIONS,
    )
    whole = Collective("all-gather", 16, groups=((0, 1, 2, 3), (4, 5, 6, 7)), asynchronous=True)
    assert found(module) == {"s": whole}
    assert start_of(module, module.main) == {"e": "s"}
    assert unmatched(module, module.main) == ()


def test_an_all_reduce_of_which_a_slice_is_kept_is_a_reduce_scatter():
    module = entry(
        """
  %a = bf16[16,4] parameter(0)
  ROOT %f = bf16[4,4] fusion(%a), kind=kCustom, calls=%all-reduce-scatter""",
        before="""%all-reduce-scatter (x: bf16[16,4]) -> bf16[4,4] {
  %x = bf16[16,4] parameter(0)
  %r = bf16[16,4] all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%sum
  %z = u32[] constant(0)
  ROOT %d = bf16[4,4] dynamic-slice(%r, %z, %z), dynamic_slice_sizes={4,4}
}""",
        partitions=4,
    )
    assert found(module) == {"f": Collective("reduce-scatter", 128, groups=((0, 1, 2, 3),))}


def test_copies_between_memories():
    module = entry("""
  %a = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %c = (bf16[8,16]{1,0:S(1)}, bf16[8,16]{1,0}, u32[]{:S(2)}) copy-start(%a)
  %s = ((bf16[8,16]{1,0}), bf16[2,16]{1,0:S(3)}, s32[]{:S(2)}) slice-start(%a), \
slice={[0:2], [0:16]}
  %cd = bf16[8,16]{1,0:S(1)} copy-done(%c)
  %sd = bf16[2,16]{1,0:S(3)} slice-done(%s)
  ROOT %back = (bf16[8,16]{1,0}, bf16[8,16]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%cd)""")
    each = module.main.by_name
    assert copy(module, each["c"]) == Copy(256, 0, 1)
    assert copy(module, each["s"]) == Copy(64, 0, 3)
    assert copy(module, each["back"]) == Copy(256, 1, 0)
    assert copy(module, each["cd"]) is None
    assert start_of(module, module.main) == {"cd": "c", "sd": "s"}
    assert unmatched(module, module.main) == ("back",)


# ---- compiled programs ----


def compiled(devices):
    """{name: text} of one collective each, over tensor of a mesh (data 2, tensor t)."""
    t = len(devices) // 2
    mesh = Mesh(
        np.array(devices).reshape(2, t), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2
    )
    x = jax.ShapeDtypeStruct(
        (1024, 512), jnp.float32, sharding=NamedSharding(mesh, P(("data", "tensor")))
    )
    ring = [(i, (i + 1) % t) for i in range(t)]
    rows = P(("data", "tensor"))
    bodies = {
        "all-gather": (lambda x: lax.all_gather(x, "tensor", tiled=True), rows),
        "reduce-scatter": (lambda x: lax.psum_scatter(x, "tensor", tiled=True), rows),
        "all-reduce": (lambda x: lax.psum(x, "tensor"), P("data")),
        "all-to-all": (lambda x: lax.all_to_all(x, "tensor", 1, 0, tiled=True), rows),
        "collective-permute": (lambda x: lax.ppermute(x, "tensor", ring), rows),
    }
    for name, (body, out) in bodies.items():
        function = jax.shard_map(body, mesh=mesh, in_specs=rows, out_specs=out)
        yield name, jax.jit(function).lower(x).compile().as_text()


def slices(name):
    """The devices of a TPU slice, for the compiler alone."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: no TPU program was compiled")
    options = {"chip_config_name": "megacore"} if name.startswith(("v4", "v5p")) else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices


OFFLOADED = pytest.param(
    "tpu7x:2x2x1",
    marks=pytest.mark.skipif(
        jax.__version_info__ < (0, 12),
        reason="this jaxlib fails to print the collectives that tpu7x runs on another core",
    ),
)


@pytest.mark.parametrize("where", ["cpu", "v5e:2x4", "v4:2x2x1", OFFLOADED])
def test_bytes_of_compiled_collectives_are_the_closed_form(where):
    """Every device holds S bytes; see `wire_bytes`."""
    devices = jax.devices()[:8] if where == "cpu" else slices(where)
    count, t = len(devices), len(devices) // 2
    shard = 1024 * 512 * 4 // count
    expected = {
        "all-gather": (t - 1) * shard,
        "reduce-scatter": (t - 1) * shard // t,
        "all-reduce": 2 * (t - 1) * shard // t,
        "all-to-all": (t - 1) * shard // t,
        "collective-permute": shard,
    }
    rows = tuple(tuple(range(d * t, (d + 1) * t)) for d in range(2))
    ring = {(d * t + i, d * t + (i + 1) % t) for d in range(2) for i in range(t)}
    for name, text in compiled(devices):
        module = parse(text)
        (only,) = found(module).values()
        assert (only.kind, wire_bytes(only)) == (name, expected[name])
        assert only.groups == rows if only.groups else set(only.pairs) == ring
        assert unmatched(module, module.main) == ()
