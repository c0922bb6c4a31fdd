"""Which of vLLM's own options are not the user's to set in a teacher's engine: `rollout.options.check_options` asks."""

from __future__ import annotations

from typing import Any

OWNED_OPTIONS = {
    "model": "teachers.<domain>.path",
    "tokenizer": "teachers.<domain>.path",
    "trust_remote_code": "model.trust_remote_code",
    "dtype": "teacher_workers.dtype",
    "max_num_batched_tokens": "teacher_workers.max_tokens_per_batch",
}
FIXED_OPTIONS: dict[str, Any] = {
    "logprobs_mode": "raw_logprobs",
    "max_logprobs": -1,  # top_k may be any
    "skip_tokenizer_init": True,  # token ids are the truth
    "enable_prefix_caching": False,
    "async_scheduling": False,
    "enable_return_routed_experts": False,
}
