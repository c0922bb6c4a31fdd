"""Write the tiny corpus in the public row format: demonstrations for SFT, prompts, and two held-out splits.

Owns the splits. No prompt text occurs in two of them, or twice in one (demonstrations alone may repeat a prompt,
since math has only 8,100 sums); this is checked by hash before anything is written. Files in the output folder:
`sft.jsonl`, and for every domain `prompts.<domain>.jsonl` (RL and MOPD), `valid.<domain>.jsonl` (choosing
hyper-parameters), `heldout.<domain>.jsonl` (the final table).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.tiny.domains import Task, World, demonstrate, worlds

SFT = "sft.jsonl"
SPLITS = ("prompts", "valid", "heldout")


def _fresh_tasks(world: World, rng: random.Random) -> Iterator[Task]:
    """Tasks whose prompts differ from all earlier ones; ValueError when the world has no more of them."""
    seen: set[str] = set()
    num_repeats = 0
    while num_repeats < 1_000:
        task = world.sample(rng)
        num_repeats += 1
        if task.prompt not in seen:
            num_repeats = 0
            seen.add(task.prompt)
            yield task
    raise ValueError(
        f"domain {world.name} has only about {len(seen)} different prompts; ask for smaller splits"
    )


def _row(world: World, task: Task, reply: list[dict[str, str]]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "messages": [{"role": "user", "content": task.prompt}, *reply],
        "domain": world.name,
    }
    row["answer"] = task.answer
    if world.tools:
        row["tools"] = world.tools
    return row


def _demonstration(world: World, rng: random.Random, held_back: set[str], row_id: str) -> dict[str, Any]:
    """One SFT row whose prompt is in none of the other splits."""
    while True:
        task = world.sample(rng)
        row = _row(world, task, demonstrate(task, rng))
        if prompt_hash(row) not in held_back:
            return row | {"id": row_id}


def prompt_hash(row: dict[str, Any]) -> str:
    """Hash of the domain and of everything before the first assistant message."""
    before: list[str] = []
    for message in row["messages"]:
        if message["role"] == "assistant":
            break
        before.append(message["content"])
    return hashlib.sha256(json.dumps([row["domain"], before]).encode()).hexdigest()


def check_no_overlap(files: dict[str, list[dict[str, Any]]]) -> int:
    """Number of distinct prompts over all files; ValueError naming the files if a prompt occurs twice.

    Within sft.jsonl a prompt may be demonstrated several times.
    """
    owner: dict[str, str] = {}
    for name, rows in files.items():
        for row in rows:
            key = prompt_hash(row)
            if key in owner and (owner[key] != name or name != SFT):
                raise ValueError(
                    f"prompt {row['messages'][0]['content']!r} is in {owner[key]} and again in {name}"
                )
            owner[key] = name
    return len(owner)


def build(
    seed: int,
    *,
    num_sft: int = 32_000,
    num_prompts: int = 2_000,
    num_valid: int = 300,
    num_heldout: int = 500,
    long_math: bool = False,
) -> dict[str, list[dict[str, Any]]]:
    """Rows of every file. ``num_sft`` is over all domains (shares as in `WORLDS`), the others are per domain;
    ``long_math`` as in `examples.tiny.domains.worlds`."""
    sizes = dict(zip(SPLITS, (num_prompts, num_valid, num_heldout), strict=True))
    chosen = worlds(long_math)
    shares = sum(world.sft_share for world in chosen.values())
    files: dict[str, list[dict[str, Any]]] = {SFT: []}
    for world in chosen.values():
        rng = random.Random(f"{seed}/{world.name}")
        tasks = _fresh_tasks(world, rng)
        for split in reversed(SPLITS):
            drawn = [next(tasks) for _ in range(sizes[split])]
            files[f"{split}.{world.name}.jsonl"] = [_row(world, task, []) for task in drawn]
        held_back = {prompt_hash(row) for split in SPLITS for row in files[f"{split}.{world.name}.jsonl"]}
        for number in range(num_sft * world.sft_share // shares):
            files[SFT].append(_demonstration(world, rng, held_back, f"{world.name}-{number:05}"))
    random.Random(seed).shuffle(files[SFT])
    check_no_overlap(files)
    return files


def make(out_dir: str | Path, seed: int = 0, **options: int) -> dict[str, Path]:
    """Write the corpus (`options` as in `build`) and return file name -> path. The same arguments give the same bytes."""
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    paths: dict[str, Path] = {}
    for name, rows in build(seed, **options).items():
        paths[name] = out / name
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


def main() -> None:
    """`python -m examples.tiny.make_data OUT --seed 0`"""
    parser = argparse.ArgumentParser(description="Write the tiny corpus.")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-sft", type=int, default=32_000, help="demonstrations, all domains together")
    parser.add_argument("--num-prompts", type=int, default=2_000, help="RL and MOPD prompts per domain")
    parser.add_argument("--num-valid", type=int, default=300, help="validation prompts per domain")
    parser.add_argument("--num-heldout", type=int, default=500, help="held-out prompts per domain")
    parser.add_argument(
        "--long-math", action="store_true", help="answers of math are 15 times as long as instruct's"
    )
    arguments = vars(parser.parse_args())
    for name, path in make(**arguments).items():
        print(f"{path}  ({sum(1 for _ in path.open())} rows)", flush=True)
        assert name == path.name


if __name__ == "__main__":
    main()
