"""Trains a vision transformer: `python -m models.train CONFIG [--field value ...]`.

CONFIG names a file of models/configs; `python -m models.train CONFIG --help` lists its fields. The
output folder gets the config, the metrics as JSON lines, checkpoints, the weights as safetensors
and the curves as a picture. A run that was stopped goes on where its newest checkpoint is.

`--dry-run` compiles the step and ends, `--dry-run v4:8x8x16` does so for a TPU slice that need not
be there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from models import configs, data, dry_run, formats, guard, resuming, step
from models.checkpoint import Folder, alone
from models.config import Config
from models.devices import layout_of, simulate
from models.feed import Feed, without_index
from models.reporting import figures, metrics
from models.reporting.goodput import Ledger
from models.reporting.journal import Fetched, Journal
from models.reporting.profile import Profile
from models.reporting.progress import progress
from models.reporting.speed import speed_of
from models.watch import agreement, distributed, fingerprint, replicas, status, store
from models.watch.preemption import Preemption
from models.watch.watchdog import Watchdog


class Result(NamedTuple):
    """How a run ended: after which step, with what accuracy on the test images (nan where it was
    asked to leave before), and the status for whoever started it."""

    step: int
    accuracy: float
    status: int


def main(arguments: Sequence[str]) -> int:
    """What the command line asks for. Returns a status of models/watch/status.py."""
    slices, arguments = dry_run.asked(arguments)
    config = configs.from_command_line(arguments)
    if slices is not None:
        return dry_run.run(slices, arguments)
    with distributed.joined(config.watch) as processes:
        simulate(math.ceil(config.devices / processes))
        return train(config).status


def train(config: Config) -> Result:
    """Trains, and leaves everything in `config.out`.

    Args:
      config: the run.

    Raises:
      ValueError: if the config asks for what the devices, the data or the model cannot give.
      Held: if another run has the folder.
      Damaged, Mismatch: if there are checkpoints, and none that this run can go on from.
      Fault: if the run cannot go on: it gave up, processes disagree, or memory is damaged.
    """
    leader = jax.process_index() == 0
    layout = layout_of(config)
    rows = step.rows_held(layout, config.batch)
    train_images, test_images = data.splits(
        config.data,
        image_shape=config.model.image_shape,
        channels=config.model.channels,
        classes=config.model.num_classes,
        seed=config.seed,
    )
    if train_images.classes is None or config.model.num_classes is None:
        raise ValueError(
            f"nothing to learn: the images have {train_images.classes} classes, the model "
            f"num_classes={config.model.num_classes}; images need labels (--data.labels, or a "
            "folder for each class), the model a classifier"
        )
    if config.watch.agree:
        asked = agreement.settings(configs.flat(config))
        agreement.check(asked | agreement.code(), config.watch.patience)

    with contextlib.ExitStack() as stack:
        line = stack.enter_context(progress(config.steps, visible=leader))
        stack.enter_context(alone(config.out))
        if leader:
            configs.save(config, config.out / "config.json")
        line.say(configs.described(config))
        ledger = Ledger(config.out / "ledger.jsonl" if leader and config.checkpoint.every else None)

        # The state: of the newest checkpoint that is good, or as the seed makes it.
        folder = None
        if config.checkpoint.every is not None:
            folder = stack.enter_context(
                Folder(
                    config.out / "checkpoints",
                    config.checkpoint,
                    identity=resuming.identity(config),
                    say=line.say,
                )
            )
        graph, described = step.abstract(config, layout)
        with ledger.spend("restore"):
            found, at = resuming.resume(folder, described) or (None, resuming.Place())
            state = step.create(config, layout)[1] if found is None else found
        ledger.begin(at.step)
        resumed = at.step

        file = stack.enter_context(
            metrics.writing(
                config.out if leader else None,
                resumed=resumed,
                tensorboard=config.report.tensorboard,
                say=line.say,
            )
        )
        journal = Journal(file, line, speed_of(config.model, config.batch, config.devices))
        count = sum(x.size for x in jax.tree.leaves(state.params))
        journal.say(f"{count:,} parameters, {len(train_images):,} training images")
        if resumed:
            journal.say(f"going on after step {resumed:,}, with batch {at.batch:,}")

        # The data, and the programs.
        feed = stack.enter_context(
            Feed(train_images, config, layout, rows, start=at.batch, like=at.data)
        )
        with ledger.spend("compile"):
            train_step = {}
            for observed, variant in step.variants(config).items():
                lowered = step.jitted_training(graph, variant, state).lower(state, feed.first())
                if config.watch.agree:
                    topic = "program with statistics" if observed else "program"
                    agreement.check(agreement.program(lowered), config.watch.patience, topic=topic)
                train_step[observed] = lowered.compile()
            eval_step = step.compile_evaluation(graph, config, state, feed.first())
        journal.say("compiled")

        copies = replicas.Replicas(state.params) if config.watch.replicas_every else None
        chain = fingerprint.Chain(at.chain) if config.watch.fingerprint_every else None
        preemption = stack.enter_context(Preemption())
        profile = stack.enter_context(Profile(config.report, config.out / "profile", journal.say))
        watchdog = stack.enter_context(
            Watchdog(
                config.watch.stall,
                config.watch.on_stall,
                stacks=config.out,
                others=store.connected(),
                rank=jax.process_index(),
            )
        )

        def evaluated() -> float:
            """The accuracy of the state on the test images, reported."""
            watchdog.rest()
            with ledger.spend("evaluate"):
                sums = np.zeros(3)
                for batch in data.eval_batches(test_images, config.data, config.batch, rows=rows):
                    placed = step.place(without_index(batch), layout)
                    sums += jax.device_get(eval_step(state.averaged, placed))
                loss, accuracy = (sums[:2] / max(1.0, sums[2])).tolist()
            journal.evaluated(at.step, loss, accuracy)
            return accuracy

        def settled(known: Fetched | None) -> guard.Verdict:
            """What follows from the numbers of a step, which are known a step later."""
            if known is None:
                return "go"
            watchdog.beat(known.step)
            if copies is not None and "copies" in known.marks:
                replicas.raise_if(copies.odd(known.marks["copies"]))
            if chain is not None:
                link = chain.add(known.step, known.marks["batch"], known.marks.get("params"))
                if "params" in known.marks:
                    file.write(step=known.step, fingerprint=link)
            verdict = guard.decide(config.guard, known.numbers, at.rollbacks)
            if verdict != "go":
                journal.say(guard.report(config.guard, known.numbers, at.rollbacks, known.step))
            return verdict

        accuracy, leaving = math.nan, False
        with jax.transfer_guard("disallow"):  # what crosses to the host and back is asked for
            while at.step < config.steps and not leaving:
                profile.before(at.step + 1)
                batch, marks, waited = feed.next(marked=chain is not None)
                ledger.add("data", waited)
                observed = step.observed(config, at.step + 1)
                state, numbers = train_step[observed](state, batch)
                at = dataclasses.replace(at, step=at.step + 1, batch=feed.step)
                if copies and at.step % (config.watch.replicas_every or 1) == 0:
                    marks["copies"] = copies.start(state.params)
                if chain and at.step % (config.watch.fingerprint_every or 1) == 0:
                    marks["params"] = fingerprint.marks(state.params)
                known = journal.trained(at.step, numbers, marks, waited)
                verdict = settled(known)
                ledger.tick(at.step)

                last, leaving = at.step == config.steps, preemption.reached()
                evaluate = last or at.step % config.evaluate == 0
                save = folder is not None and (last or leaving or folder.due(at.step))
                if verdict == "go" and (evaluate or save):
                    known = journal.flush()  # no state is saved or shown that was not looked at
                    verdict = settled(known)
                if verdict == "give up":
                    raise status.Fault(
                        f"gave up after step {at.step:,}; {config.out}/metrics.jsonl has the steps",
                        status.GAVE_UP,
                    )
                if verdict == "rollback" and known is not None:
                    watchdog.rest()
                    journal.drop()
                    with ledger.spend("restore"):
                        good = known.step - int(known.numbers["bad_streak"])
                        older, at = resuming.go_back(folder, described, config, at, good)
                        state = step.create(config, layout)[1] if older is None else older
                        feed.jump(at.batch)
                    chain = fingerprint.Chain(at.chain) if chain else None
                    journal.say(f"went back to step {at.step:,}, goes on with batch {at.batch:,}")
                    leaving = False
                    continue
                if folder is not None and save:
                    watchdog.rest()
                    with ledger.spend("save"):
                        at = dataclasses.replace(at, chain=chain.value if chain else "")
                        beside = resuming.extra(at, feed.state())
                        folder.save(at.step, state, beside, wait=last or leaving)
                    ledger.mark(at.step)
                if evaluate and not leaving:
                    accuracy = evaluated()
            if leaving and at.step < config.steps:
                where = (
                    f"saved in {folder.path}" if folder else "nothing saved: no checkpoint.every"
                )
                journal.say(f"asked to leave, and left after step {at.step:,}; {where}")
                return Result(at.step, math.nan, config.watch.preempted_status)
            if math.isnan(accuracy):  # the run had ended before
                accuracy = evaluated()

        if config.report.weights:
            formats.save(state.averaged, config.model, config.out / "weights.safetensors")
        if leader:
            figures.curves(file.records, config.out / "curves.png", configs.described(config))
        if folder is not None:
            journal.say(str(ledger.report(at.step)))
        journal.say(
            f"test accuracy {accuracy:.2%} of {len(test_images)} images; metrics, weights and "
            f"curves are in {config.out}"
        )
    return Result(at.step, accuracy, status.FINISHED)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
