"""Configuration schemas: every key, its default and its meaning, once. No torch, ray, vllm or deepspeed import.

A default lives on the field; the string under a field is its documentation (`docs/configuration.md` is generated
from it). `__post_init__` refuses values that cannot work, naming the key, the value and the way out. What needs
the file system or several sections at once is checked by `posttrain.validate`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from omegaconf import MISSING


class UserError(ValueError):
    """Something that the user can mend. The message is one line: key, value, way out. The command exits with 2."""


def require(condition: bool, key: str, value: Any, way_out: str) -> None:
    """Raise `UserError` "key=value: way out" unless ``condition`` holds."""
    if not condition:
        raise UserError(f"{key}={value!r}: {way_out}")


def require_at_least(low: float, section: str, values: Any, *names: str) -> None:
    """`require` that fields of ``values`` are ``low`` or more; None stands for "not given" and passes."""
    for name in names:
        value = getattr(values, name)
        require(value is None or value >= low, f"{section}.{name}", value, f"give {low:g} or more")


def require_above(low: float, section: str, values: Any, *names: str) -> None:
    """`require` that fields of ``values`` are more than ``low``; None stands for "not given" and passes."""
    for name in names:
        value = getattr(values, name)
        require(value is None or value > low, f"{section}.{name}", value, f"give more than {low:g}")


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class BadRow(StrEnum):
    fail = "fail"
    skip = "skip"


class Schedule(StrEnum):
    constant = "constant"
    cosine = "cosine"
    linear = "linear"


class Replay(StrEnum):
    auto = "auto"
    off = "off"


class OnUpdate(StrEnum):
    recompute = "recompute"
    keep = "keep"


class Loss(StrEnum):
    policy_gradient = "policy_gradient"
    ppo_clip = "ppo_clip"
    gspo = "gspo"
    cispo = "cispo"
    reinforce = "reinforce"


class Advantage(StrEnum):
    grpo = "grpo"
    dr_grpo = "dr_grpo"
    rloo = "rloo"


class Aggregation(StrEnum):
    seq_mean = "seq_mean"
    token_mean = "token_mean"
    token_mean_balanced = "token_mean_balanced"
    constant = "constant"


class Correction(StrEnum):
    icepop = "icepop"
    tis = "tis"
    off = "off"


class Signal(StrEnum):
    sampled = "sampled"
    top_k = "top_k"
    top_k_renorm = "top_k_renorm"
    full = "full"


class Overlong(StrEnum):
    mask = "mask"
    keep = "keep"
    shape = "shape"


class TeacherTraining(StrEnum):
    rl = "rl"
    sft = "sft"
    none = "none"


class MergeMethod(StrEnum):
    average = "average"
    task_arithmetic = "task_arithmetic"


class TeacherBackend(StrEnum):
    transformers = "transformers"
    vllm = "vllm"
    server = "server"


class WandbMode(StrEnum):
    offline = "offline"
    online = "online"
    disabled = "disabled"


# Gates of the preflight whose red line a config may accept by name (`teachers.gates` says what each looks at).
ACCEPTABLE = (
    "vocabulary",
    "special_tokens",
    "chat_template",
    "tokenizer",
    "revision",
    "self_teacher",
    "tensors",
    "weights",
    "foreign",
    "adapter",
    "scoring",
    "noise",
    "initial_kl",
)


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    path: str = MISSING
    """Hugging Face checkpoint directory or hub id: safetensors, config.json, tokenizer with a chat template."""
    revision: str | None = None
    """Hub revision; recorded in the manifest."""
    trust_remote_code: bool = False
    """Run Python code that ships with the checkpoint. Off unless you wrote that code."""
    attn_implementation: str | None = None
    """Transformers attention implementation; null lets Transformers choose."""
    experts_implementation: str | None = "grouped_mm"
    """Transformers experts implementation; grouped_mm is the fast choice on CPU and GPU."""


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    path: str = MISSING
    """JSONL or Parquet file, directory of them, or the name of a `datasets` dataset."""
    domain: str | None = None
    """Domain of every row; null reads the row's own `domain` field."""
    split: str = "train"
    """Split, for `datasets` sources."""
    weight: float = 1.0
    """Share of this source in the mixture, relative to the others."""

    def __post_init__(self) -> None:
        require(self.weight >= 0, "data.sources.*.weight", self.weight, "give a weight of 0 or more")


@dataclass(kw_only=True, slots=True)
class DataConfig:
    path: str | None = None
    """Shorthand for one source; rows carry their own `domain` (rows without one belong to `default`)."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Named sources: `data.sources.math.path=math.jsonl`."""
    eval_path: str | None = None
    """Held-out prompts for evaluation, same format; never trained on."""
    eval_sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Named held-out sources."""
    on_bad_row: BadRow = BadRow.fail
    """fail: stop at the first malformed row with its line number; skip: drop, count and name it."""
    max_prompt_tokens: int | None = None
    """Prompts longer than this are refused (or skipped, see on_bad_row); null: what the context leaves room for."""

    def __post_init__(self) -> None:
        require_at_least(1, "data", self, "max_prompt_tokens")


@dataclass(kw_only=True, slots=True)
class RolloutConfig:
    num_workers: int = 1
    """Ray actors, one vLLM engine each."""
    dtype: Dtype = Dtype.bfloat16
    """Weights and activations of the engine."""
    head_dtype: Dtype | None = Dtype.float32
    """Type of the LM head's product. float32 is that of the learner's softmax: rounding logits to bfloat16 was a quarter
    of the k3 that routing replay leaves (docs/results.md). null: as dtype, for quantised heads."""
    max_new_tokens: int = 512
    """Upper bound on sampled tokens per turn."""
    max_turns: int = 1
    """Policy turns per episode; more than 1 needs an environment for the domain."""
    max_model_len: int = 2048
    """Context of the engine: prompt, completions and tool results together."""
    temperature: float = 1.0
    """Training rollouts are sampled at 1; other values are refused until all logprobs follow them."""
    top_p: float = 1.0
    """As temperature: only 1 is accepted for training."""
    record_routes: Replay = Replay.auto
    """auto: MoE models record the experts of every token; dense models run without."""
    on_update: OnUpdate = OnUpdate.recompute
    """What happens to requests in flight when weights change: KV dropped and rebuilt, or kept and marked."""
    probe_tolerance: float = 0.1
    """Largest mean |engine - learner| logprob of the probe texts after an update, nat; above it, or above 5 times what the
    first update showed, the run stops."""
    max_retries: int = 2
    """Times a prompt is generated again after a worker died; then it is quarantined and named."""
    environment_timeout_s: float | None = 300.0
    """An environment that takes longer over one reply costs its rollout, not the run; null: no limit."""
    cores_per_worker: int = 1
    """CPU cores for each engine (CPU only)."""
    num_gpus_per_worker: float | None = None
    """GPUs for each engine; null: 1 (times tensor_parallel_size) where there are GPUs, else 0."""
    vllm: dict[str, Any] = field(default_factory=dict)
    """Passed to vLLM's engine under vLLM's own option names."""

    def __post_init__(self) -> None:
        require(
            self.num_workers >= 1, "rollout.num_workers", self.num_workers, "at least one worker is needed"
        )
        require(self.max_new_tokens >= 1, "rollout.max_new_tokens", self.max_new_tokens, "give at least 1")
        require(self.max_turns >= 1, "rollout.max_turns", self.max_turns, "give at least 1")
        require(
            self.temperature == 1.0,
            "rollout.temperature",
            self.temperature,
            "training rollouts are sampled at temperature 1 (evaluation has eval.temperature)",
        )
        require(self.top_p == 1.0, "rollout.top_p", self.top_p, "training rollouts are sampled at top_p 1")
        require_at_least(1, "rollout", self, "max_model_len", "cores_per_worker")
        require_at_least(0, "rollout", self, "max_retries", "num_gpus_per_worker")
        require_above(0, "rollout", self, "probe_tolerance", "environment_timeout_s")


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
    expert_bias_rate: float = 0.0
    """gamma of the aux-loss-free bias update, once per optimizer step; 0 leaves the bias alone."""
    aux_loss_coef: float = 0.0
    """SFT only: coefficient of the sequence-wise balance loss."""
    freeze_router: bool = False
    """No gradient for router weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    logprob_chunk_tokens: int = 2048
    """Tokens whose logits exist at once; bounds the memory of the vocabulary softmax."""
    cores_per_rank: int | None = None
    """Torch threads of a rank (CPU only); null: all cores divided by the number of ranks."""
    num_gpus_per_rank: float | None = None
    """GPUs of each rank; null: 1 where there are GPUs; 0.5 shares one GPU with an engine."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Passed to DeepSpeed under its own option names; keys that this config owns are refused."""

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


@dataclass(kw_only=True, slots=True)
class SFTAlgorithm:
    steps: int = 100
    """Optimizer steps."""
    batch_size: int = 128
    """Conversations per step, over all ranks."""
    max_tokens: int = 2048
    """Longer conversations are refused (or skipped, see data.on_bad_row)."""

    def __post_init__(self) -> None:
        require_at_least(1, "algorithm", self, "steps", "batch_size", "max_tokens")


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
        require(
            0 <= self.ratio_low < 1 < self.ratio_high,
            "algorithm.ratio_low",
            self.ratio_low,
            "the band must hold 1: ratio_low < 1 < ratio_high",
        )
        require(
            self.alpha != 0 or self.beta != 0,
            "algorithm.alpha",
            self.alpha,
            "alpha and beta are both 0: nothing would be learned",
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
    """The learner of SFT: cosine from 5e-5 to 5e-6 (MiMo-V2-Flash report)."""
    return LearnerConfig(lr=5e-5, schedule=Schedule.cosine, min_lr_ratio=0.1)


def rl_algorithm() -> PolicyAlgorithm:
    """GRPO with clip-higher (DAPO)."""
    return PolicyAlgorithm(loss=Loss.ppo_clip)


def mopd_algorithm() -> PolicyAlgorithm:
    """Defaults of MOPD: the teacher's log-ratio alone, one sample a prompt."""
    return PolicyAlgorithm(beta=1.0, alpha=0.0, group_size=1)


@dataclass(kw_only=True, slots=True)
class TeacherConfig:
    path: str | None = None
    """Frozen checkpoint of this domain's teacher; of `teachers.default`: of every domain without a teacher of its own.
    With backend=server the URL http://HOST:PORT. In `pipeline`, null means: trained here, see train."""
    backend: TeacherBackend = TeacherBackend.transformers
    """transformers: in the teacher workers; vllm: an engine of its own that only prefills; server: `vllm serve` at path."""
    adapter: str | None = None
    """LoRA adapter (PEFT directory) on top of path, or of the start model where path is null; one base serves many."""
    model: str | None = None
    """backend=server only: the name under which the server holds the teacher."""
    revision: str | None = None
    """Hub revision; of a folder, the commit that it must have been fetched at."""
    self: bool = False
    """This teacher is the student itself, on purpose; otherwise such a teacher is refused, because it teaches nothing."""
    train: TeacherTraining = TeacherTraining.rl
    """pipeline only: rl (from the SFT model), sft (on the domain's own data) or none (path, or the SFT model itself). In
    later rounds the former student takes the place of the SFT model."""
    steps: int | None = None
    """pipeline only: steps of this teacher; null: those of the stage."""

    def __post_init__(self) -> None:
        require_at_least(1, "teachers.*", self, "steps")


@dataclass(kw_only=True, slots=True)
class TeacherWorkerConfig:
    num_workers: int = 1
    """Ray actors that score; teachers are spread over them."""
    dtype: Dtype = Dtype.float32
    """Type in which teachers are held."""
    max_tokens_per_batch: int = 8192
    """Tokens (padding included) of one scoring forward."""
    cores_per_worker: int | None = None
    """Torch threads of a worker (CPU only); null: all cores."""
    num_gpus_per_worker: float | None = None
    """GPUs for each worker; null: 1 where there are GPUs to spare, else 0 (backend=vllm: tensor_parallel_size)."""
    max_initial_kl: float = 2.0
    """Preflight refuses a teacher whose mean |log-ratio| to the student on the student's own samples is above this."""
    vllm: dict[str, Any] = field(default_factory=dict)
    """Passed to the engine of each backend=vllm teacher under vLLM's own option names."""
    api_key_env: str | None = None
    """Environment variable that holds the key of backend=server teachers; null: they need none."""
    server_concurrency: int = 16
    """Texts that are with one server at the same time."""
    server_timeout_s: float = 300.0
    """Seconds that a server may take for one text."""
    server_retries: int = 4
    """Times a text is sent again after a timeout, a lost connection or an overloaded server; then the run stops."""
    accept: list[str] = field(default_factory=list)
    """Red lines of the preflight that do not stop the run, by the name of their gate: `[foreign, chat_template]`."""

    def __post_init__(self) -> None:
        for name in self.accept:
            require(
                name in ACCEPTABLE,
                "teacher_workers.accept",
                name,
                f"no such gate, or none that can be accepted; choose among {', '.join(ACCEPTABLE)}",
            )
        require_at_least(
            1,
            "teacher_workers",
            self,
            "num_workers",
            "max_tokens_per_batch",
            "cores_per_worker",
            "server_concurrency",
        )
        require_at_least(0, "teacher_workers", self, "num_gpus_per_worker", "server_retries")
        require_above(0, "teacher_workers", self, "max_initial_kl", "server_timeout_s")


@dataclass(kw_only=True, slots=True)
class RewardWorkerConfig:
    num_workers: int = 1
    """Ray actors that score; batches take turns among them."""
    timeout_s: float | None = 60.0
    """A reward that takes longer over one rollout is an error of that rollout, not a stopped run; null: no limit."""

    def __post_init__(self) -> None:
        require_at_least(1, "reward_workers", self, "num_workers")
        require_above(0, "reward_workers", self, "timeout_s")


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    every_steps: int = 20
    """Steps between checkpoints; the last step always has one."""
    keep: int = 2
    """Checkpoints kept on disk."""

    def __post_init__(self) -> None:
        require_at_least(1, "checkpoint", self, "every_steps", "keep")


@dataclass(kw_only=True, slots=True)
class HeldOutConfig:
    """What every evaluation has."""

    num_prompts: int | None = None
    """Held-out prompts per domain; null: all."""
    num_samples: int = 4
    """Samples a prompt at the evaluation temperature."""
    temperature: float = 1.0
    """Temperature of the sampled evaluation."""

    def __post_init__(self) -> None:
        require_at_least(1, "eval", self, "num_prompts", "num_samples")
        require_above(0, "eval", self, "temperature")


@dataclass(kw_only=True, slots=True)
class StepEvalConfig(HeldOutConfig):
    """Evaluation while a policy trains."""

    every_steps: int = 0
    """Steps between evaluations on data.eval_path or data.eval_sources; also before the first step and after the last.
    0: none."""
    num_samples: int = 1
    """Samples a prompt at the evaluation temperature."""
    teachers: bool = False
    """MOPD: measure every teacher on its domain once, before the first step; gives eval/<domain>/headroom."""

    def __post_init__(self) -> None:
        HeldOutConfig.__post_init__(self)
        require_at_least(0, "eval", self, "every_steps")


@dataclass(kw_only=True, slots=True)
class EvalConfig(HeldOutConfig):
    greedy: bool = True
    """Also one greedy sample a prompt."""
    cross_num_prompts: int = 200
    """pipeline: prompts per cell of the teachers x domains table."""

    def __post_init__(self) -> None:
        HeldOutConfig.__post_init__(self)
        require_at_least(1, "eval", self, "cross_num_prompts")


@dataclass(kw_only=True, slots=True)
class SampleConfig:
    num_samples: int = 1
    """Samples a prompt."""
    num_prompts: int | None = None
    """The first prompts of every domain; null: all."""
    temperature: float = 1.0
    """Temperature; 0 is greedy."""
    min_reward: float | None = None
    """Rejection sampling: only samples with at least this reward are written. null: all."""
    keep_truncated: bool = False
    """Also write samples that hit a length limit; they have no end mark."""

    def __post_init__(self) -> None:
        require_at_least(1, "sample", self, "num_samples", "num_prompts")
        require_at_least(0, "sample", self, "temperature")
        require(
            self.temperature > 0 or self.num_samples == 1,
            "sample.num_samples",
            self.num_samples,
            "greedy samples of one prompt are all the same; give 1, or a sample.temperature above 0",
        )


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    wandb: WandbMode = WandbMode.offline
    """offline needs no account; `wandb sync` uploads later."""
    project: str = "posttrain"
    """wandb project."""
    entity: str | None = None
    """wandb user or team; null: the account's default."""
    console: bool = True
    """Live progress display."""
    rollout_samples: int = 8
    """Rollouts per step written to rollouts/ with their per-token scores."""
    rollout_every_steps: int = 10
    """Steps between written samples, and between measurements of what replay does (mismatch with and without)."""

    def __post_init__(self) -> None:
        require_at_least(1, "tracking", self, "rollout_every_steps")
        require_at_least(0, "tracking", self, "rollout_samples")


@dataclass(kw_only=True, slots=True)
class RayConfig:
    address: str | None = None
    """null starts Ray on this machine, bound to the loopback address; `auto` or an address joins a cluster."""
    num_cpus: int | None = None
    """Logical CPUs that a local Ray offers; null: those of the machine, at least 16 (actors share cores)."""
    object_store_gb: float = 1.0
    """Shared memory of a local Ray for rollouts and weights, GiB."""
    log_to_driver: bool = False
    """Print what the worker processes print; otherwise it is in /tmp/ray/session_latest/logs."""

    def __post_init__(self) -> None:
        require_at_least(1, "ray", self, "num_cpus")
        require_above(0, "ray", self, "object_store_gb")


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """What every run has."""

    name: str = MISSING
    """Folder of the run under runs_dir."""
    runs_dir: str = "runs"
    """Where run folders go."""
    seed: int = 0
    """Seed of data order, and of engines as they start; engines that serve several stages go on with their state."""
    fresh: bool = False
    """Start over: the folder's former content is moved to `<name>.old-<time>`. Default is to resume."""
    dry_run: bool = False
    """Resolve, validate, print what would be used, and start nothing."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


@dataclass(kw_only=True, slots=True)
class SFTRun(RunConfig):
    """`posttrain sft`"""

    name: str = "sft"
    domain: str | None = None
    """Train on this domain's conversations only; null: all."""
    algorithm: SFTAlgorithm = field(default_factory=SFTAlgorithm)
    learner: LearnerConfig = field(default_factory=lambda: sft_learner())


@dataclass(kw_only=True, slots=True)
class PolicyRun(RunConfig):
    """What `rl` and `mopd` share."""

    algorithm: PolicyAlgorithm = field(default_factory=lambda: rl_algorithm())
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: dict[str, Any] = field(default_factory=dict)
    """`_target_` and arguments of one reward for every domain, or `<domain>: {_target_: ...}`."""
    reward_workers: RewardWorkerConfig = field(default_factory=RewardWorkerConfig)
    environments: dict[str, Any] = field(default_factory=dict)
    """`<domain>: {_target_: ...}`: what answers a turn of the policy in this domain."""
    eval: StepEvalConfig = field(default_factory=StepEvalConfig)

    def __post_init__(self) -> None:
        resolve_algorithm(self.algorithm, self.rollout)


@dataclass(kw_only=True, slots=True)
class RLRun(PolicyRun):
    """`posttrain rl`"""

    name: str = "rl"
    domain: str | None = None
    """Train on this domain's prompts only; null: all."""


@dataclass(kw_only=True, slots=True)
class MOPDRun(PolicyRun):
    """`posttrain mopd`"""

    name: str = "mopd"
    domain: str | None = None
    """Train on this domain's prompts only, with its teacher alone; null: all."""
    algorithm: PolicyAlgorithm = field(default_factory=mopd_algorithm)
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)
    """Teacher of each domain: `teachers.math.path=DIR`; `teachers.default` serves domains without one."""
    teacher_workers: TeacherWorkerConfig = field(default_factory=TeacherWorkerConfig)


@dataclass(kw_only=True, slots=True)
class SFTStage:
    algorithm: SFTAlgorithm = field(default_factory=SFTAlgorithm)
    learner: LearnerConfig = field(default_factory=lambda: sft_learner())


@dataclass(kw_only=True, slots=True)
class PolicyStage:
    algorithm: PolicyAlgorithm = field(default_factory=lambda: rl_algorithm())
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    eval: StepEvalConfig = field(default_factory=StepEvalConfig)


@dataclass(kw_only=True, slots=True)
class PipelineRun(RunConfig):
    """`posttrain pipeline`: SFT, one teacher per domain, MOPD, evaluation, table."""

    name: str = "pipeline"
    rounds: int = 1
    """Rounds of teachers and MOPD. From the second on teachers and student start from the former round's student; their
    folders are round2/teachers/DOMAIN and round2/mopd."""
    sft: SFTStage = field(default_factory=SFTStage)
    rl: PolicyStage = field(default_factory=PolicyStage)
    mopd: PolicyStage = field(default_factory=lambda: PolicyStage(algorithm=mopd_algorithm()))
    sft_data: DataConfig = field(default_factory=DataConfig)
    """Demonstrations for the SFT stage; `data` holds the prompts of RL and MOPD."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)
    teacher_workers: TeacherWorkerConfig = field(default_factory=TeacherWorkerConfig)
    rewards: dict[str, Any] = field(default_factory=dict)
    """`_target_` and arguments of one reward for every domain, or `<domain>: {_target_: ...}`."""
    reward_workers: RewardWorkerConfig = field(default_factory=RewardWorkerConfig)
    environments: dict[str, Any] = field(default_factory=dict)
    """`<domain>: {_target_: ...}`: what answers a turn of the policy in this domain."""
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        for stage in (self.rl, self.mopd):
            resolve_algorithm(stage.algorithm, self.rollout)
        require(self.rounds >= 1, "rounds", self.rounds, "give 1 or more")


@dataclass(kw_only=True, slots=True)
class EvalRun(RunConfig):
    """`posttrain eval`: accuracy of one checkpoint on held-out prompts."""

    name: str = "eval"
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: dict[str, Any] = field(default_factory=dict)
    """`_target_` and arguments of one reward for every domain, or `<domain>: {_target_: ...}`."""
    reward_workers: RewardWorkerConfig = field(default_factory=RewardWorkerConfig)
    environments: dict[str, Any] = field(default_factory=dict)
    """`<domain>: {_target_: ...}`: what answers a turn of the policy in this domain."""
    eval: EvalConfig = field(default_factory=EvalConfig)


@dataclass(kw_only=True, slots=True)
class SampleRun(RunConfig):
    """`posttrain sample`: rollouts of one checkpoint as rows for `posttrain sft`."""

    name: str = "sample"
    domain: str | None = None
    """Sample this domain's prompts only; null: all."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: dict[str, Any] = field(default_factory=dict)
    """`_target_` and arguments of one reward for every domain, or `<domain>: {_target_: ...}`."""
    reward_workers: RewardWorkerConfig = field(default_factory=RewardWorkerConfig)
    environments: dict[str, Any] = field(default_factory=dict)
    """`<domain>: {_target_: ...}`: what answers a turn of the policy in this domain."""
    sample: SampleConfig = field(default_factory=SampleConfig)


@dataclass(kw_only=True, slots=True)
class MergeRun(RunConfig):
    """`posttrain merge`: one model out of several of one shape, without training."""

    name: str = "merge"
    method: MergeMethod = MergeMethod.average
    """average: the mean of the models; task_arithmetic: base + coefficient * sum of (model - base) (arXiv:2212.04089)."""
    models: list[str] = field(default_factory=list)
    """Checkpoints of one architecture: `models=[runs/math/model,runs/code/model]`."""
    base: str | None = None
    """task_arithmetic: the checkpoint that the models were trained from."""
    coefficient: float = 0.5
    """task_arithmetic: weight of every difference."""
    coefficients: list[float] = field(default_factory=list)
    """task_arithmetic: one weight for each of `models`, in their order; empty: coefficient for all."""

    def __post_init__(self) -> None:
        arithmetic = self.method is MergeMethod.task_arithmetic
        require(
            not arithmetic or self.base is not None,
            "base",
            self.base,
            "task arithmetic needs the checkpoint that the models were trained from; give base=DIR",
        )
        require(
            arithmetic or self.base is None,
            "base",
            self.base,
            "only method=task_arithmetic has a base; remove it",
        )
        require(
            arithmetic or not self.coefficients,
            "coefficients",
            self.coefficients,
            "only method=task_arithmetic weighs the models; remove it",
        )
        require(
            not self.coefficients or len(self.coefficients) == len(self.models),
            "coefficients",
            self.coefficients,
            f"give one for each of the {len(self.models)} models, or coefficient=NUMBER for all",
        )

    def sources(self) -> dict[str, str]:
        """Config key -> checkpoint of everything that is read."""
        base = {} if self.base is None else {"base": self.base}
        return base | {f"models.{i}": path for i, path in enumerate(self.models)}

    def weights(self) -> list[float]:
        """Weight of every model's difference to the base."""
        return list(self.coefficients) or [self.coefficient] * len(self.models)


@dataclass(kw_only=True, slots=True)
class ReplayCheck:
    num_rollouts: int = 48
    """Rollouts to sample; a quarter of them go on from another one's end, through the prefix cache."""
    max_new_tokens: int = 64
    """Upper bound on sampled tokens per turn."""

    def __post_init__(self) -> None:
        require_at_least(4, "replay", self, "num_rollouts")
        require_at_least(1, "replay", self, "max_new_tokens")


@dataclass(kw_only=True, slots=True)
class TeacherCheck:
    num_samples: int = 32
    """Answers of the student to score, per domain."""
    max_new_tokens: int = 256
    """Upper bound on sampled tokens of each."""

    def __post_init__(self) -> None:
        require_at_least(1, "teacher_check", self, "num_samples", "max_new_tokens")


@dataclass(kw_only=True, slots=True)
class DoctorRun(RunConfig):
    """`posttrain doctor`: versions, devices, memory, and what is wrong; `doctor replay`: routing replay; `doctor
    teachers`: are these the right teachers?"""

    name: str = "doctor"
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    replay: ReplayCheck = field(default_factory=ReplayCheck)
    domain: str | None = None
    """doctor teachers: look at this domain's prompts and teacher only; null: all."""
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)
    """Teacher of each domain: `teachers.math.path=DIR`, as in `mopd`."""
    teacher_workers: TeacherWorkerConfig = field(default_factory=TeacherWorkerConfig)
    teacher_check: TeacherCheck = field(default_factory=TeacherCheck)


RUNS: dict[str, type[RunConfig]] = {
    "sft": SFTRun,
    "rl": RLRun,
    "mopd": MOPDRun,
    "pipeline": PipelineRun,
    "eval": EvalRun,
    "sample": SampleRun,
    "merge": MergeRun,
    "doctor": DoctorRun,
}
