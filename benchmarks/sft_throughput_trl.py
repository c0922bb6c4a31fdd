"""TRL's sides of `sft_throughput`: SFTTrainer, stopped and started between blocks of steps.

``trl-packed`` packs the documents into rows and so decides which of them an optimizer step sees; it writes them down
before it starts, for the others to train on the same. ``trl-sorted`` pads instead of packing: the documents of a step in
order of length, in a fixed number of micro-batches, which hardly have padding then. Runs in .venv-trl, where this
project is not installed, and imports nothing of it but two files of benchmarks/.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.blocks import Channel
from benchmarks.sft_throughput_sorted import sorted_micro_batches

CHANNEL = Channel()

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer  # noqa: E402

IGNORED = -100
PACKED = "trl-packed"


class Blocks(TrainerCallback):
    """Waits at the end of a block for the command that starts the next one. A block so is whole rounds of the trainer's
    loop: logging, fetching, forward and backward, update. The trainer's own ``max_steps`` ends the last."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self._left, self._begin = 0, 0.0

    def _wait(self) -> None:
        self._left = int(CHANNEL.receive()["steps"])
        self._begin = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._left -= 1
        if self._left == 0:
            CHANNEL.send({"seconds": time.perf_counter() - self._begin})
            if state.global_step < state.max_steps:
                self._wait()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])


def documents_of(row: dict[str, list[int]]) -> list[dict[str, list[int]]]:
    """The documents of a packed row."""
    found, end = [], 0
    for length in row["seq_lengths"]:
        start, end = end, end + length
        found.append({name: row[name][start:end] for name in ("input_ids", "labels")})
    return found


def write_steps(rows: Dataset, rows_per_step: int, num_steps: int, file: Path) -> None:
    """The documents of every optimizer step, a line a step."""
    if len(rows) < rows_per_step * num_steps:
        sys.exit(f"{len(rows)} packed rows are not enough for {num_steps} steps of {rows_per_step}")
    with file.open("w") as stream:
        for first in range(0, rows_per_step * num_steps, rows_per_step):
            step = rows.select(range(first, first + rows_per_step))
            stream.write(json.dumps([d for row in step for d in documents_of(row)]) + "\n")


class SortedTrainer(SFTTrainer):
    """SFTTrainer on given micro-batches, which TRL has no option for."""

    numbers: list[list[int]]

    def get_train_dataloader(self) -> DataLoader:
        loader = DataLoader(self.train_dataset, batch_sampler=self.numbers, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, documents: list[dict[str, list[int]]]) -> float:
    """Mean cross-entropy over the loss tokens, one document at a time, from the model's ordinary logits."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for document in documents:
        logits = model(input_ids=torch.tensor([document["input_ids"]]), use_cache=False).logits[0, :-1]
        labels = torch.tensor(document["labels"][1:])
        total += float(torch.nn.functional.cross_entropy(logits.double(), labels, reduction="sum"))
        count += int((labels != IGNORED).sum())
    model.train(was_training)
    return total / count


def configure(settings: dict[str, Any]) -> SFTConfig:
    """What both arms share: TRL's own fused AdamW, no recomputation, nothing saved or reported."""
    return SFTConfig(
        output_dir=str(Path(settings["work"]) / settings["arm"]),
        packing=settings["arm"] == PACKED,
        packing_strategy="bfd",
        max_length=settings["row_tokens"],
        per_device_train_batch_size=1,
        gradient_accumulation_steps=settings["micro_batches"][settings["arm"]],
        max_steps=settings["total_steps"],
        shuffle_dataset=settings["arm"] == PACKED,
        train_sampling_strategy="sequential",  # of rows that are shuffled already, so that they can be written down
        learning_rate=settings["lr"],
        lr_scheduler_type="constant",
        warmup_steps=0,
        optim="adamw_torch_fused",
        adam_beta1=settings["betas"][0],
        adam_beta2=settings["betas"][1],
        adam_epsilon=settings["eps"],
        weight_decay=0.0,
        max_grad_norm=settings["grad_clip"],
        router_aux_loss_coef=0.0,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        seed=settings["seed"],
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
    )


def build(
    settings: dict[str, Any], kind: type[SFTTrainer], documents: list[dict[str, list[int]]], blocks: Blocks
) -> SFTTrainer:
    """A trainer of ``kind`` around the model of the settings."""
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    model.set_experts_implementation("grouped_mm")
    trainer = kind(
        model=model,
        args=configure(settings),
        train_dataset=Dataset.from_list(documents),
        processing_class=AutoTokenizer.from_pretrained(settings["model"]),
        callbacks=[blocks],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def build_packed(
    settings: dict[str, Any], documents: list[dict[str, list[int]]], blocks: Blocks
) -> SFTTrainer:
    """Packs the documents and writes down those of every step."""
    trainer = build(settings, SFTTrainer, documents, blocks)
    rows_per_step, file = settings["micro_batches"][PACKED], Path(settings["steps"])
    write_steps(trainer.train_dataset, rows_per_step, settings["total_steps"], file)
    return trainer


def build_sorted(settings: dict[str, Any], blocks: Blocks) -> SFTTrainer:
    """Trains on the steps that were written down."""
    steps = [json.loads(line) for line in Path(settings["steps"]).read_text().splitlines()]
    documents, numbers = sorted_micro_batches(steps, settings["micro_batches"][settings["arm"]])
    trainer = build(settings, SortedTrainer, documents, blocks)
    assert len(trainer.train_dataset) == len(documents), "TRL has left documents out"
    trainer.numbers = numbers
    return trainer


def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["num_threads"])
    data = json.loads(Path(settings["data"]).read_text())
    blocks = Blocks()
    if settings["arm"] == PACKED:
        trainer = build_packed(settings, data["train"], blocks)
    else:
        trainer = build_sorted(settings, blocks)
    CHANNEL.send(
        {
            "held_out": held_out_loss(trainer.model, data["held_out"]),
            "attention": trainer.model.config._attn_implementation,
            "versions": {name: importlib.metadata.version(name) for name in ("trl", "torch", "transformers")},
        }
    )
    trainer.train()
    CHANNEL.receive()
    CHANNEL.send({"losses": blocks.losses, "held_out": held_out_loss(trainer.model, data["held_out"])})


if __name__ == "__main__":
    main()
