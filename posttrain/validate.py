"""Checks of a configuration against the world, before any engine starts: checkpoints, data, rewards, teachers, GPUs.

Owns what needs the file system or several sections at once; what one value alone tells is refused by the schema
(`posttrain.config`). Every refusal is a `UserError` of one line. Reads headers of checkpoints and the data files,
imports the user's reward and environment modules, starts nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

from posttrain.config import (
    DataConfig,
    EvalRun,
    LearnerConfig,
    MergeRun,
    MOPDRun,
    PipelineRun,
    PolicyAlgorithm,
    PolicyRun,
    Replay,
    RLRun,
    RolloutConfig,
    RunConfig,
    SampleRun,
    SFTAlgorithm,
    SFTRun,
    Signal,
    UserError,
    check_deepspeed,
    require,
)
from posttrain.gpus import check_gpus, learners_of
from posttrain.tracking.wandb_sink import check_account
from posttrain.validate_teachers import check_run_teachers, check_step_eval
from rollout.options import FIXED_OPTIONS, OWNED_OPTIONS, check_options
from teachers.checkpoint import TensorEntry, locate, read_config, read_tensors
from teachers.gates import GateRow

BIAS_ENDINGS = ("correction_bias", "expert_bias")  # of the tensors that learner.expert_bias_rate moves


@dataclass(kw_only=True, slots=True)
class ModelReport:
    """What the checkpoint's files say."""

    path: str
    architecture: str
    num_parameters: int
    num_bytes: int
    num_experts: int  # 0: dense
    vocab_size: int | None  # where config.json says so
    context: int | None  # tokens, where config.json says so
    has_expert_bias: bool


@dataclass(kw_only=True, slots=True)
class Report:
    """What a run was found to be made of. Counts are per domain."""

    model: ModelReport
    num_prompts: dict[str, int] = field(default_factory=dict)
    num_eval_prompts: dict[str, int] = field(default_factory=dict)
    num_conversations: dict[str, int] = field(default_factory=dict)
    num_eval_conversations: dict[str, int] = field(default_factory=dict)
    teachers: list[GateRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def domains(self) -> list[str]:
        """Domains of the prompts, or of the conversations where there are no prompts."""
        return sorted(self.num_prompts or self.num_eval_prompts or self.num_conversations)


def validate(cfg: RunConfig) -> Report:
    """Check one run. Raises `UserError` for the first thing that cannot work."""
    if isinstance(cfg, MergeRun):
        return _check_merge(cfg)
    check_account(cfg.tracking)
    report = Report(model=check_model(cfg.model.path, revision=cfg.model.revision))
    if cfg.model.trust_remote_code:
        report.notes.append("model.trust_remote_code=true: Python code of the checkpoint will run")
    check_gpus(cfg, report.notes)
    for key, learner in learners_of(cfg):
        _check_learner(key, learner, report.model)
        if not _is_sft(key, cfg):
            _check_policy_learner(key, learner, cast(Any, cfg).rollout, report.model)
    if isinstance(cfg, PolicyRun | PipelineRun | EvalRun | SampleRun):
        check_engine(cfg.rollout, report.model)
    _check_lengths(cfg)
    _check_data(cfg, report)
    if isinstance(cfg, PolicyRun | PipelineRun | EvalRun | SampleRun):
        _check_targets(cfg, report)
    for key, algorithm in _algorithms_of(cfg):
        if getattr(cfg, "domain", None) is None:  # else it is a part of a run that has them all
            _check_shares(key, algorithm, report)
        _check_teacher_term(key, algorithm, report.model, isinstance(cfg, RLRun) or key.startswith("rl."))
    check_step_eval(cfg, report)  # asks no server
    if isinstance(cfg, MOPDRun | PipelineRun):
        report.teachers = check_run_teachers(cfg, report)
    return report


def _check_shares(key: str, algorithm: PolicyAlgorithm, report: Report) -> None:
    for domain, share in algorithm.target_shares.items():
        way_out = f"no prompt belongs to domain {domain!r}; there are {', '.join(report.num_prompts)}"
        require(domain in report.num_prompts, f"{key}.target_shares.{domain}", share, way_out)
    if algorithm.target_shares:
        for domain in report.num_prompts:
            way_out = "has prompts but no share; give it one"
            require(domain in algorithm.target_shares, f"{key}.target_shares.{domain}", None, way_out)


def _check_merge(cfg: MergeRun) -> Report:
    from posttrain.merge import check_layout

    require(not cfg.model.path, "model.path", cfg.model.path, "give what is merged as models=[DIR,DIR]")
    require(
        bool(cfg.models), "models", cfg.models, "give at least one checkpoint directory: models=[DIR,DIR]"
    )
    check_layout(cfg.sources())
    key, first = next(iter(cfg.sources().items()))
    weights = "" if cfg.base is None else f" with weights {cfg.weights()}"
    note = f"{cfg.method.value} of {', '.join(cfg.models)}{weights}"
    return Report(model=check_model(first, key), notes=[note])


def check_model(path: str, key: str = "model.path", revision: str | None = None) -> ModelReport:
    """Files of a checkpoint: config, complete shards; no tokenizer yet."""
    folder = locate(path, key, revision)
    config = read_config(folder, key)
    tensors = read_tensors(folder, key)
    text = config.get("text_config", config)
    experts = next(
        (text[k] for k in ("n_routed_experts", "num_experts", "num_local_experts") if text.get(k)), 0
    )
    return ModelReport(
        path=path,
        architecture=", ".join(config.get("architectures") or [config.get("model_type", "unknown")]),
        num_parameters=sum(_num_elements(entry) for entry in tensors.values()),
        num_bytes=sum(entry.end - entry.start for entry in tensors.values()),
        num_experts=int(experts),
        vocab_size=text.get("vocab_size"),
        context=text.get("max_position_embeddings"),
        has_expert_bias=any(name.endswith(BIAS_ENDINGS) for name in tensors),
    )


def check_engine(rollout: RolloutConfig, model: ModelReport) -> None:
    """The engine's context holds a completion and a prompt, and is not longer than the model's; vLLM has its options."""
    check_options("rollout.vllm", rollout.vllm, OWNED_OPTIONS, FIXED_OPTIONS)
    require(
        rollout.max_new_tokens < rollout.max_model_len,
        "rollout.max_new_tokens",
        rollout.max_new_tokens,
        f"leaves no room for a prompt in rollout.max_model_len={rollout.max_model_len}; lower it or raise that",
    )
    require(
        model.context is None or rollout.max_model_len <= model.context,
        "rollout.max_model_len",
        rollout.max_model_len,
        f"the model's context is {model.context} tokens; give at most that",
    )


def _num_elements(entry: TensorEntry) -> int:
    count = 1
    for size in entry.shape:
        count *= size
    return count


def _is_sft(learner_key: str, cfg: RunConfig) -> bool:
    return isinstance(cfg, SFTRun) or learner_key.startswith("sft.")


def _check_learner(key: str, learner: LearnerConfig, model: ModelReport) -> None:
    check_deepspeed(learner, key)
    if not model.num_experts:
        way_out = f"{model.path} is a dense model without experts; leave it at its default"
        require(not learner.expert_bias_rate, f"{key}.expert_bias_rate", learner.expert_bias_rate, way_out)
        require(not learner.aux_loss_coef, f"{key}.aux_loss_coef", learner.aux_loss_coef, way_out)
        require(not learner.freeze_router, f"{key}.freeze_router", learner.freeze_router, way_out)
    require(
        not learner.expert_bias_rate or model.has_expert_bias,
        f"{key}.expert_bias_rate",
        learner.expert_bias_rate,
        f"the routers of {model.path} have no expert bias; give 0 (in SFT learner.aux_loss_coef balances as well)",
    )


def _check_policy_learner(
    key: str, learner: LearnerConfig, rollout: RolloutConfig, model: ModelReport
) -> None:
    """What only learners of RL and MOPD can get wrong."""
    require(
        learner.lora.dropout == 0,
        f"{key}.lora.dropout",
        learner.lora.dropout,
        "RL and MOPD train the policy that sampled, and it dropped nothing; give 0",
    )
    require(
        not learner.aux_loss_coef,
        f"{key}.aux_loss_coef",
        learner.aux_loss_coef,
        f"the balance loss is a part of SFT alone; give 0 (models with an expert bias: {key}.expert_bias_rate)",
    )
    require(
        not model.num_experts or rollout.record_routes is Replay.auto or learner.routing_replay is Replay.off,
        "rollout.record_routes",
        rollout.record_routes.value,
        f"{key}.routing_replay=auto replays routes that nobody records; set {key}.routing_replay=off too",
    )


def _algorithms_of(cfg: RunConfig) -> list[tuple[str, PolicyAlgorithm]]:
    if isinstance(cfg, PipelineRun):
        return [("rl.algorithm", cfg.rl.algorithm), ("mopd.algorithm", cfg.mopd.algorithm)]
    return [("algorithm", cfg.algorithm)] if isinstance(cfg, PolicyRun) else []


def _check_teacher_term(key: str, algorithm: PolicyAlgorithm, model: ModelReport, is_rl: bool) -> None:
    require(
        not is_rl or algorithm.beta == 0,
        f"{key}.beta",
        algorithm.beta,
        "RL has no teachers; give 0, or run `posttrain mopd`",
    )
    require(
        algorithm.signal not in (Signal.top_k, Signal.top_k_renorm)
        or model.vocab_size is None
        or algorithm.top_k <= model.vocab_size,
        f"{key}.top_k",
        algorithm.top_k,
        f"the vocabulary of {model.path} has {model.vocab_size} tokens; give at most that",
    )


def _check_lengths(cfg: RunConfig) -> None:
    """The longest sequence that can come up fits into one micro-batch of every learner that may see it."""
    for key, learner in learners_of(cfg):
        if _is_sft(key, cfg):
            length_key = key.removesuffix("learner") + "algorithm.max_tokens"
            length = _sft_algorithm(cfg).max_tokens
        else:
            length_key, length = "rollout.max_model_len", cast(Any, cfg).rollout.max_model_len
        for name in ("max_tokens_per_micro_batch", "pack_tokens"):
            limit = getattr(learner, name)
            require(
                length <= limit or (name == "pack_tokens" and limit == 0),
                length_key,
                length,
                f"a sequence of that length does not fit into {key}.{name}={limit}; lower it or raise that",
            )


# Data -----------------------------------------------------------------------------------------------------------


def _check_data(cfg: RunConfig, report: Report) -> None:
    from posttrain.data.sources import load_conversations, load_prompts, sources_of
    from posttrain.data.tokenizer import load_tokenizer

    _refuse_unused_held_out(cfg)
    plans = _data_plans(cfg)
    for data, held_out, _ in plans:
        sources_of(data, eval=held_out)  # is anything configured? cheaper than a tokenizer
    tokenizer = load_tokenizer(cfg.model.path, cfg.model.revision, cfg.model.trust_remote_code)
    training: set[str] = set()
    demonstrations: set[bytes] = set()
    for data, held_out, kind in plans:
        if kind == "conversations":
            domain = cfg.domain if isinstance(cfg, SFTRun) else None
            max_tokens = _sft_algorithm(cfg).max_tokens
            samples = load_conversations(data, tokenizer, max_tokens, eval=held_out, domain=domain)
            longest = max(len(sample.token_ids) for sample in samples)
            _check_conversation_length(cfg, max_tokens, longest, report.model.context)
            counts, found = _count(s.domain for s in samples), {s.token_ids.tobytes() for s in samples}
            if held_out:
                report.num_eval_conversations = counts
                if repeated := demonstrations & found:
                    report.notes.append(
                        f"{len(repeated)} held-out conversations also occur in the training data"
                    )
            else:
                report.num_conversations, demonstrations = counts, found
            continue
        room = cast(Any, cfg).rollout.max_model_len - cast(Any, cfg).rollout.max_new_tokens
        domain = getattr(cfg, "domain", None)
        prompts = load_prompts(data, tokenizer, room, eval=held_out, domain=domain)
        _check_required_fields(cast(Any, cfg).rewards, prompts, data, tokenizer, room, held_out)
        if held_out:
            report.num_eval_prompts = _count(prompt.domain for prompt in prompts)
            if shared := training & {str(prompt.messages) for prompt in prompts}:
                report.notes.append(f"{len(shared)} held-out prompts also occur in the training prompts")
        else:
            report.num_prompts = _count(prompt.domain for prompt in prompts)
            training = {str(prompt.messages) for prompt in prompts}


def _check_conversation_length(cfg: RunConfig, max_tokens: int, longest: int, context: int | None) -> None:
    require(
        context is None or max_tokens <= context or longest <= context,
        "sft.algorithm.max_tokens" if isinstance(cfg, PipelineRun) else "algorithm.max_tokens",
        max_tokens,
        f"a conversation has {longest} tokens and the model's context is {context}; give at most {context}",
    )


def _refuse_unused_held_out(cfg: RunConfig) -> None:
    """Held-out data where nothing is evaluated would silently do nothing."""
    if isinstance(cfg, EvalRun) or _evaluates_steps(cfg) or _validates(cfg):
        return
    section = "sft_data" if isinstance(cfg, PipelineRun) else "data"
    data: DataConfig = getattr(cfg, section)
    for name, value in (("eval_path", data.eval_path), ("eval_sources", sorted(data.eval_sources))):
        require(
            not value,
            f"{section}.{name}",
            value,
            f"nothing is evaluated on it; {_way_out(cfg)}",
        )


def _way_out(cfg: RunConfig) -> str:
    if isinstance(cfg, SFTRun):
        return "give algorithm.validate_every"
    if isinstance(cfg, PipelineRun):
        return "give sft.algorithm.validate_every; held-out prompts are data.eval_path or data.eval_sources"
    return "give eval.every_steps to `posttrain rl` or `mopd`, or held-out prompts to `posttrain eval`"


def _sft_algorithm(cfg: RunConfig) -> SFTAlgorithm:
    return (cfg.sft if isinstance(cfg, PipelineRun) else cast(SFTRun, cfg)).algorithm


def _validates(cfg: RunConfig) -> bool:
    return isinstance(cfg, SFTRun | PipelineRun) and _sft_algorithm(cfg).validate_every > 0


def _data_plans(cfg: RunConfig) -> list[tuple[DataConfig, bool, str]]:
    """(section, held-out?, kind) of everything that the run reads."""
    if isinstance(cfg, SFTRun):
        plans = [(cfg.data, False, "conversations")]
        return [*plans, (cfg.data, True, "conversations")] if _validates(cfg) else plans
    if isinstance(cfg, EvalRun):
        return [(cfg.data, True, "prompts")]
    if isinstance(cfg, PipelineRun):
        if cfg.sft_data.path is None and not cfg.sft_data.sources:
            raise UserError(
                "sft_data.path is missing: give sft_data.path=FILE.jsonl with the SFT demonstrations"
            )
        if _validates(cfg) and cfg.sft_data.eval_path is None and not cfg.sft_data.eval_sources:
            raise UserError(
                f"sft.algorithm.validate_every={cfg.sft.algorithm.validate_every}: no held-out demonstrations;"
                " give sft_data.eval_path=FILE.jsonl"
            )
        return [
            (cfg.sft_data, False, "conversations"),
            *([(cfg.sft_data, True, "conversations")] if _validates(cfg) else []),
            (cfg.data, False, "prompts"),
            (cfg.data, True, "prompts"),
        ]
    plans = [(cfg.data, False, "prompts")]
    return [*plans, (cfg.data, True, "prompts")] if _evaluates_steps(cfg) else plans


def _evaluates_steps(cfg: RunConfig) -> bool:
    return isinstance(cfg, PolicyRun) and cfg.eval.every_steps > 0


def _check_required_fields(
    rewards: dict[str, Any], prompts: list[Any], data: DataConfig, tokenizer: Any, room: int, held_out: bool
) -> None:
    """Rows have the fields that a reward class names in ``required_fields``; the loader's error names file and line."""
    from posttrain.data.sources import load_prompts

    for domain in sorted({prompt.domain for prompt in prompts}):
        key, entry = (
            ("rewards", rewards) if "_target_" in rewards else (f"rewards.{domain}", rewards.get(domain))
        )
        if not isinstance(entry, dict) or "_target_" not in entry:
            continue  # rewards.resolve says it
        names = getattr(find_target(key, entry["_target_"]), "required_fields", ())
        lacking = [
            p for p in prompts if p.domain == domain and any(not _has_field(p, name) for name in names)
        ]
        if lacking:
            load_prompts(data, tokenizer, room, eval=held_out, domain=domain, required_fields=names)


def _has_field(prompt: Any, names: str) -> bool:
    from posttrain.data.sources import EMPTY

    return any(
        (prompt.answer if name == "answer" else prompt.metadata.get(name)) not in EMPTY
        for name in names.split("|")
    )


def _count(domains: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for domain in domains:
        counts[domain] = counts.get(domain, 0) + 1
    return dict(sorted(counts.items()))


# Rewards, environments, teachers --------------------------------------------------------------------------------


def find_target(key: str, target: Any) -> Any:
    """The class or function that ``_target_`` names."""
    prefix = f"{key}._target_={target!r}"
    way_out = "give MODULE.CLASS; modules are looked for in the working directory and on PYTHONPATH"
    module_name, _, attribute = str(target).rpartition(".")
    if not module_name:
        raise UserError(f"{prefix}: no module in it; {way_out}")
    try:  # code of the user runs on import
        module = importlib.import_module(module_name)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{prefix}: module {module_name!r} cannot be imported ({reason}); {way_out}"
        ) from error
    if not hasattr(module, attribute):
        raise UserError(f"{prefix}: module {module_name!r} has no {attribute!r}; {way_out}")
    return getattr(module, attribute)


def _check_targets(cfg: PolicyRun | PipelineRun | EvalRun | SampleRun, report: Report) -> None:
    from rewards.resolve import resolve

    domains = report.domains
    if isinstance(cfg, MOPDRun):
        require(
            cfg.algorithm.alpha == 0 or bool(cfg.rewards),
            "algorithm.alpha",
            cfg.algorithm.alpha,
            "an outcome advantage needs rewards; give rewards._target_=MODULE.CLASS, or algorithm.alpha=0",
        )
    if isinstance(cfg, SampleRun):
        require(
            cfg.sample.min_reward is None or bool(cfg.rewards),
            "sample.min_reward",
            cfg.sample.min_reward,
            "nothing gives a reward; give rewards._target_=MODULE.CLASS, or sample.min_reward=null",
        )
    if cfg.rewards or not isinstance(cfg, MOPDRun | SampleRun):
        resolve(cfg.rewards, sorted({*domains, *report.num_eval_prompts}))
    for domain, entry in cfg.environments.items():
        if not isinstance(entry, dict) or "_target_" not in entry:
            raise UserError(
                f"environments.{domain}={entry!r}: no _target_; give environments.{domain}._target_=MODULE.CLASS"
            )
        find_target(f"environments.{domain}", entry["_target_"])
        known = {*domains, *report.num_eval_prompts}
        if domain not in known and not getattr(cfg, "domain", None):
            raise UserError(
                f"environments.{domain}: no prompt belongs to domain {domain!r}; there are {', '.join(domains)}"
            )
    require(
        cfg.rollout.max_turns == 1 or bool(cfg.environments),
        "rollout.max_turns",
        cfg.rollout.max_turns,
        "nothing answers a turn; give environments.DOMAIN._target_=MODULE.CLASS, or rollout.max_turns=1",
    )
