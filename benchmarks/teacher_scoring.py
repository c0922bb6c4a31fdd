"""What scoring with the teacher pool costs: against a bare forward, and with 1 to 8 LoRA teachers on one base.

    .venv/bin/python benchmarks/teacher_scoring.py [--json FILE] [--repeats 9] [--hidden 256] [--groups 64] [--tokens 120]

1. Tokens per second of `TeacherWorker.score` (fetching groups from Ray's store, batching, chunked softmax, checks,
   packing the result) against the least that any scoring needs: the model on the same padded batches, log-softmax,
   gather. Both in this process, alternating; the ratio is the median of the ratios of neighbours. Bar: 0.9.
2. Seconds of a step whose rollouts are spread evenly over 1, 2, 4 and 8 LoRA teachers (rank 8 on attention) of one
   base: the same tokens, one call, as in a run. Bar: 1.25 times one teacher. Beside it the same with one call per teacher,
   as adapters are scored that PEFT cannot mix. Also the bytes that are held, and the largest difference of the scores.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from transformers import AutoModelForCausalLM

from examples.tiny.model import build_model
from posttrain.config import Dtype, ModelConfig, TeacherWorkerConfig
from posttrain.records import Prompt, Rollout, RolloutGroup, RolloutStatus, TeacherScores, Turn
from teachers.scorer import plan_batches
from teachers.teacher import Teacher
from teachers.worker import ScoringTask, TeacherWorker

NUM_TEACHERS = (1, 2, 4, 8)


def make_groups(num_groups: int, mean_tokens: int, vocab_size: int) -> list[RolloutGroup]:
    """One rollout a group, log-normal lengths."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(mean_tokens), 0.4, num_groups), 8, 4 * mean_tokens).astype(int)
    return [_group(rng.integers(0, vocab_size, n).astype(np.int32), f"g{i}") for i, n in enumerate(lengths)]


def _group(token_ids: np.ndarray, name: str) -> RolloutGroup:
    prompt = Prompt(prompt_id=name, source="s", domain="d", messages=[], token_ids=token_ids[:1])
    turn = Turn(
        author="policy",
        token_ids=token_ids,
        loss_mask=np.ones(len(token_ids), bool),
        rollout_logprobs=np.zeros(len(token_ids), np.float32),
        policy_versions=np.zeros(len(token_ids), np.int32),
    )
    rollout = Rollout(
        group_id=name,
        rollout_id=f"{name}-0",
        prompt=prompt,
        turns=[turn],
        messages=[],
        routed_experts=None,
        finish_reason="stop",
        status=RolloutStatus.completed,
    )
    return RolloutGroup(group_id=name, prompt=prompt, rollouts=[rollout])


def make_adapters(base: str, folder: Path, count: int) -> list[str]:
    """LoRA adapters with random weights on the attention of ``base``."""
    import peft

    paths = []
    for index in range(count):
        torch.manual_seed(index)
        model = AutoModelForCausalLM.from_pretrained(base)
        config = peft.LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            init_lora_weights=False,
        )
        adapted = peft.get_peft_model(model, config)
        adapted.save_pretrained(str(folder / f"adapter_{index}"))
        paths.append(str(folder / f"adapter_{index}"))
    return paths


@torch.no_grad()
def bare_forward(model: Any, token_ids: list[np.ndarray], max_tokens: int) -> list[np.ndarray]:
    """The least that any scoring needs, on the batches that the pool forms."""
    scores: list[np.ndarray] = [np.zeros(0, np.float32)] * len(token_ids)
    for batch in plan_batches([len(ids) for ids in token_ids], max_tokens):
        padded = torch.zeros(len(batch), max(len(token_ids[i]) for i in batch), dtype=torch.long)
        for row, index in enumerate(batch):
            padded[row, : len(token_ids[index])] = torch.from_numpy(token_ids[index].astype(np.int64))
        logprobs = model(input_ids=padded, use_cache=False).logits.float().log_softmax(-1)
        chosen = logprobs[:, :-1].gather(-1, padded[:, 1:, None]).squeeze(-1).numpy()
        for row, index in enumerate(batch):
            scores[index] = chosen[row, : len(token_ids[index]) - 1]
    return scores


def seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def paired(
    first: Callable[[], Any], second: Callable[[], Any], repeats: int
) -> tuple[list[float], list[float]]:
    """Seconds of both, alternating, after one round that warms up; who begins changes every round."""
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        order = (0, 1) if repeat % 2 else (1, 0)
        for which in order:
            spent = seconds((first, second)[which])
            if repeat:
                times[which].append(spent)
    return times


def measure_pool(
    worker: TeacherWorker, base: str, refs: list[Any], ids: list[np.ndarray], repeats: int
) -> dict[str, Any]:
    teacher = Teacher(key="teachers.d", path=base)
    task = ScoringTask(key="base", teacher=teacher, name=base, group_refs=refs)
    scores = worker.score(task)
    model: Any = worker.backends["base"]
    bare = bare_forward(model.model, ids, worker.cfg.max_tokens_per_batch)
    gap = max(float(np.abs(s.logprobs[1:] - b).max()) for s, b in zip(scores, bare, strict=True))
    assert gap < 1e-4, f"pool and bare forward disagree by {gap}"
    pool_s, bare_s = paired(
        lambda: worker.score(task),
        lambda: bare_forward(model.model, ids, worker.cfg.max_tokens_per_batch),
        repeats,
    )
    num_tokens = sum(len(i) for i in ids)
    return {
        "num_tokens": num_tokens,
        "pool_tokens_per_s": num_tokens / statistics.median(pool_s),
        "bare_tokens_per_s": num_tokens / statistics.median(bare_s),
        "ratio": statistics.median(b / p for b, p in zip(bare_s, pool_s, strict=True)),
        "max_difference": gap,
    }


def measure_lora(
    worker: TeacherWorker, base: str, adapters: list[str], refs: list[Any], repeats: int
) -> list[dict[str, Any]]:
    """Seconds of the same rollouts scored by n teachers in turn; every n is measured beside n = 1."""
    teachers = [Teacher(key=f"teachers.d{i}", path=base, adapter=path) for i, path in enumerate(adapters)]
    worker.set_teachers({f"base+{i}": teacher for i, teacher in enumerate(teachers)})

    def tasks(count: int) -> list[ScoringTask]:
        return [
            ScoringTask(key=f"base+{i}", teacher=teachers[i], name=adapters[i], group_refs=refs[i::count])
            for i in range(count)
        ]

    def common(count: int) -> list[list[TeacherScores]]:
        return worker.score_all(tasks(count))

    def apart(count: int) -> list[list[TeacherScores]]:
        return [worker.score(task) for task in tasks(count)]

    rows = []
    for count in NUM_TEACHERS:
        gaps = [
            np.abs(one.logprobs - other.logprobs).max()
            for mixed, single in zip(common(count), apart(count), strict=True)
            for one, other in zip(mixed, single, strict=True)
        ]
        assert max(gaps) < 1e-4, f"scores of mixed batches are off by {max(gaps)}"
        one_s, many_s = paired(lambda: common(1), lambda n=count: common(n), repeats)  # type: ignore[misc]
        first_s, apart_s = paired(lambda: common(1), lambda n=count: apart(n), repeats)  # type: ignore[misc]
        rows.append(
            {
                "num_teachers": count,
                "seconds": statistics.median(many_s),
                "ratio": statistics.median(m / o for m, o in zip(many_s, one_s, strict=True)),
                "ratio_one_call_each": statistics.median(
                    a / f for a, f in zip(apart_s, first_s, strict=True)
                ),
                "max_difference": float(max(gaps)),
            }
        )
    return rows


def held_bytes(worker: TeacherWorker) -> tuple[int, int]:
    """Bytes of base weights and of adapters in the worker."""
    named = [item for backend in worker.backends.values() for item in backend.model.named_parameters()]  # type: ignore[attr-defined]
    sizes = [("lora_" in name, p.numel() * p.element_size()) for name, p in named]
    return sum(n for is_lora, n in sizes if not is_lora), sum(n for is_lora, n in sizes if is_lora)


def measure(work: Path, args: argparse.Namespace) -> dict[str, Any]:
    base = str(
        build_model(
            work / "base",
            0,
            family="qwen3_moe",
            hidden=args.hidden,
            moe_width=args.hidden,
            max_positions=2048,
        )
    )
    adapters = make_adapters(base, work, max(NUM_TEACHERS))
    cfg = TeacherWorkerConfig(
        dtype=Dtype.float32, max_tokens_per_batch=args.batch_tokens, cores_per_worker=args.threads
    )
    worker = TeacherWorker(cfg, ModelConfig(path=base))
    groups = make_groups(args.groups, args.tokens, vocab_size=90)
    refs = [ray.put(group) for group in groups]
    ids = [group.rollouts[0].token_ids for group in groups]
    pool = measure_pool(worker, base, refs, ids, args.repeats)
    weights, _ = held_bytes(worker)
    lora = measure_lora(worker, base, adapters, refs, args.repeats)
    after, extra = held_bytes(worker)
    assert after == weights, "the base is held more than once"
    memory = {"base_bytes": weights, "adapter_bytes": extra, "num_adapters": len(adapters)}
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return {"machine": machine, "repeats": args.repeats, "pool": pool, "lora": lora, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--repeats", type=int, default=9, help="measured rounds of each comparison")
    parser.add_argument("--hidden", type=int, default=256, help="width of the model")
    parser.add_argument("--groups", type=int, default=64, help="rollouts of a step")
    parser.add_argument("--tokens", type=int, default=120, help="median length of a rollout")
    parser.add_argument("--batch-tokens", type=int, default=8192, help="teacher_workers.max_tokens_per_batch")
    parser.add_argument("--threads", type=int, help="torch threads (default: all cores)")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=200 * 2**20)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), args)
    ray.shutdown()
    pool = result["pool"]
    print(
        f"pool {pool['pool_tokens_per_s']:,.0f} tokens/s, bare forward {pool['bare_tokens_per_s']:,.0f}: {pool['ratio']:.3f}"
    )
    for row in result["lora"]:
        print(
            f"{row['num_teachers']} LoRA teachers: {row['seconds']:.3f} s a step, {row['ratio']:.3f} of one;"
            f" with a call each {row['ratio_one_call_each']:.3f}"
        )
    memory = result["memory"]
    print(
        f"held: base {memory['base_bytes']:,} bytes once, {memory['num_adapters']} adapters {memory['adapter_bytes']:,} bytes"
    )
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
