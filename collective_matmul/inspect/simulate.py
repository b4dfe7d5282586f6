"""One device's run of a scheduled program: its compute, and its transfers on the network.

Every device runs the same text, so one stands for all. Its instructions are issued in order. What
computes occupies it for its cost (`costs`); a transfer begins at its start and runs beside it, in
shares where several transfers cross one link (`Network.slowdowns`), and the device waits at its
done for what is left. A collective without a start waits for all of it. Copies between HBM and
on-chip memory are transfers too, which share the memory's bandwidth.

    exposed   time that the device waits for a transfer, counted at the one that it waits for
    hidden    time that a transfer passes under compute
    seconds   exposed + hidden; of a transfer alone, `Traffic.seconds`

While the device waits for one transfer, another that is in flight is neither. So the run takes the
sum of its compute and of what is exposed. A loop's body is run once, with idle links, and counts as
often as it runs; its condition is taken to be free. Of a conditional the dearest branch counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from collective_matmul.inspect.collectives import (
    Collective,
    Copy,
    collective,
    copy,
    start_of,
    unmatched,
)
from collective_matmul.inspect.costs import Cost, cost
from collective_matmul.inspect.flights import Flight, Flights
from collective_matmul.inspect.hlo import Computation, Instruction, Module
from collective_matmul.inspect.network import Network, Traffic
from collective_matmul.inspect.remote import Hop, Schedule, schedule
from collective_matmul.inspect.timeline import (
    COMPUTE,
    COPIES,
    COPY,
    OTHER,
    PRODUCT,
    WAIT,
    Event,
    Loop,
    Op,
    Timeline,
    Transfer,
)
from collective_matmul.inspect.trips import trips

HOST = 5  # the memory space of the host
_ENDS = ("-done", "-update")  # what ends or carries on something, and costs nothing by itself
_Key = tuple[str, str]


def simulate(
    module: Module,
    network: Network,
    *,
    clock: float | None = None,
    bundles: Mapping[str, float] | None = None,
) -> Timeline:
    """Runs a program, as above.

    Args:
      module: a scheduled program.
      network: where its partitions stand; its chip costs the compute.
      clock: Hz that the compiler's cycles are divided by; default the chip's.
      bundles: as in `costs.cost`.

    Returns:
      The timeline of one device, predicted.
    """
    run = _Run(module, network, clock or network.chip.clock, bundles)
    return run.timeline(module.main)


@dataclasses.dataclass
class _Pending:
    flight: Flight
    instruction: Instruction
    collective: Collective | None
    traffic: Traffic | None


class _Run:
    """A run in progress. `_Run(..).timeline(computation)` is one run of one computation."""

    def __init__(
        self,
        module: Module,
        network: Network,
        clock: float | None,
        bundles: Mapping[str, float] | None,
    ):
        self.module, self.network, self.clock, self.bundles = module, network, clock, bundles
        self.now = 0.0
        self.flights = Flights(network)
        self.pending: dict[_Key, _Pending] = {}
        self.arrived: dict[_Key, Transfer] = {}
        self.ops: dict[_Key, Op] = {}
        self.events: list[Event] = []
        self.loops: list[Loop] = []
        self.remarks: dict[str, None] = {}

    def timeline(self, computation: Computation) -> Timeline:
        self.walk(computation)
        for key in list(self.pending):
            self.done(key)
        return Timeline(
            self.now,
            tuple(self.events),
            tuple(self.loops),
            tuple(self.ops.values()),
            tuple(self.arrived.values()),
            tuple(self.remarks),
        )

    def walk(self, computation: Computation) -> None:
        starts = start_of(self.module, computation)
        if apart := unmatched(self.module, computation):
            self.remark(
                f"{len(apart)} transfers, {apart[0]} the first, begin and end in different "
                f"computations: they are waited for at the end of that in which they begin"
            )
        for instruction in computation.instructions:
            if instruction.opcode == "while":
                self.loop(instruction)
            elif instruction.opcode == "conditional":
                self.conditional(instruction)
            elif instruction.opcode == "call":
                for callee in self.module.callees(instruction):
                    self.walk(callee)
            else:
                self.issue(instruction, starts.get(instruction.name, ""))

    def issue(self, instruction: Instruction, start: str) -> None:
        """One instruction; `start` is what it is the end of. A fusion may compute as well."""
        if (instruction.computation, start) in self.pending:
            self.done((instruction.computation, start))
            if instruction.cycles:
                self.compute(instruction)
        elif moved := collective(self.module, instruction):
            if instruction.cycles:
                self.compute(instruction)
            self.launch(instruction, moved)
            if not moved.asynchronous:
                self.done(_key(instruction))
        elif copied := copy(self.module, instruction):
            self.copy(instruction, copied)
        elif not instruction.opcode.endswith(_ENDS):
            self.compute(instruction)

    def compute(self, instruction: Instruction) -> None:
        spent = cost(self.module, instruction, self.network.chip, self.clock, self.bundles)
        if spent.how == "free":
            return
        self.add_op(Op(instruction, spent, 1))
        told = schedule(instruction)
        if told is not None:
            self.talk(instruction, told, spent)
        else:
            self.work(instruction, spent, spent.seconds)

    def work(self, instruction: Instruction, spent: Cost, seconds: float) -> None:
        kind = PRODUCT if spent.flops else OTHER
        self.event(COMPUTE, instruction, kind, self.now, seconds)
        self.now = self.flights.compute(self.now, seconds)

    def talk(self, instruction: Instruction, told: Schedule, spent: Cost) -> None:
        """A kernel that sends and receives while it computes."""
        moved = told.collectives(self.network)
        traffic = [self.network.traffic(each) for each in moved]
        flying: dict[Hop, Flight] = {}
        for step, what in told.steps():
            if step == "work":
                self.work(instruction, spent, what * spent.seconds)
            elif step == "send":
                flying[what] = self.fly((*_key(instruction), what), traffic[what[0]])
            else:
                flight, begun = flying[what], self.now
                self.now = self.flights.wait(self.now, flight)
                self.event(COMPUTE, instruction, WAIT, begun, self.now - begun)
                assert flight.end is not None
                lane, seconds = _lane(traffic[what[0]]), flight.end - flight.start
                self.event(lane, instruction, moved[what[0]].kind, flight.start, seconds)
        for i, (each, way) in enumerate(zip(moved, traffic, strict=True)):
            own = [flight for hop, flight in flying.items() if hop[0] == i]
            exposed, hidden = sum(x.exposed for x in own), sum(x.hidden for x in own)
            self.add_transfer(Transfer(instruction, each, way, True, len(own), exposed, hidden))

    def launch(self, instruction: Instruction, moved: Collective) -> None:
        traffic = self.network.traffic(moved)
        key = _key(instruction)
        flight = self.fly(key, traffic)
        self.pending[key] = _Pending(flight, instruction, moved, traffic)

    def fly(self, key: tuple[Any, ...], traffic: Traffic) -> Flight:
        flight = Flight(
            key=key,
            start=self.now,
            moves=self.now + traffic.route.latency,
            left=traffic.bytes * traffic.route.seconds_per_byte,
            route=traffic.route,
        )
        self.flights.launch(flight)
        return flight

    def copy(self, instruction: Instruction, copied: Copy) -> None:
        """Begins a copy between memories: its bytes pass once for each end that is in HBM."""
        passes = (copied.source == 0) + (copied.target == 0)
        left = passes * copied.bytes / self.network.chip.hbm_bandwidth
        if HOST in (copied.source, copied.target):
            left = 0.0
            self.add_op(Op(instruction, Cost(0.0, 0, copied.bytes, "unknown"), 1))
        key = _key(instruction)
        flight = Flight(key, self.now, self.now, left, None)
        self.flights.launch(flight)
        self.pending[key] = _Pending(flight, instruction, None, None)

    def done(self, key: _Key) -> None:
        """Waits for a transfer, and books it."""
        pending = self.pending.pop(key)
        flight, instruction = pending.flight, pending.instruction
        begun = self.now
        self.now = self.flights.wait(self.now, flight)
        lane, kind = COPIES, COPY
        if pending.collective is not None and pending.traffic is not None:
            lane = _lane(pending.traffic)
            kind = pending.collective.kind
        self.event(COMPUTE, instruction, WAIT, begun, self.now - begun)
        end = self.now if flight.end is None else flight.end
        self.event(lane, instruction, kind, flight.start, end - flight.start)
        asynchronous = pending.collective is None or pending.collective.asynchronous
        self.add_transfer(
            Transfer(
                instruction,
                pending.collective,
                pending.traffic,
                asynchronous,
                1,
                flight.exposed,
                flight.hidden,
            )
        )

    def loop(self, instruction: Instruction) -> None:
        count = trips(self.module, instruction)
        if count is None:
            count = 1
            self.remark(f"{instruction.name}: how often it runs cannot be told; it is counted once")
        body = instruction.attributes["body"].lstrip("%")
        inner = self.inside(self.module.computations[body])
        self.repeat(instruction, inner, count)

    def conditional(self, instruction: Instruction) -> None:
        branches = [self.inside(branch) for branch in self.module.callees(instruction)]
        dearest = max(branches, key=lambda branch: branch.seconds)
        if len({branch.seconds for branch in branches}) > 1:
            self.remark(f"{instruction.name}: of its branches the dearest is counted")
        self.repeat(instruction, dearest, 1)

    def inside(self, computation: Computation) -> Timeline:
        return _Run(self.module, self.network, self.clock, self.bundles).timeline(computation)

    def repeat(self, instruction: Instruction, inner: Timeline, count: int) -> None:
        self.remarks |= dict.fromkeys(inner.remarks)
        ops, transfers = inner.times(count)
        for op in ops:
            self.add_op(op)
        for transfer in transfers:
            self.add_transfer(transfer)
        self.loops.append(Loop(instruction.name, self.now, count, inner))
        waits = sum(transfer.exposed for transfer in inner.transfers)
        busy = 1 - waits / inner.seconds if inner.seconds else 1.0
        self.now = self.flights.compute(self.now, count * inner.seconds, busy)

    def add_op(self, op: Op) -> None:
        key = _key(op.instruction)
        known = self.ops.get(key)
        self.ops[key] = dataclasses.replace(op, count=op.count + (known.count if known else 0))

    def add_transfer(self, transfer: Transfer) -> None:
        key = _key(transfer.instruction)
        known = self.arrived.get(key)
        if known is not None:
            transfer = dataclasses.replace(
                transfer,
                count=transfer.count + known.count,
                exposed=transfer.exposed + known.exposed,
                hidden=transfer.hidden + known.hidden,
            )
        self.arrived[key] = transfer

    def event(
        self, lane: str, instruction: Instruction, kind: str, start: float, seconds: float
    ) -> None:
        if seconds > 0:
            name, op_name = instruction.name, instruction.op_name
            self.events.append(Event(lane, name, kind, start, seconds, op_name))

    def remark(self, text: str) -> None:
        self.remarks[text] = None


def _key(instruction: Instruction) -> _Key:
    return instruction.computation, instruction.name


def _lane(traffic: Traffic) -> str:
    return f"{traffic.route.axes or 'unknown axes'} {traffic.route.way}".rstrip()
