"""Rewards: stock verifier, resolution of the config, and failures that never become a reward."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from posttrain.config import UserError
from posttrain.records import Prompt, Rollout, RolloutGroup, RolloutStatus
from rewards.base import Reward
from rewards.exact_match import ExactMatch
from rewards.resolve import build, resolve
from rewards.worker import RewardWorker, score_rollout

EXACT = {"_target_": "rewards.exact_match.ExactMatch"}


def rollout(text: str, answer="42", domain="math", status=RolloutStatus.completed, error=None) -> Rollout:
    prompt = Prompt(
        prompt_id="p", source="s", domain=domain, messages=[], token_ids=np.zeros(1, np.int32), answer=answer
    )
    return Rollout(
        group_id="g",
        rollout_id="r",
        prompt=prompt,
        turns=[],
        messages=[{"role": "assistant", "content": text}],
        routed_experts=None,
        finish_reason="stop",
        status=status,
        error=error,
    )


def value(verifier: ExactMatch, text: str, answer="42") -> float:
    return verifier.score(rollout(text, answer))[0]


class Raises:
    def score(self, rollout):
        raise RuntimeError("verifier is broken")


class Returns:
    def __init__(self, what):
        self.what = what

    def score(self, rollout):
        return self.what


class NoScore:
    pass


class WithoutRollout:
    def score(self):
        return 0.0, {}


class Static:
    @staticmethod
    def score(rollout):
        return 0.5, {}


def plain_function(rollout):
    return 0.0, {}


class Unbuildable:
    def __init__(self):
        raise OSError("no dictionary file")

    def score(self, rollout):
        return 0.0, {}


def test_exact_match_is_a_reward():
    assert isinstance(ExactMatch(), Reward) and not isinstance(NoScore(), Reward)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("42", 1.0), (" 42\n", 1.0), ("042", 0.0), ("42.", 0.0), ("4", 0.0), ("", 0.0), ("41 42", 0.0)],
)
def test_exact_match_on_the_whole_message(text, expected):
    assert value(ExactMatch(), text) == expected


def test_exact_match_after_a_marker():
    verifier = ExactMatch(after="####")
    assert value(verifier, "6*7 #### 42") == 1.0
    assert value(verifier, "42") == 0.0  # without the marker
    assert value(verifier, "#### 42 #### 41") == 0.0  # the last one counts
    assert value(verifier, "#### 41 #### 42") == 1.0


def test_exact_match_options():
    assert value(ExactMatch(strip=False), " 42") == 0.0
    assert value(ExactMatch(ignore_case=True), "PARIS", "Paris") == 1.0
    assert value(ExactMatch(), "PARIS", "Paris") == 0.0
    assert value(ExactMatch(), "b", ["a", "b"]) == 1.0
    assert value(ExactMatch(), "42", 42) == 1.0
    with pytest.raises(ValueError, match="after"):
        ExactMatch(after="")


def test_missing_answer_is_an_error_and_no_reward():
    result = score_rollout(ExactMatch(), rollout("42", answer=None))
    assert result.error is not None and "no answer" in result.error


def test_exception_becomes_an_error_with_its_place():
    result = score_rollout(Raises(), rollout("42"))
    assert result.error is not None
    assert "RuntimeError: verifier is broken" in result.error and "test_rewards.py:" in result.error


@pytest.mark.parametrize(
    "what", [1.0, (1.0,), ("high", {}), (1.0, None), (float("nan"), {}), (float("inf"), {})]
)
def test_unusable_return_values_are_errors(what):
    assert score_rollout(Returns(what), rollout("42")).error is not None


def test_usable_return_values_become_floats():
    for bare in (1.0, "1", ("1", {})):
        found = score_rollout(Returns(bare), rollout("42"))
        assert found.reward == 0.0 and "return (reward, breakdown)" in str(found.error)
    result = score_rollout(Returns((True, {"parts": np.float32(0.5)})), rollout("42"))
    assert (result.reward, result.breakdown, result.error) == (1.0, {"parts": 0.5}, None)
    assert type(result.reward) is float and type(result.breakdown["parts"]) is float


@pytest.mark.parametrize("status", list(RolloutStatus))
def test_failed_rollouts_are_not_scored(status):
    result = score_rollout(ExactMatch(), rollout("42", status=status, error="why"))
    if status in (RolloutStatus.completed, RolloutStatus.truncated):
        assert (result.reward, result.error) == (1.0, None)
    else:
        assert result.error == "why"


def test_resolve_shared_and_by_domain():
    assert resolve(EXACT, ["math", "code"]) == {"math": EXACT, "code": EXACT}
    by_domain = {"math": EXACT, "code": {**EXACT, "after": "#"}, "law": EXACT}
    assert resolve(by_domain, ["math", "code"]) == {"math": by_domain["math"], "code": by_domain["code"]}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, r"rewards\.math: domain 'math' without reward \(rewards are given for: none\)"),
        ({"code": EXACT}, r"rewards\.math: domain 'math' without reward \(rewards are given for: code\)"),
        ({"math": {"after": "#"}}, r"rewards\.math=.*no _target_"),
        ({"math": "rewards.exact_match.ExactMatch"}, r"rewards\.math=.*no _target_"),
        ({"_target_": "ExactMatch"}, r"rewards\._target_='ExactMatch': no module"),
        ({"_target_": "no_such_module.Thing"}, r"module 'no_such_module' cannot be imported.*PYTHONPATH"),
        ({"_target_": "rewards.exact_match.Nope"}, r"has no 'Nope'"),
        ({"_target_": f"{__name__}.NoScore"}, r"no score method"),
        ({"_target_": f"{__name__}.plain_function"}, r"a function, not a class; give the dotted path"),
        ({"_target_": f"{__name__}.WithoutRollout"}, r"score method does not take one argument"),
        ({"_target_": f"{__name__}.Returns"}, r"cannot be built \(missing a required argument: 'what'\)"),
        ({"_target_": f"{__name__}.Returns", "what": 1, "x": 2}, r"got an unexpected keyword argument 'x'"),
    ],
)
def test_resolve_says_what_is_wrong(entry, message):
    with pytest.raises(UserError, match=message) as caught:
        resolve(entry, ["math"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "entry",
    [
        {"_target_": f"{__name__}.Static", "_convert_": "all"},
        {"_target_": f"{__name__}.Returns", "what": 1},
        {"_target_": f"{__name__}.Returns", "_args_": [1]},
        {"_target_": f"{__name__}.Unbuildable"},
    ],
)
def test_resolve_accepts_what_fits(entry):
    assert resolve(entry, ["math"]) == {"math": entry}


def test_build_says_what_is_wrong():
    with pytest.raises(UserError, match=r"rewards\.math\._target_=.*cannot be built .*no dictionary file"):
        build({"_target_": f"{__name__}.Unbuildable"}, "rewards.math")
    with pytest.raises(UserError, match=r"rewards\._target_=.*cannot be built .*unexpected keyword"):
        build({**EXACT, "typo": 1}, "rewards")
    with pytest.raises(UserError, match=r"no score method"):
        build({"_target_": "types.SimpleNamespace"}, "rewards")
    assert SimpleNamespace()  # the target above exists; what it lacks is `score`


def test_a_module_in_the_working_directory_is_found(tmp_path, monkeypatch):
    (tmp_path / "my_own_reward.py").write_text(
        "class Mine:\n    def score(self, rollout):\n        return 0.5, {'mine': 1.0}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    entry = resolve({"_target_": "my_own_reward.Mine"}, ["math"])["math"]
    assert score_rollout(build(entry, "rewards"), rollout("x")).breakdown == {"mine": 1.0}


def test_worker_scores_groups_in_order_by_domain(monkeypatch):
    monkeypatch.setattr("rewards.worker.ray.get", lambda refs: refs)
    worker = RewardWorker({"math": EXACT, "code": {**EXACT, "after": "#"}}, [])
    assert worker.problem() is None
    groups = [
        RolloutGroup(group_id="1", prompt=rollout("").prompt, rollouts=[rollout("42"), rollout("41")]),
        RolloutGroup(group_id="2", prompt=rollout("").prompt, rollouts=[rollout("#42", domain="code")]),
    ]
    assert [[r.reward for r in group] for group in worker.score(groups)] == [[1.0, 0.0], [1.0]]


def test_worker_reports_a_problem_instead_of_dying():
    worker = RewardWorker({"math": {"_target_": f"{__name__}.Unbuildable"}}, [])
    assert "no dictionary file" in str(worker.problem())
