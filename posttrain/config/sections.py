"""Schemas of the sections that runs are made of: model, data, rollout, teachers, evaluation, tracking, Ray."""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from omegaconf import MISSING

from posttrain.config.choices import (
    ACCEPTABLE,
    ALARMS,
    SKIPPABLE,
    AlarmAction,
    BadRow,
    Dtype,
    OnUpdate,
    Replay,
    TeacherBackend,
    TeacherTraining,
    WandbMode,
)
from posttrain.config.errors import require, require_above, require_at_least


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
    """Share of this source in the mixture, relative to the others; held-out sources have none."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    path: str | None = None
    """Shorthand for one source; rows carry their own `domain` (rows without one belong to `default`)."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Named sources: `data.sources.math.path=math.jsonl`."""
    eval_path: str | None = None
    """Held-out prompts (SFT: conversations), same format; never trained on."""
    eval_sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Named held-out sources."""
    on_bad_row: BadRow = BadRow.fail
    """fail: stop at the first malformed row with its line number; skip: drop, count and name it."""
    max_prompt_tokens: int | None = None
    """Prompts longer than this are refused (or skipped, see on_bad_row); null: what the context leaves room for."""

    def __post_init__(self) -> None:
        require_at_least(1, "data", self, "max_prompt_tokens")
        for name, source in self.eval_sources.items():
            way_out = "held-out rows are all asked once; remove the key"
            require(source.weight == 1, f"data.eval_sources.{name}.weight", source.weight, way_out)
        for name, source in self.sources.items():
            key = f"data.sources.{name}.weight"
            require(source.weight >= 0, key, source.weight, "give a weight of 0 or more")
            is_any = any(other.weight > 0 for other in self.sources.values())
            require(
                is_any, key, source.weight, "no source has rows to draw; give one of them a weight above 0"
            )


@dataclass(kw_only=True, slots=True)
class RolloutConfig:
    num_workers: int = 1
    """Ray actors, one vLLM engine each."""
    dtype: Dtype = Dtype.bfloat16
    """Weights and activations of the engine."""
    head_dtype: Dtype | None = Dtype.float32
    """Type in which the LM head computes logits. float32 is that of the learner's softmax: rounding logits to bfloat16
    was a quarter of the k3 that routing replay leaves (docs/results.md). null: as dtype, for quantised heads. A
    head_dtype in vllm.hf_overrides wins."""
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
    head_dtype: Dtype | None = Dtype.float32
    """Type in which the LM head computes logits, as `rollout.head_dtype`; null (as dtype) for a vLLM teacher whose head is
    quantised. Has no effect on signal=full, where the learner computes them in float32, nor on backend=server."""
    max_tokens_per_batch: int = 8192
    """Tokens (padding included) of one scoring forward."""
    cores_per_worker: int | None = None
    """Torch threads of a worker (CPU only); null: all cores."""
    num_gpus_per_worker: float | None = None
    """GPUs for each worker; null: 1 where there are GPUs to spare, else 0 (backend=vllm: tensor_parallel_size)."""
    max_initial_kl: float = 2.5
    """Preflight refuses a teacher whose mean |log-ratio| to the student on the student's own samples is above this. A token
    adds 5 nat at most, so that 5 refuses nobody."""
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
    alarms: dict[str, AlarmAction] = field(default_factory=lambda: {"nan": AlarmAction.skip})
    """What is done about an alarm, by name: warn (the default of all but nan), save (a checkpoint at once), stop (a
    checkpoint, then the end), skip (nan, loss_spike: no optimizer step on the batch). A gradient that is not finite is
    never applied, whatever stands here."""

    def __post_init__(self) -> None:
        for name, action in self.alarms.items():
            key = f"tracking.alarms.{name}"
            near = get_close_matches(name, ALARMS, 1)
            meant = f"did you mean {near[0]}?" if near else f"choose among {', '.join(ALARMS)}"
            require(name in ALARMS, key, str(action), f"no such alarm; {meant}")
            require(
                action is not AlarmAction.skip or name in SKIPPABLE,
                key,
                str(action),
                f"only {' and '.join(SKIPPABLE)} are known before the optimizer step; choose warn, save or stop",
            )
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
