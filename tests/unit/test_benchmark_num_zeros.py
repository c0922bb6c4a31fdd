"""The num-zeros study without a learner: warnings, events and leads of lines by hand; data that do not leak."""

from __future__ import annotations

import json
import time
from itertools import islice
from typing import Any

import numpy as np
import pytest

from benchmarks import learner_overhead, num_zeros, num_zeros_table
from benchmarks.num_zeros import ARMS, DOMAINS, FULL, NUM_HELD_OUT, NUM_REPEATED, batches, prompt, split
from benchmarks.num_zeros_table import SERIES, correlation, events, first_warnings, leads, rise, show, summary
from posttrain.early_warning import RECENT, WARM_UP
from posttrain.records import TrainingSample

STEPS, CHANGE = 60, 30


def line(arm: str = "narrow", seed: int = 0, **changed: float) -> dict[str, Any]:
    """A run whose signals rest until the step CHANGE and then stand at ``changed``; validation is lowest at step 40."""
    noise = [1.0, 1.02, 0.98, 1.01, 0.99]
    level = {"loss": 1.0, "total": 1000.0, "routed_expert": 900.0, "embedding": 100.0, "share": 0.0}
    level |= {"max_vio": 2.0, "empty": 0.0, "dead_experts": 1.0}
    names = {name: name.rpartition("/")[2] for name in SERIES} | {"num_empty_experts": "empty"}
    series = {}
    for name, short in names.items():
        series[name] = [
            (changed.get(short, level[short]) if step > CHANGE else level[short]) * noise[step % 5]
            for step in range(1, STEPS + 1)
        ]
    series["num_zeros/total"] = [
        a + b for a, b in zip(series["num_zeros/routed_expert"], series["num_zeros/embedding"], strict=True)
    ]
    series["num_zeros/share"] = [total / 10_000 for total in series["num_zeros/total"]]
    validated = [1, *range(5, STEPS + 1, 5)]
    losses = [2.0 + 0.008 * max(40 - step, 0) + 0.006 * max(step - 40, 0) for step in validated]
    return {
        "arm": arm,
        "seed": seed,
        "data": "narrow",
        "shift": CHANGE,
        "validated": validated,
        "validation": {"all": losses},
        "alarms": {"imbalance/above/balance/max_vio": 35},
        "series": series,
    }


def test_a_signal_warns_five_steps_after_it_left_its_band() -> None:
    found = first_warnings(line(routed_expert=2900.0, max_vio=1.0))
    assert found["num-zeros"] == found["of experts"] == (CHANGE + RECENT, "above")
    assert found["MaxVio"] == (CHANGE + RECENT, "below")
    assert found["empty experts"] is None and found["of the rest"] is None


def test_a_signal_that_was_still_warns_when_it_moves_at_all() -> None:
    moved = line()
    moved["series"]["num_empty_experts"] = [0.0] * CHANGE + [1.0] * (STEPS - CHANGE)
    assert first_warnings(moved)["empty experts"] == (CHANGE + RECENT, "above")


def test_changes_within_the_first_steps_make_the_band_and_do_not_leave_it() -> None:
    early = line()
    early["series"]["balance/max_vio"] = [2.0, 5.0] * (WARM_UP // 2) + [5.0] * (STEPS - WARM_UP)
    assert first_warnings(early)["MaxVio"] is None


def test_zeros_outside_of_experts_and_embedding_are_what_remains_of_the_total() -> None:
    bfloat16 = line()
    total = bfloat16["series"]["num_zeros/total"]
    bfloat16["series"]["num_zeros/total"] = total[:CHANGE] + [value + 50 for value in total[CHANGE:]]
    assert first_warnings(bfloat16)["of the rest"] == (CHANGE + RECENT, "above")


def test_the_gap_follows_validation_and_training_loss() -> None:
    assert first_warnings(line(loss=0.1))["validation gap"] == (CHANGE + RECENT, "above")


def test_events_by_hand() -> None:
    assert events(line()) == {"validation": 40, "empty": None}
    # The median of five steps is 1 when three of them are.
    assert events(line(empty=1.0)) == {"validation": 40, "empty": CHANGE + RECENT}
    late = line()
    late["series"]["num_empty_experts"] = [0.0] * 40 + [2.0] * (STEPS - 40)
    late["validation"]["all"][0] = 0.1  # before the data change
    assert events(late) == {"validation": 40, "empty": 43}
    assert rise([1, 5, 10, 15, 20], [3.0, 2.0, 1.0, 0.5, 0.4]) is None, "it falls to the end"
    assert rise([1, 5, 10, 15, 20], [1.0, 1.0, 1.01, 1.01, 1.01]) is None, "1 % is no rise"
    assert rise([1, 5, 10, 15, 20], [3.0, 1.0, 1.2, 1.5, 2.0]) == 5
    assert rise([1, 5, 10, 15, 20], [3.0, 2.0, 0.1, 2.0, 2.1]) is None, "one odd validation is not the lowest"


def test_leads_by_hand() -> None:
    lines = [
        line(routed_expert=2900.0, empty=1.0),
        line(seed=1, empty=1.0),
        line(seed=2, routed_expert=2900.0),
    ]
    lines[0]["series"]["num_empty_experts"] = [0.0] * 40 + [1.0] * (STEPS - 40)
    assert leads(lines, "num-zeros", "validation") == [5, 5], "seed 1 does not warn"
    assert leads(lines, "num-zeros", "empty") == [8], "seed 2 loses no expert"
    found = summary(lines)
    assert found["events"] == {"validation": [40, 40, 40], "empty": [43, 35]}
    assert found["warnings"]["num-zeros"] == [(35, "above"), (35, "above")]
    first, last = found["ends"]["num_zeros/share"]
    assert first == pytest.approx([0.1] * 3) and last == pytest.approx([0.3, 0.1, 0.3])


def test_correlation_is_of_ranks_and_knows_ties() -> None:
    run = line()
    run["series"]["num_zeros/share"] = [float(i // 2) for i in range(STEPS)]
    run["series"]["balance/max_vio"] = [float(i // 2) ** 3 for i in range(STEPS)]
    assert correlation(run, "num_zeros/share", "balance/max_vio") == pytest.approx(1.0)
    run["series"]["balance/max_vio"] = [-float(i // 2) for i in range(STEPS)]
    assert correlation(run, "num_zeros/share", "balance/max_vio") == pytest.approx(-1.0)
    run["series"]["balance/max_vio"] = [2.0] * STEPS
    assert correlation(run, "num_zeros/share", "balance/max_vio") is None


def test_tables_and_picture_from_lines_alone(tmp_path: Any, capsys: Any) -> None:
    results = tmp_path / "num_zeros.jsonl"
    probe = {"probe": {"0.5": 3e-5}, "commit": "abc"}
    cells = [
        line(empty=9.0),
        line(routed_expert=2900.0, empty=1.0),
        line(seed=1, routed_expert=2900.0),
        line("repeat"),
    ]
    results.write_text("".join(json.dumps(row) + "\n" for row in [probe, *cells]))
    show(results)
    printed = capsys.readouterr().out
    rows = [row.split(" | ") for row in printed.splitlines() if row.startswith("| narrow")]
    assert rows[0][1] == "2", "the cell that is there twice counts once, the later one"
    assert rows[1][2] == "above 35 (2/2)"
    assert rows[2][1:3] == ["40 (2/2)", "+5 [5, 5] (2/2)"]
    assert rows[3][1:3] == ["35 (1/2)", "+0 [0, 0] (1/2)"]
    assert "imbalance/above/balance/max_vio 35 (2/2)" in rows[4][1]
    assert "quantile 0.5 3e-05" in printed and "abc" in printed
    assert results.with_suffix(".png").stat().st_size > 10_000


def samples() -> list[TrainingSample]:
    made = []
    for domain in DOMAINS:
        for number in range(NUM_HELD_OUT + 200):
            asked = number % (NUM_HELD_OUT + 150)  # the last ones ask what held-out rows ask
            ids = np.array([DOMAINS.index(domain), asked, number], np.int32)
            mask = np.array([False, False, True])
            weights = np.ones(3, np.float32)
            made.append(TrainingSample(token_ids=ids, loss_mask=mask, weights=weights, domain=domain))
    return made


def test_no_held_out_prompt_is_trained_on() -> None:
    data = split(samples())
    asked = {prompt(s) for s in data.held_out}
    assert len(data.held_out) == NUM_HELD_OUT * len(DOMAINS)
    for rows in (data.pretrain, data.tune):
        assert all(rows[domain] for domain in DOMAINS)
        assert not asked & {prompt(s) for own in rows.values() for s in own}


def test_batches_are_skewed_as_their_arm_says() -> None:
    rows = split(samples()).tune

    def share(kind: str, first: int, last: int) -> float:
        feed = batches(kind, rows, FULL, 0)
        chosen = [next(feed) for _ in range(last)][first:]
        return float(np.mean([s.domain == DOMAINS[0] for batch in chosen for s in batch]))

    assert share("balanced", 0, 40) == pytest.approx(0.25, abs=0.05)
    assert share("narrow", 0, FULL.shift) == pytest.approx(0.25, abs=0.05)
    assert share("narrow", FULL.shift + 60, FULL.steps) == pytest.approx(0.95, abs=0.03)
    assert share("shift", 0, FULL.shift) == pytest.approx(0.95, abs=0.03)
    assert share("shift", FULL.shift, FULL.steps) == pytest.approx(0.05, abs=0.03)


def test_repeated_rows_are_few_and_every_epoch_has_them_all() -> None:
    rows = {d: own * 3 for d, own in split(samples()).tune.items()}

    def feed() -> Any:
        return islice(batches("repeat", rows, FULL, 0), FULL.shift, None)

    repeated = feed()
    epochs = [
        [id(s) for _ in range(NUM_REPEATED // FULL.batch_size) for s in next(repeated)] for _ in range(2)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
    assert [id(s) for s in next(feed())] == epochs[0][: FULL.batch_size]


def test_arms_leave_the_base_setting_in_one_factor() -> None:
    for arm in ARMS.values():
        changed = [arm.rate != num_zeros.BASE_RATE, arm.quantile is not None, arm.dtype != "float32"]
        assert sum(changed) <= 1, arm.name
    assert {"narrow", "repeat", "balanced"} <= {name for name, arm in ARMS.items() if arm.quick}


def test_finished_cells_and_a_changed_tree(tmp_path: Any, monkeypatch: Any, capsys: Any) -> None:
    results = tmp_path / "num_zeros.jsonl"
    results.write_text(json.dumps({"arm": "repeat", "seed": 0}) + "\n")
    parser = {"seeds": [0], "quick": False, "work": tmp_path, "threads": 1}
    args = type("Arguments", (), parser)
    num_zeros.run(args, ["repeat"], results)  # type: ignore[arg-type]
    assert "1 cells, 0 to do" in capsys.readouterr().out
    monkeypatch.setattr(num_zeros, "code_revision", lambda _: "abc-dirty")
    with pytest.raises(SystemExit, match="commit or stash"):
        num_zeros.run(args, ["repeat", "balanced"], results)  # type: ignore[arg-type]
    assert num_zeros_table.by_arm([]) == {}


def test_overhead_is_the_median_share_of_its_own_step() -> None:
    """A slow step slows what watches it as well, so shares are formed step by step."""
    parts = [
        {"num_zeros": 0.004, "select": 0.1} | dict.fromkeys(learner_overhead.HEALTH, 0.001),
        {"num_zeros": 0.04, "select": 1.0} | dict.fromkeys(learner_overhead.HEALTH, 0.01),
    ]
    found = learner_overhead.summarise([1.0, 10.0], parts)
    assert found["expert_health"]["share"] == pytest.approx(0.004), (
        "select, which the bias needs, is not in it"
    )
    assert found["parts"]["select"]["share"] == pytest.approx(0.1)
    assert found["counting"]["low"] == pytest.approx(0.004) == found["counting"]["high"]


def test_timers_count_calls_since_the_last_take() -> None:
    owner = type("Owner", (), {"work": staticmethod(lambda seconds: time.sleep(seconds))})()
    timers = learner_overhead.Timers()
    timers.watch("work", owner, "work")
    owner.work(0.02)
    owner.work(0.02)
    assert timers.take()["work"] >= 0.04
    assert timers.take() == {"work": 0.0}
