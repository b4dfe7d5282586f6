"""The cost model: how long an operation would take by each plan, and which plan to run.

A decomposed plan is walked round by round (`walk`), a plain collective is waited for (`plain`). The
two operations of a gradient are chosen together. The numbers choose a schedule; they are no
prediction of a step time.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from collective_matmul import algorithms, backends, hardware, plain, walk
from collective_matmul.compiling import current_chip
from collective_matmul.lanes import rounds, steps
from collective_matmul.operation import Operation, Plan

GAIN = 0.02  # a decomposition must promise at least this before it replaces the plain collective,
GAIN_IF_ASSUMED = 0.10  # and this on a chip whose numbers are assumptions
SLICING = ("v4", "v6e")
"""Chips on which a product that waits had better slice its operand itself. For 8192^3 over
4 devices by two_way the compiler's cycles are 1.6 % fewer on v4 and 2.8 % on v6e, but 5.0 % more on
v5e, 2.6 % on v5p and 0.4 % on 7x (`python -m bench regress`)."""
HELD = 0.6
"""Of its hop's time, what a chunk's product must take for a gradient's products to be held in
order: those that hops pass under first, a weight gradient last. Left to itself the compiler puts
the weight gradient first and waits for it: 1,925 us of 19,334 (both gradients of a gather of 16,384
x 6,144 x 10,752 over 4 devices of v4, two_way), and held none of 17,412. Where the hops take
longer, as over 16 devices, it knows better: 5,552 us of a scatter's gradients, held 6,551."""
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


def choose(op: Operation) -> Plan:
    """The cheapest plan that honours the names in `op`.

    Raises:
      ValueError: if a name is unknown.
      NotImplementedError: if no backend can do what is named.
    """
    chip = current_chip()
    plan = ranked(op, chip)[0].plan
    return dataclasses.replace(plan, whole=chip.name in SLICING, held=_held(op, plan, chip))


def choose_steps(op: Operation) -> Plan:
    """`choose`, for code that puts hops beside each of the operation's products.

    A backend without steps would leave it one place to put them.

    Raises:
      ValueError, NotImplementedError: as `choose`.
    """
    chip = current_chip()
    best = ranked(op, chip, stepwise=op.backend is None)[0]
    return dataclasses.replace(best.plan, whole=chip.name in SLICING)


def choose_journey(op: Operation) -> Plan:
    """The plan of a bare collective with products to travel beside: lanes, of the fewest hops.

    Alone the plain collective may be cheaper, but nothing can be put beside it. What is carried
    into a loop is not held back `whole`: it would be copied.

    Raises:
      ValueError, NotImplementedError: as `choose`.
    """
    options = ranked(op, current_chip(), stepwise=op.backend is None)
    lanes = [x for x in options if _backend(x.plan).decomposes]
    best = _fewest_hops(op, lanes) if lanes else options[0]
    return dataclasses.replace(best.plan, whole=False)


@functools.lru_cache(maxsize=4096)
def ranked(op: Operation, chip: hardware.Chip, *, stepwise: bool = False) -> tuple[Estimate, ...]:
    """Every plan that honours the names in `op`, the one to run first, the others by their cost.

    Args:
      op: any operation.
      chip: on which it runs.
      stepwise: of plans that decompose, only those that can be run in steps.
    """
    plans = _plans(op, chip)
    if stepwise:
        plans = [x for x in plans if not x.lanes or isinstance(_backend(x), backends.Stepwise)]
    found = [estimate(op, plan, chip) for plan in plans]
    later = _later(op, found, chip)
    options = sorted(found, key=lambda x: _preference(x, later[x]))
    undivided = [x for x in options if not _backend(x.plan).decomposes]
    lanes = [x for x in options if x not in undivided]
    best = _fewest_hops(op, lanes) if lanes else undivided[0]
    if undivided and best.steps:
        most = (1 - least_gain(chip, best.plan)) * undivided[0].total + later[undivided[0]]
        best = best if best.total + later[best] <= most else undivided[0]
    others = (x for x in options if x is not best)
    return (best, *sorted(others, key=lambda x: x.total))


def least_gain(chip: hardware.Chip, plan: Plan) -> float:
    """The share of the plain collective's time that a plan must promise to save."""
    return max(GAIN_IF_ASSUMED if chip.assumed else GAIN, _margin(plan))


def estimate(op: Operation, plan: Plan, chip: hardware.Chip) -> Estimate:
    """What `plan` would cost on `chip`."""
    backend = _backend(plan)
    if backend.decomposes:
        compute, exposed = backend.walked(op, plan, chip)
        loads = [walk.busiest(op, plan.lanes, hop, chip) for hop, _ in rounds(plan.lanes)]
        wire = sum(walk.hop_time(op, plan.lanes, hop, chip) for hop, _ in rounds(plan.lanes))
        share = 1 / plan.lanes[0].part.count if plan.lanes else 0
        flops = walk.flops(op, op.shard_size) * (op.t - 1) // max(1, steps(plan.lanes))
    else:
        compute = walk.products_time(op, op.shard_size * op.t, chip)
        loads = plain.loads(op, chip)
        wire = exposed = plain.seconds(op, chip)
        share, flops = loads[0] if loads else 0, 0
    if op.beside is not None:
        exposed -= _spare(op, plan, chip)
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


def _held(op: Operation, plan: Plan, chip: hardware.Chip) -> bool:
    """Whether the order of a gradient's products is held, for they outlast its hops (`HELD`)."""
    if not plan.fat or not plan.lanes:
        return False
    rows = op.shard_size // plan.lanes[0].part.count
    if op.beside is None:
        work = walk.filled_time(op, rows, chip)
    else:
        other = ranked(op.beside, chip)[0].plan
        if not _pass_under(op, plan, other):
            return False
        if not isinstance(_backend(other), backends.Stepwise):
            return True
        work = walk.products_time(op.beside, rows, chip)
    return work >= HELD * walk.hop_time(op, plan.lanes, 1, chip)


def _pass_under(op: Operation, plan: Plan, scatter: Plan) -> bool:
    """Whether the hops of the gather `op` pass under the products of the scatter beside it.

    Within a kernel, if it can carry them. Under a kernel, or one product of a plain scatter, no
    chain of hops does (v4: of 304 us 129 are left); hops that are independent do, and under a
    kernel are held there: with both gradients of 16,384 x 6,144 x 10,752 over 4 devices of v5p
    1,068 us of 15,736 are exposed if the order is left to the compiler, and held none of 14,668.
    """
    behind, ahead = _backend(plan), _backend(scatter)
    if not scatter.lanes:
        return False
    if not isinstance(behind, backends.Stepwise):
        same = isinstance(ahead, backends.Carrying) and plan.lanes == scatter.lanes
        return same and ahead.carries(op, plan.lanes)
    return isinstance(ahead, backends.Stepwise) or steps(plan.lanes) == 1


def _spare(op: Operation, plan: Plan, chip: hardware.Chip) -> float:
    """Seconds of this operation's wire that pass under the products of the one beside it.

    A plain scatter passes under the gather's products, which do not wait for it.
    """
    assert op.beside is not None
    if op.kind == "gather":
        return _left(op, plan, ranked(op.beside, chip)[0], chip)
    if plan.lanes or not plain.asynchronous(op, chip):
        return 0.0
    return walk.products_time(op.beside, op.shard_size * op.t, chip)


def _left(op: Operation, plan: Plan, scatter: Estimate, chip: hardware.Chip) -> float:
    """Seconds of a gradient's gather by `plan` that pass under the scatter beside it, under what
    that leaves of its products.

    A plain gather does so only where the scatter is plain too. Under a kernel all of it is exposed
    (v5e, 16,384 x 6,144 x 10,752 over 4 devices: 1,683 us), and under permutes' products most
    (2,048 x 6,144 x 5,376 over 8: 196 of 252 us).
    """
    if not plan.lanes:
        beside = plain.asynchronous(op, chip) and not scatter.plan.lanes
        return scatter.compute if beside else 0.0
    under = _pass_under(op, plan, scatter.plan)
    return max(0.0, scatter.compute - scatter.wire) if under else 0.0


def _later(op: Operation, options: list[Estimate], chip: hardware.Chip) -> dict[Estimate, float]:
    """Of a gradient's scatter by each option, how long the gather beside it would take then."""
    if op.kind == "gather" or op.beside is None:
        return dict.fromkeys(options, 0.0)
    gather = op.beside
    alone = [estimate(gather, plan, chip) for plan in _plans(gather, chip)]

    def took(each: Estimate, scatter: Estimate) -> float:
        exposed = max(0.0, each.exposed - _left(gather, each.plan, scatter, chip))
        return (each.compute + exposed) / (1 - _margin(each.plan))

    return {x: min(took(each, x) for each in alone) for x in options}


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


def _preference(option: Estimate, later: float) -> tuple[float, int, float, str]:
    """Of equals that of fewer hops: each piece has a product, or a copy, of its own. In a kernel
    pieces have not, and what counts is how little the wire is busy."""
    backend = _backend(option.plan)
    apart = isinstance(backend, backends.Stepwise)
    hops = sum(lane.hops for lane in option.plan.lanes) if apart else 0
    asked = option.total / (1 - _margin(option.plan)) + later
    return asked, hops, option.wire, option.plan.algorithm or ""


def _margin(plan: Plan) -> float:
    """The share of another's time that the plan's backend must promise to save."""
    return getattr(_backend(plan), "margin", 0.0)


def _backend(plan: Plan) -> Any:
    return backends.get(plan.backend)


def _plans(op: Operation, chip: hardware.Chip) -> list[Plan]:
    """The plans that honour the operation's names.

    Raises:
      NotImplementedError: if there are none, with each backend's reason.
    """
    if op.algorithm is not None:
        algorithms.lanes(op.algorithm, op.t)  # an unknown name is an error of its own
    contracts = any(op.letter not in term.spec.out for term in op.terms)
    found, reasons = [], []
    for name in backends.names() if op.backend is None else (op.backend,):
        backend: Any = backends.get(name)
        for plan in _walks(op) if backend.decomposes else [Plan(name)]:
            reason = backend.unsupported(op, plan.lanes, chip)
            if reason is not None:
                reasons.append(f"backend {name!r}: {reason}")
                continue
            plan = dataclasses.replace(plan, backend=name)
            if backend.decomposes and contracts:
                found += [plan] * backend.accumulates + [dataclasses.replace(plan, fat=True)]
            else:
                found.append(plan)
    if not found:
        asked = f"algorithm={op.algorithm!r}, backend={op.backend!r}"
        raise NotImplementedError(
            f"{asked} cannot be honoured: {'; '.join(dict.fromkeys(reasons))}"
        )
    return found


def _walks(op: Operation) -> list[Plan]:
    """The algorithms that honour the operation's name, for a backend to be named."""
    names = algorithms.names() if op.algorithm is None else (op.algorithm,)
    t = op.t if op.shard_size else 1
    return [Plan("", name, algorithms.lanes(name, t)) for name in names]
