"""One frozen checkpoint in this process: token log-probabilities by a prefill-only Transformers forward.

Owns batching, padding and the chunked vocabulary softmax. The teacher always routes by itself: nothing here takes
routes. Refuses checkpoints with absent weights, heads that do more than a matrix product, and non-finite scores.
"""

from __future__ import annotations

import numpy as np
import torch
import transformers

from posttrain.config import Dtype, ModelConfig, TeacherBackend, UserError
from teachers.backend import TokenScores
from teachers.lora import Adapters
from teachers.scores import TeacherScoreError, check_finite, check_ids, check_signal
from teachers.teacher import SIGNALS

__all__ = ["Scorer", "TeacherScoreError", "plan_batches", "token_logprobs"]

SOFTMAX_CHUNK_ELEMENTS = 2**26  # float32 logits that exist at once: 256 MiB
PROBE_TOKENS = 16


class Scorer:
    """A frozen model that scores token sequences at temperature 1 over its full vocabulary."""

    def __init__(self, path: str, model: ModelConfig, dtype: Dtype, device: str = "cpu") -> None:
        """Load ``path``. Attention, experts implementation and remote code follow ``model``; raises `UserError`
        when weights are missing or the head is not a plain matrix product."""
        transformers.utils.logging.disable_progress_bar()
        self.path = path
        self.model, info = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, dtype.value),
            attn_implementation=model.attn_implementation,
            trust_remote_code=model.trust_remote_code,
            output_loading_info=True,
        )
        for problem in ("missing_keys", "mismatched_keys"):
            if info[problem]:
                raise UserError(
                    f"teacher path={path!r}: {problem} {sorted(map(str, info[problem]))[:3]}; save it again"
                )
        # The option only means something for models with experts; dense ones have no such choice.
        if model.experts_implementation is not None and self.model._can_set_experts_implementation():
            self.model.set_experts_implementation(model.experts_implementation)
        self.model.requires_grad_(False).eval().to(device)
        self.device = torch.device(device)
        self.vocab_size = int(self.lm_head.weight.shape[0])
        self._check_head()
        self.adapters = Adapters(self.model)

    @property
    def lm_head(self) -> torch.nn.Module:
        """The head as it is now: an adapter may wrap it."""
        return self.model.get_output_embeddings()

    def head(self) -> torch.Tensor:
        """The LM head [V, H]."""
        return self.lm_head.weight

    def score(
        self,
        token_ids: list[np.ndarray],
        max_tokens_per_batch: int,
        names: list[str] | None = None,
        signal: str = "sampled",
        top_k: int = 64,
        masks: list[np.ndarray] | None = None,
    ) -> list[TokenScores]:
        """log p(token t | tokens before t), one `TokenScores` per sequence, entry 0 is 0.0.

        A batch holds sequences of like length, at most ``max_tokens_per_batch`` tokens with padding (a longer
        sequence is a batch of its own). Raises `TeacherScoreError`, with the sequence's entry of ``names``, for a
        score that is not finite.
        """
        check_signal("teachers.*", "transformers", signal, SIGNALS[TeacherBackend.transformers])
        scores = [TokenScores(logprobs=np.zeros(0, np.float32))] * len(token_ids)
        for batch in plan_batches([len(ids) for ids in token_ids], max_tokens_per_batch):
            for index, logprobs in zip(batch, self._forward([token_ids[i] for i in batch]), strict=True):
                check_finite(logprobs, self.path, names[index] if names else str(index))
                scores[index] = TokenScores(logprobs=logprobs)
        return scores

    @torch.no_grad()
    def _forward(self, token_ids: list[np.ndarray]) -> list[np.ndarray]:
        """Right padding under a causal mask: no real token sees padding, so no attention mask is needed and every
        architecture gives what it gives for the sequence alone."""
        lengths = [len(ids) for ids in token_ids]
        tokens_BT = torch.zeros(len(token_ids), max(lengths), dtype=torch.long)
        for row, ids in enumerate(token_ids):
            check_ids(ids, self.path, self.vocab_size)
            tokens_BT[row, : len(ids)] = torch.from_numpy(np.asarray(ids, dtype=np.int64))
        tokens_BT = tokens_BT.to(self.device)
        hidden_BTH = self.model.base_model(input_ids=tokens_BT, use_cache=False).last_hidden_state
        predicts = torch.zeros(tokens_BT.shape, dtype=torch.bool, device=self.device)
        for row, length in enumerate(lengths):
            predicts[row, : max(length - 1, 0)] = True
        targets_BT = torch.cat([tokens_BT[:, 1:], tokens_BT[:, :1]], dim=1)
        flat = (
            token_logprobs(hidden_BTH[predicts], targets_BT[predicts], self.model.get_output_embeddings())
            .cpu()
            .numpy()
        )
        scores, start = [], 0
        for length in lengths:
            stop = start + max(length - 1, 0)
            scores.append(np.concatenate([np.zeros(min(length, 1), np.float32), flat[start:stop]]))
            start = stop
        return scores

    @torch.no_grad()
    def _check_head(self) -> None:
        """The chunked softmax applies the head itself; a model that scales or caps its logits would be misread."""
        probe = torch.arange(PROBE_TOKENS, device=self.device).remainder(self.vocab_size)[None]
        own = self.model(input_ids=probe, use_cache=False).logits.float()
        ours = self.lm_head(self.model.base_model(input_ids=probe, use_cache=False).last_hidden_state).float()
        if not torch.allclose(own, ours, rtol=1e-3, atol=1e-3, equal_nan=True):
            raise UserError(
                f"teacher path={self.path!r}: {type(self.model).__name__} changes logits after its head (scale or cap),"
                " which scoring does not know; choose another architecture"
            )


def plan_batches(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Indices of the sequences of each batch, longest first: rows x longest row stays within ``max_tokens``."""
    batches: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not batches or (len(batches[-1]) + 1) * longest > max_tokens:
            batches.append([])
            longest = lengths[index]
        batches[-1].append(index)
    return batches


def token_logprobs(hidden_NH: torch.Tensor, targets_N: torch.Tensor, head: torch.nn.Module) -> torch.Tensor:
    """log softmax(head(hidden))[target] in float32 [N], by chunks: the full [N, vocabulary] never exists."""
    chunk = max(1, SOFTMAX_CHUNK_ELEMENTS // int(head.weight.shape[0]))
    parts = [torch.zeros(0, device=hidden_NH.device)]
    for start in range(0, len(targets_N), chunk):
        logits = head(hidden_NH[start : start + chunk]).float()
        chosen = logits.gather(-1, targets_N[start : start + chunk, None]).squeeze(-1)
        parts.append(chosen - logits.logsumexp(-1))
    return torch.cat(parts)
