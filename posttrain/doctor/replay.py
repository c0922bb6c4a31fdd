"""`posttrain doctor replay`: does routing replay (R3) work for this checkpoint? One engine and one learner on it, a few
dozen rollouts, and a line for every check (`posttrain.doctor.replay_checks`).

Owns what is started, sampled and measured. Refuses bad input before anything starts; a family that replay does not know
is a line of the report, with the learner's own words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import numpy as np
from rich.console import Console
from rich.table import Table

from posttrain.config import (
    DoctorRun,
    Dtype,
    LearnerConfig,
    Replay,
    RLRun,
    RolloutConfig,
    RunConfig,
    UserError,
    require,
)
from posttrain.doctor import replay_checks as checks
from posttrain.doctor import replay_samples as samples
from posttrain.doctor.findings import Finding, findings_table, print_ways_out
from posttrain.gpus import check_gpus, num_gpus
from posttrain.plan import closing_line, process_table
from posttrain.records import LossSettings, Prompt, Rollout, SampleRef, TrainingSample
from posttrain.validate import ModelReport, check_engine, check_model
from posttrain.validate_teachers import check_teacher_workers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from posttrain.learner.group import LearnerGroup
    from rollout.pool import RolloutPool

CPU_BLOCK_SIZE = 32  # vLLM's own 128 tokens on CPUs would leave short rollouts out of the prefix cache
MOE_WORD = re.compile(r"expert|moe|router", re.IGNORECASE)


def run(cfg: RunConfig) -> int:
    """Print the report; returns 1 if a check is wrong, else 0. Raises `UserError` for bad input before engines start."""
    cfg = cast(DoctorRun, cfg)
    console = Console()
    model = check_input(cfg)
    if not has_experts(cfg):
        return _nothing_to_replay(console, model)
    learner_config, rollout_config = sections(cfg, model)
    as_run = RLRun(model=cfg.model, ray=cfg.ray, learner=learner_config, rollout=rollout_config)
    check_gpus(as_run, [])
    from posttrain.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(cfg.model.path, cfg.model.revision, cfg.model.trust_remote_code)
    prompts = samples.make_prompts(cfg, tokenizer, rollout_config)
    if cfg.dry_run:
        console.print(process_table(as_run, model.num_parameters, "would start"))
        print(closing_line("doctor replay", replace(as_run, rollout=cfg.rollout)))
        return 0
    console.print(
        f"starting an engine ({rollout_config.dtype.value}) and a learner ({learner_config.dtype.value}) ...",
        highlight=False,
    )
    findings, table = _measure(cfg, learner_config, rollout_config, prompts, tokenizer)
    if not findings:
        return _nothing_to_replay(console, model)
    return _print(console, model, findings, table)


# Before engines start ---------------------------------------------------------------------------------------------


def check_input(cfg: DoctorRun) -> ModelReport:
    """What the files and settings tell. Raises `UserError`."""
    require(bool(cfg.model.path), "model.path", cfg.model.path, "give a checkpoint: model.path=DIR")
    for key, value in (
        ("rollout.record_routes", cfg.rollout.record_routes),
        ("learner.routing_replay", cfg.learner.routing_replay),
    ):
        require(value is Replay.auto, key, value.value, "there would be nothing to check; leave it at auto")
    require(
        cfg.data.eval_path is None and not cfg.data.eval_sources,
        "data.eval_path",
        cfg.data.eval_path,
        "nothing is evaluated; give prompts as data.path",
    )
    check_teacher_workers(cfg)
    return check_model(cfg.model.path, revision=cfg.model.revision)


def has_experts(cfg: DoctorRun) -> bool:
    """False only where nothing in config.json or among the tensors' names hints at a MoE layer; else the engines know."""
    from teachers.checkpoint import locate, read_config, read_tensors

    folder = locate(cfg.model.path, "model.path", cfg.model.revision)
    if any(MOE_WORD.search(name) for name in read_tensors(folder, "model.path")):
        return True
    config = read_config(folder, "model.path")
    counts = {**config, **config.get("text_config", {})}
    return any(MOE_WORD.search(key) and isinstance(value, int) and value > 1 for key, value in counts.items())


def sections(cfg: DoctorRun, model: ModelReport) -> tuple[LearnerConfig, RolloutConfig]:
    """Learner and engine as configured, but with one engine, short answers, and a context that both can hold."""
    limits = [cfg.rollout.max_model_len, cfg.learner.max_tokens_per_micro_batch]
    limits += [limit for limit in (model.context, cfg.learner.pack_tokens) if limit]
    vllm = dict(cfg.rollout.vllm)
    if not num_gpus() and cfg.ray.address is None:
        vllm.setdefault("block_size", CPU_BLOCK_SIZE)
    rollout = replace(
        cfg.rollout,
        num_workers=1,
        max_new_tokens=cfg.replay.max_new_tokens,
        max_turns=samples.MAX_TURNS,
        max_model_len=min(limits),
        vllm=vllm,
    )
    require(
        rollout.max_new_tokens + samples.GIVEN_TOKENS < rollout.max_model_len,
        "replay.max_new_tokens",
        cfg.replay.max_new_tokens,
        f"leaves no room for a prompt in the {rollout.max_model_len} tokens that engine and learner hold; lower it",
    )
    check_engine(rollout, model)
    return cfg.learner, rollout


# With engines -----------------------------------------------------------------------------------------------------


def _measure(
    cfg: DoctorRun,
    learner_config: LearnerConfig,
    rollout_config: RolloutConfig,
    prompts: list[Prompt],
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[list[Finding], Table | None]:
    """(findings, table with and without replay); no findings for a model that turns out to be dense."""
    from posttrain.engines import Engines

    can_turn = samples.answers_turns(tokenizer)
    target = {"_target_": f"{samples.GoOn.__module__}.{samples.GoOn.__name__}"}
    environments = {p.domain: target for p in prompts} if can_turn else {}
    rollout_config = rollout_config if can_turn else replace(rollout_config, max_turns=1)
    with Engines(cfg.ray) as engines:
        starting = engines.in_background(engines.rollouts, rollout_config, cfg.model, environments, cfg.seed)
        learner = engines.learner(learner_config, cfg.model, 2, cfg.seed)
        try:  # a family that replay does not know
            policy = learner.info
        except UserError as error:
            if not str(error).startswith("model.path: "):
                raise
            return [Finding(name="family", value="refused by the learner", way_out=str(error))], None
        rollouts = starting.result()
        if policy.num_moe_layers == 0 and rollouts.info.num_moe_layers == 0:
            return [], None
        return measure(cfg, learner, rollouts, prompts, samples.plain_tokens(tokenizer), rollout_config)


def measure(
    cfg: DoctorRun,
    learner: LearnerGroup,
    pool: RolloutPool,
    prompts: list[Prompt],
    plain: np.ndarray,
    rollout_config: RolloutConfig,
) -> tuple[list[Finding], Table | None]:
    """All checks, in the order in which one needs the other."""
    rollouts, sampling = samples.sample_rollouts(cfg, pool, prompts, plain, rollout_config)
    findings = [sampling]
    if not rollouts:
        return findings, None
    shapes = checks.check_shapes(pool.info, learner.info, learner.learner.dtype.value, rollouts)
    findings += shapes
    if any(finding.way_out for finding in shapes):
        return findings, None  # the learner would refuse these records

    mismatch = learner.mismatch(references(rollouts))
    layers = checks.layer_numbers(mismatch, learner.info.num_moe_layers)
    findings.append(checks.check_coverage(mismatch["coverage"]))

    dtypes = {rollout_config.dtype, learner.learner.dtype}
    coarser = Dtype.bfloat16 if Dtype.bfloat16 in dtypes else Dtype.float32
    room = pool.info.max_model_len - 1  # scoring samples one token
    texts = [rollout.token_ids[:room] for rollout in rollouts]
    scored, own_routes = pool.score(texts)
    findings += checks.check_recompute(
        rollouts,
        scored,
        cast(list[np.ndarray], own_routes),
        rollout_config.dtype,
        pool.info.num_experts,
        _max_gap(cfg, rollout_config.dtype),
        layers,
    )
    findings.append(checks.check_live_routes(mismatch, coarser))

    comparison = compare(learner, rollouts)
    findings += checks.check_mismatch(mismatch, comparison, _max_gap(cfg, coarser))

    routes = [cast(np.ndarray, rollout.routed_experts) for rollout in rollouts]
    name, broken, changed = checks.broken_routes(routes, layers, cfg.seed)
    control = learner.mismatch(references(rollouts, broken))
    findings.append(checks.check_control(name, changed, mismatch, control))

    findings.append(train_routers(learner, rollouts))
    return findings, _mismatch_table(checks.mismatch_rows(mismatch, comparison))


def _max_gap(cfg: DoctorRun, dtype: Dtype) -> float:
    return checks.MAX_EXACT_GAP if dtype is Dtype.float32 else cfg.rollout.probe_tolerance


def references(
    rollouts: Sequence[Rollout], routes: Sequence[np.ndarray] | None = None, weight: float = 0.0
) -> list[SampleRef]:
    """The rollouts for the learner, under other ``routes`` if given; every sampled token has ``weight`` and an
    advantage of 1."""
    import ray

    records = [
        TrainingSample(
            token_ids=r.token_ids,
            loss_mask=r.loss_mask,
            weights=np.zeros(len(r.token_ids), np.float32),
            rollout_logprobs=r.rollout_logprobs,
            policy_versions=r.policy_versions,
            routed_experts=r.routed_experts if routes is None else routes[i],
        )
        for i, r in enumerate(rollouts)
    ]
    source = ray.put(records)
    return [
        SampleRef(source_ref=source, index=i, num_tokens=len(s.token_ids), weight=weight, orm_advantage=1.0)
        for i, s in enumerate(records)
    ]


def compare(learner: LearnerGroup, rollouts: Sequence[Rollout]) -> checks.Comparison:
    """Learner minus engine logprobs of every sampled token, under recorded and under live routes."""
    texts = [r.token_ids for r in rollouts]

    def differences(logprobs: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [
            (own.astype(np.float64) - r.rollout_logprobs)[r.loss_mask]
            for own, r in zip(logprobs, rollouts, strict=True)
        ]

    return checks.Comparison(
        replayed=differences(learner.logprobs(texts, [r.routed_experts for r in rollouts])),
        live=differences(learner.logprobs(texts)),
    )


def train_routers(learner: LearnerGroup, rollouts: Sequence[Rollout]) -> Finding:
    """One step under replay; a step with weight 0 before it, whose gradient is 0 everywhere, counts the elements. Comes
    last, because it changes the weights."""
    from posttrain.learner.errors import NonFiniteRouterError, RecordError

    loss = LossSettings(kind="policy_gradient", alpha=1.0, correction="off")
    weight = 1.0 / sum(int(r.loss_mask.sum()) for r in rollouts)
    try:
        silent = learner.train_step(references(rollouts), loss, 1)
        trained = learner.train_step(references(rollouts, weight=weight), loss, 2)
    except (RecordError, NonFiniteRouterError) as error:
        return Finding(name="router gradient", value="the learner refuses the step", way_out=str(error))
    if silent["skipped"] or trained["skipped"]:
        return Finding(
            name="router gradient",
            value="the learner refuses the step",
            way_out="the gradient holds NaN or infinity: the checkpoint or learner.dtype is broken for this model",
        )
    key = "num_zeros/router"
    finding = checks.check_gradient(trained.get(key), silent.get(key), trained["grad_norm"])
    if rejected := int(trained.get("replay/rejected", 0)):
        finding.value += f"; learner.max_route_distance keeps {rejected} of {len(rollouts)} rollouts out"
    return finding


# Report -----------------------------------------------------------------------------------------------------------


def _nothing_to_replay(console: Console, model: ModelReport) -> int:
    text = f"{model.path}: {model.architecture} is a dense model; there is nothing to replay"
    console.print(text, style="green", soft_wrap=True, highlight=False)
    return 0


def _mismatch_table(rows: list[list[str]]) -> Table:
    table = Table(title="learner against engine, sampled tokens", title_justify="left")
    table.add_column("")
    for name in ("k3", *(f"F({threshold})" for threshold in checks.THRESHOLDS), "mean |diff|", "max |diff|"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _print(console: Console, model: ModelReport, findings: list[Finding], table: Table | None) -> int:
    console.print(findings_table(findings))
    if table is not None:
        console.print(table)
    print_ways_out(console, findings)
    num_wrong = sum(finding.way_out is not None for finding in findings)
    if table is None:
        console.print("the other checks need what is wrong here, and were not made", highlight=False)
    name = f"{model.path} ({model.architecture})"
    if num_wrong:
        text = f"routing replay cannot be trusted for {name}: {num_wrong} of {len(findings)} checks are wrong"
    else:
        text = f"routing replay works for {name}: all {len(findings)} checks are right"
    console.print(text, style="red" if num_wrong else "green", soft_wrap=True, highlight=False)
    return 1 if num_wrong else 0
