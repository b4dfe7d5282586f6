"""The cost model: how long an operation would take by each plan, and which plan to run.

A product takes the root of the sum of two squares: its FLOPs at the chip's rate, its sizes padded
to the 128 rows and columns of a matrix unit, and its bytes at the memory's bandwidth, which pass
beside them only in part. An operand that every chunk meets is read once if the chip can keep it. A
hop takes the permute's latency and its bytes at one link's bandwidth. A decomposed plan is walked
round by round: a product waits for its chunk, a hop for the sum that it carries. A plain collective
is all waiting, but pays the permute's latency once. The numbers choose a schedule; they are no
prediction of a step time.

Three constants of the model come from the TPU compiler's cycle estimates for 8192 x 6144 x 24576
over 8 devices of v5e. Adding to an accumulator costs one pass over it beside the product (7 such
steps: 1.29 Mcycles modelled, 1.33 estimated). A sum that is not added within the product costs one
read of it, one of what arrived and one write (92 kcycles modelled, 110 estimated). A chunk's copy
into the assembled operand costs five passes (115 kcycles modelled, 114 estimated).

What the compiler leaves exposed of a scatter's hops comes from its schedules of 16384 x 7680 x 6144
over 4 devices of v4, v5e, v5p, v6e and 7x. A sum is added within the next product, which so waits
for the hop that brings it. With one lane of several hops the last product waits for the last one (1
of the ring's 3 on each chip), and over more devices for about half of all; with lanes of different
lengths another lane's sum has arrived already (two_way: 0 to 0.07 of the wire, on 7x 0.35). Lanes
that move in step wait for each other: bidirectional exposes 0.40 to 0.57 of its wire, on v5e
nothing.
`python -m bench predict-op --mode scatter` shows it.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax

from collective_matmul import algorithms, backends, hardware
from collective_matmul.lanes import Lane, Part, link_load, rounds, steps
from collective_matmul.operation import Operation, Plan, Term, accumulation_dtype

MATRIX_UNIT = 128  # rows and columns that a product's sizes are padded to, on TPU and Hopper alike
IN_STEP = 0.5  # of the wire that a scatter exposes whose lanes move in step, for several rounds
IN_CHIP = 6  # bandwidth between the devices of a chip, in links
SEVERAL_RINGS = 2 / 3
"""Of the time of one ring both ways, what a plain gather takes over 8 or more chips of a 3-D torus:
170 and 183 us for 2,048 x 6,144 over 8 and 16 devices of v4, where one ring takes 252 and 274."""
PLAIN_SCATTER = {"v4": 4 / 3, "v5p": 4 / 3, "v5e": 1.1, "v6e": 1.0}
"""As many times of that of one ring takes a plain reduce-scatter over 8 devices: 336 us on v4. Over
16 of a 2-D torus it is twice as much again: 540 us on v5e."""
LATE = ("v4", "v5p", "v6e")
"""Chips on which the compiler starts a hop one product late, because it takes it to be faster than
a link is. Of two lanes each then waits while the other multiplies: 16,384 x 6,144 over 16 devices
of v4 exposes 1,122 us by two_way, 156 us if told otherwise (docs/performance.md)."""
COPY_PASSES = 5  # reads and writes that copying a chunk into a larger buffer costs
GAIN = 0.02  # a decomposition must promise at least this before it replaces the plain collective,
GAIN_IF_ASSUMED = 0.10  # and this on a chip whose numbers are assumptions
SLICING = ("v4", "v6e")
"""Chips on which a product that waits had better slice its operand itself. For 8192^3 over
4 devices by two_way the compiler's cycles are 1.6 % fewer on v4 and 2.8 % on v6e, but 5.0 % more on
v5e, 2.6 % on v5p and 0.4 % on 7x (`python -m bench regress`)."""
GAIN_OF_FEWER = 0.10  # as much dearer may a bare collective of fewer hops be, see _fewest_hops


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What one plan is thought to cost; times in seconds, `total` = `compute` + `exposed`."""

    plan: Plan
    steps: int  # rounds of hops
    hop_bytes: int  # bytes that one hop of one lane carries
    link_bytes: float  # bytes that cross the busiest link direction, all rounds
    step_flops: int  # FLOPs of the products that a step brings, all lanes together
    compute: float  # s of products, copies and sums
    wire: float  # s of hops, were nothing beside them
    exposed: float  # s that the device waits for the wire

    @property
    def total(self) -> float:
        """Seconds from first to last."""
        return self.compute + self.exposed

    @property
    def hidden(self) -> float:
        """Seconds of the wire that pass under products."""
        return max(0.0, self.wire - self.exposed)


def current_chip() -> hardware.Chip:
    """The chip that is traced for: that of the mesh in use, else the default backend's."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    kind = device.device_kind if device is not None else jax.devices()[0].device_kind
    return hardware.from_device_kind(kind)


def choose(op: Operation) -> Plan:
    """The cheapest plan that honours the names in `op`.

    Raises:
      ValueError: if a name is unknown.
      NotImplementedError: if no backend can do what is named.
    """
    chip = current_chip()
    return dataclasses.replace(ranked(op, chip)[0].plan, whole=chip.name in SLICING)


def choose_journey(op: Operation) -> Plan:
    """The plan of a bare collective with products to travel beside: lanes, of the fewest hops.

    Alone the plain collective may be cheaper, but nothing can be put beside it. What is carried
    into a loop is not held back `whole`: it would be copied.

    Raises:
      ValueError, NotImplementedError: as `choose`.
    """
    options = ranked(op, current_chip())
    lanes = [x for x in options if backends.get(x.plan.backend).decomposes]
    best = _fewest_hops(op, lanes) if lanes else options[0]
    return dataclasses.replace(best.plan, whole=False)


@functools.lru_cache(maxsize=4096)
def ranked(op: Operation, chip: hardware.Chip) -> tuple[Estimate, ...]:
    """Every plan that honours the names in `op`, the one to run first, the others by their cost."""
    options = sorted((estimate(op, plan, chip) for plan in _plans(op)), key=_preference)
    plain = [x for x in options if not backends.get(x.plan.backend).decomposes]
    lanes = [x for x in options if x not in plain]
    best = _fewest_hops(op, lanes) if lanes else plain[0]
    if plain and best.steps and best.total > (1 - least_gain(chip)) * plain[0].total:
        best = plain[0]
    return (best, *(x for x in options if x is not best))


def least_gain(chip: hardware.Chip) -> float:
    """The share of the plain collective's time that a decomposition must promise to save."""
    return GAIN_IF_ASSUMED if chip.assumed else GAIN


def estimate(op: Operation, plan: Plan, chip: hardware.Chip) -> Estimate:
    """What `plan` would cost on `chip`."""
    if backends.get(plan.backend).decomposes:
        walk = _walk_gather if op.kind == "gather" else _walk_scatter
        compute, exposed = walk(op, plan, chip)
        loads = [_busiest(op, plan.lanes, hop, chip) for hop, _ in rounds(plan.lanes)]
        wire = sum(_hop(op, plan.lanes, hop, chip) for hop, _ in rounds(plan.lanes))
        share = 1 / plan.lanes[0].part.count if plan.lanes else 0
        flops = _flops(op, op.shard_size) * (op.t - 1) // max(1, steps(plan.lanes))
    else:
        compute = _compute(op, op.shard_size * op.t, chip)
        loads = [_plain_load(op, chip)] * (op.t - 1)
        latency = chip.permute_latency + max(0, op.t // 2 - 1) * chip.hop_latency
        slower = _plain_slowdown(op, chip) * op.travelling.nbytes / chip.link_bandwidth
        wire = (sum(loads) * slower + latency) if loads else 0.0
        exposed, share, flops = wire, loads[0] if loads else 0, 0
    if op.beside is not None and plan.lanes:  # independent products may run under these hops
        spare = estimate(op.beside, dataclasses.replace(plan, fat=False), chip)
        exposed -= max(0.0, spare.compute - spare.wire)
    return Estimate(
        plan=plan,
        steps=steps(plan.lanes) if plan.algorithm else len(loads),
        hop_bytes=int(op.travelling.nbytes * share),
        link_bytes=sum(loads) * op.travelling.nbytes,
        step_flops=flops,
        compute=compute,
        wire=wire,
        exposed=max(0.0, exposed),
    )


def _plain_load(op: Operation, chip: hardware.Chip) -> float:
    """Shards on the busiest link for each other device, by a plain collective.

    It uses both directions of a ring, and several rings where the devices fill three dimensions.
    Two chips, and a switch, have one way. The devices of a chip share its links.
    """
    chips = op.t // chip.devices_per_chip
    if chips < 2:
        return 1 / IN_CHIP
    both = 1.0 if chips == 2 or chip.switched else 0.5
    fast = op.kind == "gather" or chip.name not in PLAIN_SCATTER
    rings = SEVERAL_RINGS if chips >= 8 and chip.links == 6 and fast else 1.0
    return rings * both * chip.devices_per_chip * (chips - 1) / (op.t - 1)


def _plain_slowdown(op: Operation, chip: hardware.Chip) -> float:
    """How much longer the plain reduce-scatter takes than its bytes over one ring."""
    if op.kind == "gather" or op.t < 8:
        return 1.0
    return PLAIN_SCATTER.get(chip.name, 1.0) * (op.t / 8 if chip.links == 4 else 1)


def _fewest_hops(op: Operation, options: list[Estimate]) -> Estimate:
    """The best; of collectives without products, the one of fewest hops that is nearly as good.

    What hides those is the rest of the program, and the compiler hides a hop under whole operations
    of it: there must be one for every hop. With 8 hops of whole shards both ways instead of 15 of
    halves, the weights and gradients of ViT-22B's step (v4, fsdp = 16) cost it 34 ms less.
    """
    best = options[0]
    if not op.bare:
        return best
    near = [x for x in options if x.total <= (1 + GAIN_OF_FEWER) * best.total]
    return min(near, key=lambda x: x.steps)


def _preference(option: Estimate) -> tuple[float, float, str]:
    return option.total, option.wire, option.plan.algorithm or ""


def _plans(op: Operation) -> list[Plan]:
    """The plans that honour the operation's names.

    Raises:
      NotImplementedError: if there are none, with each backend's reason.
    """
    if op.algorithm is not None:
        algorithms.lanes(op.algorithm, op.t)  # an unknown name is an error of its own
    found, reasons = [], []
    for name in backends.names() if op.backend is None else (op.backend,):
        backend = backends.get(name)
        reason = backend.unsupported(op)
        if reason is not None:
            reasons.append(f"backend {name!r}: {reason}")
        elif not backend.decomposes:
            found.append(Plan(name))
        else:
            contracts = any(op.letter not in term.spec.out for term in op.terms)
            for algorithm in algorithms.names() if op.algorithm is None else (op.algorithm,):
                lanes = algorithms.lanes(algorithm, op.t if op.shard_size else 1)
                plan = Plan(name, algorithm, lanes)
                found += [plan, dataclasses.replace(plan, fat=True)] if contracts else [plan]
    if not found:
        asked = f"algorithm={op.algorithm!r}, backend={op.backend!r}"
        raise NotImplementedError(f"{asked} cannot be honoured: {'; '.join(reasons)}")
    return found


def _walk_gather(op: Operation, plan: Plan, chip: hardware.Chip) -> tuple[float, float]:
    """Seconds of compute, and of waiting: every arrival's product waits for its chunk."""
    late = [x for x in op.terms if plan.fat and op.letter not in x.spec.out]
    now = [x for x in op.terms if x not in late]

    def arrival(part: Part) -> float:
        rows = op.shard_size // part.count
        copied = op.travelling.nbytes / part.count if late else 0
        copy = COPY_PASSES * copied / chip.hbm_bandwidth
        return copy + sum(_product_time(op, x, rows, chip) for x in now)

    compute = clock = arrival(Part())
    wire = 0.0
    for hop, moving in rounds(plan.lanes):
        for i, after in _landing(op, plan.lanes, hop, moving, chip):
            work = arrival(plan.lanes[i].part)
            clock, compute = max(clock, wire + after) + work, compute + work
        wire += _hop(op, plan.lanes, hop, chip)
        if len(moving) > 1 and chip.name in LATE:
            wire += arrival(plan.lanes[moving[0]].part)
    tail = sum(_product_time(op, x, op.shard_size * op.t, chip) for x in late)
    return compute + tail, clock - compute


def _walk_scatter(op: Operation, plan: Plan, chip: hardware.Chip) -> tuple[float, float]:
    """Seconds of compute, and of waiting: every hop waits for the sum that it carries.

    Where lanes move side by side, sums are added within the products, else in passes of their own.
    """
    wire_dtype, out = op.travelling.dtype, op.terms[0].out
    sums = accumulation_dtype(op.terms[0].lhs.dtype, out.dtype)
    addition = math.prod(out.shape) * (sums.itemsize + 2 * wire_dtype.itemsize) / chip.hbm_bandwidth
    compute = clock = wire = 0.0
    landed: dict[int, float] = {}
    in_step = len(plan.lanes) > 1 and len({x.hops for x in plan.lanes}) == 1
    for hop, moving in reversed(list(rounds(plan.lanes))):
        adds = addition if len(moving) == 1 and hop < steps(plan.lanes) else 0.0
        for i in sorted(moving, key=lambda i: landed.get(i, 0.0)):
            n = plan.lanes[i].part.count
            work = _compute(op, op.shard_size // n, chip) + adds / n
            if len(moving) > 1:  # the product adds the sum that has landed, and so waits for it
                clock = max(clock, landed.get(i, 0.0))
            clock, compute = clock + work, compute + work
            if chip.switched:
                wire = max(clock, wire) + _hop_time(op, 1 / n / chip.links, chip)
            flight = _hop(op, _same_way(op, plan.lanes, i), hop, chip)
            late = len(moving) > 1 and work < flight and chip.name in LATE
            landed[i] = clock + flight + work * late
        if not chip.switched:
            clock = max(clock, wire) if len(moving) == 1 else clock
            wire = max(wire, *(landed[i] for i in moving))
    home = sum(addition / lane.part.count for lane in plan.lanes)
    own = _compute(op, op.shard_size, chip) + home
    if len(plan.lanes) == 1 and plan.lanes[0].hops > 1:
        clock = max(clock, wire)
    exposed = max(clock + own, wire) - (compute + own)
    if (in_step and steps(plan.lanes) > 1) or (len(plan.lanes) == 1 and steps(plan.lanes) > 3):
        exposed += IN_STEP * sum(_hop(op, plan.lanes, hop, chip) for hop, _ in rounds(plan.lanes))
    return compute + own, exposed


def _same_way(op: Operation, lanes: tuple[Lane, ...], i: int) -> tuple[Lane, ...]:
    """The lanes that cross links in the direction of lane i."""
    ahead = [2 * (lane.shift % op.t) <= op.t for lane in lanes]
    return tuple(lane for lane, way in zip(lanes, ahead, strict=True) if way == ahead[i])


def _landing(
    op: Operation, lanes: tuple[Lane, ...], hop: int, moving: list[int], chip: hardware.Chip
) -> list[tuple[int, float]]:
    """`(lane, seconds after the round began)` of every chunk: through a switch, one by one."""
    if not chip.switched:
        return [(i, _hop(op, lanes, hop, chip)) for i in moving]
    landed, times = 0.0, []
    for i in moving:
        landed += _hop_time(op, 1 / lanes[i].part.count / chip.links, chip)
        times.append((i, landed))
    return times


def _hop(op: Operation, lanes: tuple[Lane, ...], hop: int, chip: hardware.Chip) -> float:
    """Seconds of round `hop`."""
    if chip.switched:
        moving = [lane for lane in lanes if lane.hops >= hop]
        return sum(_hop_time(op, 1 / lane.part.count / chip.links, chip) for lane in moving)
    farthest = max(min(x.shift % op.t, -x.shift % op.t) for x in lanes if x.hops >= hop)
    further = (farthest - 1) * chip.hop_latency
    return further + _hop_time(op, _busiest(op, lanes, hop, chip), chip)


def _hop_time(op: Operation, shards: float, chip: hardware.Chip) -> float:
    return chip.permute_latency + shards * op.travelling.nbytes / chip.link_bandwidth


def _busiest(op: Operation, lanes: tuple[Lane, ...], hop: int, chip: hardware.Chip) -> float:
    """Shards on the busiest link in round `hop`: of two chips both ways around are the same."""
    loads = link_load(lanes, op.t, hop)
    chips = op.t // chip.devices_per_chip
    if chips < 2:
        return max(loads) / IN_CHIP
    return sum(loads) if chips == 2 else max(loads)


def _compute(op: Operation, rows: int, chip: hardware.Chip) -> float:
    """Seconds of all terms' products for `rows` rows of the moving letter."""
    return sum(_product_time(op, term, rows, chip) for term in op.terms)


def _flops(op: Operation, rows: int) -> int:
    return sum(2 * math.prod(_sizes(op, term, rows)) for term in op.terms if term.rhs)


def _sizes(op: Operation, term: Term, rows: int) -> tuple[int, int, int, int]:
    """Batch, rows, contracted and columns of a term's product over `rows` of the moving letter."""
    sizes = dict(zip(term.spec.lhs, term.lhs.shape, strict=True))
    sizes |= dict(zip(term.spec.rhs or "", term.rhs.shape if term.rhs else (), strict=True))
    sizes[op.letter] = rows

    def total(letters: str, role: str) -> int:
        return math.prod(sizes[x] for x in letters if term.spec.role(x) == role)

    lhs, rhs = term.spec.lhs, term.spec.rhs or ""
    return total(lhs, "batch"), total(lhs, "free"), total(lhs, "contracted"), total(rhs, "free")


def _product_time(op: Operation, term: Term, rows: int, chip: hardware.Chip) -> float:
    """Seconds of one product, or of the copy that stands for it in a bare collective."""
    batch, m, k, n = _sizes(op, term, rows)
    if term.rhs is None:
        return COPY_PASSES * batch * m * k * term.lhs.dtype.itemsize / chip.hbm_bandwidth
    padded = [-(-size // MATRIX_UNIT) * MATRIX_UNIT for size in (m, k, n)]
    wide = accumulation_dtype(term.lhs.dtype, term.rhs.dtype, term.out.dtype)
    slower = max(term.lhs.dtype, term.rhs.dtype, key=lambda dtype: dtype.itemsize)
    rate = hardware.planning_rate(chip, slower)
    reads = {term.spec.lhs: m * k * term.lhs.dtype.itemsize}
    reads[term.spec.rhs or ""] = k * n * term.rhs.dtype.itemsize
    pieces = rows < op.shard_size * op.t
    stays = [x for letters, x in reads.items() if op.letter not in letters and x <= chip.kept]
    traffic = m * n * term.out.dtype.itemsize + sum(reads.values()) - sum(stays) * pieces
    accumulates = pieces and op.letter not in term.spec.out
    extra = 2 * m * n * wide.itemsize if accumulates else 0  # written, and read to be added
    roofline = math.hypot(2 * math.prod(padded) / rate, traffic / chip.hbm_bandwidth)
    launch = chip.permute_latency  # v5e: 14 half-size products cost 67 us more than 7 whole ones
    return batch * (roofline + extra / chip.hbm_bandwidth) + launch
