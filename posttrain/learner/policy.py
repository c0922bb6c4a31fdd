"""The module that DeepSpeed wraps: token ids in, log-probabilities of chosen tokens out.

The LM head runs inside this forward, because outside of it ZeRO-3 shows a weight of shape (0,). Refuses heads that do
more than one matrix product, since their logprobs would be others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.config import UserError
from posttrain.learner.divergence import TeacherStates, gathered_logprobs, target_and_divergence
from posttrain.learner.fused import fused_logprobs, serves
from posttrain.learner.logprobs import target_logprobs

HEAD_TRANSFORMS = ("final_logit_softcapping", "logits_scaling", "logit_scale")
PACKABLE_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")
# Transformers 5.19 makes the masks of the first two without position ids; Inkling has convolutions besides.
UNPACKABLE_MODELS = ("gpt_oss", "afmoe", "inkling_text")


class Policy(nn.Module):
    """A Transformers causal LM whose LM head answers with log-probabilities instead of logits; ``use_fused_kernel``: by
    Liger's kernel wherever that serves."""

    def __init__(self, model: nn.Module, chunk_tokens: int, use_fused_kernel: bool = False) -> None:
        super().__init__()
        head = model.get_output_embeddings()  # type: ignore[operator]
        check_head(model, head)
        self.model = model
        # DeepSpeed's hooks hang on the module, so only its forward is exchanged: names and weights stay.
        head.forward = _logprob_forward(head, chunk_tokens, use_fused_kernel)
        # FlashAttention tells packed documents apart in a batch of one row only.
        self.one_row = "flash" in str(getattr(model.config, "_attn_implementation", ""))

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        target_positions: Tensor,
        target_ids: Tensor,
        teacher: TeacherStates | None = None,
    ) -> Tensor:
        """Logprobs [N] float32 at temperature 1.

        ``input_ids`` and ``position_ids`` are [B, T] int64; positions that start again divide documents.
        ``target_positions`` [N] are flat indices b * T + t of the tokens that predict ``target_ids`` [N].
        ``target_ids`` may be [N, m], m ids at every position, and so is then the result. With ``teacher`` the result
        is [N, 2]: the logprob of ``target_ids`` [N], and the reverse KL to that teacher over the vocabulary.
        """
        if self.one_row:
            input_ids, position_ids = input_ids.reshape(1, -1), position_ids.reshape(1, -1)
        output = self.model.base_model(
            input_ids=input_ids, attention_mask=None, position_ids=position_ids, use_cache=False
        )
        hidden = output.last_hidden_state.flatten(0, 1)[target_positions]
        return self.model.get_output_embeddings()(hidden, target_ids, teacher)


def _logprob_forward(
    head: nn.Module, chunk_tokens: int, use_fused_kernel: bool
) -> Callable[[Tensor, Tensor, TeacherStates | None], Tensor]:
    def forward(hidden: Tensor, target_ids: Tensor, teacher: TeacherStates | None = None) -> Tensor:
        weight: Any = head.weight
        bias: Any = head.bias
        if teacher is not None:
            return target_and_divergence(hidden, weight, bias, target_ids, teacher, chunk_tokens)
        if use_fused_kernel and serves(hidden, bias, target_ids):
            return fused_logprobs(hidden, weight, target_ids)
        logprobs = target_logprobs if target_ids.dim() == 1 else gathered_logprobs
        return logprobs(hidden, weight, bias, target_ids, chunk_tokens)

    return forward


def check_head(model: nn.Module, head: Any) -> None:
    """`UserError` for a model whose logits are not ``hidden @ weight.T + bias``."""
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    family = type(model).__name__
    if not isinstance(head, nn.Linear):
        raise UserError(f"model.path: {family} has no linear LM head; the learner cannot train it")
    for key in HEAD_TRANSFORMS:
        if getattr(config, key, None) not in (None, 1, 1.0):
            raise UserError(
                f"model.path: {family} changes its logits by {key}, which the learner does not know; "
                "choose a model without it"
            )


def check_packable(model: nn.Module) -> None:
    """`UserError` for layers that position ids do not stop at the border of a document (linear attention, Mamba)."""
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    others = sorted(set(getattr(config, "layer_types", None) or ()) - set(PACKABLE_LAYERS))
    if others:
        raise UserError(
            f"learner.pack_tokens: {', '.join(others)} layers of {type(model).__name__} would mix packed documents; "
            "set learner.pack_tokens=0"
        )
    if config.model_type in UNPACKABLE_MODELS:
        raise UserError(
            f"learner.pack_tokens: the attention of {type(model).__name__} would mix packed documents; "
            "set learner.pack_tokens=0"
        )


def num_parameters(module: nn.Module) -> int:
    """Elements of all parameters, also of those that ZeRO-3 has partitioned."""
    return sum(int(getattr(p, "ds_numel", p.numel())) for p in module.parameters())


def model_device(module: nn.Module) -> torch.device:
    """Where inputs must be."""
    return next(module.parameters()).device
