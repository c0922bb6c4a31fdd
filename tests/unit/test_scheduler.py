"""The data cursor: mixture shares, epochs, and nothing lost or repeated across a crash."""

import json

import pytest

from posttrain.config import UserError
from posttrain.scheduler import Scheduler

ITEMS = {"math": [f"m{i}" for i in range(10)], "code": [f"c{i}" for i in range(30)]}


def items(scheduler: Scheduler, n: int) -> list[str]:
    return [d.item for d in scheduler.draw(n)]


def test_every_item_once_per_epoch() -> None:
    scheduler = Scheduler({"math": ITEMS["math"]}, seed=3)
    first, second = items(scheduler, 10), items(scheduler, 10)
    assert sorted(first) == sorted(second) == sorted(ITEMS["math"])
    assert first != second, "each epoch has its own order"
    assert scheduler.epoch == {"math": 2}


def test_shares_follow_weights_in_any_window() -> None:
    scheduler = Scheduler(ITEMS, {"math": 3.0, "code": 1.0})
    drawn = items(scheduler, 80)
    for start in range(0, 64, 7):
        assert abs(sum(i.startswith("m") for i in drawn[start : start + 16]) - 12) <= 1


def test_seed_fixes_the_order() -> None:
    assert items(Scheduler(ITEMS, seed=1), 20) == items(Scheduler(ITEMS, seed=1), 20)
    assert items(Scheduler(ITEMS, seed=1), 20) != items(Scheduler(ITEMS, seed=2), 20)


def test_resume_hands_out_the_unfinished_first_then_goes_on() -> None:
    whole = Scheduler(ITEMS, seed=5)
    expected = [(d.group_id, d.item) for d in whole.draw(24)]

    scheduler = Scheduler(ITEMS, seed=5)
    drawn = scheduler.draw(12)
    scheduler.trained(d.group_id for d in drawn[:8])
    state = json.loads(json.dumps(scheduler.state()))
    resumed = Scheduler(ITEMS, seed=5)
    resumed.load_state(state)
    again = [(d.group_id, d.item) for d in resumed.draw(16)]
    assert again == expected[8:24]


def test_a_second_crash_before_training_repeats_the_same_prompts() -> None:
    scheduler = Scheduler(ITEMS, seed=5)
    drawn = [d.group_id for d in scheduler.draw(4)]
    state = scheduler.state()
    for _ in range(2):
        scheduler = Scheduler(ITEMS, seed=5)
        scheduler.load_state(state)
        state = scheduler.state()
    assert [d.group_id for d in scheduler.draw(4)] == drawn


def test_other_data_or_seed_is_refused() -> None:
    state = Scheduler(ITEMS, seed=5).state()
    with pytest.raises(UserError, match="fresh=true"):
        Scheduler({"math": ITEMS["math"]}, seed=5).load_state(state)
    with pytest.raises(UserError, match="seed 5"):
        Scheduler(ITEMS, seed=6).load_state(state)


def test_rows_that_were_moved_or_edited_are_noticed() -> None:
    state = Scheduler(ITEMS, seed=5).state()
    for rows in (ITEMS["math"][::-1], [*ITEMS["math"][:-1], "another row"]):
        with pytest.raises(
            UserError, match=r"data\.sources\.math: its rows, their order or the chat template"
        ):
            Scheduler({**ITEMS, "math": rows}, seed=5).load_state(state)
    del state["digests"]  # of a checkpoint made before there were any
    Scheduler(ITEMS, seed=5).load_state(state)


def test_nothing_to_draw_from_is_refused() -> None:
    with pytest.raises(UserError, match="nothing to draw from"):
        Scheduler({"math": []})
    with pytest.raises(UserError, match="weight above 0"):
        Scheduler(ITEMS, {"math": 0.0, "code": 0.0})
