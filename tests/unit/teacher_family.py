"""Right teachers as real ones are made, for the tests of the preflight: a start checkpoint trained on all domains,
fine-tuned further on one; and answers of the student to score."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.tiny.domains import WORLDS
from posttrain.config import ModelConfig, TeacherConfig, TeacherWorkerConfig
from posttrain.records import Prompt, Rollout, RolloutStatus, Turn
from teachers.check import check_teachers, teacher_gates
from teachers.gates import GateRow
from teachers.teacher import resolve

WORKERS = TeacherWorkerConfig(cores_per_worker=1)
LEARNING_RATES = (1e-5, 1e-4, 2e-4, 5e-4, 1e-3)
NUM_RIGHT = 20
MAX_NEW_TOKENS = 32


def check_files(
    student: str, teachers: dict[str, TeacherConfig], domains: Iterable[str], accept: Iterable[str] = ()
) -> list[GateRow]:
    """The preflight of a run before engines, from its config."""
    workers = TeacherWorkerConfig(accept=list(accept))
    return check_teachers(resolve(teachers, domains, student), ModelConfig(path=student), workers, 64)


def file_gates(student: str, teachers: dict[str, TeacherConfig], domains: Iterable[str]) -> list[GateRow]:
    return teacher_gates(resolve(teachers, domains, student), ModelConfig(path=student), WORKERS, 64)


@torch.no_grad()
def sample(student: Path, domain: str, count: int, seed: int = 0) -> list[Rollout]:
    """Answers of the student at temperature 1 with their exact logprobs."""
    tokenizer = AutoTokenizer.from_pretrained(student)
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).eval()
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rollouts = []
    for i in range(count):
        messages = [{"role": "user", "content": WORLDS[domain].sample(rng).prompt}]
        prompt_ids = np.array(
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False), np.int32
        )
        tokens, logprobs = prompt_ids.tolist(), [0.0] * len(prompt_ids)
        while len(tokens) < len(prompt_ids) + MAX_NEW_TOKENS and tokens[-1] != tokenizer.eos_token_id:
            row = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].log_softmax(-1)
            tokens.append(int(torch.multinomial(row.exp(), 1, generator=generator)))
            logprobs.append(float(row[tokens[-1]]))
        is_sampled = np.arange(len(tokens)) >= len(prompt_ids)
        prompt = Prompt(prompt_id=str(i), source="s", domain=domain, messages=messages, token_ids=prompt_ids)
        turn = Turn(
            author="policy",
            token_ids=np.array(tokens, np.int32),
            loss_mask=is_sampled,
            rollout_logprobs=np.array(logprobs, np.float32),
            policy_versions=np.where(is_sampled, 0, -1).astype(np.int32),
        )
        ended = tokens[-1] == tokenizer.eos_token_id
        rollouts.append(
            Rollout(
                group_id=str(i),
                rollout_id=str(i),
                prompt=prompt,
                turns=[turn],
                messages=[],
                routed_experts=None,
                finish_reason="stop" if ended else "length",
                status=RolloutStatus.completed if ended else RolloutStatus.truncated,
            )
        )
    return rollouts
