"""One frozen checkpoint in this process: what it says of given tokens, by a prefill-only Transformers forward.

Owns batching, padding and the chunked vocabulary softmax. Gives every signal of `teachers.backend`. The teacher always
routes by itself: nothing here takes routes. Refuses checkpoints with absent weights, heads that do more than a matrix
product, and non-finite scores.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers

from posttrain.config import Dtype, ModelConfig, UserError
from posttrain.logits import float32_logits
from teachers.backend import TokenScores, as_array
from teachers.lora import Adapters
from teachers.scores import TeacherScoreError, check_finite, check_ids

__all__ = ["Scorer", "TeacherScoreError", "plan_batches", "token_logprobs"]

SOFTMAX_CHUNK_ELEMENTS = 2**26  # float32 logits that exist at once: 256 MiB
PROBE_TOKENS = 16
CALL_TOKENS = 256  # what a forward costs beside its tokens, in tokens; benchmarks/teacher_scoring.py


class Scorer:
    """A frozen model that scores token sequences at temperature 1 over its full vocabulary: a `teachers.backend.Backend`."""

    def __init__(
        self,
        path: str,
        model: ModelConfig,
        dtype: Dtype,
        device: str = "cpu",
        head_dtype: Dtype | None = Dtype.float32,
    ) -> None:
        """Load ``path`` in ``dtype``; ``head_dtype`` is that of the LM head's product, None: ``dtype``. Attention,
        experts implementation and remote code follow ``model``; raises `UserError` when weights are missing or the
        head is not a plain matrix product."""
        transformers.utils.logging.disable_progress_bar()
        self.path = path
        self.head_dtype = getattr(torch, (head_dtype or dtype).value)
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
        if layers := _layers_left_out(info["unexpected_keys"], self.model):
            raise UserError(
                f"teacher path={path!r}: its config.json has fewer layers than its weights (left out: {layers[0]}); give it"
                " the config.json that it was trained with"
            )
        # The option only means something for models with experts; dense ones have no such choice.
        if model.experts_implementation is not None and self.model._can_set_experts_implementation():
            self.model.set_experts_implementation(model.experts_implementation)
        self.model.requires_grad_(False).eval().to(device)
        self.device = torch.device(device)
        self.vocab_size = int(self.lm_head.weight.shape[0])
        self._check_head()
        self.adapters = Adapters(self.model)
        self._merged: tuple[str, Any] | None = None

    @property
    def lm_head(self) -> torch.nn.Module:
        """The head as it is now: an adapter may wrap it."""
        return self.model.get_output_embeddings()

    def score(
        self,
        token_ids: list[np.ndarray],
        max_tokens_per_batch: int,
        names: list[str] | None = None,
        signal: str = "sampled",
        top_k: int = 64,
        masks: list[np.ndarray] | None = None,
        adapters: list[str | None] | None = None,
    ) -> list[TokenScores]:
        """See `teachers.backend.Backend.score`.

        A batch holds sequences of like length, at most ``max_tokens_per_batch`` tokens with padding (a longer
        sequence is a batch of its own). ``adapters`` are keys of held ones that `Adapters.can_mix`, one a sequence
        (None: the bare base), in place of the active one.
        """
        scores = [TokenScores(logprobs=np.zeros(0, np.float32))] * len(token_ids)
        if adapters is not None:
            self.adapters.use(None, None)
        head = self._merged_head()
        for batch in plan_batches([len(ids) for ids in token_ids], max_tokens_per_batch):
            wanted = [np.ones(len(token_ids[i]), bool) if masks is None else masks[i] for i in batch]
            with self.adapters.rows([adapters[i] for i in batch]) if adapters else nullcontext():
                scored = self._forward([token_ids[i] for i in batch], wanted, signal, top_k, head)
            for index, score in zip(batch, scored, strict=True):
                check_finite(score.logprobs, self.path, names[index] if names else str(index))
                scores[index] = score
        return scores

    def head(self) -> torch.Tensor:
        """[V, H], or [V, H + 1] with the bias as the last column, which meets a 1 in `TokenScores.hidden`. In the model's
        type; with an adapter on the head in that of its product."""
        head = self._merged_head()
        return head.weight if head.bias is None else torch.cat([head.weight, head.bias[:, None]], dim=1)

    def _merged_head(self) -> Any:
        """The head; if the active adapter is on it, a copy with both merged, in the type of the product and kept until
        another such adapter is used."""
        adapter = self.adapters.on(self.lm_head)
        if adapter is None:
            head: Any = self.lm_head
            return getattr(head, "base_layer", head)
        if self._merged is None or self._merged[0] != adapter:
            head = copy.deepcopy(self.lm_head).to(self.head_dtype)
            head.merge()
            self._merged = adapter, head.base_layer
        return self._merged[1]

    @torch.no_grad()
    def _forward(
        self, token_ids: list[np.ndarray], masks: list[np.ndarray], signal: str, top_k: int, head: Any
    ) -> list[TokenScores]:
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
        hidden_NH = hidden_BTH[predicts]
        # The hidden state at t predicts the token at t + 1.
        wanted_N = torch.from_numpy(np.concatenate([mask[1:] for mask in masks])).to(self.device)
        columns = top_k if signal in ("top_k", "top_k_renorm") else 0
        logprobs_N, topk_ids_MK, topk_logprobs_MK = token_logprobs(
            hidden_NH, targets_BT[predicts], head, wanted_N, columns, self.head_dtype
        )
        logprobs = logprobs_N.cpu().numpy()
        topk_ids = topk_ids_MK.to(torch.int32).cpu().numpy() if columns else None
        topk_logprobs = topk_logprobs_MK.cpu().numpy() if columns else None
        hidden = as_array(self._head_input(hidden_NH[wanted_N])) if signal == "full" else None
        scores, start, first = [], 0, 0
        for length, mask in zip(lengths, masks, strict=True):
            rows = np.flatnonzero(mask[1:]) + 1
            own, start = slice(start, start + max(length - 1, 0)), start + max(length - 1, 0)
            wanted, first = slice(first, first + len(rows)), first + len(rows)
            scores.append(
                TokenScores(
                    logprobs=np.concatenate([np.zeros(min(length, 1), np.float32), logprobs[own]]),
                    topk_ids=_spread(topk_ids, wanted, rows, length),
                    topk_logprobs=_spread(topk_logprobs, wanted, rows, length),
                    hidden=_spread(hidden, wanted, rows, length),
                )
            )
        return scores

    def _head_input(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.lm_head.bias is None:
            return hidden
        return torch.cat([hidden, hidden.new_ones(len(hidden), 1)], dim=1)

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


def _layers_left_out(unexpected: Iterable[str], model: Any) -> list[str]:
    """Tensors that the model has in other layers and not in theirs. Heads of other tasks are not among them, nor are
    layers that predict further tokens (MTP), which come after the last one."""
    config = model.config.get_text_config()
    number = re.compile(r"\.(\d+)\.")
    known = {number.sub(".N.", name) for name in model.state_dict()}
    first = int(getattr(config, "num_hidden_layers", 0))
    further = range(first, first + int(getattr(config, "num_nextn_predict_layers", 0) or 0))
    return sorted(
        name
        for name in unexpected
        if number.sub(".N.", name) in known
        and (found := number.search(name))
        and int(found[1]) not in further
    )


def plan_batches(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Indices of the sequences of each batch, longest first: rows x longest row stays within ``max_tokens``.

    Of all ways to cut the sorted sequences the one with the fewest tokens, padding and `CALL_TOKENS` a batch included,
    found by dynamic programming over the first sequence of a batch.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    cost = np.full(len(order) + 1, np.inf)  # of the first n sequences
    cost[0] = 0.0
    starts = np.zeros(len(order) + 1, dtype=np.int64)  # of the batch that ends before n
    for start, index in enumerate(order):
        longest = max(lengths[index], 1)
        num_rows = np.arange(1, min(max(max_tokens // longest, 1), len(order) - start) + 1)
        total = cost[start] + CALL_TOKENS + num_rows * longest
        less = total < cost[start + num_rows]
        cost[start + num_rows[less]] = total[less]
        starts[start + num_rows[less]] = start
    batches: list[list[int]] = []
    end = len(order)
    while end:
        batches.append(order[starts[end] : end])
        end = int(starts[end])
    return batches[::-1]


def token_logprobs(
    hidden_NH: torch.Tensor,
    targets_N: torch.Tensor,
    head: torch.nn.Module,
    wanted_N: torch.Tensor,
    top_k: int = 0,
    head_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log softmax(head(hidden))[target] in float32 [N], by chunks: the full [N, vocabulary] never exists.

    ``head`` is linear, and its product taken in ``head_dtype``. From the same logits ids and logprobs [M, top_k] of the
    likeliest tokens of the M rows where ``wanted_N`` holds.
    """
    weight: Any = head.weight
    bias: Any = head.bias
    if head_dtype is torch.float32:
        logits_of = float32_logits(weight, bias, hidden_NH)
    else:
        logits_of = _rounded_logits(weight, bias, head_dtype)
    chunk = max(1, SOFTMAX_CHUNK_ELEMENTS // len(weight))
    logprobs = [torch.zeros(0, device=hidden_NH.device)]
    topk_logprobs = [torch.zeros(0, top_k, device=hidden_NH.device)]
    topk_ids = [torch.zeros(0, top_k, dtype=torch.long, device=hidden_NH.device)]
    for start in range(0, len(targets_N), chunk):
        part = slice(start, start + chunk)
        logits = logits_of(hidden_NH[part])
        normalisers = logits.logsumexp(-1)
        logprobs.append(logits.gather(-1, targets_N[part, None]).squeeze(-1) - normalisers)
        if top_k:
            likeliest = logits[wanted_N[part]].topk(top_k)
            topk_logprobs.append(likeliest.values - normalisers[wanted_N[part], None])
            topk_ids.append(likeliest.indices)
    return torch.cat(logprobs), torch.cat(topk_ids), torch.cat(topk_logprobs)


def _rounded_logits(
    weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> Callable[[torch.Tensor], torch.Tensor]:
    """As `float32_logits`, of a product that is taken in ``dtype`` and rounded to it."""
    cast_weight, cast_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return lambda hidden: F.linear(hidden.to(dtype), cast_weight, cast_bias).float()


def _spread(values: np.ndarray | None, part: slice, rows: np.ndarray, length: int) -> np.ndarray | None:
    """[length, ...] with ``values[part]`` at ``rows`` and 0 elsewhere."""
    if values is None:
        return None
    spread = np.zeros((length, *values.shape[1:]), values.dtype)
    spread[rows] = values[part]
    return spread
