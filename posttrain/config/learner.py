"""Settings of the learner: optimizer, precision, ZeRO, experts, LoRA."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from posttrain.config.choices import Dtype, FusedLoss, Replay, Schedule
from posttrain.config.errors import require, require_above, require_at_least


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """Adapters (LoRA, arXiv 2106.09685) instead of full fine-tuning: W + scaling * B A, with W frozen."""

    rank: int = 0
    """Rank of the adapters; 0 trains all weights (full fine-tuning)."""
    alpha: float | None = None
    """Scaling is alpha / rank; null: twice the rank."""
    use_rslora: bool = False
    """Scaling is alpha / sqrt(rank) instead (arXiv 2312.03732)."""
    dropout: float = 0.0
    """SFT only: share of an adapter's inputs that is dropped in training; not for target_parameters."""
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """Linear modules that get an adapter, by the end of their names: `[q_proj,v_proj]`. all-linear: those of attention and
    MLPs that PEFT can name, without routers and the LM head. Fused experts are no modules, see target_parameters."""
    target_parameters: list[str] = field(default_factory=list)
    """Parameters that get one without being a linear module, by the end of their names: `[experts.gate_up_proj]` (one
    adapter per expert), `[gate.weight]` (routers)."""

    def __post_init__(self) -> None:
        require_at_least(0, "learner.lora", self, "rank")
        require_above(0, "learner.lora", self, "alpha")
        key = "learner.lora"
        require(0 <= self.dropout < 1, f"{key}.dropout", self.dropout, "give a share from 0 to below 1")
        require(
            self.dropout == 0 or not self.target_parameters,
            f"{key}.dropout",
            self.dropout,
            f"{key}.target_parameters cannot drop inputs; give 0, or leave target_parameters empty",
        )
        if self.rank > 0:
            way_out = f"nothing is adapted; name modules, or use {key}.rank=0"
            targets = [*self.target_modules, *self.target_parameters]
            require(bool(targets), f"{key}.target_modules", self.target_modules, way_out)
            return
        way_out = f"{key}.rank=0 trains all weights; give a rank, or remove the key"
        require(self.alpha is None, f"{key}.alpha", self.alpha, way_out)
        require(not self.use_rslora, f"{key}.use_rslora", self.use_rslora, way_out)
        require(self.dropout == 0, f"{key}.dropout", self.dropout, way_out)
        require(not self.target_parameters, f"{key}.target_parameters", self.target_parameters, way_out)
        require(self.target_modules == ["all-linear"], f"{key}.target_modules", self.target_modules, way_out)


@dataclass(kw_only=True, slots=True)
class LearnerConfig:
    num_ranks: int = 1
    """DeepSpeed ranks, one Ray actor each."""
    zero_stage: int = 0
    """DeepSpeed ZeRO stage: 0, 1, 2 or 3."""
    dtype: Dtype = Dtype.float32
    """Type of the learner's weights and activations."""
    lr: float = 1e-6
    """Peak learning rate."""
    schedule: Schedule = Schedule.constant
    """Shape of the learning rate after warm-up."""
    min_lr_ratio: float = 0.0
    """Last learning rate as a share of the peak (cosine, linear)."""
    warmup_steps: int = 10
    """Optimizer steps of linear warm-up from 0."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW betas."""
    eps: float = 1e-8
    """AdamW epsilon."""
    grad_clip: float = 1.0
    """Global gradient norm is clipped to this; 0 turns clipping off."""
    max_tokens_per_micro_batch: int = 8192
    """Upper bound on tokens (padding included) of one forward pass on one rank."""
    pack_tokens: int = 0
    """Row length into which several documents are packed; 0 gives every document a row of its own."""
    routing_replay: Replay = Replay.auto
    """auto: MoE models replay the recorded routes in RL and MOPD (R3)."""
    max_route_distance: float | None = 0.5
    """Recorded routes of a rollout may be this far from the live ones in any layer (0: equal, 1: chance); above it they
    are of other weights, tokens or layers, and the rollout stays out of the loss. null: no limit."""
    expert_bias_rate: float | None = 0.0
    """gamma of the aux-loss-free bias update, once per optimizer step; 0 leaves the bias alone. null: 1e-4 where the
    routers have an expert bias and are not frozen (by freeze_router, or by adapters), else 0."""
    aux_loss_coef: float | None = 0.0
    """SFT only: coefficient of the sequence-wise balance loss. null: 1e-6 where the routers score by softmax or sigmoid
    and are not frozen (by freeze_router, or by adapters that leave them out), else 0."""
    freeze_router: bool = False
    """No gradient for router weights."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    expert_window: int = 20
    """MoE models: steps over which the load of every expert is summed, for the metrics `experts/...` and for
    expert_load.jsonl, which gets a line as often."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    logprob_chunk_tokens: int = 2048
    """Tokens whose logits exist at once; bounds the memory of the vocabulary softmax. Liger's kernel chooses its own."""
    fused_loss: FusedLoss = FusedLoss.off
    """liger: the fused kernel of `liger-kernel` computes the logprobs of sampled and learned tokens, for an LM head without
    bias; GPUs only, not measured on one yet; rounds the logits of a bfloat16 model, which our own chunks do not; not
    with zero_stage=3, which takes the head away before the kernel's backward. off: our own chunks."""
    cores_per_rank: int | None = None
    """Torch threads of a rank (CPU only); null: the cores that this process may use, divided by the number of ranks."""
    num_gpus_per_rank: float | None = None
    """GPUs of each rank; null: 1 where there are GPUs; 0.5 shares one GPU with an engine."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Passed to DeepSpeed under its own option names; keys that this config owns are refused. Optimizer states and gradients
    go to the CPU with `zero_optimization.offload_optimizer.device=cpu` (zero_stage 1 to 3), weights with
    `zero_optimization.offload_param.device=cpu` (zero_stage 3); nvme is refused."""

    def __post_init__(self) -> None:
        require(self.num_ranks >= 1, "learner.num_ranks", self.num_ranks, "at least one rank is needed")
        require(self.zero_stage in (0, 1, 2, 3), "learner.zero_stage", self.zero_stage, "choose 0, 1, 2 or 3")
        require(self.lr > 0, "learner.lr", self.lr, "give a positive learning rate")
        require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "learner.betas",
            self.betas,
            "give two numbers from 0 to below 1",
        )
        require(
            0 <= self.min_lr_ratio <= 1, "learner.min_lr_ratio", self.min_lr_ratio, "give a share from 0 to 1"
        )
        require_at_least(
            1, "learner", self, "max_tokens_per_micro_batch", "logprob_chunk_tokens", "cores_per_rank"
        )
        require_at_least(1, "learner", self, "expert_window")
        require(
            self.fused_loss is FusedLoss.off or self.zero_stage != 3,
            "learner.fused_loss",
            self.fused_loss.value,
            "learner.zero_stage=3 takes the LM head away before the kernel's backward; use off, or a lower stage",
        )
        require_at_least(0, "learner", self, "warmup_steps", "weight_decay", "grad_clip", "pack_tokens")
        require_at_least(0, "learner", self, "expert_bias_rate", "aux_loss_coef")
        require_above(0, "learner", self, "eps", "max_route_distance")
        self._check_gpus()
        for key in (
            "gradient_accumulation_steps",
            "train_batch_size",
            "train_micro_batch_size_per_gpu",
            "bf16",
            "fp16",
        ):
            require(
                key not in self.deepspeed,
                f"learner.deepspeed.{key}",
                self.deepspeed.get(key),
                "the learner sets this itself; remove the key",
            )

    def _check_gpus(self) -> None:
        each = self.num_gpus_per_rank
        require(
            each is None or 0 <= each <= 1,
            "learner.num_gpus_per_rank",
            each,
            "give 1, a fraction of 1, or 0 for the CPU: a rank uses one GPU",
        )
        require(
            each is None or each == 0 or each > 0.5 or self.num_ranks == 1,
            "learner.num_gpus_per_rank",
            each,
            f"learner.num_ranks={self.num_ranks} ranks cannot share a GPU (NCCL needs one each); give more than 0.5",
        )
