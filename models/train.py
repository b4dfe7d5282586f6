"""Trains a vision transformer: `python -m models.train CONFIG [--field value ...]`.

CONFIG names a file of models/configs; `python -m models.train CONFIG --help` lists its fields. The
output folder gets the config, the metrics as JSON lines, the weights as safetensors and the curves
as a picture.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence

import jax
import numpy as np

from models import configs, data, figures, metrics, step, weights
from models.config import Config
from models.devices import layout_of, simulate
from models.files import atomically
from models.journal import Journal
from models.progress import progress


def main(arguments: Sequence[str]) -> None:
    """What the command line asks for."""
    config = configs.from_command_line(arguments)
    simulate(config.devices)
    train(config)


def train(config: Config) -> float:
    """Trains, and leaves everything in `config.out`.

    Args:
      config: the run.

    Returns:
      The accuracy on the test images at the end.

    Raises:
      ValueError: if the config asks for what the devices, the data or the model cannot give.
    """
    leader = jax.process_index() == 0
    layout = layout_of(config)
    rows = step.rows_held(layout, config.batch)
    train_images, test_images = data.digits()
    if config.model.num_classes is None or config.model.num_classes < train_images.classes:
        raise ValueError(
            f"num_classes={config.model.num_classes} are too few: the images have "
            f"{train_images.classes} classes"
        )
    if leader:
        config.out.mkdir(parents=True, exist_ok=True)
        with atomically(config.out / "config.json") as draft:
            draft.write_text(json.dumps(dataclasses.asdict(config), default=str, indent=2) + "\n")

    def batch_of(number: int) -> step.Placed:
        batch = data.train_batch(
            train_images, config.batch, config.augment, seed=config.seed, step=number, rows=rows
        )
        return step.place(batch, layout)

    with (
        progress(config.steps, visible=leader) as line,
        metrics.writing(config.out / "metrics.jsonl" if leader else None) as file,
    ):
        line.say(_described(config))
        journal = Journal(file, line, config.batch)
        graph, state = step.create(config, layout)
        count = sum(x.size for x in jax.tree.leaves(state.params))
        journal.say(f"{count:,} parameters, {len(train_images):,} training images")
        train_step = step.compile_training(graph, config, state, batch_of(0))
        eval_step = step.compile_evaluation(graph, config, state, batch_of(0))
        journal.say("compiled")

        for number in range(1, config.steps + 1):
            state, numbers = train_step(state, batch_of(number - 1))
            journal.trained(number, numbers)
            if number % config.evaluate == 0 or number == config.steps:
                journal.flush()
                sums = np.zeros(3)
                for batch in data.eval_batches(test_images, config.batch, rows=rows):
                    sums += jax.device_get(eval_step(state.params, step.place(batch, layout)))
                loss, accuracy = (sums[:2] / sums[2]).tolist()
                journal.evaluated(number, loss, accuracy)

        weights.save(state.params, config.out / "weights.safetensors")
        if leader:
            figures.curves(file.records, config.out / "curves.png", _described(config))
        journal.say(
            f"test accuracy {accuracy:.2%} of {len(test_images)} images; metrics, weights and "
            f"curves are in {config.out}"
        )
    return accuracy


def _described(config: Config) -> str:
    """A run in one line."""
    name, kind = config.out.name, jax.devices()[0].device_kind
    if config.devices == 1:
        return f"{name} on one {kind}"
    what = "simulated devices" if kind == "cpu" else f"x {kind}"
    data, fsdp, tensor = config.mesh
    return (
        f"{name} on {config.devices} {what} ({data} data x {fsdp} fsdp x {tensor} tensor), "
        f"{config.layout}, {config.algorithm or 'any algorithm'}, {config.backend or 'any backend'}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
