"""The closed choices of the configuration."""

from __future__ import annotations

from enum import StrEnum


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


class FusedLoss(StrEnum):
    off = "off"
    liger = "liger"


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


class AlarmAction(StrEnum):
    warn = "warn"
    save = "save"
    stop = "stop"
    skip = "skip"


# Alarms that a run can sound (`posttrain.alarms`, `posttrain.early_warning`).
ALARMS = (
    "nan",
    "loss_spike",
    "imbalance",
    "dead_experts",
    "overfitting",
    "gradient_underflow",
    "truncation",
    "repetition",
    "entropy",
    "length",
    "starving_domain",
    "no_mixed_groups",
    "rollouts_fail",
    "route_mismatch",
    "mismatch_k3",
    "mismatch_f2",
    "routes_rejected",
)
SKIPPABLE = ("nan", "loss_spike")  # known before the optimizer step

# Gates of the preflight whose red line a config may accept by name (`teachers.gates` says what each looks at).
ACCEPTABLE = (
    "vocabulary",
    "special_tokens",
    "chat_template",
    "tokenizer",
    "config",
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
