"""Composition of the configuration: every file under conf/, overrides of every kind, one clear line per mistake."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from omegaconf import MISSING, OmegaConf

from posttrain.compose import available_groups, command_groups, compose, config_dir, merge
from posttrain.config import RUNS, Correction, Dtype, Loss, RunConfig, UserError
from posttrain.run_folder import plain
from posttrain.schema import lookup, walk

MODEL = "model.path=/m"
PACKAGED = {  # group files that describe one section, and the command to try them with
    "algorithm": ("rl", "algorithm"),
    "learner": ("sft", "learner"),
    "tracking": ("sft", "tracking"),
}


def build(command: str, *overrides: str, **kwargs) -> RunConfig:
    return compose(command, [MODEL, *overrides], **kwargs)[1]


def message(command: str, *overrides: str, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        build(command, *overrides, **kwargs)
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("command", RUNS)
def test_primary_config_equals_the_schema(command):
    _, cfg = compose(command, [MODEL])
    assert type(cfg) is RUNS[command]
    defaults = RUNS[command]()
    defaults.model.path = "/m"
    assert cfg == defaults


def test_every_file_under_conf_composes():
    seen = set()
    for group, options in available_groups().items():
        for option in options:
            if group == "experiment":
                cfg = build("pipeline", f"experiment={option}")
            else:
                command, place = PACKAGED[group]
                cfg = build(command, f"{group}={option}")
                assert getattr(cfg, place) != getattr(RUNS[command](), place), (
                    "an option that changes nothing"
                )
            assert isinstance(cfg, RunConfig)
            seen.add(f"{group}/{option}.yaml")
    files = {str(p.relative_to(config_dir())) for p in config_dir().rglob("*.yaml")}
    assert files == seen | {f"{command}.yaml" for command in RUNS}


def test_groups_of_the_pipeline_reach_their_stage():
    cfg = build("pipeline", "algorithm@rl.algorithm=dapo", "learner@mopd.learner=zero3")
    assert cfg.rl.algorithm.drop_equal_groups and cfg.mopd.learner.zero_stage == 3
    assert cfg.sft.learner.zero_stage == 0
    assert "algorithm@rl.algorithm" in command_groups("pipeline")
    assert "has no such group" in message("pipeline", "algorithm=dapo")


def test_experiment_with_and_without_plus():
    assert build("pipeline", "experiment=tiny") == build("pipeline", "+experiment=tiny")
    assert build("pipeline", "experiment=tiny").name == "tiny"


def test_mappings_take_new_names_without_plus():
    cfg = build(
        "mopd",
        "teachers.math.path=/t",
        "teachers.math.steps=3",
        "data.sources.math.path=f.jsonl",
        "data.sources.math.weight=2",
        "rewards._target_=my_module.MyReward",
        "rewards.tolerance=0.1",
        "environments.tool._target_=my_module.MyTool",
        "rollout.vllm.enforce_eager=true",
        "learner.deepspeed.zero_optimization.overlap_comm=false",
        "algorithm.target_shares.math=0.5",
    )
    assert cfg.teachers["math"].path == "/t" and cfg.teachers["math"].steps == 3
    assert cfg.data.sources["math"].weight == 2.0
    assert cfg.rewards == {"_target_": "my_module.MyReward", "tolerance": 0.1}
    assert cfg.environments["tool"] == {"_target_": "my_module.MyTool"}
    assert cfg.rollout.vllm == {"enforce_eager": True}
    assert cfg.learner.deepspeed == {"zero_optimization": {"overlap_comm": False}}
    assert cfg.algorithm.target_shares == {"math": 0.5}


def test_values_of_every_kind():
    cfg = build("rl", "learner.lr=3e-4", "learner.dtype=bfloat16", "learner.betas=[0.8,0.9]", "domain=null")
    assert (cfg.learner.lr, cfg.learner.dtype, cfg.learner.betas) == (3e-4, Dtype.bfloat16, [0.8, 0.9])
    assert build("rl", "algorithm.correction=off").algorithm.correction is Correction.off
    assert build("rl", 'model.path="a b=c(1)"').model.path == "a b=c(1)"


def test_later_wins_and_an_entry_can_be_removed():
    assert build("rl", "seed=1", "seed=2").seed == 2
    cfg = build("pipeline", "experiment=tiny", "~teachers.tool")
    assert set(cfg.teachers) == {"math", "code", "instruct"}
    assert "can be removed" in message("pipeline", "~teachers")


@pytest.mark.parametrize(
    ("command", "override", "expected"),
    [
        (
            "mopd",
            "teachers.math.pth=x",
            "teachers.math.pth='x': no such key; did you mean teachers.math.path?",
        ),
        ("rl", "learner.lrr=1", "learner.lrr=1: no such key; did you mean learner.lr?"),
        ("rl", "+learnr.lr=1", "learnr.lr=1: no such key; did you mean learner.lr?"),
        ("rl", "lr=1", "lr=1: no such key; did you mean learner.lr?"),
        ("rl", "++typo=1", "typo=1: no such key"),
        ("rl", "learner.lr.x=1", "learner.lr.x=1: no such key; learner.lr is a single value"),
        ("rl", "learner.lr=abc", "learner.lr=abc: a number is needed"),
        ("rl", "learner.warmup_steps=1.5", "learner.warmup_steps=1.5: a whole number is needed"),
        ("rl", "fresh=maybe", "fresh=maybe: true or false is needed"),
        ("rl", "learner.dtype=fp32", "learner.dtype=fp32: choose float32 or bfloat16"),
        ("rl", "learner.betas=1", "learner.betas=1: a list such as"),
        ("rl", "learner=3", "learner=3: this is a section"),
        ("mopd", "teachers=3", "teachers=3: a mapping"),
        ("rl", "seed=1,2", "seed=1,2: several values"),
        ("rl", "hydra.run.dir=x", "hydra.run.dir=x: Hydra's own settings"),
        ("rl", "seed", "seed: cannot be read; an override is key=value"),
        ("rl", "model.path=a(1)", "model.path=a(1): cannot be read; quote the value"),
        ("pipeline", "experiment=tny", "experiment=tny: no such option; did you mean tiny?"),
        ("rl", "learner.zero_stage=4", "learner.zero_stage=4: choose 0, 1, 2 or 3"),
        (
            "rl",
            "learner={fused_loss: liger, zero_stage: 3}",
            "learner.fused_loss='liger': learner.zero_stage=3 takes",
        ),
        ("rl", "rollout.temperature=0.7", "rollout.temperature=0.7: training rollouts"),
        ("rl", "algorithm.group_size=1", "algorithm.group_size=1: an outcome advantage"),
        ("rl", "learner.deepspeed.bf16.enabled=true", "learner.deepspeed.bf16="),
        ("pipeline", "rl.algorithm.group_size=1", "rl.algorithm.group_size=1: an outcome advantage"),
        (
            "mopd",
            "algorithm.signal=topk",
            "algorithm.signal=topk: choose sampled, top_k, top_k_renorm or full",
        ),
        (
            "rl",
            "algorithm.signal=full",
            "algorithm.signal='full': it is the teacher's, whose weight algorithm.beta is 0",
        ),
        ("pipeline", "rl.algorithm.signal=top_k", "rl.algorithm.signal='top_k': it is the teacher's"),
        ("sft", "data.sources.a.weight=1", "data.sources.a.path is missing: give data.sources.a.path="),
        ("sft", "name=${nowhere}", "name: "),
        ("sft", "tracking.alarms.nam=warn", "tracking.alarms.nam='warn': no such alarm; did you mean nan?"),
        ("sft", "tracking.alarms.zzz=warn", "tracking.alarms.zzz='warn': no such alarm; choose among nan,"),
        ("sft", "tracking.alarms.nan=halt", "tracking.alarms.nan=halt: choose warn, save, stop or skip"),
        (
            "rl",
            "tracking.alarms.length=skip",
            "tracking.alarms.length='skip': only nan and loss_spike are known",
        ),
    ],
)
def test_one_line_names_key_value_and_way_out(command, override, expected):
    assert message(command, override).startswith(expected)


@pytest.mark.parametrize(
    ("command", "overrides"),
    [
        ("rl", "algorithm.updates_per_batch=0 algorithm.steps=0 algorithm.max_off_policy_steps=-1"),
        ("rl", "algorithm.teacher_clip=0.0 algorithm.clip_low=0.0 algorithm.clip_high=-0.1"),
        ("rl", "algorithm.ratio_truncate=0.9 algorithm.target_shares.math=-0.5"),
        ("rl", "algorithm.length_norm=0 algorithm.overlong_buffer=0 algorithm.overlong_penalty=-0.5"),
        ("mopd", "eval.every_steps=-1 eval.num_samples=0 eval.num_prompts=0 eval.temperature=0.0"),
        ("mopd", "algorithm.top_k=0 algorithm.top_k=-3"),
        ("sft", "algorithm.steps=0 algorithm.batch_size=0 algorithm.max_tokens=0"),
        (
            "sft",
            "algorithm.validate_every=-1 algorithm.early_stop_patience=0 algorithm.early_stop_patience=3",
        ),
        ("sft", "checkpoint.every_steps=0 checkpoint.keep=0 data.max_prompt_tokens=0"),
        ("sft", "tracking.rollout_every_steps=0 tracking.rollout_samples=-1"),
        ("sft", "ray.object_store_gb=0.0 ray.num_cpus=0"),
        ("sft", "learner.logprob_chunk_tokens=0 learner.max_tokens_per_micro_batch=0 learner.pack_tokens=-1"),
        ("sft", "learner.betas=[0.9,1.0] learner.betas=[-0.1,0.9] learner.warmup_steps=-1 learner.eps=0.0"),
        ("sft", "learner.grad_clip=-1.0 learner.min_lr_ratio=1.5 learner.weight_decay=-0.1"),
        ("sft", "learner.expert_bias_rate=-0.1 learner.aux_loss_coef=-0.1 learner.cores_per_rank=0"),
        ("sft", "learner.num_gpus_per_rank=2.0 learner.num_gpus_per_rank=-0.5"),
        ("eval", "eval.num_samples=0 eval.num_prompts=0 eval.temperature=0.0 eval.cross_num_prompts=0"),
        ("eval", "rollout.max_retries=-1 rollout.probe_tolerance=0.0 rollout.max_model_len=0"),
        ("eval", "rollout.num_gpus_per_worker=-1.0 rollout.cores_per_worker=0"),
        ("mopd", "teacher_workers.num_workers=0 teacher_workers.max_initial_kl=0.0"),
        ("mopd", "teacher_workers.max_tokens_per_batch=0 teacher_workers.cores_per_worker=0"),
        ("pipeline", "rl.algorithm.updates_per_batch=0 mopd.learner.eps=0.0 sft.algorithm.steps=0 rounds=0"),
        ("sample", "sample.num_samples=0 sample.num_prompts=0 sample.temperature=-0.5"),
        ("mopd", "teacher_workers.server_concurrency=0 teacher_workers.server_timeout_s=0.0"),
        ("mopd", "teacher_workers.server_retries=-1"),
    ],
)
def test_numbers_that_cannot_work(command, overrides):
    for override in overrides.split():
        key, value = override.split("=")
        assert message(command, override).startswith(f"{key}={value.replace(',', ', ')}: give "), override


def test_numbers_on_the_edge_of_what_works():
    edge = [
        "learner.betas=[0,0.99]",
        "learner.grad_clip=0",
        "learner.min_lr_ratio=1",
        "learner.warmup_steps=0",
    ]
    build("rl", *edge, "algorithm.ratio_truncate=1", "tracking.rollout_samples=0", "rollout.max_retries=0")
    assert build("eval", "eval.num_prompts=null", "eval.num_samples=1").eval.num_prompts is None
    assert build("rl", "learner.num_gpus_per_rank=0.5").learner.num_gpus_per_rank == 0.5
    assert build("rl", "learner.num_gpus_per_rank=0", "learner.num_ranks=4").learner.num_ranks == 4


def test_ranks_do_not_share_a_gpu():
    found = message("rl", "learner.num_gpus_per_rank=0.5", "learner.num_ranks=2")
    assert found.startswith("learner.num_gpus_per_rank=0.5: learner.num_ranks=2 ranks cannot share a GPU")


def test_greedy_samples_are_all_the_same():
    found = message("sample", "sample.temperature=0", "sample.num_samples=4")
    assert found.startswith("sample.num_samples=4: greedy samples of one prompt are all the same; give 1")
    assert build("sample", "sample.temperature=0").sample.num_samples == 1


def test_steps_of_a_teacher():
    assert message("pipeline", "teachers.math.steps=0").startswith("teachers.*.steps=0: give 1 or more")


def test_missing_model_path():
    with pytest.raises(UserError, match=r"^model\.path is missing: give model\.path=VALUE"):
        compose("sft", [])
    assert OmegaConf.missing_keys(merge("sft", [])) == {
        "model.path"
    }  # and `--cfg job` can still show the rest


def test_user_file_lies_between_defaults_and_command_line(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("defaults: [{learner: zero3}]\nlearner: {lr: 1.0e-3, warmup_steps: 3}\nseed: 7\n")
    cfg = build("rl", "learner.warmup_steps=5", config_file=str(file))
    assert (cfg.learner.zero_stage, cfg.learner.lr, cfg.learner.warmup_steps, cfg.seed) == (3, 1e-3, 5, 7)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learner: {lrr: 1}", "learner.lrr=1: no such key; did you mean learner.lr?"),
        ("learner: {lr: abc}", "learner.lr=abc: a number is needed"),
        (
            "learner: {routing_replay: off}",
            'choose auto or off (YAML reads a bare on/off as true/false: write "off"',
        ),
        ("learner: [", "not valid YAML"),
        ("- a", "a mapping of keys is needed"),
        ("defaults: [tiny]", "give `- group: option`"),
    ],
)
def test_mistakes_in_the_user_file_name_the_file(tmp_path, text, expected):
    file = tmp_path / "my.yaml"
    file.write_text(text)
    found = message("rl", config_file=str(file))
    assert str(file) in found and expected in found


def test_user_folder_of_groups(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 5\n")
    (tmp_path / "experiment" / "typo.yaml").write_text("# @package _global_\nlearner: {lrr: 5}\n")
    assert build("rl", "experiment=mine", search_dir=str(tmp_path)).seed == 5
    found = message("rl", "experiment=typo", search_dir=str(tmp_path))
    assert found == "experiment=typo: learner.lrr: no such key; did you mean learner.lr?"
    assert "no such folder" in message("rl", search_dir=str(tmp_path / "nowhere"))
    assert "no such file" in message("rl", config_file=str(tmp_path / "nowhere.yaml"))


def test_an_experiment_of_another_command_is_refused():
    assert message("sft", "experiment=tiny").startswith("experiment=tiny: ")


def test_walk_lists_every_leaf_once():
    keys = [key.name for key in walk(RUNS["mopd"])]
    assert len(keys) == len(set(keys))
    assert {"model.path", "learner.lr", "teachers.<name>.path", "rollout.vllm"} <= set(keys)
    for key in walk(RUNS["mopd"]):
        assert lookup(RUNS["mopd"], key.name.split(".")) is not None
    by_name = {key.name: key for key in walk(RUNS["mopd"])}
    assert by_name["model.path"].default == MISSING
    assert by_name["algorithm.beta"].default == 1.0  # the command's own default, not the class's
    assert by_name["learner.lr"].doc == "Peak learning rate."


def test_every_key_is_documented():
    undocumented = {key.name for schema in RUNS.values() for key in walk(schema) if not key.doc}
    assert undocumented == set()


def test_schemas_use_slots():
    for schema in RUNS.values():
        assert dataclasses.is_dataclass(schema) and hasattr(schema, "__slots__")


def test_configuration_page_is_current():
    from scripts.write_configuration_docs import page

    written = (Path(__file__).resolve().parents[2] / "docs" / "configuration.md").read_text()
    assert written == page(), "run: python scripts/write_configuration_docs.py"


# What depends on the loss and the longest answer ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "clips"),
    [
        ("ppo_clip", (0.2, 0.28)),
        ("gspo", (3e-4, 4e-4)),
        ("cispo", (1.0, 4.0)),
        ("policy_gradient", (None, None)),
        ("reinforce", (None, None)),
    ],
)
def test_clips_follow_the_loss_and_are_seen(loss, clips):
    algorithm = build("rl", f"algorithm.loss={loss}").algorithm
    assert (algorithm.clip_low, algorithm.clip_high) == clips
    stage = build("pipeline", f"rl.algorithm.loss={loss}").rl.algorithm
    assert (stage.clip_low, stage.clip_high) == clips
    assert build("rl", f"algorithm.loss={loss}", "algorithm.clip_low=0.1").algorithm.clip_low == 0.1


def test_clips_of_the_default_losses():
    assert build("rl").algorithm.clip_high == 0.28
    assert build("mopd").algorithm.clip_high is None
    gspo = build("rl", "algorithm=gspo").algorithm
    assert (gspo.loss, gspo.clip_low, gspo.clip_high) == (Loss.gspo, 3e-4, 4e-4)


def test_the_constant_normaliser_is_the_longest_answer():
    assert build("rl").algorithm.length_norm is None
    assert build("rl", "algorithm=dr_grpo", "rollout.max_new_tokens=100").algorithm.length_norm == 100
    turns = ["rollout.max_new_tokens=100", "rollout.max_turns=3"]
    assert build("rl", "algorithm=dr_grpo", *turns).algorithm.length_norm == 300
    assert build("rl", "algorithm=dr_grpo", "algorithm.length_norm=7").algorithm.length_norm == 7
    assert build("pipeline", "algorithm@rl.algorithm=dr_grpo").rl.algorithm.length_norm == 512


def test_the_overlong_buffer_is_a_fifth_of_the_longest_answer():
    shape = ["algorithm.overlong=shape", "rollout.max_new_tokens=100"]
    assert build("rl", *shape).algorithm.overlong_buffer == 20
    assert build("rl", *shape, "algorithm.overlong_buffer=30").algorithm.overlong_buffer == 30
    assert message("rl", *shape, "algorithm.overlong_buffer=100").startswith(
        "algorithm.overlong_buffer=100: the longest answer has 100 tokens"
    )
    assert message("mopd", "algorithm.overlong=shape").startswith("algorithm.overlong='shape': it shapes")


def test_gap_following_needs_balanced_shares():
    assert message("mopd", "algorithm.gap_following=true").startswith(
        "algorithm.gap_following=True: it moves"
    )
    balanced = "algorithm.aggregation=token_mean_balanced"
    assert build("mopd", "algorithm.gap_following=true", balanced).algorithm.gap_following


def test_resolved_values_read_back_from_the_run_folder(tmp_path):
    """config.yaml holds resolved values; a run that is started from it is the same run."""
    cfg = build("rl", "algorithm=dr_grpo", "algorithm.loss=cispo", "algorithm.overlong=shape")
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(plain(cfg)))
    assert compose("rl", [], str(file))[1] == cfg
