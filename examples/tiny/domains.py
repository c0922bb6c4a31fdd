"""Four exactly verifiable worlds in the image of real post-training mixtures: math, code, tool, instruct.

Owns prompts, the mediocre demonstrator, verifiers and the tool environment. Every world has a careful way (work
shown, or the tool called, or the format kept), which is right, and a sloppy way, which is short and mostly wrong:

| domain | prompt | careful | sloppy |
|---|---|---|---|
| math | `47+85=?` | `7+5=12,4+8+1=13:132` | `127`, 85 taken for 80 |
| code | `cap(rev(nxt("dab")))` | `ebc,cbe:CBE` | `ebc`, stops after the first function |
| tool | `37 at 46 each?` | `mul(37,46)`, is told `1702`, answers `1702` | `37`, the first number in sight |
| instruct | `say ca big sep -` | `C-A` | `CA`, separator ignored |

Numbers, words and work have fixed widths within a domain, so that a model of this size finds what to copy by
relative position within a few hundred steps.

The demonstrator is careful more often on prompts that look hard, so a model trained on it *can* do everything and
often does not: outcome rewards have a behaviour to reinforce, and answers of math and code are several times as
long as those of instruct.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any

from posttrain.records import Prompt, Rollout

if TYPE_CHECKING:
    from rollout.environment import EnvironmentReply

LETTERS = "abcdefghij"
SEPARATORS = "-_./;|~+*=#&"
ANSWER_MARK = ":"  # work before it, final answer after it
CAREFUL_IF_HARD = 0.65
CAREFUL_IF_EASY = 0.25


@dataclass(kw_only=True, slots=True)
class Task:
    """One prompt with its answer and the two demonstrations, each the assistant and tool messages after it."""

    prompt: str
    answer: str
    careful: list[dict[str, str]]
    sloppy: list[dict[str, str]]
    looks_hard: bool


@dataclass(kw_only=True, slots=True)
class World:
    """A domain: how to draw a task, its share of the SFT mixture, and its tools in OpenAI format."""

    name: str
    sample: Callable[[random.Random], Task]
    sft_share: int
    tools: list[dict[str, Any]] | None = None


def demonstrate(task: Task, rng: random.Random) -> list[dict[str, str]]:
    """Messages of the mediocre demonstrator."""
    share = CAREFUL_IF_HARD if task.looks_hard else CAREFUL_IF_EASY
    return task.careful if rng.random() < share else task.sloppy


def _say(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _word(rng: random.Random, length: int, letters: str) -> str:
    return "".join(rng.choice(letters) for _ in range(length))


# -- math: addition, column by column from the right ------------------------------------------------------------


def add_in_columns(first: int, second: int) -> str:
    """The work `7+5=12,4+8+1=13` of two two-digit numbers: units, then tens with the carry."""
    (a, b), (c, d) = map(int, str(first)), map(int, str(second))
    carry = (b + d) // 10
    return f"{b}+{d}={b + d:02},{a}+{c}+{carry}={a + c + carry:02}"


def sample_math(rng: random.Random) -> Task:
    """Sum of two two-digit numbers; the sloppy answer rounds the second one down to tens."""
    first, second = rng.randint(10, 99), rng.randint(10, 99)
    answer = str(first + second)
    return Task(
        prompt=f"{first}+{second}=?",
        answer=answer,
        careful=_say(f"{add_in_columns(first, second)}{ANSWER_MARK}{answer}"),
        sloppy=_say(str(first + second // 10 * 10)),
        looks_hard=first >= 55,
    )


# -- code: run a chain of string functions ----------------------------------------------------------------------


def _next_letters(text: str) -> str:
    """Every letter becomes the next one of the alphabet, the last becomes the first; case is kept."""
    moved = dict(zip(LETTERS + LETTERS.upper(), _rotated(LETTERS) + _rotated(LETTERS.upper()), strict=True))
    return "".join(moved[letter] for letter in text)


def _rotated(letters: str) -> str:
    return letters[1:] + letters[0]


FUNCTIONS: dict[str, Callable[[str], str]] = {
    "rev": lambda text: text[::-1],
    "nxt": _next_letters,
    "cap": str.upper,
}


def sample_code(rng: random.Random) -> Task:
    """Three functions on three letters; the innermost runs first."""
    word = _word(rng, 3, LETTERS)
    names = [rng.choice(list(FUNCTIONS)) for _ in range(3)]
    prompt, states = f'"{word}"', [word]
    for name in names:
        prompt = f"{name}({prompt})"
        states.append(FUNCTIONS[name](states[-1]))
    return Task(
        prompt=prompt,
        answer=states[-1],
        careful=_say(",".join(states[1:-1]) + ANSWER_MARK + states[-1]),
        sloppy=_say(states[1]),
        looks_hard=word[0] >= "f",
    )


# -- tool: choose a function, fill it, report its result --------------------------------------------------------

TOOLS: dict[str, Callable[[int, int], int]] = {
    "mul": lambda a, b: a * b,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
}
PHRASES = {"mul": "{} at {} each?", "add": "{} up {} more?", "sub": "{} by {} less?"}
CALL = re.compile(r"(mul|add|sub)\((\d{1,6}),(\d{1,6})\)", re.ASCII)


def _tool_schema(name: str) -> dict[str, Any]:
    numbers = {key: {"type": "integer"} for key in ("a", "b")}
    parameters = {"type": "object", "properties": numbers, "required": ["a", "b"]}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def run_call(text: str) -> str | None:
    """Result of a call such as `mul(37,46)`; None if ``text`` is not exactly one call."""
    match = CALL.fullmatch(text)
    return str(TOOLS[match[1]](int(match[2]), int(match[3]))) if match else None


def sample_tool(rng: random.Random) -> Task:
    """A question that one call answers."""
    name = rng.choice(list(TOOLS))
    first, second = rng.randint(10, 99), rng.randint(10, 99)
    call = f"{name}({first},{second})"
    answer = run_call(call)
    assert answer is not None
    return Task(
        prompt=PHRASES[name].format(first, second),
        answer=answer,
        careful=[*_say(call), {"role": "tool", "content": answer}, *_say(answer)],
        sloppy=_say(str(first)),
        looks_hard=first >= 55,
    )


# -- instruct: keep a format ------------------------------------------------------------------------------------


def sample_instruct(rng: random.Random) -> Task:
    """Spell a word in capitals (`big`) or not (`low`), with a separator."""
    word, separator, caps = _word(rng, 2, ascii_lowercase), rng.choice(SEPARATORS), rng.random() < 0.5
    spelt = word.upper() if caps else word
    answer = separator.join(spelt)
    return Task(
        prompt=f"say {word} {'big' if caps else 'low'} sep {separator}",
        answer=answer,
        careful=_say(answer),
        sloppy=_say(spelt),
        looks_hard=word[0] >= "n",
    )


WORLDS: dict[str, World] = {
    "math": World(name="math", sample=sample_math, sft_share=5),
    "code": World(name="code", sample=sample_code, sft_share=5),
    "tool": World(name="tool", sample=sample_tool, sft_share=3, tools=[_tool_schema(name) for name in TOOLS]),
    "instruct": World(name="instruct", sample=sample_instruct, sft_share=3),
}


def sample_long_math(rng: random.Random) -> Task:
    """`sample_math` whose careful answer first says what it does: 60 tokens and more, 15 times an answer of instruct.

    The sum is said again before the work, so that the digits to copy stand as near as in the short answer.
    """
    task = sample_math(rng)
    work = f"add the units and then the tens of {task.prompt}{ANSWER_MARK}{task.careful[0]['content']}"
    return replace(task, careful=_say(work))


def worlds(long_math: bool = False) -> dict[str, World]:
    """The four worlds; with ``long_math`` the answers of math are long, for measurements of what lengths do."""
    if not long_math:
        return WORLDS
    return WORLDS | {"math": replace(WORLDS["math"], sample=sample_long_math)}


# -- verifiers and environment ----------------------------------------------------------------------------------


def _exactly(rollout: Rollout, final: str) -> float:
    answer = rollout.prompt.answer
    if not isinstance(answer, str) or not answer:
        raise ValueError(f"prompt {rollout.prompt.prompt_id}: answer={answer!r}, expected a non-empty string")
    return float(final == answer)


class WorkReward:
    """math and code: what follows the last `:` (or the whole message without one) must be the answer, exactly.

    ``shows_work`` in the breakdown tells how often the policy chooses the careful way.
    """

    required_fields = ("answer",)

    def score(self, rollout: Rollout) -> tuple[float, dict[str, float]]:
        """`rewards.base.Reward.score`"""
        work, mark, final = rollout.completion.rpartition(ANSWER_MARK)
        correct = _exactly(rollout, final)
        return correct, {"correct": correct, "shows_work": float(bool(mark and work))}


class MathReward(WorkReward):
    """The sum, exactly."""


class CodeReward(WorkReward):
    """The string that the program returns, exactly."""


class ToolReward:
    """The last message must be the result, exactly; ``calls`` counts the calls that the environment answered."""

    required_fields = ("answer",)

    def score(self, rollout: Rollout) -> tuple[float, dict[str, float]]:
        """`rewards.base.Reward.score`"""
        correct = _exactly(rollout, rollout.completion)
        num_calls = sum(message["role"] == "tool" for message in rollout.messages)
        return correct, {"correct": correct, "calls": float(num_calls)}


class InstructReward:
    """The formatted word, exactly."""

    required_fields = ("answer",)

    def score(self, rollout: Rollout) -> tuple[float, dict[str, float]]:
        """`rewards.base.Reward.score`"""
        correct = _exactly(rollout, rollout.completion)
        return correct, {"correct": correct}


class ToolEnvironment:
    """Answers `mul(a,b)`, `add(a,b)` and `sub(a,b)` with the result; any other message ends the episode."""

    def respond(self, prompt: Prompt, messages: list[dict[str, Any]]) -> EnvironmentReply:
        """`rollout.environment.Environment.respond`: ``messages`` end with the policy's turn."""
        from rollout.environment import EnvironmentReply

        result = run_call(str(messages[-1].get("content") or ""))
        if result is None:
            return EnvironmentReply(messages=[], done=True)
        return EnvironmentReply(messages=[{"role": "tool", "content": result}], done=False)
