"""Schedules are right for every number of devices: properties of integers, no arrays."""

import dataclasses
import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collective_matmul import algorithms
from collective_matmul.lanes import (
    WHOLE,
    Lane,
    Part,
    check_covering,
    link_load,
    permutation,
    steps,
)

names = st.sampled_from(algorithms.names())
devices = st.integers(1, 64)


def test_the_four_algorithms_are_found():
    assert {"ring", "bidirectional", "two_way", "direct"} <= set(algorithms.names())
    assert algorithms.names() == tuple(sorted(algorithms.names()))


@given(names, devices)
def test_every_part_of_every_other_shard_arrives_once(name, t):
    """Simulated hop by hop, with messages in place of arrays."""
    arrived = {device: Counter() for device in range(t)}
    for lane in algorithms.lanes(name, t):
        held = {device: (device, lane.part) for device in range(t)}
        for _ in range(lane.hops):
            held = {target: held[source] for source, target in permutation(lane.shift, t)}
            for device, message in held.items():
                arrived[device][message] += 1
    cuts = {lane.part for lane in algorithms.lanes(name, t)} or {WHOLE}
    for device in range(t):
        others = itertools.product(sorted(set(range(t)) - {device}), cuts)
        assert arrived[device] == Counter(others)


@given(names, devices)
def test_run_backwards_every_device_collects_every_addend_once(name, t):
    """A scatter's sums leave from the far end of a lane and gain an addend at each stop."""
    collected = {device: Counter() for device in range(t)}
    for lane in algorithms.lanes(name, t):
        for home in range(t):
            for hop in range(lane.hops, 0, -1):
                collected[home][(home + lane.shift * hop) % t, lane.part] += 1
    cuts = {lane.part for lane in algorithms.lanes(name, t)} or {WHOLE}
    for home in range(t):
        others = itertools.product(sorted(set(range(t)) - {home}), cuts)
        assert collected[home] == Counter(others)


STEPS = {
    "ring": lambda t: t - 1,
    "bidirectional": lambda t: t - 1,
    "two_way": lambda t: t // 2,
    "direct": lambda t: min(t - 1, 1),
}
LINKS = {  # shards over the busier direction of the busiest link of a ring, all rounds together
    "ring": lambda t: t - 1,
    "bidirectional": lambda t: (t - 1) / 2 if t > 2 else t - 1,  # 2 devices share one link
    "two_way": lambda t: t // 2,
    # Every offset by its shorter way round: 1 + 2 + ... + t // 2 shards forwards.
    "direct": lambda t: (t // 2) * (t // 2 + 1) / 2,
}


@pytest.mark.parametrize("name", STEPS)
@given(t=devices)
def test_steps(name, t):
    assert steps(algorithms.lanes(name, t)) == STEPS[name](t)


@pytest.mark.parametrize("name", LINKS)
@given(t=devices)
def test_bytes_on_a_link(name, t):
    lanes = algorithms.lanes(name, t)
    loads = [link_load(lanes, t, hop) for hop in range(1, steps(lanes) + 1)]
    assert max(map(sum, zip(*loads, strict=True)), default=0) == pytest.approx(LINKS[name](t))


@given(names, devices)
def test_all_hops_of_a_link_carry_what_all_must_see(name, t):
    """Whatever the order, (t - 1) shards reach each device: nothing is carried in vain."""
    carried = sum(lane.hops / lane.part.count for lane in algorithms.lanes(name, t))
    assert carried == pytest.approx(t - 1)


@given(names, devices)
def test_one_device_has_nothing_to_send(name, t):
    assert (algorithms.lanes(name, t) == ()) == (t == 1)


@given(names, st.integers(2, 24), st.data())
def test_a_broken_schedule_is_refused(name, t, data):
    """One hop more or less, a lane lost or doubled, a wrong shift or a wrong part."""
    lanes = list(algorithms.lanes(name, t))
    at = data.draw(st.integers(0, len(lanes) - 1))
    lane = lanes[at]
    kind = data.draw(st.sampled_from(["hop more", "hop less", "lost", "twice", "shift", "part"]))
    if kind == "hop more":
        lanes[at] = dataclasses.replace(lane, hops=lane.hops + 1)
    elif kind == "hop less":
        lanes[at] = dataclasses.replace(lane, hops=lane.hops - 1)
    elif kind == "lost":
        del lanes[at]
    elif kind == "twice":
        lanes.append(lane)
    elif kind == "shift":
        # A shift of 0 sends a shard to its own device, where it is already.
        lanes[at] = dataclasses.replace(lane, shift=0)
    else:
        count = lane.part.count + 1
        lanes[at] = dataclasses.replace(lane, part=Part(lane.part.index, count))
    with pytest.raises(ValueError, match=f"t={t}|pieces"):
        check_covering(tuple(lanes), t)


def test_the_refusal_names_what_is_missed_and_what_is_doubled():
    with pytest.raises(ValueError, match=r"t=4.*piece 0 at offset 3: 0 visits"):
        check_covering((Lane(+1, 2),), 4)
    with pytest.raises(ValueError, match=r"t=3.*offset 1: 2 visits"):
        check_covering((Lane(+1, 2), Lane(+1, 1)), 3)
    with pytest.raises(ValueError, match=r"offset 0: 1 visits"):
        check_covering((Lane(+1, 3),), 3)
    with pytest.raises(ValueError, match=r"\[1, 2\] pieces"):
        check_covering((Lane(+1, 1, Part(0, 2)), Lane(-1, 1)), 3)


def test_a_shift_that_skips_devices_covers_only_where_it_is_coprime():
    check_covering((Lane(+3, 4),), 5)
    check_covering((Lane(-2, 6),), 7)
    with pytest.raises(ValueError, match="t=6"):
        check_covering((Lane(+2, 5),), 6)


@given(st.integers(0, 200), st.integers(1, 9))
def test_parts_tile_a_shard_of_any_size(size, count):
    bounds = [Part(index, count).bounds(size) for index in range(count)]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == size
    assert all(a[1] == b[0] for a, b in itertools.pairwise(bounds))
    lengths = [stop - start for start, stop in bounds]
    assert sum(lengths) == size
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(("index", "count"), [(1, 1), (-1, 2), (2, 2), (0, 0)])
def test_a_part_that_is_none_is_refused(index, count):
    with pytest.raises(ValueError, match=f"{index} of {count}"):
        Part(index, count)


@given(st.integers(-70, 70), devices)
def test_a_permutation_gives_everyone_one_message(shift, t):
    pairs = permutation(shift, t)
    assert sorted(source for source, _ in pairs) == list(range(t))
    assert sorted(target for _, target in pairs) == list(range(t))
    assert all((target - source - shift) % t == 0 for source, target in pairs)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"'rng'.*ring.*Did you mean 'ring'\?"):
        algorithms.lanes("rng", 4)
    with pytest.raises(ValueError, match=r"'zzz'.*bidirectional.*two_way"):
        algorithms.lanes("zzz", 4)


def test_schedules_are_values():
    """They choose compiled programs, so equal schedules must be equal keys."""
    for name in algorithms.names():
        assert hash(algorithms.lanes(name, 6)) == hash(tuple(algorithms.lanes(name, 6)))
        assert len(set(algorithms.lanes(name, 6))) == len(algorithms.lanes(name, 6))
