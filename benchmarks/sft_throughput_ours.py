"""This project's side of `sft_throughput`: SFT steps of the learner of the runs, a block at a command.

Metrics, num-zeros and expert health are computed in every step, as in a run.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from pathlib import Path

from benchmarks.blocks import Channel

CHANNEL = Channel()

import numpy as np  # noqa: E402

import benchmarks.local_learner as local  # noqa: E402
from posttrain.config import LearnerConfig  # noqa: E402
from posttrain.records import TrainingSample  # noqa: E402

IGNORED = -100


def sample(document: dict[str, list[int]]) -> TrainingSample:
    """A document with the labels of TRL, in which the tokens that are not learned are -100."""
    token_ids = np.array(document["input_ids"], np.int32)
    loss_mask = np.array(document["labels"]) != IGNORED
    return TrainingSample(
        token_ids=token_ids, loss_mask=loss_mask, weights=np.ones(len(token_ids), np.float32)
    )


def main() -> None:
    settings = json.loads(sys.argv[1])
    learner = local.LocalLearner(settings["num_threads"])
    config = LearnerConfig(**settings["learner"])
    learner.reset(config, Path(settings["model"]), settings["total_steps"], settings["seed"])
    held_out = [sample(d) for d in json.loads(Path(settings["data"]).read_text())["held_out"]]
    batches = [
        [sample(d) for d in json.loads(line)] for line in Path(settings["steps"]).read_text().splitlines()
    ]
    CHANNEL.send(
        {
            "held_out": learner.validate(held_out)["all"],
            "attention": learner.worker.policy.model.config._attn_implementation,
            "versions": {
                name: importlib.metadata.version(name) for name in ("deepspeed", "torch", "transformers")
            },
        }
    )
    losses: list[float] = []
    while "steps" in (command := CHANNEL.receive()):
        begin = time.perf_counter()
        for _ in range(command["steps"]):
            step = len(losses) + 1
            losses.append(learner.train_step(batches[step - 1], step)["loss"])
        CHANNEL.send({"seconds": time.perf_counter() - begin})
    CHANNEL.send({"losses": losses, "held_out": learner.validate(held_out)["all"]})


if __name__ == "__main__":
    main()
