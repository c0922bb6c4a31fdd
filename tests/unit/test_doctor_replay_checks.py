"""`posttrain doctor replay` without engines: every check can fail, bad input is one line, and what would be sampled."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from posttrain.cli import main
from posttrain.compose import compose
from posttrain.config import DoctorRun, Dtype, UserError
from posttrain.data.tokenizer import load_tokenizer
from posttrain.doctor import replay
from posttrain.doctor import replay_checks as checks
from posttrain.doctor import replay_samples as samples
from posttrain.records import EngineInfo, PolicyInfo, Prompt, Rollout, RolloutStatus, Turn
from tests.tiny_models import tiny_dense, tiny_mimo

LAYERS, EXPERTS, TOP_K = 3, 8, 2
NUMBERS = [1, 2, 3]  # layer 0 is dense
ENGINE = EngineInfo(
    worker_id="rollout-0", vocab_size=90, max_model_len=512, dtype="bfloat16", records_routes=True,
    num_moe_layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K, load_s=0.0,
)  # fmt: skip
POLICY = PolicyInfo(
    vocab_size=90, num_parameters=1, num_moe_layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K, num_ranks=1
)
MISMATCH = {
    "k3": 1e-5, "k3_without": 1e-4, "coverage": 1.0, "route_mismatch": 0.01, "route_mismatch/layer_1": 0.005,
    "route_mismatch/layer_2": 0.02, "route_mismatch/layer_3": 0.005,
} | {f"f{t}{s}": 0.0 for t in ("1.1", "1.25", "2") for s in ("", "_without")}  # fmt: skip


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return str(tiny_mimo(tmp_path_factory.mktemp("replay") / "moe"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return str(tiny_dense(tmp_path_factory.mktemp("replay") / "dense"))


def config(*overrides: str) -> DoctorRun:
    cfg = compose("doctor", list(overrides))[1]
    assert isinstance(cfg, DoctorRun)
    return cfg


def sets(rng: np.random.Generator, num_tokens: int, num_layers: int = LAYERS) -> np.ndarray:
    """[num_tokens, num_layers, TOP_K] uint8: random sets."""
    order = rng.permuted(np.tile(np.arange(EXPERTS, dtype=np.uint8), (num_tokens, num_layers, 1)), axis=-1)
    return order[:, :, :TOP_K]


def turn(author: str, length: int) -> Turn:
    sampled = author == "policy"
    return Turn(
        author=author,
        token_ids=np.arange(length, dtype=np.int32),
        loss_mask=np.full(length, sampled),
        rollout_logprobs=np.full(length, -4.0 if sampled else 0.0, np.float32),
        policy_versions=np.full(length, 0 if sampled else -1, np.int32),
    )


def make_rollout(index: int, authors: tuple[str, ...] = ("prompt", "policy"), **metadata: Any) -> Rollout:
    turns = [turn(author, 20) for author in authors]
    ids = np.zeros(20, np.int32)
    prompt = Prompt(
        prompt_id="p", source="s", domain="d", messages=[], token_ids=ids, metadata=dict(metadata)
    )
    return Rollout(
        group_id="g", rollout_id=f"g/{index}", prompt=prompt, turns=turns, messages=[], finish_reason="stop",
        status=RolloutStatus.completed, routed_experts=sets(np.random.default_rng(index), 20 * len(turns) - 1),
    )  # fmt: skip


@pytest.fixture
def rollouts() -> list[Rollout]:
    """A rollout of one turn, one of two turns, and one whose prompt is another rollout."""
    two = ("prompt", "policy", "environment", "policy")
    return [make_rollout(0), make_rollout(1, two), make_rollout(2, continued_at=16)]


# Shapes -----------------------------------------------------------------------------------------------------------


def test_right_records_pass(rollouts):
    shape, recorded = checks.check_shapes(ENGINE, POLICY, "float32", rollouts)
    assert shape.way_out is None and recorded.way_out is None
    assert shape.value == "3 MoE layers, 8 experts, 2 chosen in engine (bfloat16) and learner (float32)"
    assert recorded.value == "3 rollouts, 160 tokens: [T-1, 3, 2] uint8, ids below 8, none twice"


def test_engine_and_learner_with_other_routers_are_wrong(rollouts):
    shape, _ = checks.check_shapes(ENGINE, replace(POLICY, num_moe_layers=4), "float32", rollouts)
    assert shape.value.startswith("engine: 3 MoE layers") and "learner: 4 MoE layers" in shape.value
    assert shape.way_out


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda routes: None, "no routes"),
        (lambda routes: routes[:-1], "routes of shape (38, 3, 2), expected (39, 3, 2)"),
        (lambda routes: routes[:, :2], "routes of shape (39, 2, 2)"),
        (lambda routes: routes.astype(np.uint16), "routes of type uint16, expected uint8"),
        (lambda routes: routes + np.uint8(EXPERTS), "of 8"),
        (lambda routes: np.zeros_like(routes), "one expert twice in a set"),
    ],
)
def test_unusable_routes_are_named(rollouts, spoil, words):
    rollouts[0].routed_experts = spoil(rollouts[0].routed_experts)
    _, recorded = checks.check_shapes(ENGINE, POLICY, "float32", rollouts)
    assert recorded.value == "1 of 3 rollouts have unusable routes"
    assert recorded.way_out.startswith("g/0: ") and words in recorded.way_out


# One prefill ------------------------------------------------------------------------------------------------------


def test_share_of_experts_that_are_not_in_the_other_set():
    own = np.array([[[0, 1], [2, 3]]], np.uint8)
    other = np.array([[[1, 0], [3, 7]]], np.uint8)
    assert checks.outside_share(own, other).tolist() == [[0.0, 0.5]]


def test_seams_are_where_a_later_segment_begins(rollouts):
    assert [checks.seams(r) for r in rollouts] == [[], [40], [16]]


def recompute(rollouts, routes=None, logprobs=None, dtype=Dtype.bfloat16):
    routes = [r.routed_experts for r in rollouts] if routes is None else routes
    logprobs = [r.rollout_logprobs for r in rollouts] if logprobs is None else logprobs
    return checks.check_recompute(rollouts, logprobs, routes, dtype, EXPERTS, 0.1, NUMBERS)


def test_a_prefill_that_agrees(rollouts):
    own = [r.routed_experts[:, :, ::-1] for r in rollouts]  # the order in a set means nothing
    routes, logprobs = recompute(rollouts, routes=own)
    assert routes.way_out is None and logprobs.way_out is None
    assert routes.value.startswith("100.00 % of 471 (token, layer) sets equal; worst layer 1: 100.00 %")
    assert "at 4 tokens where a turn or a prefix goes on: 100.00 %" in routes.value
    assert logprobs.value == "mean |difference| 0 nat over 80 sampled tokens, largest 0"


def test_a_prefill_of_a_shorter_text_is_compared_as_far_as_it_goes(rollouts):
    cut = [r.routed_experts[:30] for r in rollouts]
    routes, _ = recompute(rollouts, routes=cut, logprobs=[r.rollout_logprobs[:31] for r in rollouts])
    assert routes.way_out is None and "of 270 (token, layer)" in routes.value
    assert "at 2 tokens" in routes.value


def test_a_few_close_calls_are_rounding_in_bfloat16_alone(rollouts):
    own = [r.routed_experts.copy() for r in rollouts]
    first, second = own[0][5, 1].tolist()
    own[0][5, 1, 0] = next(e for e in range(EXPERTS) if e not in (first, second))
    assert recompute(rollouts, routes=own)[0].way_out is None
    own[0][:12, 1] = (own[0][:12, 1] + 1) % EXPERTS
    assert recompute(rollouts, routes=own)[0].way_out is None
    assert recompute(rollouts, routes=own, dtype=Dtype.float32)[0].way_out


def test_two_layers_swapped_in_a_prefill_are_seen(rollouts):
    _, own, changed = checks.broken_routes([r.routed_experts for r in rollouts], NUMBERS, 0)
    routes, _ = recompute(rollouts, routes=own)
    assert routes.way_out and 0.6 < changed < 0.7


def test_rows_shifted_by_one_token_are_seen(rollouts):
    routes, _ = recompute(rollouts, routes=[np.roll(r.routed_experts, 1, axis=0) for r in rollouts])
    assert routes.way_out and "cached blocks" in routes.way_out


def test_wrong_rows_at_the_seams_alone_are_seen():
    """One token in 79 is wrong: 1.3 % of all rows, which no limit over all of them would show."""
    two = ("prompt", "policy", "environment", "policy")
    rollouts = [make_rollout(i, two) for i in range(8)]
    own = [r.routed_experts.copy() for r in rollouts]
    for routes in own:
        routes[39] = (routes[39] + 3) % EXPERTS
    finding, _ = recompute(rollouts, routes=own)
    assert finding.way_out
    for routes, rollout in zip(own, rollouts, strict=True):
        routes[39] = rollout.routed_experts[39]
        routes[25] = (routes[25] + 3) % EXPERTS  # as many rows, but not at a seam
    assert recompute(rollouts, routes=own)[0].way_out is None


def test_other_logprobs_of_a_prefill_are_seen(rollouts):
    _, logprobs = recompute(rollouts, logprobs=[r.rollout_logprobs - 0.2 for r in rollouts])
    assert logprobs.way_out and "mean |difference| 0.2 nat" in logprobs.value
    _, logprobs = recompute(rollouts, logprobs=[r.rollout_logprobs * np.nan for r in rollouts])
    assert logprobs.way_out


# Learner against engine -------------------------------------------------------------------------------------------


def test_coverage_must_be_one():
    assert checks.check_coverage(1.0).way_out is None
    assert checks.check_coverage(1.0 - 1e-9).way_out


def test_live_routes_name_the_worst_layer():
    finding = checks.check_live_routes(MISMATCH, Dtype.bfloat16)
    assert finding.way_out is None
    assert (
        finding.value == "1.00 % of (token, layer) sets differ from the recorded ones; worst layer 2: 2.00 %"
    )
    one_layer_wrong = MISMATCH | {"route_mismatch": 0.35, "route_mismatch/layer_2": 0.96}
    assert checks.check_live_routes(one_layer_wrong, Dtype.bfloat16).way_out
    rounded = MISMATCH | {"route_mismatch/layer_2": 0.03}
    assert checks.check_live_routes(rounded, Dtype.bfloat16).way_out is None
    assert checks.check_live_routes(rounded, Dtype.float32).way_out


def comparison(with_replay: float, without: float) -> checks.Comparison:
    """16 rollouts of 40 tokens whose log ratios have these standard deviations."""
    rng = np.random.default_rng(0)
    return checks.Comparison(
        replayed=[with_replay * rng.standard_normal(40) for _ in range(16)],
        live=[without * rng.standard_normal(40) for _ in range(16)],
    )


def effect(with_replay: float, without: float, **changes: float):
    shown = {"k3": with_replay**2 / 2, "k3_without": without**2 / 2}
    return checks.check_mismatch(MISMATCH | shown | changes, comparison(with_replay, without), max_gap=0.1)


def test_the_effect_of_replay_is_told_from_chance():
    agreement, lowers = effect(0.01, 0.03)
    assert agreement.way_out is None and lowers.way_out is None
    assert lowers.value.endswith(": replay lowers it") and "x 0.11" in lowers.value
    _, raises = effect(0.03, 0.01)
    assert raises.way_out and "replay raises it" in raises.value
    _, chance = effect(0.01, 0.01)
    assert chance.way_out is None and "within chance" in chance.value
    _, nothing = effect(1e-7, 1e-7, route_mismatch=0.0)
    assert nothing.way_out is None and "nothing to lower" in nothing.value


def test_a_learner_that_computes_another_model_is_wrong():
    agreement, _ = effect(0.3, 0.5)
    assert agreement.way_out and "different models" in agreement.way_out
    not_a_number = checks.Comparison(replayed=[np.array([np.nan])] * 2, live=[np.zeros(1)] * 2)
    assert checks.check_mismatch(MISMATCH, not_a_number, 0.1)[0].way_out


def test_table_with_and_without_replay():
    shown = MISMATCH | {"f1.1_without": 0.25, "f2": 0.5}
    values = checks.Comparison(replayed=[np.array([0.1, -0.3])], live=[np.array([0.5])])
    without, with_replay = checks.mismatch_rows(shown, values)
    assert without == ["without replay", "1.00e-04", "25.000 %", "0.000 %", "0.000 %", "5.00e-01", "5.00e-01"]
    assert with_replay == [
        "with replay",
        "1.00e-05",
        "0.000 %",
        "0.000 %",
        "50.000 %",
        "2.00e-01",
        "3.00e-01",
    ]


def test_broken_routes_keep_their_form():
    routes = [sets(np.random.default_rng(i), 30) for i in range(3)]
    name, broken, changed = checks.broken_routes(routes, NUMBERS, 0)
    assert name == "routes of layers 1 and 3 swapped"
    for own, original in zip(broken, routes, strict=True):
        np.testing.assert_array_equal(own[:, 0], original[:, 2])
        np.testing.assert_array_equal(own[:, 2], original[:, 0])
        np.testing.assert_array_equal(own[:, 1], original[:, 1])
    differs = [(np.sort(o[:, 0]) != np.sort(o[:, 2])).any(-1).mean() for o in routes]
    assert changed == pytest.approx(2 / 3 * np.mean(differs))
    single = [r[:, :1] for r in routes]
    name, broken, changed = checks.broken_routes(single, [1], 0)
    assert "shuffled" in name and changed > 0.8
    assert sorted(map(tuple, broken[0][:, 0])) == sorted(map(tuple, single[0][:, 0]))


def test_the_control_must_be_seen():
    seen = {"k3": 1e-2, "route_mismatch": 0.66}
    assert checks.check_control("swapped", 0.65, MISMATCH, seen).value.endswith("k3 1.00e-02 (x 1e+03): seen")
    for blind in ({"k3": 1.5e-5}, {"route_mismatch": 0.01}):
        finding = checks.check_control("swapped", 0.65, MISMATCH, seen | blind)
        assert finding.way_out and finding.value.endswith("not seen")
    assert checks.check_control("swapped", 0.0, MISMATCH, seen).way_out


def test_routers_need_a_gradient():
    assert checks.check_gradient(0.0, 3072.0, 0.5).value.startswith("100.00 % of 3,072 elements are not 0")
    assert checks.check_gradient(3071.0, 3072.0, 0.5).way_out is None
    assert checks.check_gradient(3072.0, 3072.0, 0.5).way_out
    assert "freeze_router" in checks.check_gradient(None, None, 0.5).value


# Before engines start ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "model.path='': give a checkpoint"),
        (["model.path=/nowhere"], "model.path='/nowhere': no such directory"),
        (["model.path={empty}"], "config.json is missing"),
        (["model.path={moe}", "learner.routing_replay=off"], "learner.routing_replay='off': there would be nothing"),
        (["model.path={moe}", "rollout.record_routes=off"], "rollout.record_routes='off': there would be nothing"),
        (["model.path={moe}", "replay.max_new_tokens=508"], "replay.max_new_tokens=508: leaves no room"),
        (["model.path={moe}", "replay.num_rollouts=3"], "replay.num_rollouts=3: give 4 or more"),
        (["model.path={moe}", "replay.num_rolouts=3"], "did you mean replay.num_rollouts?"),
        (["model.path={moe}", "data.path=/nowhere.jsonl"], "data.path='/nowhere.jsonl'"),
        (["model.path={moe}", "data.eval_path=x.jsonl"], "data.eval_path='x.jsonl': nothing is evaluated"),
        (["model.path={moe}", "rollout.num_gpus_per_worker=64"], "rollout.num_gpus_per_worker=64"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_before_anything_starts(arguments, line, moe, tmp_path, capsys):
    filled = [a.format(moe=moe, empty=tmp_path) for a in arguments]
    assert main(["doctor", "replay", *filled]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and line in err
    assert not ray.is_initialized()


def test_topics_of_the_command_line(capsys):
    assert main(["doctor", "replya", "model.path=/m"]) == 2
    assert capsys.readouterr().err == "error: doctor replya: no such topic; did you mean replay?\n"
    assert main(["doctor", "xyz"]) == 2
    assert capsys.readouterr().err == "error: doctor xyz: no such topic; choose replay, teachers, or none\n"
    assert main(["doctor", "replay", "replay"]) == 2
    assert capsys.readouterr().err == "error: doctor replay replay: give one topic\n"
    assert main(["rl", "replay"]) == 2
    assert capsys.readouterr().err.startswith("error: replay: cannot be read")
    assert main(["doctor", "replay", "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("posttrain doctor replay: ") and "Groups:" in out


def test_a_dense_model_has_nothing_to_replay(dense, capsys):
    assert main(["doctor", "replay", f"model.path={dense}"]) == 0
    assert (
        capsys.readouterr().out == f"{dense}: Qwen3ForCausalLM is a dense model; there is nothing to replay\n"
    )
    assert not ray.is_initialized()


def test_experts_under_a_name_of_their_own_are_not_taken_for_dense(dense, moe):
    assert replay.has_experts(config(f"model.path={moe}"))
    cfg = config(f"model.path={dense}")
    assert not replay.has_experts(cfg)
    file = Path(dense, "config.json")
    original = file.read_text()
    for section in ({"moe_num_experts": 64}, {"text_config": {"num_local_experts": 4}}):
        file.write_text(json.dumps(json.loads(original) | section))
        assert replay.has_experts(cfg)
    file.write_text(original)


def test_dry_run_starts_nothing(moe, capsys):
    assert main(["doctor", "replay", f"model.path={moe}", "dry_run=true"]) == 0
    out = capsys.readouterr().out
    assert "everything checked; nothing started" in out and "rollout" in out
    assert not ray.is_initialized()


def test_context_and_workers_follow_the_checkpoint(moe):
    cfg = config(f"model.path={moe}", "rollout.num_workers=3", "replay.max_new_tokens=40")
    learner, rollout = replay.sections(cfg, replay.check_input(cfg))
    assert learner is cfg.learner
    assert (rollout.max_model_len, rollout.num_workers, rollout.max_new_tokens) == (512, 1, 40)
    cfg = config(f"model.path={moe}", "learner.max_tokens_per_micro_batch=200")
    assert replay.sections(cfg, replay.check_input(cfg))[1].max_model_len == 200


def test_random_prompts_have_no_marks_and_leave_room(moe):
    cfg = config(f"model.path={moe}", "replay.num_rollouts=50")
    tokenizer = load_tokenizer(moe)
    _, rollout = replay.sections(cfg, replay.check_input(cfg))
    prompts = samples.make_prompts(cfg, tokenizer, rollout)
    assert len(prompts) == 10  # 38 rollouts of the first round in groups of 4
    marks = set(tokenizer.all_special_ids)
    assert not any(marks & set(prompt.token_ids.tolist()) for prompt in prompts)
    lengths = [len(prompt.token_ids) for prompt in prompts]
    assert lengths[::3] == [320] * 4 and all(33 <= n <= 96 for n in lengths[1::3] + lengths[2::3])
    again = samples.make_prompts(cfg, tokenizer, rollout)
    assert all(np.array_equal(a.token_ids, b.token_ids) for a, b in zip(prompts, again, strict=True))
    small = samples.make_prompts(cfg, tokenizer, replace(rollout, max_model_len=80, max_new_tokens=64))
    assert {len(prompt.token_ids) for prompt in small} == {15}


def test_real_prompts_are_spread_over_the_groups(moe, tmp_path):
    file = tmp_path / "prompts.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"{i}+1=?"}], "domain": "math"} for i in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = config(f"model.path={moe}", "replay.num_rollouts=16", f"data.path={file}")
    _, rollout = replay.sections(cfg, replay.check_input(cfg))
    prompts = samples.make_prompts(cfg, load_tokenizer(moe), rollout)
    assert [p.messages[0]["content"] for p in prompts] == ["0+1=?", "6+1=?", "13+1=?"]


def test_continuations_are_whole_rollouts_and_a_few_tokens(rollouts):
    plain = np.arange(5, 90)
    following = samples._continuations(rollouts, 2, plain, 0, max_model_len=512)
    assert [p.metadata["continued_at"] for p in following] == [40, 80]
    np.testing.assert_array_equal(following[1].token_ids[:-4], rollouts[1].token_ids)
    assert samples._continuations(rollouts, 2, plain, 0, max_model_len=44) == []
    assert len(samples._continuations(rollouts, 2, plain, 0, max_model_len=60)) == 2


def test_templates_that_cannot_answer_give_single_turns(moe):
    tokenizer = load_tokenizer(moe)
    assert samples.answers_turns(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"  # no end mark
    assert not samples.answers_turns(tokenizer)


def test_a_family_that_replay_does_not_know_is_a_line_with_its_name(moe, monkeypatch, capsys):
    monkeypatch.setattr("posttrain.engines.cluster.start", lambda cfg: None)
    monkeypatch.setattr("posttrain.engines.Engines.rollouts", lambda *arguments: None)
    refusal = (
        "model.path: routing replay does not know PhimoeSparseMoeBlock/PhimoeTopKRouter (x): because; choose"
    )

    class Refused:
        @property
        def info(self):
            raise UserError(refusal)

        def shutdown(self):
            pass

    monkeypatch.setattr("posttrain.engines.Engines.learner", lambda *arguments: Refused())
    assert main(["doctor", "replay", f"model.path={moe}"]) == 1
    out = capsys.readouterr().out
    assert refusal in out and "1 of 1 checks are wrong" in out
    refusal = "learner.zero_stage=3: another problem"
    assert main(["doctor", "replay", f"model.path={moe}"]) == 2
    assert capsys.readouterr().err == f"error: {refusal}\n"
