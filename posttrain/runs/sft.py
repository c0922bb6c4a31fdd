"""Supervised fine-tuning: one generalist from demonstrations."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import ray

from posttrain.clock import Clock
from posttrain.config import Aggregation, SFTRun, UserError
from posttrain.data.sources import load_conversations, sources_of
from posttrain.data.tokenizer import load_tokenizer
from posttrain.engines import Engines
from posttrain.learner.group import is_window_end
from posttrain.monitor import Monitor
from posttrain.records import LossSettings, SampleRef, TrainingSample
from posttrain.run_folder import RunFolder, plain
from posttrain.scheduler import Scheduler
from posttrain.tracking import Tracker
from posttrain.tracking.jsonl import read_jsonl
from posttrain.validation import Validation
from posttrain.weighting import token_weights


def run(cfg: SFTRun, engines: Engines | None = None) -> str:
    """Train, validate, and return the folder of the finished model. Resumes where the run folder stands.

    Args:
        engines: living processes to use; None starts and ends its own.
    """
    folder = RunFolder.open(cfg)
    if folder.finished:
        print(f"{folder.path}: finished before; nothing to do")
        folder.close()
        return str(folder.model)
    scheduler = Scheduler(
        *conversations(cfg),
        cfg.seed,
        identify=lambda sample: sample.token_ids.tobytes() + sample.loss_mask.tobytes(),
    )
    with nullcontext(engines) if engines else Engines.of(cfg) as engines:
        learner = engines.learner(cfg.learner, cfg.model, cfg.algorithm.steps, cfg.seed)
        validation = Validation(cfg.algorithm, held_out(cfg), learner, folder)
        first_step = 1
        if checkpoint := folder.latest():
            learner.load_checkpoint(checkpoint.folder)
            scheduler.load_state(checkpoint.state["scheduler"])
            validation.load_state(checkpoint.state.get("validation"))
            first_step = checkpoint.step + 1
        with Tracker(
            folder.path,
            cfg.tracking,
            cfg.name,
            plain(cfg),
            cfg.algorithm.steps,
            first_step - 1,
            ["loss", "grad_norm"],
        ) as tracker:
            monitor = Monitor(cfg.tracking.alarms, tracker, read_jsonl(folder.path / "metrics.jsonl"))
            for step in range(first_step, cfg.algorithm.steps + 1):
                if validation.stop:
                    break
                clock = Clock()
                drawn = scheduler.draw(cfg.algorithm.batch_size)
                scheduler.trained(d.group_id for d in drawn)
                with clock("train"):
                    loss = LossSettings(kind="sft", max_loss=monitor.max_loss)
                    metrics = learner.train_step(
                        batch([d.item for d in drawn], cfg.algorithm.aggregation), loss, step
                    )
                with clock("validate"):
                    metrics |= validation.metrics(step)
                if validation.stop:
                    tracker.event(
                        "early_stop",
                        step=step,
                        message=f"step {step}: no lower loss in {cfg.algorithm.early_stop_patience} validations",
                    )
                if is_window_end(learner, step, cfg.algorithm.steps, metrics):
                    tracker.expert_load(step, learner.expert_load())
                save_now = monitor.check(step, metrics) or validation.stop
                # Logged before it is saved: a crash in between repeats the step, and its line is cut back.
                tracker.log(step, metrics | clock.metrics(num_tokens=metrics["num_tokens"]))
                if step % cfg.checkpoint.every_steps == 0 or step == cfg.algorithm.steps or save_now:
                    state = {"scheduler": scheduler.state(), "validation": validation.state()}
                    folder.save(step, learner.save_checkpoint, state)
                    validation.prune()
                monitor.end()
            validation.save_model()
    folder.finish()
    return str(folder.model)


def conversations(cfg: SFTRun) -> tuple[dict[str, list[TrainingSample]], dict[str, float]]:
    """Tokenised conversations and mixture weight of every source, of one domain where ``cfg.domain`` says so."""
    tokenizer = load_tokenizer(cfg.model.path, cfg.model.revision, cfg.model.trust_remote_code)
    by_source, weights = {}, {}
    for name, source in sources_of(cfg.data).items():
        data = replace(cfg.data, path=None, sources={name: source})
        samples = load_conversations(data, tokenizer, cfg.algorithm.max_tokens)
        by_source[name] = [s for s in samples if cfg.domain in (None, s.domain)]
        weights[name] = source.weight
    if not any(by_source.values()):
        raise UserError(f"domain={cfg.domain!r}: no conversation of that domain in data.sources")
    return by_source, weights


def held_out(cfg: SFTRun) -> list[SampleRef]:
    """Held-out conversations, of one domain where ``cfg.domain`` says so; none without ``algorithm.validate_every``."""
    if cfg.algorithm.validate_every == 0:
        return []
    tokenizer = load_tokenizer(cfg.model.path, cfg.model.revision, cfg.model.trust_remote_code)
    max_tokens = cfg.algorithm.max_tokens
    return batch(load_conversations(cfg.data, tokenizer, max_tokens, eval=True, domain=cfg.domain))


def batch(
    samples: list[TrainingSample], aggregation: Aggregation = Aggregation.token_mean
) -> list[SampleRef]:
    """One step's samples in one object, each with the weight of its loss tokens in the global batch."""
    counts = [int(sample.loss_mask.sum()) for sample in samples]
    weighting = token_weights(counts, [sample.domain for sample in samples], aggregation)
    ref = ray.put(samples)
    return [
        SampleRef(
            source_ref=ref,
            index=i,
            num_tokens=len(sample.token_ids),
            weight=weight,
            domain=sample.domain,
        )
        for i, (sample, weight) in enumerate(zip(samples, weighting.weights.tolist(), strict=True))
    ]
