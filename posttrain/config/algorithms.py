"""Schemas of the algorithms: SFT, and what RL and MOPD share, with what the loss decides where the user gave nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

from posttrain.config.choices import Advantage, Aggregation, Correction, Loss, Overlong, Schedule, Signal
from posttrain.config.errors import require, require_above, require_at_least
from posttrain.config.learner import LearnerConfig
from posttrain.config.sections import RolloutConfig


@dataclass(kw_only=True, slots=True)
class SFTAlgorithm:
    steps: int = 100
    """Optimizer steps."""
    batch_size: int = 128
    """Conversations per step, over all ranks."""
    aggregation: Aggregation = Aggregation.token_mean
    """token_mean: every loss token of a batch weighs the same, so that long conversations have most of the gradient;
    seq_mean: every conversation does; token_mean_balanced: every domain has its share of the conversations."""
    max_tokens: int = 2048
    """Longer conversations are refused (or skipped, see data.on_bad_row)."""
    validate_every: int = 0
    """Steps between measurements of the loss on the conversations of data.eval_path or data.eval_sources; also after the
    last step. 0: none."""
    early_stop_patience: int | None = None
    """Validations in a row without a lower loss after which the run ends; `model/` then holds the weights of the lowest
    validation loss, also when all steps ran. null: all steps run, and `model/` holds the last weights."""

    def __post_init__(self) -> None:
        require_at_least(1, "algorithm", self, "steps", "batch_size", "max_tokens", "early_stop_patience")
        require_at_least(0, "algorithm", self, "validate_every")
        require(
            self.aggregation is not Aggregation.constant,
            "algorithm.aggregation",
            self.aggregation.value,
            "choose token_mean, seq_mean or token_mean_balanced",
        )
        require(
            self.early_stop_patience is None or self.validate_every > 0,
            "algorithm.early_stop_patience",
            self.early_stop_patience,
            "give algorithm.validate_every as well: nothing is validated",
        )


@dataclass(kw_only=True, slots=True)
class PolicyAlgorithm:
    """What RL and MOPD share: one loop, `advantage = beta * (teacher - policy) + alpha * outcome`."""

    steps: int = 100
    """Optimizer batches."""
    prompts_per_step: int = 128
    """Prompts (groups) per batch."""
    group_size: int = 8
    """Samples per prompt. MOPD needs one, an outcome advantage at least 2."""
    loss: Loss = Loss.policy_gradient
    """policy_gradient: eq. 7 of the MiMo report; ppo_clip: clipped surrogate with clip-higher (DAPO); gspo: ratio of whole
    sequences; cispo: clipped weight, no token dropped (MiniMax-M1); reinforce: no ratio of the policy's movement."""
    beta: float = 0.0
    """Weight of the teacher's term. 1 in MOPD, 0 in RL."""
    signal: Signal = Signal.sampled
    """What a teacher says of a token. sampled: its log-ratio on the token that was sampled; top_k: divergence over its
    likeliest tokens, with the correction that keeps the minimum at the teacher; top_k_renorm: reverse KL of both
    renormalised over these; full: reverse KL over the vocabulary, from the teacher's last hidden states."""
    top_k: int = 64
    """Tokens per position that top_k and top_k_renorm look at."""
    alpha: float = 1.0
    """Weight of the outcome (ORM) advantage. 1 in RL, 0 in MOPD."""
    advantage: Advantage = Advantage.grpo
    """Outcome advantage within a group."""
    aggregation: Aggregation = Aggregation.seq_mean
    """How tokens add up to the loss: every sequence (seq_mean), every token (token_mean) or every domain's target share
    (token_mean_balanced) counts the same; constant: sum of a sequence's tokens / length_norm (Dr. GRPO)."""
    length_norm: int | None = None
    """aggregation=constant: tokens by which every sequence's sum is divided; null: the longest answer,
    rollout.max_new_tokens * rollout.max_turns."""
    target_shares: dict[str, float] = field(default_factory=dict)
    """Share of each domain under token_mean_balanced; empty: its share of the prompts."""
    gap_following: bool = False
    """token_mean_balanced: a domain's target share is also multiplied by its mean |advantage| over former steps relative
    to that of the other domains, within 0.05 and 20, so that domains with a wide gap to their teacher weigh more."""
    correction: Correction = Correction.icepop
    """Train/inference ratio pi/mu: drop tokens outside the band, truncate, or ignore."""
    ratio_low: float = 0.5
    """Lower end of the icepop band on pi/mu."""
    ratio_high: float = 5.0
    """Upper end of the icepop band on pi/mu."""
    ratio_truncate: float = 2.0
    """tis truncates pi/mu here."""
    teacher_clip: float = 5.0
    """Signal sampled: the teacher log-ratio is clipped to plus or minus this."""
    clip_low: float | None = None
    """PPO clip below: 1 - clip_low on pi/pi_old; null: that of the loss, 0.2 (ppo_clip), 3e-4 (gspo), 1 (cispo: no bound)."""
    clip_high: float | None = None
    """PPO clip above: 1 + clip_high; null: that of the loss, 0.28 (ppo_clip), 4e-4 (gspo), 4 (cispo)."""
    updates_per_batch: int = 1
    """Optimizer steps on one batch of rollouts."""
    max_off_policy_steps: int = 0
    """0: generation and training alternate, strictly on-policy; n: rollouts may be up to n versions old."""
    drop_equal_groups: bool = False
    """Dynamic sampling (DAPO): groups whose rewards are all equal are replaced by others."""
    overlong: Overlong = Overlong.mask
    """Truncated rollouts: mask leaves them out of loss and baseline, keep trains on them with their reward, shape also
    takes off a penalty that grows over the last overlong_buffer tokens before the limit (DAPO)."""
    overlong_buffer: int | None = None
    """overlong=shape: tokens before the longest answer over which the penalty grows from 0; null: a fifth of it (DAPO)."""
    overlong_penalty: float = 1.0
    """overlong=shape: reward that an answer at or over the limit loses."""

    def __post_init__(self) -> None:
        require(
            self.prompts_per_step >= 1, "algorithm.prompts_per_step", self.prompts_per_step, "give at least 1"
        )
        require(self.group_size >= 1, "algorithm.group_size", self.group_size, "give at least 1")
        require(
            self.alpha == 0 or self.group_size > 1,
            "algorithm.group_size",
            self.group_size,
            "an outcome advantage (algorithm.alpha > 0) compares samples of one prompt; give at least 2, or algorithm.alpha=0",
        )
        band = "the band must hold 1: 0 <= ratio_low < 1 < ratio_high"
        require(0 <= self.ratio_low < 1, "algorithm.ratio_low", self.ratio_low, band)
        require(self.ratio_high > 1, "algorithm.ratio_high", self.ratio_high, band)
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            require(
                value >= 0,
                f"algorithm.{name}",
                value,
                "a weight of less than 0 turns from the aim; give 0 or more",
            )
        require(
            self.alpha != 0 or self.beta != 0,
            "algorithm.alpha and algorithm.beta",
            self.alpha,
            "nothing would be learned; give one of them, alpha weighs the outcome, beta the teachers",
        )
        require(
            self.signal is Signal.sampled or self.beta != 0,
            "algorithm.signal",
            self.signal.value,
            "it is the teacher's, whose weight algorithm.beta is 0; leave it at sampled, or give algorithm.beta=1",
        )
        require(
            not self.gap_following or self.aggregation is Aggregation.token_mean_balanced,
            "algorithm.gap_following",
            self.gap_following,
            "it moves the domains' shares; set algorithm.aggregation=token_mean_balanced",
        )
        require(
            self.overlong is not Overlong.shape or self.alpha != 0,
            "algorithm.overlong",
            self.overlong.value,
            "it shapes the reward, which algorithm.alpha=0 does not use; choose mask or keep",
        )
        require_at_least(1, "algorithm", self, "steps", "top_k", "updates_per_batch", "ratio_truncate")
        require_at_least(1, "algorithm", self, "length_norm", "overlong_buffer")
        require_at_least(0, "algorithm", self, "max_off_policy_steps", "overlong_penalty")
        require_above(0, "algorithm", self, "teacher_clip", "clip_low", "clip_high")
        for domain, share in self.target_shares.items():
            require(share >= 0, f"algorithm.target_shares.{domain}", share, "give a share of 0 or more")


CLIPS = {Loss.ppo_clip: (0.2, 0.28), Loss.gspo: (3e-4, 4e-4), Loss.cispo: (1.0, 4.0)}
"""Clips below and above: DAPO; GSPO section 5.1; MiniMax-M1 has no bound below and gives no value above, 4 is a choice."""


def resolve_algorithm(algorithm: PolicyAlgorithm, rollout: RolloutConfig) -> None:
    """Put in what depends on the loss and on the longest answer where the user gave nothing, so that the resolved values
    are seen. Called by the run, not by the section: a default section is made before the user's keys are known."""
    longest = rollout.max_new_tokens * rollout.max_turns
    low, high = CLIPS.get(algorithm.loss, (None, None))
    if algorithm.clip_low is None:
        algorithm.clip_low = low
    if algorithm.clip_high is None:
        algorithm.clip_high = high
    if algorithm.aggregation is Aggregation.constant and algorithm.length_norm is None:
        algorithm.length_norm = longest
    if algorithm.overlong is Overlong.shape:
        if algorithm.overlong_buffer is None:
            algorithm.overlong_buffer = max(1, longest // 5)
        require(
            algorithm.overlong_buffer < longest,
            "algorithm.overlong_buffer",
            algorithm.overlong_buffer,
            f"the longest answer has {longest} tokens (rollout.max_new_tokens * rollout.max_turns); give less",
        )


def sft_learner() -> LearnerConfig:
    """The learner of SFT (MiMo-V2-Flash report): cosine from 5e-5 to 5e-6, epsilon 1e-8, both kinds of expert balance."""
    return LearnerConfig(
        lr=5e-5,
        schedule=Schedule.cosine,
        min_lr_ratio=0.1,
        eps=1e-8,
        expert_bias_rate=None,
        aux_loss_coef=None,
    )


def rl_algorithm() -> PolicyAlgorithm:
    """GRPO with clip-higher (DAPO)."""
    return PolicyAlgorithm(loss=Loss.ppo_clip)


def mopd_algorithm() -> PolicyAlgorithm:
    """Defaults of MOPD: the teacher's log-ratio alone, one sample a prompt."""
    return PolicyAlgorithm(beta=1.0, alpha=0.0, group_size=1)
