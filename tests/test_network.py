"""Links under a program: routes, shares and latencies that can be worked out on paper."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh

from collective_matmul import hardware, make_mesh, torus
from collective_matmul.inspect.collectives import Collective
from collective_matmul.inspect.network import Network
from collective_matmul.inspect.routes import Grid

from .test_mesh import pretend

V4 = hardware.chip("v4")


def network(mesh, chip="v4"):
    return Network.of(mesh.devices.flat, dict(mesh.shape), hardware.chip(chip))


def line(shape, kind="TPU v4", chip="v4", cores=1):
    """A slice as a mesh with one axis for each dimension of the torus, in the order z, y, x."""
    devices = np.array(pretend(kind, shape, cores)).reshape(*reversed(shape), cores)
    return network(Mesh(devices, ("z", "y", "x", "core")), chip)


def groups(net, *names):
    """Partitions that differ along these mesh axes only."""
    sizes = list(net.axes.values())
    numbers = [list(net.axes).index(name) for name in names]
    index = np.moveaxis(
        np.arange(math.prod(sizes)).reshape(sizes), numbers, range(-len(numbers), 0)
    )
    width = math.prod(sizes[i] for i in numbers)
    return tuple(tuple(group) for group in index.reshape(-1, width).tolist())


def shift(net, axis, by):
    """The pairs of a permute that shifts along a mesh axis."""
    return tuple(
        (group[i], group[(i + by) % len(group)])
        for group in groups(net, axis)
        for i in range(len(group))
    )


def permute(net, pairs, size=1):
    return net.traffic(Collective("collective-permute", size, pairs=tuple(pairs)))


def over(net, kind, *names, size=1):
    return net.traffic(Collective(kind, size, groups=groups(net, *names)))


def load(traffic, chip=V4):
    """Bytes on the busiest link for one byte of the shard."""
    return traffic.route.seconds_per_byte * chip.link_bandwidth


@st.composite
def grids(draw):
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    return Grid(shape, tuple(draw(st.booleans()) for _ in shape))


@given(grids(), st.data())
def test_a_route_is_as_long_as_the_distance(grid, data):
    every = list(itertools.product(*map(range, grid.shape)))
    a, b = (data.draw(st.sampled_from(every)) for _ in range(2))
    passes = grid.empty()
    longest = grid.route(passes, np.array([a]), np.array([b]))
    away = torus.distance(a, b, grid.shape, grid.wrap)
    assert longest == away
    assert passes.sum() == away


@given(grids())
def test_opposite_ways_load_opposite_links(grid):
    """Every device sends one step up: each link in that direction carries one message."""
    every = np.array(list(itertools.product(*map(range, grid.shape))))
    for dim, size in enumerate(grid.shape):
        passes = grid.empty()
        grid.walk(passes, every, dim, np.full(len(every), 1))
        assert (passes[dim, 0] == 1).all()
        grid.walk(passes, every, dim, np.full(len(every), -2 * (size > 2)))
        assert (passes[dim, 1] == 2 * (size > 2)).all()
        assert passes[dim].sum() == passes.sum()


def test_half_way_round_goes_both_ways():
    passes = Grid((4,), (True,)).empty()
    Grid((4,), (True,)).route(passes, np.array([[0]]), np.array([[2]]))
    np.testing.assert_array_equal(passes[0], [[0.5, 0.5, 0, 0], [0.5, 0, 0, 0.5]])


@pytest.mark.parametrize(
    ("by", "busiest", "hops", "way"),
    [(1, 1, 1, "+"), (-1, 1, 1, "-"), (3, 3, 3, "+"), (8, 4, 8, "+")],
)
def test_a_shift_along_a_wrapped_axis(by, busiest, hops, way):
    net = line((4, 4, 16))
    traffic = permute(net, shift(net, "z", by), size=10**6)
    assert load(traffic) == pytest.approx(busiest)
    assert (traffic.route.hops, traffic.route.axes, traffic.route.way) == (hops, "z", way)
    seconds = V4.permute_latency + (hops - 1) * V4.hop_latency + busiest * 1e6 / V4.link_bandwidth
    assert traffic.seconds == pytest.approx(seconds)


def test_without_wrap_the_last_device_is_far():
    net = line((2, 4, 1), "TPU v5 lite", "v5e")
    traffic = permute(net, shift(net, "y", 1))
    assert traffic.route.hops == 3
    assert load(traffic) == pytest.approx(1)
    assert traffic.route.names == ("y+", "y-")


def test_what_stays_costs_nothing():
    net = line((4, 4, 4))
    assert permute(net, [(i, i) for i in range(64)], size=10**9).seconds == 0
    assert net.traffic(Collective("all-gather", 10**9, groups=((0,), (1,)))).seconds == 0


@pytest.mark.parametrize(
    ("kind", "axes", "busiest"),
    [
        ("all-gather", ("z",), 15 / 2),  # both ways of an axis that closes
        ("all-gather", ("x",), 3 / 2),
        ("all-gather", ("x", "z"), 63 / 4),
        ("all-gather", ("x", "y", "z"), 255 / 6),  # 6 links into a device
        ("reduce-scatter", ("z",), 15 / 16 / 2),
        ("all-reduce", ("z",), 15 / 16),
        ("all-to-all", ("z",), 16 / 8),  # V / (4 W): https://jax-ml.github.io/scaling-book/sharding
        ("collective-broadcast", ("z",), 1 / 2),
    ],
)
def test_groups_on_whole_axes_follow_the_closed_forms(kind, axes, busiest):
    assert load(over(line((4, 4, 16)), kind, *axes)) == pytest.approx(busiest)


def test_a_line_has_half_the_bandwidth_of_a_ring():
    assert load(over(line((2, 2, 4)), "all-gather", "z")) == pytest.approx(3)
    assert load(over(line((2, 2, 4)), "all-gather", "x", "y")) == pytest.approx(3 / 2)


def test_the_latency_of_a_group_is_that_of_its_farthest_pair():
    net = line((4, 4, 16))
    latency = V4.permute_latency + 7 * V4.hop_latency
    assert over(net, "all-gather", "z").route.latency == pytest.approx(latency)
    assert over(net, "all-reduce", "z").route.latency == pytest.approx(latency + 8 * V4.hop_latency)


def test_groups_with_gaps_share_the_links_between():
    """Every other device of an axis: two groups interleave, and each step passes both."""
    mesh = make_mesh(16, 16, 4, devices=pretend("TPU v4", (8, 8, 16)))
    net = network(mesh)
    assert load(over(net, "all-gather", "data")) == pytest.approx(15 / 4 * 2)  # 4x4 boxes, stride 2
    assert load(over(net, "all-gather", "fsdp")) == pytest.approx(15 / 2)
    assert load(over(net, "all-gather", "tensor")) == pytest.approx(3 / 2)  # a 2x2 box, 2 ports


def test_a_group_that_is_no_box_sends_around_its_ring():
    net = line((4, 1, 1), "TPU v5 lite", "v5e")
    chip = hardware.chip("v5e")
    odd = Collective("all-gather", 1, groups=((0, 1, 3),))
    # Of the ring 0 -> 1 -> 3 -> 0, the links between 1 and 3 are crossed once each way round.
    assert load(net.traffic(odd), chip) == pytest.approx(2 / 2 * 2)


def test_opposite_rings_in_a_box_do_not_meet():
    net = network(make_mesh(16, 16, 4, devices=pretend("TPU v4", (8, 8, 16))))
    forth, back = (permute(net, shift(net, "tensor", by)).route for by in (1, -1))
    along = permute(net, shift(net, "fsdp", 1)).route
    assert net.slowdowns((forth, back)) == (1, 1)
    assert net.slowdowns((forth, forth)) == (2, 2)
    assert net.slowdowns((forth, along, forth)) == (2, 1, 2)


def test_the_devices_of_a_chip_share_its_links():
    chip = hardware.chip("7x")
    net = line((2, 2, 1), "TPU7x", "7x", cores=2)
    assert load(permute(net, shift(net, "x", 1)), chip) == pytest.approx(2)
    assert load(permute(net, shift(net, "core", 1)), chip) == pytest.approx(1 / hardware.IN_CHIP)
    # 3 other chips with 2 shards each, over 2 links into the chip: gathered once for both devices.
    assert load(over(net, "all-gather", "x", "y", "core"), chip) == pytest.approx(3)
    assert load(over(net, "all-gather", "x", "y"), chip) == pytest.approx(3)


def test_axes_are_told_from_the_partitions():
    net = network(make_mesh(2, 4, 8, devices=pretend("TPU v4", (4, 4, 4))))
    for names in (("data",), ("fsdp", "tensor"), ("data", "tensor"), ("data", "fsdp", "tensor")):
        assert over(net, "all-reduce", *names).route.axes == ",".join(names)
    everyone = net.traffic(Collective("all-reduce", 1))
    assert everyone.route.axes == "data,fsdp,tensor"


def test_a_switch_has_one_port_for_all():
    chip = hardware.chip("H100")
    net = Network.without_coordinates({"t": 8}, chip)
    assert "one switch" in net.assumed
    forth, back = (permute(net, shift(net, "t", by)).route for by in (1, -1))
    assert forth.seconds_per_byte * chip.link_bandwidth == pytest.approx(1)
    assert net.slowdowns((forth, back)) == (2, 2)
    assert load(over(net, "all-gather", "t"), chip) == pytest.approx(7)
    assert load(over(net, "all-to-all", "t"), chip) == pytest.approx(7 / 8)


def test_without_coordinates_a_mesh_axis_is_a_ring():
    net = Network.without_coordinates({"slice": 2, "tensor": 4}, V4)
    assert "taken to be a ring" in net.assumed
    assert permute(net, shift(net, "tensor", 1)).route.hops == 1
    assert load(over(net, "all-gather", "tensor")) == pytest.approx(3 / 2)
    assert load(over(net, "all-gather", "slice")) == pytest.approx(1)


def test_between_slices_nothing_is_known_and_it_is_said():
    mesh = make_mesh(2, 1, 8, devices=pretend("TPU v5 lite", (2, 4, 1), slices=2))
    net = network(mesh, "v5e")
    for traffic in (permute(net, shift(net, "data", 1)), over(net, "all-reduce", "data")):
        assert "slice to slice" in traffic.route.unknown
        assert traffic.route.axes == "data"
    assert not over(net, "all-gather", "tensor").route.unknown


def test_what_no_model_fits_is_said():
    net = line((4, 4, 4))
    assert "no model of" in over(net, "collective-rumour", "x").route.unknown
    uneven = Collective("all-reduce", 1, groups=((0, 1), (2, 3, 4)))
    assert "different sizes" in net.traffic(uneven).route.unknown


def test_partitions_that_the_mesh_lacks_are_refused():
    with pytest.raises(ValueError, match=r"names partition 64, and the mesh .* has 64 devices"):
        permute(line((4, 4, 4)), [(0, 64)])
