"""What must be true of a worker process before vLLM is imported in it: environment variables and cores."""

from __future__ import annotations

import os

QUIET = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def cores_of_worker(index: int, cores_per_worker: int, available: list[int]) -> list[int]:
    """Cores of rollout worker ``index``: neighbours in turn, shared once there are more workers than cores."""
    count = min(cores_per_worker, len(available))
    return sorted({available[(index * count + offset) % len(available)] for offset in range(count)})


def prepare(index: int, cores_per_worker: int, tensor_parallel_size: int = 1) -> None:
    """Set this process up for an in-process engine. Values that the user exported are kept."""
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine lives here and is driven step by step
    os.environ["TORCHDYNAMO_DISABLE"] = (
        "1"  # the CPU sampler would be compiled for 5 to 15 s, and gains nothing
    )
    if tensor_parallel_size == 1:
        cores = cores_of_worker(index, cores_per_worker, sorted(os.sched_getaffinity(0)))
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
        os.environ["OMP_NUM_THREADS"] = str(len(cores))
