"""Checks before any engine starts: what a good run is found to be made of, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from posttrain import gpus
from posttrain.compose import compose
from posttrain.config import RunConfig, UserError
from posttrain.plan import print_plan, processes
from posttrain.validate import check_model, validate
from tests.tiny_models import tiny_dense, tiny_mimo, tiny_qwen3_moe, tiny_teacher

REWARD = "rewards._target_=rewards.exact_match.ExactMatch"
ROOM = ("rollout.max_new_tokens=16", "rollout.max_model_len=64")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Three checkpoints, prompts of two domains, held-out prompts, conversations, two teachers."""
    root = tmp_path_factory.mktemp("world")
    tiny_mimo(root / "mimo")
    tiny_qwen3_moe(root / "qwen")
    tiny_dense(root / "dense")
    tiny_teacher(root / "mimo", root / "teacher_math", seed=1)
    tiny_teacher(root / "mimo", root / "teacher_code", seed=2)

    def rows(name: str, start: int, *, reply: bool = False) -> None:
        lines = []
        for i in range(start, start + 4):
            messages = [{"role": "user", "content": f"{i}+1=?"}]
            if reply:
                messages.append({"role": "assistant", "content": str(i + 1)})
            domain = "math" if i % 2 else "code"
            lines.append(json.dumps({"messages": messages, "domain": domain, "answer": str(i + 1)}))
        (root / name).write_text("\n".join(lines) + "\n")

    rows("prompts.jsonl", 0)
    rows("heldout.jsonl", 10)
    rows("chats.jsonl", 20, reply=True)
    return root


def config(world: Path, command: str, *overrides: str) -> RunConfig:
    prompts = "data.eval_path" if command == "eval" else "data.path"
    base = [
        f"model.path={world}/mimo",
        f"{prompts}={world}/{'chats' if command == 'sft' else 'prompts'}.jsonl",
    ]
    if command == "pipeline":
        base += [f"data.eval_path={world}/heldout.jsonl", f"sft_data.path={world}/chats.jsonl", REWARD]
        base += ["teachers.math.train=rl", "teachers.code.train=none"]
    if command == "mopd":
        base += [f"teachers.{d}.path={world}/teacher_{d}" for d in ("math", "code")]
    if command in ("rl", "eval", "sample"):
        base.append(REWARD)
    room = () if command == "sft" else ROOM
    return compose(command, [*base, *room, *overrides])[1]


def refusal(world: Path, command: str, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        validate(config(world, command, *overrides))
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("command", ["sft", "rl", "mopd", "pipeline", "eval", "sample"])
def test_a_good_run_is_counted(world, command, capsys):
    cfg = config(world, command)
    report = validate(cfg)
    assert report.domains == ["code", "math"]
    assert report.model.num_experts == 8 and report.model.has_expert_bias
    if command == "pipeline":
        assert (
            report.num_prompts
            == report.num_eval_prompts
            == report.num_conversations
            == {"code": 2, "math": 2}
        )
    if command == "mopd":
        assert {(row.domain, row.verdict) for row in report.teachers} == {("code", "ok"), ("math", "ok")}
    print_plan(command, cfg, report, "runs/x: would begin")
    out = capsys.readouterr().out
    assert "MiMoV2FlashForCausalLM" in out and "nothing started" in out and "math 2" in out


def test_model_report(world):
    dense = check_model(str(world / "dense"))
    assert dense.num_experts == 0 and not dense.has_expert_bias and dense.context
    assert check_model(str(world / "qwen")).num_experts > 0
    assert dense.num_bytes > dense.num_parameters > 10_000


def test_processes_of_each_run(world):
    commands = ("sft", "rl", "mopd", "eval", "sample")
    names = {c: [p.name for p in processes(config(world, c), 1000)] for c in commands}
    assert names["sft"] == ["learner"]
    assert names["rl"] == ["learner", "rollout", "rewards"]
    assert names["mopd"] == ["learner", "rollout", "teachers"]
    assert names["eval"] == names["sample"] == ["rollout", "rewards"]


def test_a_dry_run_says_what_it_cannot_check(world, capsys):
    def shown(command: str, *overrides: str) -> str:
        cfg = config(world, command, *overrides)
        print_plan(command, cfg, validate(cfg), "runs/x: would begin")
        return " ".join(capsys.readouterr().out.split())

    assert "everything checked; nothing started" in shown("sft")
    plain = shown("sft", "learner.lora.rank=2")
    assert "everything checked but the targets of learner.lora, which the learner checks" in plain
    assert "another whole copy" not in plain
    experts = shown("sft", "learner.lora.rank=2", "learner.lora.target_parameters=[experts.down_proj]")
    assert "not in it: of the weights in learner.lora.target_parameters another whole copy" in experts
    options = ("learner.zero_stage=2", "learner.deepspeed.zero_optimization.overlap_comm=false")
    assert "but the options in learner.deepspeed, which the learner checks" in shown("sft", *options)
    values = shown("rl", "rollout.vllm.max_num_seqs=4")
    assert "everything checked but the values in rollout.vllm, which vLLM checks as it starts" in values
    both = shown("rl", "rollout.vllm.max_num_seqs=4", "learner.lora.rank=2")
    assert "as it loads, and the values in rollout.vllm, which vLLM" in both
    assert "but the targets of learner.lora" in shown("pipeline", "rl.learner.lora.rank=2")


def test_a_dry_run_says_the_mixture(world, capsys):
    def shown(*overrides: str) -> str:
        cfg = config(world, *overrides)
        print_plan(overrides[0], cfg, validate(cfg), "runs/x: would begin")
        return capsys.readouterr().out

    two = ["data.path=null", "data.sources.code.path=" + f"{world}/prompts.jsonl"]
    two += [f"data.sources.math.path={world}/prompts.jsonl", "data.sources.math.weight=3"]
    assert "mixture" not in shown("rl")
    assert "mixture   data: code 25.0%, math 75.0%" in shown("rl", *two)
    assert "mixture" not in shown("rl", *two, "domain=math")


def test_rl_of_one_domain(world):
    assert validate(config(world, "rl", "domain=math")).num_prompts == {"math": 2}
    assert "domain='law'" in refusal(world, "rl", "domain=law")


def test_rl_on_all_domains_with_a_reward_for_each(world):
    own = [f"rewards.{d}._target_=rewards.exact_match.ExactMatch" for d in ("math", "code")]
    report = validate(config(world, "rl", "~rewards._target_", *own))
    assert report.num_prompts == {"code": 2, "math": 2}
    found = refusal(world, "rl", "~rewards._target_", own[0])
    assert found.startswith("rewards.code: domain 'code' without reward")


def test_mopd_of_one_domain_needs_that_teacher_alone(world):
    for extra in ([], ["~teachers.code"], ["teachers.code.path=/nowhere"]):
        report = validate(config(world, "mopd", "domain=math", *extra))
        assert report.num_prompts == {"math": 2} and {row.domain for row in report.teachers} == {"math"}
    found = refusal(world, "mopd", "domain=math", "~teachers.math")
    assert found.startswith("teachers.math.path=None: prompts of domain 'math' have no teacher")
    assert "domain='law'" in refusal(world, "mopd", "domain=law")


def test_samples_without_and_with_rewards(world):
    assert validate(config(world, "sample", "~rewards._target_", "domain=math")).num_prompts == {"math": 2}
    validate(config(world, "sample", "sample.min_reward=1"))
    found = refusal(world, "sample", "~rewards._target_", "sample.min_reward=1")
    assert found.startswith(
        "sample.min_reward=1.0: nothing gives a reward; give rewards._target_=MODULE.CLASS"
    )
    found = refusal(world, "sample", "rewards._target_=no_module.X")
    assert found.startswith("rewards._target_='no_module.X'")


def test_held_out_prompts_that_are_trained_on_are_noted(world):
    report = validate(config(world, "pipeline", f"data.eval_path={world}/prompts.jsonl"))
    assert report.notes == ["4 held-out prompts also occur in the training prompts"]


@pytest.mark.parametrize(
    ("command", "overrides", "expected"),
    [
        ("rl", ["model.path=/nowhere"], "model.path='/nowhere': no such directory"),
        ("rl", ["data.path=null"], "data.path=None: no data; give data.path="),
        ("rl", ["data.path=/nowhere.jsonl"], "data.path='/nowhere.jsonl'"),
        ("rl", ["~rewards._target_"], "rewards.code: domain 'code' without reward"),
        ("rl", ["rewards._target_=no_module.X"], "rewards._target_='no_module.X': module 'no_module'"),
        ("rl", ["rollout.max_turns=3"], "rollout.max_turns=3: nothing answers a turn"),
        ("rl", ["environments.math._target_=no_module.X"], "environments.math._target_='no_module.X'"),
        ("rl", ["environments.math.x=1"], "environments.math={{'x': 1}}: no _target_"),
        ("rl", ["environments.law._target_=json.loads"], "environments.law: no prompt belongs to domain 'law'"),
        ("rl", ["rollout.max_new_tokens=64"], "rollout.max_new_tokens=64: leaves no room for a prompt"),
        ("rl", ["rollout.max_model_len=999999"], "rollout.max_model_len=999999: the model's context is"),
        ("rl", ["rollout.max_new_tokens=60"], "a prompt longer than the context"),
        ("mopd", ["~teachers.math"], "teachers.math.path=None: prompts of domain 'math' have no teacher"),
        ("mopd", ["teachers.law.path=/x"], "teachers.law.path='/x': no prompt belongs to domain 'law'"),
        ("mopd", ["teachers.math.path=/x"], "teachers.math.path='/x': no such directory"),
        ("mopd", ["algorithm.alpha=0.5", "algorithm.group_size=4"], "algorithm.alpha=0.5: an outcome advantage needs"),
        ("mopd", ["algorithm.signal=top_k", "algorithm.top_k=500"], "algorithm.top_k=500: the vocabulary of {world}/mimo has "),
        ("pipeline", ["mopd.algorithm.signal=top_k_renorm", "mopd.algorithm.top_k=500"], "mopd.algorithm.top_k=500: the vocabulary"),
        ("rl", ["algorithm.beta=1"], "algorithm.beta=1.0: RL has no teachers"),
        ("pipeline", ["rl.algorithm.beta=1"], "rl.algorithm.beta=1.0: RL has no teachers"),
        ("mopd", ["teachers.default.path=/x"], "teachers.default.path='/x': every domain (code, math) has a teacher of its own"),
        ("mopd", ["~teachers.math", "teachers.default.path=/x"], "teachers.default.path='/x': no such directory"),
        ("mopd", ["teachers.math.backend=vllm", "rollout.max_model_len=512"], "rollout.max_model_len=512: the context of teachers.math.path='{world}/teacher_math' is 512, and vLLM samples one"),
        ("mopd", ["teachers.math.backend=server", "teachers.math.model=x"], "teachers.math.path='{world}/teacher_math': not the URL of a server"),
        ("mopd", ["teachers.math.backend=server", "teachers.math.path=http://127.0.0.1:9", "teachers.math.model=x", "teacher_workers.server_retries=0"], "teachers.math.path='http://127.0.0.1:9': no answer to /v1/models in 1 tries"),
        ("mopd", ["teachers.math.path=http://h:1"], "teachers.math.path='http://h:1': a URL; set teachers.math.backend=server"),
        ("mopd", ["teachers.math.adapter={world}/mimo"], "teachers.math.adapter='{world}/mimo': no adapter_config.json"),
        ("mopd", ["teacher_workers.vllm.tensor_parallel_size=2"], "teacher_workers.vllm={{'tensor_parallel_size': 2}}: no teacher has backend=vllm"),
        ("mopd", ["teacher_workers.api_key_env=KEY"], "teacher_workers.api_key_env='KEY': no teacher has backend=server"),
        ("pipeline", ["teachers.math.adapter=/x"], "teachers.math.adapter='/x': the pipeline takes whole checkpoints"),
        ("pipeline", ["teachers.math.backend=server", "teachers.math.path=http://h:1", "teachers.math.model=m"], "teachers.math.backend='server': the pipeline takes checkpoints"),
        ("pipeline", ["~teachers.math"], "teachers.math=None: prompts of domain 'math' have no teacher"),
        ("pipeline", ["teachers.law.train=rl"], "teachers.law=None: no prompt belongs to domain 'law'"),
        ("pipeline", ["sft_data.path=null"], "sft_data.path is missing"),
        ("pipeline", ["data.eval_path=null"], "data.eval_path=None: no data"),
        ("pipeline", ["sft.learner.expert_bias_rate=0.1", "model.path={world}/qwen"], "sft.learner.expert_bias_rate=0.1: the routers of"),
        ("sft", ["learner.aux_loss_coef=0.1", "model.path={world}/dense"], "learner.aux_loss_coef=0.1: {world}/dense is a dense"),
        ("pipeline", ["rl.learner.expert_bias_rate=0.1", "model.path={world}/qwen"], "rl.learner.expert_bias_rate=0.1: the routers of"),
        ("sft", ["domain=law"], "domain='law'"),
        ("sft", ["learner.zero_stage=3", "learner.deepspeed.zero_optimization.offload_optimizer.device=nvme"], "learner.deepspeed.zero_optimization.offload_optimizer.device='nvme': only cpu"),
        ("rl", ["learner.aux_loss_coef=0.1"], "learner.aux_loss_coef=0.1: the balance loss is a part of SFT alone"),
        ("mopd", ["learner.aux_loss_coef=0.1"], "learner.aux_loss_coef=0.1: the balance loss is a part of SFT alone"),
        ("pipeline", ["mopd.learner.aux_loss_coef=0.1"], "mopd.learner.aux_loss_coef=0.1: the balance loss is a part of SFT"),
        ("rl", ["rollout.record_routes=off"], "rollout.record_routes='off': learner.routing_replay=auto replays routes that nobody"),
        ("pipeline", ["rollout.record_routes=off", "rl.learner.routing_replay=off"], "set mopd.learner.routing_replay=off too"),
        ("rl", ["learner.max_tokens_per_micro_batch=63"], "rollout.max_model_len=64: a sequence of that length does not fit into learner.max_tokens_per_micro_batch=63"),
        ("mopd", ["learner.pack_tokens=63"], "rollout.max_model_len=64: a sequence of that length does not fit into learner.pack_tokens=63"),
        ("pipeline", ["rl.learner.pack_tokens=63"], "rollout.max_model_len=64: a sequence of that length does not fit into rl.learner.pack_tokens=63"),
        ("pipeline", ["sft.algorithm.max_tokens=9000"], "sft.algorithm.max_tokens=9000: a sequence of that length does not fit into sft.learner.max_tokens_per_micro_batch=8192"),
        ("sft", ["learner.pack_tokens=100"], "algorithm.max_tokens=2048: a sequence of that length does not fit into learner.pack_tokens=100"),
        ("rl", ["data.eval_path={world}/heldout.jsonl"], "data.eval_path='{world}/heldout.jsonl': nothing is evaluated on it"),
        ("mopd", ["data.eval_sources.x.path={world}/heldout.jsonl"], "data.eval_sources=['x']: nothing is evaluated on it"),
        ("pipeline", ["sft_data.eval_path={world}/heldout.jsonl"], "sft_data.eval_path='{world}/heldout.jsonl': nothing is evaluated"),
        ("sft", ["data.eval_path={world}/chats.jsonl"], "data.eval_path='{world}/chats.jsonl': nothing is evaluated on it; give algorithm.validate_every"),
        ("sft", ["algorithm.validate_every=5"], "data.eval_path=None: no data"),
        ("sft", ["algorithm.validate_every=5", "data.eval_path={world}/heldout.jsonl"], "heldout.jsonl:1: messages: a conversation to train on must end"),
        ("pipeline", ["sft.algorithm.validate_every=5"], "sft.algorithm.validate_every=5: no held-out demonstrations; give sft_data.eval_path"),
        ("rl", ["eval.every_steps=5"], "data.eval_path=None: no data"),
        ("mopd", ["eval.every_steps=5", "data.eval_path={world}/heldout.jsonl"], "eval.every_steps=5: an accuracy needs rewards"),
        ("rl", ["eval.every_steps=5", "data.eval_path={world}/heldout.jsonl", "eval.teachers=true"], "eval.teachers=True: only MOPD"),
        ("mopd", ["eval.teachers=true"], "eval.teachers=True: only MOPD with eval.every_steps > 0"),
        ("pipeline", ["rl.eval.every_steps=5", "rl.eval.teachers=true"], "rl.eval.teachers=True: only MOPD"),
    ],
)  # fmt: skip
def test_refusals(world, command, overrides, expected):
    found = refusal(world, command, *(o.format(world=world) for o in overrides))
    if "longer than the context" in expected:
        assert "more than the 4 that the context leaves room for" in found and "prompts.jsonl:1" in found
    else:
        assert expected.format(world=world) in found


def test_held_out_conversations(world, tmp_path):
    rows = (world / "chats.jsonl").read_text().splitlines()
    (tmp_path / "one.jsonl").write_text(rows[0] + "\n")  # of domain code
    report = validate(
        config(world, "sft", "algorithm.validate_every=5", f"data.eval_path={tmp_path}/one.jsonl")
    )
    assert report.num_conversations == {"code": 2, "math": 2}
    assert report.num_eval_conversations == {"code": 1}
    assert report.notes == ["1 held-out conversations also occur in the training data"]
    stage = ["sft.algorithm.validate_every=5", f"sft_data.eval_path={tmp_path}/one.jsonl"]
    assert validate(config(world, "pipeline", *stage)).num_eval_conversations == {"code": 1}
    found = refusal(world, "pipeline", *stage, "teachers.math.train=sft")
    assert found.startswith(
        "teachers.math.train='sft': the held-out conversations of sft_data have none of domain"
    )


@pytest.mark.parametrize("model", ["mimo", "qwen", "dense"])
def test_defaults_of_sft_fit_every_model(world, model):
    cfg = config(world, "sft", f"model.path={world}/{model}")
    assert (cfg.learner.expert_bias_rate, cfg.learner.aux_loss_coef) == (None, None)
    validate(cfg)


def test_held_out_prompts_of_a_training_run(world, tmp_path):
    given = ["eval.every_steps=5", f"data.eval_path={world}/heldout.jsonl"]
    report = validate(config(world, "rl", *given))
    assert report.num_prompts == report.num_eval_prompts == {"code": 2, "math": 2}
    assert validate(config(world, "rl", *given, "domain=math")).num_eval_prompts == {"math": 2}
    validate(config(world, "mopd", *given, REWARD, "eval.teachers=true"))
    found = refusal(world, "mopd", *given, REWARD, "eval.teachers=true", f"model.path={world}/qwen")
    assert found.startswith("eval.teachers=True: teachers.")
    row = json.loads((world / "heldout.jsonl").read_text().splitlines()[0]) | {"domain": "law"}
    (tmp_path / "law.jsonl").write_text(json.dumps(row) + "\n")
    law = ["eval.every_steps=5", f"data.eval_path={tmp_path}/law.jsonl"]
    assert validate(config(world, "rl", *law)).num_eval_prompts == {"law": 1}
    one = [f"rewards.{d}._target_=rewards.exact_match.ExactMatch" for d in ("math", "code")]
    assert "domain 'law' without reward" in refusal(world, "rl", *law, "~rewards._target_", *one)


@pytest.mark.parametrize(
    "teacher",
    [
        ["teachers.math.backend=server", "teachers.math.path=http://127.0.0.1:9", "teachers.math.model=big"],
        ["teachers.math.adapter=lora/math"],
    ],
)
def test_teachers_that_no_engine_can_load_are_not_evaluated(world, teacher):
    """Refused for what the evaluation cannot do, before the server is asked or the adapter is read."""
    given = ["eval.every_steps=5", f"data.eval_path={world}/heldout.jsonl", REWARD, *teacher]
    found = refusal(world, "mopd", *given, "eval.teachers=true")
    assert found.startswith("eval.teachers=True: teachers.math is no whole checkpoint")
    assert refusal(world, "mopd", *given, "teacher_workers.server_retries=0").startswith("teachers.math.")


def test_mopd_of_one_domain(world):
    """Teachers of other domains, and the default that serves them, may stay in the config."""
    for more in ([], [f"teachers.default.path={world}/mimo"], ["teachers.code.path=/gone"]):
        report = validate(config(world, "mopd", "domain=math", *more))
        assert report.num_prompts == {"math": 2}
        assert {(row.domain, row.verdict) for row in report.teachers} == {("math", "ok")}


def test_a_domain_without_held_out_prompts(world, tmp_path):
    file = tmp_path / "held.jsonl"
    file.write_text((world / "heldout.jsonl").read_text().splitlines()[0] + "\n")
    found = refusal(world, "pipeline", f"data.eval_path={file}")
    assert "no held-out prompts of domain 'math'" in found


def test_held_out_prompts_of_a_domain_that_is_not_trained(world, tmp_path):
    row = json.loads((world / "heldout.jsonl").read_text().splitlines()[0]) | {"domain": "law"}
    file = tmp_path / "held.jsonl"
    file.write_text((world / "heldout.jsonl").read_text() + json.dumps(row) + "\n")
    found = refusal(world, "pipeline", f"data.eval_path={file}")
    assert found.startswith("data.eval_sources=['code', 'law', 'math']: held-out prompts of domain 'law'")


def test_lengths_and_replay_that_go_together(world):
    validate(config(world, "rl", "rollout.record_routes=off", "learner.routing_replay=off"))
    validate(config(world, "rl", "rollout.record_routes=off", f"model.path={world}/dense"))
    validate(config(world, "rl", "learner.max_tokens_per_micro_batch=64", "learner.pack_tokens=64"))
    validate(config(world, "pipeline", "sft.learner.aux_loss_coef=0.1"))


def test_a_teacher_by_sft_needs_conversations_of_its_domain(world, tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text((world / "chats.jsonl").read_text().splitlines()[0] + "\n")
    found = refusal(world, "pipeline", f"sft_data.path={file}", "teachers.math.train=sft")
    assert found.startswith("teachers.math.train='sft': sft_data has no conversation of domain 'math'")


def test_fields_that_a_reward_requires(world, tmp_path, monkeypatch):
    (tmp_path / "strict_reward.py").write_text(
        "class Strict:\n    required_fields = ('answer', 'tests|cases')\n    def score(self, rollout):\n        return 0.0, {}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = refusal(world, "rl", "rewards._target_=strict_reward.Strict")
    assert "prompts.jsonl:1" in found and "tests" in found
    row = {"messages": [{"role": "user", "content": "1+1=?"}], "tests": ["x"]}
    file = tmp_path / "empty.jsonl"
    for lacking in ({"answer": ""}, {"answer": "2", "tests": []}):
        file.write_text(json.dumps(row | lacking) + "\n")
        found = refusal(world, "rl", "rewards._target_=strict_reward.Strict", f"data.path={file}")
        assert "empty.jsonl:1" in found and "missing or empty" in found


def test_a_conversation_longer_than_the_context(world, tmp_path):
    context = check_model(str(world / "mimo")).context
    assert context is not None and context < 2048
    messages = [{"role": "user", "content": "1+1=?"}, {"role": "assistant", "content": "1" * context}]
    file = tmp_path / "long.jsonl"
    file.write_text(json.dumps({"messages": messages}) + "\n")
    found = refusal(world, "sft", f"data.path={file}")
    assert found.startswith("algorithm.max_tokens=2048: a conversation has ")
    assert found.endswith(f"the model's context is {context}; give at most {context}")
    found = refusal(world, "sft", f"data.path={file}", f"algorithm.max_tokens={context}")
    assert "long.jsonl:1: messages: the conversation has" in found


def test_gpus_that_are_not_there(world, monkeypatch):
    monkeypatch.setattr(gpus, "num_gpus", lambda: 0)
    found = refusal(world, "rl", "rollout.num_gpus_per_worker=1")
    assert found.startswith("rollout.num_gpus_per_worker=1: 1 workers need 1 GPUs and this machine has 0")
    monkeypatch.setattr(gpus, "num_gpus", lambda: 2)
    assert "asks for 4 GPUs (learner 1, rollout 3)" in refusal(world, "rl", "rollout.num_workers=3")
    assert validate(config(world, "rl")).notes == []
    found = validate(config(world, "rl", "rollout.num_workers=3", "ray.address=auto")).notes
    assert found == ["ray.address=auto: the cluster's GPUs are not checked here"]


def test_one_gpu_is_shared(world, monkeypatch):
    monkeypatch.setattr(gpus, "num_gpus", lambda: 1)
    assert "learner.num_gpus_per_rank=0.5" in refusal(world, "rl")
    halves = ("rollout.num_gpus_per_worker=0.5", "learner.num_gpus_per_rank=0.5")
    cfg = config(world, "rl", *halves)
    validate(cfg)
    assert gpus.gpus_of(cfg, 1) == {"learner": 0.5, "rollout": 0.5}
    assert gpus.gpus_of(config(world, "rl", "learner.num_gpus_per_rank=0"), 1) == {"learner": 0, "rollout": 1}
    stages = [f"{s}.learner.num_gpus_per_rank=0.5" for s in ("sft", "rl", "mopd")]
    assert gpus.gpus_of(config(world, "pipeline", halves[0], *stages), 1) == {
        "learner": 0.5,
        "rollout": 0.5,
        "teacher_workers": 0,
    }
    found = refusal(world, "rl", "learner.num_gpus_per_rank=0.6", "learner.num_ranks=2")
    assert found.startswith("learner.num_gpus_per_rank=0.6: each of the 2 ranks needs a GPU of its own")


def test_processes_and_gpus_follow_the_back_ends(world, monkeypatch):
    engines = [f"teachers.{d}.backend=vllm" for d in ("math", "code")]
    tensor_parallel = "teacher_workers.vllm.tensor_parallel_size=2"
    one, both = config(world, "mopd", engines[0]), config(world, "mopd", *engines, tensor_parallel)
    rows = {p.name: p for p in processes(one, 1000)}
    assert rows["teachers"].count == 2, "one engine beside the shared worker"
    assert gpus.gpus_of(both, 8) == {"learner": 1, "rollout": 1, "teacher_workers": 4}
    assert gpus.gpus_of(one, 8) == {"learner": 1, "rollout": 1, "teacher_workers": 2}
    assert gpus.gpus_of(one, 3)["teacher_workers"] == 1, (
        "the shared worker takes a GPU only where one is to spare"
    )
    monkeypatch.setattr(gpus, "num_gpus", lambda: 4)
    assert "asks for 6 GPUs" in refusal(world, "mopd", *engines, tensor_parallel)


def test_a_default_teacher_and_an_adapter_are_shown(world, tmp_path, capsys):
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(world / "mimo")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(str(tmp_path / "lora"))
    overrides = ["~teachers.math", f"teachers.default.adapter={tmp_path}/lora"]
    cfg = config(world, "mopd", *overrides)
    report = validate(cfg)
    assert {(r.domain, r.verdict) for r in report.teachers} == {("code", "ok"), ("math", "ok")}
    assert {(r.domain, r.gate) for r in report.teachers if "adapter" in r.gate} == {("math", "adapter")}
    print_plan("mopd", cfg, report, "runs/x: would begin")
    assert f"math: {tmp_path}/lora (transformers; ok)" in capsys.readouterr().out


def test_a_dry_run_says_what_is_wrong_and_accepted(world, capsys):
    """Default, self, accept and domain at once."""
    overrides = [
        *("~teachers.math", "~teachers.code", f"teachers.default.path={world}/mimo", "domain=math"),
        "teacher_workers.accept=[self_teacher]",
    ]
    cfg = config(world, "mopd", *overrides)
    report = validate(cfg)
    assert {row.domain for row in report.teachers} == {"math"}
    print_plan("mopd", cfg, report, "runs/x: would begin")
    assert "self_teacher accepted: its tensors are the student's" in capsys.readouterr().out
    found = refusal(world, "mopd", *overrides[:-1])
    assert found.startswith(f"teachers.default.path='{world}/mimo': its tensors are the student's")
    assert "teachers.default.self=true" in found
    report = validate(config(world, "mopd", *overrides[:-1], "teachers.default.self=true"))
    assert {row.verdict for row in report.teachers} == {"ok"}


def test_a_pipeline_takes_a_default_teacher_and_what_is_accepted(world):
    given = ["~teachers.math", "~teachers.code", f"teachers.default.path={world}/teacher_math"]
    report = validate(config(world, "pipeline", *given))
    assert {row.domain for row in report.teachers} == {"math", "code"}
    assert "weights" not in {row.gate for row in report.teachers}, "the SFT model is not there yet"
    found = refusal(
        world, "pipeline", *given, f"teachers.default.revision={'b' * 40}", f"teachers.math.path={world}/gone"
    )
    assert found.startswith(f"teachers.math.path='{world}/gone': no such directory")
    found = refusal(world, "pipeline", "~teachers.math", "teachers.default.train=rl")
    assert found.startswith("teachers.default.train='rl': only a model that is there serves several domains")
    found = refusal(world, "pipeline", "teachers.default.train=rl")
    assert found.startswith("teachers.default=None: every domain has a teacher of its own")


def test_visible_gpus(monkeypatch):
    monkeypatch.setattr(gpus.glob, "glob", lambda pattern: ["/dev/nvidia0", "/dev/nvidia1"])
    for value, count in ((None, 2), ("", 0), ("1", 1), ("0,1", 2), ("-1", 0)):
        if value is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert gpus.num_gpus() == count


def test_trust_remote_code_is_said(world):
    assert "Python code" in validate(config(world, "sft", "model.trust_remote_code=true")).notes[0]


def test_wandb_online_without_key_is_refused_before_any_engine(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setattr(type(wandb.api), "api_key", None)
    with pytest.raises(UserError, match=r"tracking.wandb='online': no API key"):
        validate(config(world, "sft", "tracking.wandb=online"))
    assert validate(config(world, "sft", "tracking.wandb=offline"))
