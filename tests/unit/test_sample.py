"""`posttrain sample` without engines: what is written, in which order, how it resumes, and that SFT trains on it as it is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from examples.tiny.tokenizer import build_tokenizer
from posttrain import run_folder
from posttrain.compose import compose
from posttrain.config import BadRow, DataConfig, SampleConfig, UserError
from posttrain.data.chat import encode_prompt
from posttrain.data.sources import load_conversations
from posttrain.records import GroupSummary, Prompt, RewardResult, Rollout, RolloutGroup, RolloutStatus, Turn
from posttrain.run_folder import RunFolder
from posttrain.runs import sample
from posttrain.runs.sample import GROUPS_PER_WRITE, Samples, judge, sample_all, to_row

TOKENIZER = build_tokenizer()
COMPLETED, TRUNCATED = RolloutStatus.completed, RolloutStatus.truncated


def decode(token_ids: np.ndarray) -> str:
    return TOKENIZER.decode(token_ids.tolist(), skip_special_tokens=False)


def turn(author: str, text: str) -> Turn:
    ids = np.array(TOKENIZER(text, add_special_tokens=False)["input_ids"], np.int32)
    return Turn(
        author=author,
        token_ids=ids,
        loss_mask=np.full(len(ids), author == "policy"),
        rollout_logprobs=np.zeros(len(ids), np.float32),
        policy_versions=np.zeros(len(ids), np.int32),
    )


def prompt_of(index: int, domain: str = "math") -> Prompt:
    messages = [{"role": "user", "content": f"{index}+1=?"}]
    return Prompt(
        prompt_id=f"p{index}",
        source="s",
        domain=domain,
        messages=messages,
        token_ids=encode_prompt(TOKENIZER, messages),
        answer=str(index + 1),
        metadata={"level": 3},
    )


def rollout_of(prompt: Prompt, texts: list[str], status: RolloutStatus = COMPLETED) -> Rollout:
    """Policy and environment in turn."""
    turns = [turn("prompt", decode(prompt.token_ids))]
    messages = []
    for i, text in enumerate(texts):
        author = ("policy", "environment")[i % 2]
        mark = "<|end|>" if author == "policy" else "<|assistant|>"
        turns.append(turn(author, text + mark if author == "policy" else f"<|tool|>{text}{mark}"))
        messages.append({"role": "assistant" if author == "policy" else "tool", "content": text})
    return Rollout(
        group_id="g",
        rollout_id="g/0",
        prompt=prompt,
        turns=turns,
        messages=messages,
        routed_experts=None,
        finish_reason="stop",
        status=status,
    )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "_fingerprints", lambda cfg: {})
    cfg = compose("sample", ["model.path=/m", "data.path=/d.jsonl", f"runs_dir={tmp_path}"])[1]
    yield RunFolder.open(cfg)
    for path in list(run_folder._locks):
        run_folder._locks.pop(path).close()


@pytest.mark.parametrize(
    ("status", "result", "settings", "fate"),
    [
        (COMPLETED, None, {}, "written"),
        (COMPLETED, RewardResult(reward=0.0), {}, "written"),
        (COMPLETED, RewardResult(reward=0.0, error="sandbox died"), {}, "written"),
        (COMPLETED, RewardResult(reward=0.5), {"min_reward": 0.5}, "written"),
        (COMPLETED, RewardResult(reward=0.4), {"min_reward": 0.5}, "rejected"),
        (COMPLETED, RewardResult(reward=1.0, error="sandbox died"), {"min_reward": 0.5}, "failed"),
        (TRUNCATED, RewardResult(reward=1.0), {"min_reward": 0.5}, "truncated"),
        (TRUNCATED, RewardResult(reward=1.0), {"keep_truncated": True, "min_reward": 1.0}, "written"),
        (RolloutStatus.environment_error, None, {"keep_truncated": True}, "failed"),
        (RolloutStatus.engine_error, RewardResult(reward=1.0), {"min_reward": 0.0}, "failed"),
    ],
)
def test_fate_of_a_sample(status, result, settings, fate):
    assert judge(rollout_of(prompt_of(1), ["2"], status), result, SampleConfig(**settings)) == fate


def test_row_holds_prompt_conversation_and_tokens():
    prompt = prompt_of(1)
    rollout = rollout_of(prompt, ["add(1,1)", "2", "2"])
    row = to_row(rollout, RewardResult(reward=1.0), 3, decode)
    assert (row["id"], row["domain"], row["answer"], row["level"], row["reward"]) == (
        "p1/3",
        "math",
        "2",
        3,
        1.0,
    )
    assert [m["role"] for m in row["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert row["token_ids"] == rollout.token_ids.tolist() and "tools" not in row
    assert row["text"] == "<|user|>1+1=?<|assistant|>add(1,1)<|end|><|tool|>2<|assistant|>2<|end|>"
    trained = [t for t, bit in zip(row["token_ids"], row["loss_mask"], strict=True) if bit]
    assert decode(np.array(trained)) == "add(1,1)<|end|>2<|end|>"
    assert to_row(rollout, RewardResult(reward=1.0, error="x"), 0, decode)["reward"] is None


def write_rows(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_sft_trains_on_the_sampled_tokens(tmp_path):
    """Also where tokenising the text again would give others: here a mark that the policy spelt letter by letter."""
    rollout = rollout_of(prompt_of(1), ["x"])
    spelt = [TOKENIZER.convert_tokens_to_ids(letter) for letter in "<|end|>"]
    policy = rollout.turns[1]
    policy.token_ids = np.array([*spelt, TOKENIZER.eos_token_id], np.int32)
    policy.loss_mask = np.ones(len(policy.token_ids), bool)
    row = to_row(rollout, None, 0, decode)
    assert TOKENIZER(row["text"], add_special_tokens=False)["input_ids"] != row["token_ids"]
    written = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path = write_rows(
        tmp_path / "s.jsonl", row, written, to_row(rollout_of(prompt_of(2), ["3"]), None, 0, decode)
    )
    first, second, third = load_conversations(DataConfig(path=path), TOKENIZER, 64)
    assert first.token_ids.tolist() == rollout.token_ids.tolist() and first.token_ids.dtype == np.int32
    assert first.loss_mask.tolist() == rollout.loss_mask.tolist() and first.loss_mask.dtype == bool
    assert first.domain == "math" and decode(second.token_ids) == "<|user|>a<|assistant|>b<|end|>"
    assert decode(third.token_ids[third.loss_mask]) == "3<|end|>"


GOOD = to_row(rollout_of(prompt_of(1), ["2"]), None, 0, decode)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": []}, "token_ids: expected a non-empty list of integers"),
        ({"token_ids": [1.0]}, "token_ids: expected a non-empty list of integers"),
        ({"loss_mask": None}, "loss_mask: expected a 0 or 1 for each of the"),
        ({"loss_mask": [0, 1]}, "loss_mask: expected a 0 or 1 for each of the"),
        ({"loss_mask": [0] * len(GOOD["token_ids"])}, "loss_mask: expected a 0 for the first token"),
        ({"loss_mask": [1] * len(GOOD["token_ids"])}, "loss_mask: expected a 0 for the first token"),
        ({"text": None}, "token_ids: they do not spell the row's text"),
        ({"text": GOOD["text"] + "x"}, "token_ids: they do not spell the row's text"),
        ({"token_ids": [i + 1 for i in GOOD["token_ids"]]}, "token_ids: they do not spell the row's text"),
        ({"token_ids": [*GOOD["token_ids"][:-1], 100_000]}, "token_ids: they do not spell the row's text"),
        ({"messages": []}, "messages: expected a non-empty list"),
    ],
)
def test_bad_sampled_rows_name_line_and_field(tmp_path, change, message):
    path = write_rows(tmp_path / "s.jsonl", GOOD, GOOD | change)
    with pytest.raises(UserError) as error:
        load_conversations(DataConfig(path=path), TOKENIZER, 64)
    assert str(error.value).startswith(f"{path}:2: {message}") and "\n" not in str(error.value)
    skip = DataConfig(path=path, on_bad_row=BadRow.skip)
    assert len(load_conversations(skip, TOKENIZER, 64)) == 1


def test_a_sampled_row_longer_than_the_limit(tmp_path):
    path = write_rows(tmp_path / "s.jsonl", GOOD)
    with pytest.raises(UserError, match=r"more than algorithm\.max_tokens=4"):
        load_conversations(DataConfig(path=path), TOKENIZER, 4)


class FakePool:
    """Answers every prompt with its own id, the last submitted first, a few at a time."""

    def __init__(self, lose: bool = False) -> None:
        self.quarantined = [("p0", "its worker died")]
        self.submitted: list[tuple[Prompt, str]] = []
        self.lose = lose

    def submit(self, prompt, settings, group_id):
        assert settings.group_size == 2
        self.submitted.append((prompt, group_id))

    def wait(self, timeout_s):
        now, self.submitted = self.submitted[-7:], self.submitted[:-7]
        return [(group(p), summary_of(g)) for p, g in reversed(now)]

    def pop_lost(self):
        return ["s00000000"] if self.lose else []


def group(prompt: Prompt) -> RolloutGroup:
    rollouts = [rollout_of(prompt, [prompt.prompt_id]), rollout_of(prompt, ["x"], TRUNCATED)]
    return RolloutGroup(group_id="", prompt=prompt, rollouts=rollouts)


def summary_of(group_id: str) -> GroupSummary:
    return GroupSummary(
        group_id=group_id, prompt_id="", domain="", source="", statuses=[], num_tokens=[], num_loss_tokens=[],
        min_policy_version=0, max_policy_version=0, engine_s=0.0, errors=[], repeated=[],
    )  # fmt: skip


@pytest.fixture
def plain_ray(monkeypatch):
    monkeypatch.setattr(sample.ray, "get", lambda value: value)


CFG = compose("sample", ["model.path=/m", "data.path=/d", "sample.num_samples=2"])[1]


def ids_in(samples: Samples) -> list[str]:
    return [json.loads(line)["id"] for line in samples.path.read_text().splitlines()]


def test_samples_come_in_the_order_of_the_prompts(folder, plain_ray):
    prompts = [prompt_of(i, ("math", "code")[i % 2]) for i in range(2 * GROUPS_PER_WRITE + 5)]
    samples = Samples(folder, CFG.sample, decode)
    sample_all(FakePool(), None, prompts, CFG, samples)
    assert ids_in(samples) == [f"p{i}/0" for i in range(len(prompts))]
    summary = samples.summary()
    assert (
        summary["domains"]["code"]["written"]
        == summary["domains"]["code"]["truncated"]
        == GROUPS_PER_WRITE + 2
    )
    text = "".join(f"p{i}x" for i in range(len(prompts)))
    assert summary["num_tokens"] == len(text) + 2 * len(prompts), "truncated samples were sampled too"


class FakeRewards:
    """1 for the first five prompts, an error for the fourth."""

    def score_all(self, groups):
        died = RewardResult(reward=0.0, error="the reward's process died")
        for group, num_rollouts in groups:
            assert len(group.rollouts) == num_rollouts
        return [
            [died] * n
            if g.prompt.prompt_id == "p3"
            else [RewardResult(reward=float(g.prompt.prompt_id < "p5"))] * n
            for g, n in groups
        ]


def test_rewards_go_to_their_samples(folder, plain_ray):
    """A reward that failed fails the samples of its own group alone."""
    prompts = [prompt_of(i) for i in range(9)]
    samples = Samples(folder, SampleConfig(num_samples=2, min_reward=1.0), decode)
    sample_all(FakePool(), FakeRewards(), prompts, CFG, samples)
    assert ids_in(samples) == ["p0/0", "p1/0", "p2/0", "p4/0"]
    counts = samples.summary()["domains"]["math"]
    assert (counts["written"], counts["rejected"], counts["failed"]) == (4, 4, 1)


def test_a_killed_run_goes_on_after_its_last_whole_prompt(folder, plain_ray, capsys):
    prompts = [prompt_of(i) for i in range(9)]
    samples = Samples(folder, CFG.sample, decode)
    samples.write([group(p) for p in prompts[:4]], [None] * 4)
    with samples.path.open("a") as stream:
        stream.write('{"id": "half')  # killed while it wrote the next ones
    again = Samples(folder, CFG.sample, decode)
    assert again.num_prompts == 4 and "resuming after prompt 4" in capsys.readouterr().out
    sample_all(FakePool(), None, prompts, CFG, again)
    assert ids_in(again) == [f"p{i}/0" for i in range(9)]
    assert again.summary()["domains"]["math"]["prompts"] == 9
    again.path.write_text("")
    with pytest.raises(UserError, match=r"samples\.jsonl: shorter than when this run stopped"):
        Samples(folder, CFG.sample, decode)


def test_failed_samples_are_named(folder):
    samples = Samples(folder, SampleConfig(min_reward=1.0), decode)
    prompts = group(prompt_of(3))
    samples.write([prompts], [[RewardResult(reward=0.0, error="sandbox died"), RewardResult(reward=1.0)]])
    assert ids_in(samples) == []
    event = json.loads((folder.path / "events.jsonl").read_text())
    assert (event["kind"], event["prompt_id"], event["error"]) == ("sample_failed", "p3", "sandbox died")
    counts = samples.summary()["domains"]["math"]
    assert (counts["failed"], counts["truncated"], counts["written"]) == (1, 1, 0)


def test_lost_prompts_end_the_run(folder, plain_ray):
    with pytest.raises(UserError, match=r"1 prompts were given up: .*its worker died"):
        sample_all(FakePool(lose=True), None, [prompt_of(0)] * 10, CFG, Samples(folder, CFG.sample, decode))
