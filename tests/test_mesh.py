"""Meshes on the torus: properties of rings, pretended devices, the TPU compiler's topologies."""

import collections
import dataclasses
import importlib.util
import itertools
import math
import os
import random

import jax
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from collective_matmul import torus
from collective_matmul.mesh import AXES, check_ring, make_mesh, ring_report

# ---- rings in boxes: properties of coordinates ----

boxes = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple)


@st.composite
def wrapped_boxes(draw, largest=300):
    box = draw(boxes)
    assume(math.prod(box) <= largest)
    return box, tuple(draw(st.booleans()) for _ in box)


def neighbours(a, b, box, wrap):
    differ = [i for i in range(len(box)) if a[i] != b[i]]
    if len(differ) != 1:
        return False
    i = differ[0]
    way = abs(a[i] - b[i])
    return way == 1 or (wrap[i] and way == box[i] - 1)


@given(wrapped_boxes())
def test_a_ring_visits_every_device_once_and_steps_to_neighbours(case):
    box, wrap = case
    order = torus.ring_order(box, wrap)
    assert sorted(order) == list(itertools.product(*map(range, box)))
    assert all(neighbours(a, b, box, wrap) for a, b in itertools.pairwise(order))
    if torus.closes(box, wrap) and len(order) > 1:
        assert neighbours(order[-1], order[0], box, wrap)


def has_cycle(box, wrap):
    """Whether a Hamiltonian cycle exists, by trying all paths from the origin."""
    every = list(itertools.product(*map(range, box)))
    if len(every) <= 2:
        return True
    near = {a: [b for b in every if neighbours(a, b, box, wrap)] for a in every}

    def extend(path, seen):
        if len(path) == len(every):
            return path[0] in near[path[-1]]
        return any(extend([*path, b], seen | {b}) for b in near[path[-1]] if b not in seen)

    return extend([every[0]], {every[0]})


@given(wrapped_boxes(largest=12))
def test_a_ring_closes_exactly_where_a_cycle_exists(case):
    box, wrap = case
    assert torus.closes(box, wrap) == has_cycle(box, wrap)


@given(wrapped_boxes(largest=60), st.data())
def test_distance_is_the_shortest_path(case, data):
    box, wrap = case
    every = list(itertools.product(*map(range, box)))
    start = data.draw(st.sampled_from(every))
    reached, front = {start: 0}, [start]
    while front:
        front = [
            b for b in every for a in front if b not in reached and neighbours(a, b, box, wrap)
        ]
        reached |= {b: max(reached.values()) + 1 for b in front}
    assert reached == {at: torus.distance(start, at, box, wrap) for at in every}


@given(wrapped_boxes(largest=128), st.data())
def test_axes_are_laid_so_that_every_device_is_used_once(case, data):
    shape, wrap = case
    volume = math.prod(shape)
    tensor = data.draw(st.sampled_from([n for n in range(1, volume + 1) if volume % n == 0]))
    rest = volume // tensor
    fsdp = data.draw(st.sampled_from([n for n in range(1, rest + 1) if rest % n == 0]))
    sizes = (tensor, fsdp, rest // fsdp)
    placed = torus.place(shape, wrap, sizes)
    assert tuple(map(len, placed)) == sizes
    stands = [tuple(map(sum, zip(*steps, strict=True))) for steps in itertools.product(*placed)]
    assert sorted(stands) == list(itertools.product(*map(range, shape)))
    # The first axis is a cycle of neighbours if any box that tiles the torus allows one.
    possible = any(
        torus.closes(box, tuple(w and b == n for w, b, n in zip(wrap, box, shape, strict=True)))
        for box in itertools.product(*(range(1, n + 1) for n in shape))
        if math.prod(box) == tensor and all(n % b == 0 for n, b in zip(shape, box, strict=True))
    )
    ring = placed[0]
    steps = [
        torus.distance(a, b, shape, wrap) for a, b in zip(ring, ring[1:] + ring[:1], strict=True)
    ]
    assert (max(steps) <= 1) == possible


def test_sizes_that_do_not_fill_the_torus_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 1, 1\) do not fill a torus of \(2, 2\)"):
        torus.place((2, 2), (False, False), (3, 1, 1))


@pytest.mark.parametrize(
    ("kind", "chips", "wrap"),
    [
        ("TPU v4", (2, 2, 4), (False, False, False)),
        ("TPU v4", (4, 4, 4), (True, True, True)),
        ("TPU v4", (8, 8, 12), (True, True, True)),
        ("TPU v5", (2, 4, 4), (False, False, False)),
        ("TPU v5p", (4, 8, 20), (True, True, True)),
        ("TPU7x", (2, 2, 4), (False, False, False)),
        ("TPU7x", (4, 4, 8), (True, True, True)),
        ("TPU v5 lite", (8, 8, 1), (False, False, False)),
        ("TPU v5 lite", (8, 16, 1), (False, True, False)),
        ("TPU v6 lite", (16, 16, 1), (True, True, False)),
        ("a kind of the future", (16, 16, 16), (False, False, False)),
    ],
)
def test_slices_wrap_as_their_vendor_builds_them(kind, chips, wrap):
    assert torus.wraps(kind, (*chips, 1)) == (*wrap, False)


# ---- make_mesh on pretended devices ----


@dataclasses.dataclass(frozen=True)
class Pretended:
    id: int
    coords: tuple[int, ...] = (0, 0, 0)
    core_on_chip: int = 0
    device_kind: str = "TPU v4"
    platform: str = "tpu"
    process_index: int = 0
    slice_index: int = 0


@dataclasses.dataclass(frozen=True)
class Client:
    all: tuple

    def devices(self):
        return list(self.all)


@dataclasses.dataclass(frozen=True)
class PartOfSlice(Pretended):
    client: Client = Client(())


def pretend(kind, chips, cores=1, slices=1):
    grid = itertools.product(range(slices), *map(range, reversed(chips)), range(cores))
    return [
        Pretended(i, tuple(reversed(at)), core, kind, slice_index=number)
        for i, (number, *at, core) in enumerate(grid)
    ]


def hops(mesh, axis="tensor"):
    return {ring.hops for ring in ring_report(mesh, axis).rings}


@pytest.mark.parametrize(
    ("kind", "chips", "cores", "sizes"),
    [
        ("TPU v4", (8, 8, 16), 1, (64, 4, 4)),
        ("TPU v4", (8, 8, 16), 1, (16, 16, 4)),
        ("TPU v4", (8, 8, 16), 1, (256, 1, 4)),
        ("TPU v4", (8, 8, 16), 1, (8, 8, 16)),
        ("TPU v5p", (4, 4, 12), 1, (4, 4, 12)),
        ("TPU v5 lite", (16, 16, 1), 1, (1, 16, 16)),
        ("TPU v6 lite", (8, 8, 1), 1, (2, 1, 32)),
        ("TPU7x", (4, 4, 4), 2, (2, 8, 8)),
    ],
)
def test_the_tensor_axis_is_a_cycle_of_neighbours(kind, chips, cores, sizes):
    devices = pretend(kind, chips, cores)
    mesh = make_mesh(*sizes, devices=devices)
    assert mesh.axis_names == AXES
    assert mesh.devices.shape == sizes
    assert set(mesh.devices.flat) == set(devices)
    report = check_ring(mesh, strict=True)
    assert report.closed is True
    assert "every step is one link" in str(report)


def test_all_axes_are_cycles_where_each_is_a_whole_axis_of_the_torus():
    mesh = make_mesh(8, 16, 8, devices=pretend("TPU v4", (8, 8, 16)))
    assert {steps for axis in AXES for steps in hops(mesh, axis)} == {(1,) * 8, (1,) * 16}


def test_fsdp_gets_short_steps_of_what_is_left():
    mesh = make_mesh(64, 4, 4, devices=pretend("TPU v4", (8, 8, 16)))
    assert hops(mesh, "fsdp") == {(2, 1, 2, 1)}


def test_the_devices_of_one_chip_stay_together():
    mesh = make_mesh(8, 4, 4, devices=pretend("TPU7x", (4, 4, 4), cores=2))
    chips = [
        collections.Counter(d.coords for d in ring.devices) for ring in ring_report(mesh).rings
    ]
    assert all(list(chip.values()) == [2, 2] for chip in chips)


def test_the_order_of_the_devices_does_not_matter_on_a_torus():
    devices = pretend("TPU v4", (4, 4, 4))
    shuffled = random.Random(0).sample(devices, len(devices))
    a, b = (make_mesh(4, 4, 4, devices=order) for order in (devices, shuffled))
    assert (a.devices == b.devices).all()


def test_a_line_without_wrap_is_a_path_and_the_check_says_so():
    mesh = make_mesh(1, 1, 4, devices=pretend("TPU v5 lite", (1, 4, 1)))
    assert hops(mesh) == {(1, 1, 1, 3)}
    with pytest.warns(UserWarning, match=r"device 3 at \(0, 3, 0, 0\) -> device 0 .* 3 links away"):
        report = check_ring(mesh)
    assert report.closed is False
    [ring] = report.rings
    assert [(a.id, b.id, n) for a, b, n in ring.far] == [(3, 0, 3)]
    with pytest.raises(ValueError, match="3 links away"):
        check_ring(mesh, strict=True)


def test_a_mesh_in_the_order_of_ids_is_told_to_be_no_ring():
    devices = np.array(pretend("TPU v5 lite", (2, 4, 1))).reshape(1, 1, 8)
    report = ring_report(Mesh(devices, AXES))
    assert report.closed is False
    assert "1 ring with steps of 1, 2, 1, 2, 1, 2, 1, 4 links" in str(report)


def test_a_long_report_is_cut_short():
    devices = np.array(pretend("TPU v4", (8, 8, 16))).reshape(1, 1, 1024)
    text = str(ring_report(Mesh(devices, AXES)))
    assert "more pairs that are not neighbours" in text
    assert text.count("\n") < 12


def test_a_part_of_a_slice_wraps_only_where_the_slice_does():
    everyone = pretend("TPU v4", (8, 4, 4))
    client = Client(tuple(everyone))
    slice_of = [PartOfSlice(d.id, d.coords, client=client) for d in everyone]
    along_x = [d for d in slice_of if d.coords[1:] == (0, 0) and 2 <= d.coords[0] < 6]
    along_y = [d for d in slice_of if d.coords[::2] == (3, 0)]
    assert hops(make_mesh(1, 1, 4, devices=along_x)) == {(1, 1, 1, 3)}
    assert hops(make_mesh(1, 1, 4, devices=along_y)) == {(1, 1, 1, 1)}


def test_devices_that_fill_no_box_keep_their_order():
    devices = pretend("TPU v4", (2, 2, 2))[:6]
    mesh = make_mesh(3, 1, 2, devices=devices)
    assert list(mesh.devices.flat) == devices


def test_only_the_data_axis_crosses_slices():
    devices = pretend("TPU v5 lite", (2, 4, 1), slices=2)
    mesh = make_mesh(2, 1, 8, devices=devices)
    assert check_ring(mesh, strict=True).closed
    assert [{d.slice_index for d in row.flat} for row in mesh.devices] == [{0}, {1}]
    assert "in another slice" in str(ring_report(mesh, "data"))
    with pytest.raises(ValueError, match=r"data=1 does not split over 2 slices.*multiple of 2"):
        make_mesh(1, 2, 8, devices=devices)


def test_several_axes_may_be_used_as_one():
    mesh = make_mesh(1, 2, 4, devices=pretend("TPU v5 lite", (2, 4, 1)))
    report = ring_report(mesh, ("fsdp", "tensor"))
    assert (report.axis, report.size, len(report.rings)) == ("fsdp, tensor", 8, 1)
    assert report.rings[0].devices == tuple(mesh.devices.flat)


# ---- make_mesh elsewhere ----


def test_other_hardware_keeps_its_order_with_tensor_innermost():
    devices = jax.devices()[:8]
    mesh = make_mesh(2, 2, 2, devices=devices)
    assert list(mesh.devices.flat) == devices
    assert mesh.axis_types == (AxisType.Auto,) * 3
    report = check_ring(mesh, strict=True)
    assert report.closed is None
    assert "neighbours cannot be told" in str(report)


def test_the_tensor_axis_stays_inside_a_process():
    devices = [Pretended(i, platform="gpu", process_index=i // 4) for i in range(8)]
    inside = make_mesh(2, 1, 4, devices=devices)
    assert all(len({d.process_index for d in row}) == 1 for row in inside.devices.reshape(-1, 4))
    assert "process to process: 0" in str(ring_report(inside))
    assert "process to process: 1" in str(ring_report(make_mesh(1, 1, 8, devices=devices)))


def test_all_devices_are_used_by_default_and_one_size_may_be_left_open():
    count = len(jax.devices())
    assert make_mesh(-1, 1, 2).devices.shape == (count // 2, 1, 2)
    assert make_mesh(1, -1, 2).devices.shape == (1, count // 2, 2)
    assert make_mesh(tensor=-1).devices.shape == (1, 1, count)


def test_axis_types_on_request():
    devices = jax.devices()[:4]
    explicit = make_mesh(2, 1, 2, devices=devices, axis_types=AxisType.Explicit)
    assert explicit.axis_types == (AxisType.Explicit,) * 3
    mixed = (AxisType.Auto, AxisType.Auto, AxisType.Explicit)
    assert make_mesh(2, 1, 2, devices=devices, axis_types=mixed).axis_types == mixed


def test_sizes_that_do_not_multiply_are_refused_with_the_nearest_that_do():
    devices = jax.devices()[:8]
    with pytest.raises(ValueError, match=r"3 x 1 x 4 = 12 does not equal the 8 devices") as error:
        make_mesh(3, 1, 4, devices=devices)
    assert "nearest: data=2, fsdp=1, tensor=4;" in str(error.value)
    with pytest.raises(ValueError, match=r"1 x 3 = 3 does not divide the 8 devices") as error:
        make_mesh(-1, 1, 3, devices=devices)
    assert "nearest: data=2, fsdp=1, tensor=4;" in str(error.value)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (-1, -1, 2), (-2, 1, 1)])
def test_sizes_are_positive_and_one_may_be_left_open(sizes):
    with pytest.raises(ValueError, match=f"at most one is -1.*got data={sizes[0]}"):
        make_mesh(*sizes)


def test_an_axis_that_the_mesh_lacks_is_refused():
    with pytest.raises(ValueError, match="no axis 'model' in a mesh with the axes"):
        ring_report(make_mesh(tensor=-1), "model")


# ---- make_mesh on the topologies of the TPU compiler ----


@pytest.fixture
def topology(monkeypatch):
    """The devices of a slice that is not there, as the TPU compiler describes them."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: no real TPU topology was checked")
    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    return lambda name, **options: (
        topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    )


@pytest.mark.parametrize(
    ("name", "options", "sizes"),
    [
        ("v5e:2x4", {}, (1, 1, 8)),
        ("v5e:2x4", {}, (2, 1, 4)),
        ("v5e:4x4", {}, (1, 1, 16)),
        ("v6e:2x4", {}, (2, 2, 2)),
        ("v5p:2x2x2", {}, (1, 1, 8)),
        ("tpu7x:2x2x1", {}, (1, 1, 8)),
        ("tpu7x:2x2x1", {}, (2, 1, 4)),
        ("v4:2x2x1", {"chip_config_name": "megacore"}, (1, 1, 4)),
        ("v4:8x8x16", {"chip_config_name": "megacore"}, (64, 4, 4)),
        ("v4:8x8x16", {"chip_config_name": "megacore"}, (16, 16, 4)),
    ],
)
def test_real_slices_give_closed_rings(topology, name, options, sizes):
    devices = topology(name, **options)
    mesh = make_mesh(*sizes, devices=devices)
    assert mesh.devices.shape == sizes
    assert {d.id for d in mesh.devices.flat} == {d.id for d in devices}
    assert check_ring(mesh, strict=True).closed is True
