"""Small scheduled programs whose time can be worked out on paper: 1 MB is 1 ms, 1e6 cycles too."""

import dataclasses

import pytest

from collective_matmul import hardware
from collective_matmul.inspect.hlo import parse
from collective_matmul.inspect.network import Network
from collective_matmul.inspect.simulate import simulate

MS = 1e-3
ROUND = dataclasses.replace(
    hardware.chip("v4"),
    bf16=1e12,
    f32=1e12,
    hbm_bandwidth=1e9,
    link_bandwidth=1e9,
    permute_latency=0.0,
    hop_latency=0.0,
    clock=1e9,
)
MB = "f32[250000]{0}"  # a megabyte
FORTH = "source_target_pairs={{0,1},{1,2},{2,3},{3,0}}"
BACK = "source_target_pairs={{1,0},{2,1},{3,2},{0,3}}"
ALL = "replica_groups={{0,1,2,3}}, dimensions={0}, use_global_device_ids=true"

HEAD = "HloModule m, is_scheduled=true, num_partitions=4\n"
FUSED = f"""
%fused (a: f32[250000]) -> f32[250000] {{
  %a = {MB} parameter(0)
  ROOT %n = {MB} negate(%a)
}}
"""


def work(name, ms, operand="p"):
    config = f'backend_config={{"window_config":{{"estimated_cycles":"{round(ms * 1e6)}"}}}}'
    return f"%{name} = {MB} fusion(%{operand}), kind=kLoop, calls=%fused, {config}"


def start(name, pairs, operand="p"):
    return f"%{name} = ({MB}, {MB}) collective-permute-start(%{operand}), channel_id=1, {pairs}"


def done(name, of):
    return f"%{name} = {MB} collective-permute-done(%{of})"


def computation(head, *lines):
    return "\n".join([head + " {", *(f"  {line}" for line in lines), "}\n"])


def entry(*lines):
    body = (f"%p = {MB} parameter(0)", *lines, f"ROOT %end = ({MB}) tuple(%p)")
    return computation("ENTRY %main (p: f32[250000]) -> (f32[250000])", *body)


def run(*lines, others="", axes=None, chip=ROUND):
    module = parse(HEAD + FUSED + others + entry(*lines))
    return simulate(module, Network.without_coordinates(axes or {"t": 4}, chip))


def told(timeline):
    """{transfer: (exposed, hidden)} in ms."""
    return {
        x.instruction.name: (pytest.approx(x.exposed / MS), pytest.approx(x.hidden / MS))
        for x in timeline.transfers
    }


def test_compute_is_serial():
    timeline = run(work("a", 1), work("b", 2))
    assert timeline.seconds == pytest.approx(3 * MS)
    assert [(e.name, e.start, e.seconds) for e in timeline.events] == [
        ("a", 0, pytest.approx(MS)),
        ("b", pytest.approx(MS), pytest.approx(2 * MS)),
    ]


@pytest.mark.parametrize(
    ("ms", "exposed", "hidden"), [(0, 1, 0), (0.5, 0.5, 0.5), (1, 0, 1), (3, 0, 1)]
)
def test_a_transfer_hides_as_much_as_is_computed_beside_it(ms, exposed, hidden):
    timeline = run(start("s", FORTH), work("a", ms), done("d", "s"), work("b", 1))
    assert told(timeline) == {"s": (exposed, hidden)}
    assert timeline.seconds == pytest.approx((ms + exposed + 1) * MS)


def test_what_is_computed_after_the_done_hides_nothing():
    timeline = run(work("b", 5), start("s", FORTH), done("d", "s"), work("a", 5))
    assert told(timeline) == {"s": (1, 0)}


def test_two_transfers_on_one_link_share_it():
    timeline = run(
        start("s", FORTH), start("u", FORTH), work("a", 1), done("d", "s"), done("e", "u")
    )
    assert timeline.seconds == pytest.approx(2 * MS)
    # Both arrive at 2 ms; the device waits for the first, and counts that wait once.
    assert told(timeline) == {"s": (1, 1), "u": (0, 1)}


def test_two_transfers_in_opposite_directions_do_not():
    timeline = run(
        start("s", FORTH), start("u", BACK), work("a", 1), done("d", "s"), done("e", "u")
    )
    assert timeline.seconds == pytest.approx(1 * MS)
    assert told(timeline) == {"s": (0, 1), "u": (0, 1)}


def test_a_link_is_free_again_when_a_transfer_has_arrived():
    """Half of s passes alone, then both share: s has arrived after 1.5 ms, u after 2."""
    lines = [start("s", FORTH), work("a", 0.5), start("u", FORTH), work("b", 0.5)]
    timeline = run(*lines, done("d", "s"), done("e", "u"))
    assert told(timeline) == {"s": (0.5, 1), "u": (0.5, 0.5)}
    assert timeline.seconds == pytest.approx(2 * MS)


def test_a_collective_without_a_start_is_exposed():
    gather = f"%g = f32[1000000]{{0}} all-gather(%p), channel_id=1, {ALL}"
    timeline = run(work("a", 1), gather, work("b", 1))
    assert told(timeline) == {"g": (1.5, 0)}  # 3 shards, both ways round
    assert timeline.seconds == pytest.approx(3.5 * MS)
    assert not timeline.transfers[0].asynchronous


def test_latency_is_paid_before_the_first_byte():
    slow = dataclasses.replace(ROUND, permute_latency=MS, hop_latency=MS / 10)
    timeline = run(start("s", FORTH), work("a", 0.5), done("d", "s"), chip=slow)
    assert told(timeline) == {"s": (1.5, 0.5)}
    far = "source_target_pairs={{0,2},{1,3},{2,0},{3,1}}"
    timeline = run(start("s", far), done("d", "s"), chip=slow)  # two links, and half goes each way
    assert told(timeline) == {"s": (2.1, 0)}


LOOPS = (
    computation(
        "%inner (q: (s32[], f32[250000])) -> (s32[], f32[250000])",
        f"%q = (s32[], {MB}) parameter(0)",
        f"%x = {MB} get-tuple-element(%q), index=1",
        start("s", FORTH, "x"),
        work("a", 0.25, "x"),
        done("d", "s"),
        f"ROOT %r = (s32[], {MB}) tuple(%x, %d)",
    )
    + computation(
        "%outer (q: (s32[], f32[250000])) -> (s32[], f32[250000])",
        f"%q = (s32[], {MB}) parameter(0)",
        f"%x = {MB} get-tuple-element(%q), index=1",
        work("b", 1, "x"),
        f"%w = (s32[], {MB}) while(%q), condition=%cond, body=%inner, "
        'backend_config={"known_trip_count":{"n":"3"}}',
        f"ROOT %r = (s32[], {MB}) tuple(%x, %x)",
    )
    + computation(
        "%cond (q: (s32[], f32[250000])) -> pred[]",
        f"%q = (s32[], {MB}) parameter(0)",
        'ROOT %yes = pred[] custom-call(%q), custom_call_target="unknown"',
    )
)


def test_loops_run_as_often_as_they_do():
    loop = f"%w = (s32[], {MB}) while(%p), condition=%cond, body=%outer, "
    timeline = run(loop + 'backend_config={"known_trip_count":{"n":"48"}}', others=LOOPS)
    assert timeline.seconds == pytest.approx(48 * (1 + 3 * 1) * MS)
    assert told(timeline) == {"s": (144 * 0.75, 144 * 0.25)}
    assert timeline.transfers[0].count == 144
    assert {op.instruction.name: op.count for op in timeline.ops} == {"b": 48, "a": 144}
    [outer] = timeline.loops
    [inner] = outer.body.loops
    assert (outer.trips, inner.trips, inner.start) == (48, 3, pytest.approx(MS))
    assert len(inner.body.events) == 3  # once, however often it runs


def test_a_loop_whose_trips_cannot_be_told_is_counted_once_and_named():
    loop = f"%w = (s32[], {MB}) while(%p), condition=%cond, body=%inner"
    timeline = run(loop, others=LOOPS)
    assert timeline.seconds == pytest.approx(1 * MS)
    assert any("w: how often it runs cannot be told" in remark for remark in timeline.remarks)


def test_a_transfer_may_pass_beside_a_loop():
    loop = f"%w = (s32[], {MB}) while(%p), condition=%cond, body=%quick, "
    quick = computation(
        "%quick (q: (s32[], f32[250000])) -> (s32[], f32[250000])",
        f"%q = (s32[], {MB}) parameter(0)",
        f"%x = {MB} get-tuple-element(%q), index=1",
        work("a", 0.1, "x"),
        f"ROOT %r = (s32[], {MB}) tuple(%x, %a)",
    )
    loop += 'backend_config={"known_trip_count":{"n":"4"}}'
    timeline = run(start("s", FORTH), loop, done("d", "s"), others=LOOPS + quick)
    assert told(timeline) == {"s": (0.6, 0.4)}


def test_the_dearest_branch_counts():
    branches = "".join(
        computation(
            f"%branch{i} (y: f32[250000]) -> f32[250000]",
            f"%y = {MB} parameter(0)",
            work(f"a{i}", i, "y").replace(f"%a{i} =", f"ROOT %a{i} ="),
        )
        for i in (1, 2)
    )
    timeline = run(
        f"%c = {MB} conditional(%p, %p, %p), branch_computations={{%branch1, %branch2}}",
        others=branches,
    )
    assert timeline.seconds == pytest.approx(2 * MS)
    assert any("of its branches the dearest" in remark for remark in timeline.remarks)


def test_copies_to_on_chip_memory_share_the_memory():
    copies = [f"%c{i} = (f32[250000]{{0:S(1)}}, {MB}, u32[]) copy-start(%p)" for i in (1, 2)]
    dones = [f"%e{i} = f32[250000]{{0:S(1)}} copy-done(%c{i})" for i in (1, 2)]
    timeline = run(*copies, work("a", 1.5), *dones)
    assert timeline.seconds == pytest.approx(2 * MS)
    assert told(timeline) == {"c1": (0.5, 1.5), "c2": (0, 1.5)}


def test_without_cycles_the_longer_of_flops_and_bytes_counts():
    dot = "f32[1000,1000]{1,0} dot(%m, %m), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    timeline = run(
        "%m = f32[1000,1000]{1,0} parameter(1)",
        f"%x = {dot}",  # 2e9 FLOPs: 2 ms; 12 MB: 12 ms
        f"%n = {MB} negate(%p)",
    )
    assert [(op.cost.how, op.cost.flops) for op in timeline.ops] == [
        ("bytes", 2 * 10**9),
        ("bytes", 0),
    ]
    assert timeline.seconds == pytest.approx(14 * MS)
    fast = dataclasses.replace(ROUND, hbm_bandwidth=1e12)
    timeline = run("%m = f32[1000,1000]{1,0} parameter(1)", f"%x = {dot}", chip=fast)
    assert timeline.ops[0].cost.how == "FLOPs"
    assert timeline.seconds == pytest.approx(2 * MS)


def test_a_kernel_costs_what_it_declares_and_no_other_is_free():
    cost = '"cost_estimate":{"flops":"3000000000","transcendentals":"0","bytes_accessed":"1000000"}'
    config = f'backend_config={{"custom_call_config":{{"body":"abc",{cost}}}}}'
    timeline = run(
        f'%k = {MB} custom-call(%p), custom_call_target="tpu_custom_call", {config}',
        f'%u = {MB} custom-call(%p), custom_call_target="tpu_custom_call"',
        f'%z = {MB} custom-call(), custom_call_target="AllocateBuffer"',
    )
    assert [(op.instruction.name, op.cost.how) for op in timeline.ops] == [
        ("k", "declared"),
        ("u", "unknown"),
    ]
    assert timeline.seconds == pytest.approx(3 * MS)


def test_a_fusion_reads_the_slices_that_it_takes():
    sliced = computation(
        "%sliced (b: f32[250000], i: s32[]) -> f32[1000]",
        f"%b = {MB} parameter(0)",
        "%i = s32[] parameter(1)",
        "ROOT %ds = f32[1000]{0} dynamic-slice(%b, %i), dynamic_slice_sizes={1000}",
    )
    updated = computation(
        "%updated (b: f32[250000], u: f32[1000], i: s32[]) -> f32[250000]",
        f"%b = {MB} parameter(0)",
        "%u = f32[1000]{0} parameter(1)",
        "%i = s32[] parameter(2)",
        f"ROOT %dus = {MB} dynamic-update-slice(%b, %u, %i)",
    )
    timeline = run(
        "%i = s32[] parameter(1)",
        "%x = f32[1000]{0} fusion(%p, %i), kind=kLoop, calls=%sliced",
        f"%y = {MB} fusion(%p, %x, %i), kind=kLoop, calls=%updated",
        others=sliced + updated,
    )
    assert [op.cost.bytes for op in timeline.ops] == [8000 + 4, 8000 + 4]
