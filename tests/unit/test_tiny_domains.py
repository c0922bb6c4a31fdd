"""The tiny worlds: gold and adversarial answers, the tool environment, and the demonstrator."""

from __future__ import annotations

import random

import numpy as np
import pytest

from examples.tiny.domains import (
    FUNCTIONS,
    WORLDS,
    CodeReward,
    InstructReward,
    MathReward,
    Task,
    ToolEnvironment,
    ToolReward,
    add_in_columns,
    demonstrate,
    run_call,
    worlds,
)
from posttrain.records import Prompt, Rollout, RolloutStatus
from rewards.base import Reward
from rewards.worker import score_rollout

REWARDS = {"math": MathReward, "code": CodeReward, "tool": ToolReward, "instruct": InstructReward}


def tasks(domain: str, n: int = 200) -> list[Task]:
    rng = random.Random(3)
    return [WORLDS[domain].sample(rng) for _ in range(n)]


def rollout(domain: str, answer, messages: list[dict[str, str]]) -> Rollout:
    prompt = Prompt(
        prompt_id="p",
        source=domain,
        domain=domain,
        messages=[],
        token_ids=np.zeros(1, np.int32),
        answer=answer,
    )
    return Rollout(
        group_id="g",
        rollout_id="r",
        prompt=prompt,
        turns=[],
        messages=messages,
        routed_experts=None,
        finish_reason="stop",
        status=RolloutStatus.completed,
    )


def reward_of(domain: str, answer: str, *texts: str) -> float:
    messages = [{"role": "assistant", "content": text} for text in texts]
    return REWARDS[domain]().score(rollout(domain, answer, messages))[0]


@pytest.mark.parametrize("domain", WORLDS)
def test_careful_demonstrations_are_right(domain):
    verifier = REWARDS[domain]()
    assert isinstance(verifier, Reward)
    for task in tasks(domain):
        assert verifier.score(rollout(domain, task.answer, task.careful))[0] == 1.0, task


@pytest.mark.parametrize("domain", WORLDS)
def test_sloppy_demonstrations_are_mostly_wrong(domain):
    verifier = REWARDS[domain]()
    scores = [verifier.score(rollout(domain, t.answer, t.sloppy))[0] for t in tasks(domain, 500)]
    assert np.mean(scores) < 0.2


def test_examples_of_the_docstring():
    assert add_in_columns(47, 85) == "7+5=12,4+8+1=13"
    assert [FUNCTIONS[name]("dab") for name in ("rev", "nxt", "cap")] == ["bad", "ebc", "DAB"]
    assert FUNCTIONS["nxt"]("jJa") == "aAb"
    assert run_call("mul(347,46)") == "15962"


@pytest.mark.parametrize("first", [10, 19, 45, 55, 90, 99])
@pytest.mark.parametrize("second", [10, 45, 99])
def test_math_work_leads_to_the_sum(first, second):
    columns = add_in_columns(first, second).split(",")
    units, tens = (column.split("=")[1] for column in columns)
    assert int(tens) * 10 + int(units[1]) == first + second


@pytest.mark.parametrize(
    "text",
    [
        "7+5=12:431",
        "432:",
        "432:431",
        "0432",
        "432 ",
        " 432",
        "4 3 2",
        "=432",
        "",
        ":",
        "431432",
        "４３２",
        "432\n",
    ],
)
def test_math_refuses(text):
    assert reward_of("math", "432", text) == 0.0


def test_math_accepts_the_bare_answer_and_counts_shown_work():
    messages = [{"role": "assistant", "content": "7+5=12:432"}]
    assert MathReward().score(rollout("math", "432", messages)) == (1.0, {"correct": 1.0, "shows_work": 1.0})
    messages = [{"role": "assistant", "content": "432"}]
    assert MathReward().score(rollout("math", "432", messages))[1]["shows_work"] == 0.0
    messages = [{"role": "assistant", "content": ":432"}]
    assert MathReward().score(rollout("math", "432", messages))[1]["shows_work"] == 0.0


@pytest.mark.parametrize("text", ["cbe", "CBE,cbe", "CBE:cbe", "CBECBE", '"CBE"', "CB", ""])
def test_code_refuses(text):
    assert reward_of("code", "CBE", text) == 0.0


@pytest.mark.parametrize(
    "text", ["cab", "CAB", "C-A-B-", "-C-A-B", "C_A_B", "c-a-b", "C-A-B C-A-B", "C - A - B"]
)
def test_instruct_refuses(text):
    assert reward_of("instruct", "C-A-B", text) == 0.0


def test_tool_counts_the_last_message_only():
    assert reward_of("tool", "1702", "mul(37,46)", "1702") == 1.0
    assert reward_of("tool", "1702", "1702", "mul(37,46)") == 0.0
    assert reward_of("tool", "1702", "1702", "1703") == 0.0
    messages = [
        {"role": "assistant", "content": "mul(37,46)"},
        {"role": "tool", "content": "1702"},  # the environment's own words are no answer
    ]
    assert ToolReward().score(rollout("tool", "1702", messages)) == (0.0, {"correct": 0.0, "calls": 1.0})


@pytest.mark.parametrize("domain", WORLDS)
@pytest.mark.parametrize("answer", [None, "", 432])
def test_unusable_answer_is_an_error_and_no_reward(domain, answer):
    result = score_rollout(REWARDS[domain](), rollout(domain, answer, [{"role": "assistant", "content": ""}]))
    assert result.error is not None and "answer" in result.error


@pytest.mark.parametrize(("call", "result"), [("mul(37,46)", "1702"), ("add(1,2)", "3"), ("sub(1,2)", "-1")])
def test_environment_answers_calls(call, result):
    prompt = rollout("tool", "x", []).prompt
    reply = ToolEnvironment().respond(prompt, [{"role": "assistant", "content": call}])
    assert reply.messages == [{"role": "tool", "content": result}] and not reply.done


@pytest.mark.parametrize(
    "text",
    ["1702", "", "mul(37,46", "mul(37,46) ", "pow(2,9)", "mul(37,46)mul(1,1)", "mul(9999999,1)", "mul(٣,1)"],
)
def test_environment_ends_on_anything_else(text):
    reply = ToolEnvironment().respond(
        rollout("tool", "x", []).prompt, [{"role": "assistant", "content": text}]
    )
    assert reply.messages == [] and reply.done


def test_tool_demonstration_agrees_with_the_environment():
    for task in tasks("tool", 50):
        call, answered, final = task.careful
        reply = ToolEnvironment().respond(rollout("tool", task.answer, []).prompt, [call])
        assert reply.messages == [answered]
        assert (
            ToolEnvironment().respond(rollout("tool", task.answer, []).prompt, [call, answered, final]).done
        )


def test_demonstrator_is_careful_more_often_where_it_looks_hard():
    rng = random.Random(0)
    shares = {}
    for hard in (True, False):
        chosen = [t for t in tasks("math", 2000) if t.looks_hard is hard]
        shares[hard] = np.mean([demonstrate(task, rng) is task.careful for task in chosen])
    assert shares[True] > shares[False] + 0.2


def test_work_is_several_times_as_long_as_format():
    def mean_length(domain: str) -> float:
        return float(np.mean([len(task.careful[-1]["content"]) for task in tasks(domain)]))

    assert mean_length("math") > 3 * mean_length("instruct")
    assert mean_length("code") > 2 * mean_length("instruct")


def test_long_math_is_the_same_task_with_an_answer_fifteen_times_as_long():
    short, long = (worlds(flag)["math"].sample for flag in (False, True))
    for seed in range(50):
        task, told = short(random.Random(seed)), long(random.Random(seed))
        assert (told.prompt, told.answer, told.sloppy) == (task.prompt, task.answer, task.sloppy)
        assert told.careful[0]["content"].endswith(f"{task.prompt}:{task.careful[0]['content']}")
        assert reward_of("math", told.answer, told.careful[0]["content"]) == 1.0
        assert reward_of("math", told.answer, told.sloppy[0]["content"]) == float(
            told.sloppy == [{"role": "assistant", "content": told.answer}]
        )
        instruct = worlds(True)["instruct"].sample(random.Random(seed)).careful[0]["content"]
        assert 72 >= len(told.careful[0]["content"]) + 1 >= 15 * (len(instruct) + 1), "with their end marks"
    assert worlds()["math"] is WORLDS["math"] and worlds(True)["code"] is WORLDS["code"]
