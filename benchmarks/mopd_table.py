"""The quality table of `benchmarks/mopd.py` and its picture, from the lines of the results alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from examples.tiny.domains import WORLDS
from posttrain.report.bootstrap import Interval, difference, normalised
from posttrain.tracking.jsonl import read_jsonl

DOMAINS = list(WORLDS)
LABELS = {
    "sft": "SFT",
    "teachers": "own teacher",
    "average": "parameter average",
    "task_arithmetic": "task arithmetic",
    "mopd": "MOPD",
    "mopd_token_mean": "MOPD, token_mean",
    "mopd_balanced": "MOPD, token_mean_balanced",
    "mopd_top_k": "MOPD, top_k signal",
    "mopd_top_k_renorm": "MOPD, top_k renormalised",
    "mopd_full": "MOPD, full signal",
    "mopd_no_clip": "MOPD without teacher_clip",
    "mopd_orm": "MOPD with outcome reward",
    "foreign_teachers": "foreign teachers",
    "mopd_foreign": "MOPD, foreign teachers",
    "mix_rl": "Mix-RL, student's tokens",
    "mix_rl_half_batch": "Mix-RL, half the batch",
    "mix_rl_all": "Mix-RL, teachers' tokens too",
    "cascade": "cascade RL",
    "off_policy": "off-policy distillation",
    "off_policy_seq_mean": "off-policy, seq_mean",
    "off_policy_filtered": "off-policy, right answers",
    "oracle": "one teacher, one student",
    "round2": "MOPD, second round",
}


def summarise(lines: list[dict[str, Any]], against: str = "mopd") -> list[dict[str, Any]]:
    """One entry per row over its seeds: mean accuracies, share of gain with its interval, tokens.

    The interval is a paired bootstrap over held-out prompts, with every (seed, domain) resampled by itself; ``spread``
    is the standard deviation of the share over seeds; ``ahead`` is the share of the row ``against`` minus that of the
    row, paired.
    """
    cells = {(line["row"], line["seed"]): line for line in lines}
    table = []
    for name in LABELS:
        seeds = [s for row, s in cells if row == name and ("sft", s) in cells and ("teachers", s) in cells]
        if not seeds:
            continue
        own = [cells[name, s] for s in seeds]
        arrays = [
            {f"{s}/{d}": np.array(cells[row, s]["per_prompt"][d]) for s in seeds for d in DOMAINS}
            for row in ("sft", "teachers", name)
        ]
        ahead, ahead_of_seeds = None, []
        if name != against and all((against, s) in cells for s in seeds):
            student = {
                f"{s}/{d}": np.array(cells[against, s]["per_prompt"][d]) for s in seeds for d in DOMAINS
            }
            ahead = difference(arrays[0], arrays[1], student, arrays[2], seed=0)
            pairs = [[cells[row, s]["normalised"]["mean"] for row in (against, name)] for s in seeds]
            ahead_of_seeds = [theirs - own for theirs, own in pairs if None not in (theirs, own)]
        shares = [line["normalised"]["mean"] for line in own]
        entry: dict[str, Any] = {"row": name, "seeds": seeds}
        entry["accuracy"] = {d: float(np.mean([line["accuracy"][d] for line in own])) for d in DOMAINS}
        entry["greedy"] = float(np.mean([np.mean(list(line["accuracy_greedy"].values())) for line in own]))
        by_cell, entry["share"] = normalised(arrays[0], arrays[1], arrays[2], seed=0)
        entry["ahead"], entry["ahead_of_seeds"] = ahead, ahead_of_seeds
        own_shares = {d: [by_cell[f"{s}/{d}"].value for s in seeds] for d in DOMAINS}
        entry["domain_share"] = {
            d: None if None in v else float(np.mean([x for x in v if x is not None]))
            for d, v in own_shares.items()
        }
        known = [share for share in shares if share is not None]
        entry["spread"] = float(np.std(known, ddof=1)) if len(known) > 1 else None
        for key in ("tokens", "tokens_teachers", "wall_s"):
            entry[key] = float(np.mean([line[key] for line in own]))
        table.append(entry)
    return table


def print_table(table: list[dict[str, Any]], against: str = "mopd") -> None:
    versus = f"{LABELS[against]} - row"
    print(
        "Accuracy on held-out prompts at temperature 1, %; share of gain = (row - SFT) / (teacher - SFT) [95 %]; least:"
        f" that of the worst domain; {versus}: paired difference of the shares [95 %]"
    )
    header = "".join(f"{d:>9}" for d in [*DOMAINS, "mean", "greedy"])
    print(
        f"{'':<30}{header}   share of gain          sd   least  {versus:<22} Mtokens (+ teachers')"
        "   wall s  seeds"
    )
    for entry in table:
        values = list(entry["accuracy"].values())
        numbers = "".join(f"{100 * v:9.1f}" for v in [*values, np.mean(values), entry["greedy"]])
        shares = [v for v in entry["domain_share"].values() if v is not None]
        least = min(shares) if len(shares) == len(DOMAINS) else None
        spread = "    -" if entry["spread"] is None else f"{entry['spread']:5.2f}"
        print(
            f"{LABELS[entry['row']]:<30}{numbers}   {_interval(entry['share']):<20} {spread}  "
            f"{'    -' if least is None else f'{least:5.2f}'}   {_interval(entry['ahead']):<20} "
            f"{entry['tokens'] / 1e6:6.2f} (+ {entry['tokens_teachers'] / 1e6:.2f}){entry['wall_s']:14.0f}"
            f"  {len(entry['seeds'])}"
        )


def print_seeds(table: list[dict[str, Any]], against: str = "mopd") -> None:
    """The difference in every seed, and the standard error of their mean: what another seed would change is in it."""
    several = [entry for entry in table if len(entry["ahead_of_seeds"]) > 1]
    if several:
        print(
            f"\n{LABELS[against]} - row, the difference of the shares in every seed; mean +- standard error over seeds"
        )
    for entry in several:
        found = entry["ahead_of_seeds"]
        error = np.std(found, ddof=1) / np.sqrt(len(found))
        seeds = "".join(f"{v:8.3f}" for v in found)
        print(f"{LABELS[entry['row']]:<30}{seeds}   {np.mean(found):6.3f} +- {error:.3f}")


def _interval(found: Interval | None) -> str:
    if found is None:
        return "    -"
    value = "    -" if found.value is None else f"{found.value:5.2f}"
    return f"{value} [{found.low:.2f}, {found.high:.2f}]"


def print_course(lines: list[dict[str, Any]], level: float = 0.9) -> None:
    """Figure 6 of the report in miniature, and who gets the tokens and the gradient, of rows that were watched."""
    cells = {(line["row"], line["seed"]): line for line in lines}
    shortest = "instruct"
    print(
        f"\nOn the way: sampled tokens to {level:.0%} of the gain (mean over domains; the curve's best rising fit) [95 %]"
        " (seeds), and as a share of those of Mix-RL [prompts alone] (seeds); shares of tokens and gradient of"
        f" {shortest}, the domain of the shortest answers; share of its gain"
    )
    watched = {
        name: [
            line
            for line in lines
            if line["row"] == name
            and "curve" in line
            and all((row, line["seed"]) in cells for row in ("sft", "teachers"))
        ]
        for name in LABELS
    }
    draws = {name: draw_tokens_to(level, own, cells) for name, own in watched.items() if own}
    for name, means in draws.items():
        own = watched[name]
        reached = [tokens_to(level, *gain_over_tokens(line, cells)) for line in own]
        found = [tokens for tokens in reached if tokens is not None]
        text = f"{len(found)} of {len(own)} reach it"
        if len(found) == len(own):
            text = f"{np.mean(found) / 1e3:.0f} k {_ends(means, 1e-3, '.0f')}"
            text += f" ({', '.join(f'{tokens / 1e3:.0f}' for tokens in found)})"
            others = [line for line in watched["mix_rl"] if line["seed"] in {line["seed"] for line in own}]
            theirs = [tokens_to(level, *gain_over_tokens(line, cells)) for line in others]
            if name != "mix_rl" and len(others) == len(own) and None not in theirs:
                beside = draw_tokens_to(level, others, cells)
                ratios = [ours / other for ours, other in zip(found, theirs, strict=True)]  # type: ignore[operator]
                text += f"  {np.mean(found) / np.mean(theirs):.2f} {_ends(means / beside, 1, '.2f')}"  # type: ignore[arg-type]
                text += f" ({', '.join(f'{ratio:.2f}' for ratio in ratios)})"
        share = [line["normalised"][shortest] for line in own]
        errors = [line["target_error"] for line in own if "target_error" in line]
        print(
            f"{LABELS[name]:<30}{text:<54}  tokens {np.mean([line['share_tokens'][shortest] for line in own]):.3f}"
            f"   gradient {np.mean([line['share_gradient'][shortest] for line in own]):.3f}"
            f"   gain {'-' if None in share else f'{np.mean(share):.2f}'}"
            + (f"   largest |weight share - target| {max(errors):.1e}" if errors else "")
        )


def _ends(draws: np.ndarray, scale: float, form: str) -> str:
    low, high = np.percentile(draws, [2.5, 97.5]) * scale
    return f"[{low:{form}}, {high:{form}}]"


def draw_tokens_to(
    level: float,
    own: list[dict[str, Any]],
    cells: dict[tuple[str, int], dict[str, Any]],
    num_draws: int = 1000,
) -> np.ndarray:
    """Draws [num_draws] of the mean over ``own`` of `tokens_to`: every accuracy of a curve is drawn anew from as many
    answers as it was measured on. A draw that does not get there counts with the last point."""
    rng = np.random.default_rng(0)
    means = np.zeros(num_draws)
    for line in own:
        base, gains = _scale(line, cells, DOMAINS)
        tokens = line["curve"]["tokens"]
        count = line["curve"].get("num_prompts", len(next(iter(line["per_prompt"].values()))))
        accuracy = np.array([line["curve"]["accuracy"][d] for d in DOMAINS])
        drawn = rng.binomial(count, accuracy, size=(num_draws, *accuracy.shape)) / count
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = ((drawn - base[:, None]) / gains[:, None]).mean(axis=1)  # [draws, points]
        for draw, values in enumerate(shares.tolist()):
            found = tokens_to(level, tokens, values)
            means[draw] += (tokens[-1] if found is None else found) / len(own)
    return means


def gain_over_tokens(
    line: dict[str, Any], cells: dict[tuple[str, int], dict[str, Any]], domains: list[str] = DOMAINS
) -> tuple[list[int], list[float]]:
    """Sampled tokens, and the share of the teachers' gain at that point, mean over ``domains``. SFT and teachers count on
    the prompts that the curve was measured on, the first of each domain."""
    base, gains = _scale(line, cells, domains)
    accuracy = np.array([line["curve"]["accuracy"][d] for d in domains])
    with np.errstate(divide="ignore", invalid="ignore"):  # without a gain there is no share
        shares = (accuracy - base[:, None]) / gains[:, None]
    return line["curve"]["tokens"], shares.mean(axis=0).tolist()


def _scale(
    line: dict[str, Any], cells: dict[tuple[str, int], dict[str, Any]], domains: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy of SFT, and what the teachers gained over it, on the prompts that the curve was measured on [domains]."""
    num_prompts = line["curve"].get("num_prompts")
    sft, teachers = (
        np.array([np.mean(cells[row, line["seed"]]["per_prompt"][d][:num_prompts]) for d in domains])
        for row in ("sft", "teachers")
    )
    return sft, teachers - sft


def tokens_to(level: float, tokens: list[int], shares: list[float]) -> float | None:
    """Tokens at which the best rising fit of the curve reaches ``level``, between its points on a line; None if it does
    not. The curve itself is noisy: its first crossing would be the earlier the more noise it has."""
    fit = rising(shares)
    for i, share in enumerate(fit):
        if share >= level:
            if i == 0:
                return float(tokens[0])
            part = (level - fit[i - 1]) / (share - fit[i - 1])
            return tokens[i - 1] + part * (tokens[i] - tokens[i - 1])
    return None


def rising(values: list[float]) -> list[float]:
    """The non-decreasing sequence with the least squared distance to ``values`` (isotonic regression): neighbours that
    fall are pooled until none do."""
    blocks: list[tuple[float, int]] = []  # mean, count
    for value in values:
        mean, count = value, 1
        while blocks and blocks[-1][0] > mean:
            former, number = blocks.pop()
            mean, count = (mean * count + former * number) / (count + number), count + number
        blocks.append((mean, count))
    return [mean for mean, count in blocks for _ in range(count)]


def draw(path: Path, table: list[dict[str, Any]], lines: list[dict[str, Any]]) -> None:
    """Share of gain of every row: the mean with its interval, and each seed as a dot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [e for e in table if e["share"].value is not None and e["row"] not in ("sft", "teachers")]
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.36 * len(shown)), layout="constrained")
    for y, entry in enumerate(reversed(shown)):
        share = entry["share"]
        dots = [
            e["normalised"]["mean"] for e in lines if e["row"] == entry["row"] and e["seed"] in entry["seeds"]
        ]
        axes.plot([share.low, share.high], [y, y], color="#5b7bb4", linewidth=3, alpha=0.5)
        axes.plot(dots, [y] * len(dots), "o", color="#5b7bb4", markersize=3)
        axes.plot(share.value, y, "D", color="#e2702b", markersize=7)
        axes.annotate(
            f"{share.value:.2f}",
            (share.value, y),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    labels = [f"{LABELS[e['row']]} ({len(e['seeds'])})" for e in reversed(shown)]
    axes.set_yticks(range(len(shown)), labels)
    axes.axvline(0, color="#c3c8d1", linewidth=1)
    axes.axvline(1, color="#c3c8d1", linewidth=1)
    axes.set_xlabel("share of the teachers' gain over SFT (0: SFT, 1: own teachers); in brackets the seeds")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def draw_course(path: Path, lines: list[dict[str, Any]]) -> bool:
    """Share of gain over sampled tokens: MOPD, with outcome reward, outcome reward alone, the exact signal; and of the
    shortest domain under the three aggregations. False when no row was watched."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = {(line["row"], line["seed"]): line for line in lines}
    watched = [line for line in lines if "curve" in line and ("teachers", line["seed"]) in cells]
    if not watched:
        return False
    panels: dict[str, list[str]] = {
        "mean of all domains": ["mopd", "mopd_orm", "mix_rl_all", "mix_rl", "mopd_full"],
        "instruct, the shortest answers": ["mopd", "mopd_token_mean", "mopd_balanced"],
    }
    figure, both = pyplot.subplots(1, 2, figsize=(11, 3.8), layout="constrained", sharey=True)
    for axes, (title, names) in zip(both, panels.items(), strict=True):
        for color, name in zip(("#e2702b", "#5b7bb4", "#4a8f5c", "#8a6fb0", "#333333"), names, strict=False):
            for number, line in enumerate(w for w in watched if w["row"] == name):
                domains = ["instruct"] if title.startswith("instruct") else DOMAINS
                tokens, shares = gain_over_tokens(line, cells, domains)
                label = LABELS[name] if number == 0 else None
                axes.plot(np.array(tokens) / 1e3, shares, color=color, linewidth=1.3, alpha=0.8, label=label)
        axes.axhline(0.9, color="#c3c8d1", linewidth=1)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("sampled tokens, thousands")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    both[0].set_ylabel("share of the teachers' gain")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


def show(results: Path, seeds: list[int] | None = None, against: str = "mopd") -> None:
    """Table and picture from the lines alone; of a cell that is there twice the later one counts. With ``seeds``, those
    alone, and no picture."""
    lines = list({(line["row"], line["seed"]): line for line in read_jsonl(results)}.values())
    lines = [line for line in lines if seeds is None or line["seed"] in seeds]
    table = summarise(lines, against)
    print_table(table, against)
    print_seeds(table, against)
    print_course(lines)
    print("commits: " + ", ".join(sorted({line.get("commit") or "unknown" for line in lines})))
    if seeds is not None:
        return
    if draw_course(results.with_name(results.stem + "_course.png"), lines):
        print(f"picture: {results.with_name(results.stem + '_course.png')}")
    draw(results.with_suffix(".png"), table, lines)
    print(f"picture: {results.with_suffix('.png')}")
