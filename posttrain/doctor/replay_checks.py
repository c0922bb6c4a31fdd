"""The checks of `posttrain doctor replay`: from what engine and learner said to one line each. Pure: numpy only.

Owns the limits between rounding and a fault. Rounding moves a close call between two experts now and then; routes of
other tokens, layers or weights agree no better than chance. So a limit has only to lie well between the two, and
`broken_routes` proves on every checkpoint that the measures tell them apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from posttrain.config import Dtype
from posttrain.doctor.findings import Finding
from posttrain.records import EngineInfo, PolicyInfo, Rollout

# Distance of routes: share of the experts of one set that the other lacks, over 1 - K / E; 0 is equal, 1 is chance.
MAX_DISTANCE = {Dtype.float32: 0.02, Dtype.bfloat16: 0.1}  # between two computations of one engine
MAX_LIVE_SHARE = {Dtype.float32: 0.02, Dtype.bfloat16: 0.5}  # of a layer's tokens, whose live set is another
MAX_EXACT_GAP = 1e-3  # nat, mean |difference| of logprobs where everything is float32
SIGNIFICANT = 3.0  # standard errors
CONTROL_FACTOR = 2.0  # wrong routes must raise k3 at least by this
THRESHOLDS = ("1.1", "1.25", "2")


@dataclass(kw_only=True, slots=True)
class Comparison:
    """Learner minus engine logprobs on the sampled tokens of every rollout, float64 [n] each."""

    replayed: list[np.ndarray]
    live: list[np.ndarray]


def check_shapes(
    engine: EngineInfo, policy: PolicyInfo, learner_dtype: str, rollouts: Sequence[Rollout]
) -> list[Finding]:
    """Engine and learner mean the same routers, and every rollout carries whole routes [T-1, L, K]."""
    learner_shape = (policy.num_moe_layers, policy.num_experts, policy.top_k)
    engine_shape = (engine.num_moe_layers, engine.num_experts, engine.top_k)
    names = ("MoE layers", "experts", "chosen")
    shape = ", ".join(f"{n} {name}" for n, name in zip(engine_shape, names, strict=True))
    findings = [
        Finding(name="shape", value=f"{shape} in engine ({engine.dtype}) and learner ({learner_dtype})")
    ]
    if learner_shape != engine_shape:
        other = ", ".join(f"{n} {name}" for n, name in zip(learner_shape, names, strict=True))
        findings[0].value = f"engine: {shape}; learner: {other}"
        findings[
            0
        ].way_out = "engine and learner find different routers in this checkpoint: it cannot be replayed"
    dtype = np.dtype(np.uint8 if engine.num_experts <= 256 else np.uint16)
    problems = [
        f"{r.rollout_id}: {problem}"
        for r in rollouts
        if (problem := _routes_problem(r, engine_shape, dtype)) is not None
    ]
    num_tokens = sum(len(r.token_ids) for r in rollouts)
    value = f"{len(rollouts)} rollouts, {num_tokens:,} tokens: [T-1, {engine_shape[0]}, {engine_shape[2]}] {dtype}"
    findings.append(
        Finding(name="recorded routes", value=f"{value}, ids below {engine_shape[1]}, none twice")
    )
    if problems:
        findings[1].value = f"{len(problems)} of {len(rollouts)} rollouts have unusable routes"
        findings[1].way_out = f"{problems[0]}; the engine does not record this family as it should"
    return findings


def _routes_problem(rollout: Rollout, shape: tuple[int, int, int], dtype: np.dtype) -> str | None:
    num_layers, num_experts, top_k = shape
    routes, expected = rollout.routed_experts, (len(rollout.token_ids) - 1, num_layers, top_k)
    if routes is None:
        return "no routes"
    if routes.shape != expected:
        return f"routes of shape {routes.shape}, expected {expected}"
    if routes.dtype != dtype:
        return f"routes of type {routes.dtype}, expected {dtype}"
    if int(routes.max()) >= num_experts:
        return f"expert {int(routes.max())} of {num_experts}"
    ordered = np.sort(routes, axis=-1)
    if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
        return "one expert twice in a set"
    return None


def seams(rollout: Rollout) -> list[int]:
    """Where a later segment begins: before every reply of an environment, and where another rollout was continued."""
    found = [int(at) for at in [rollout.prompt.metadata.get("continued_at")] if at is not None]
    end = 0
    for turn in rollout.turns:
        if turn.author == "environment":
            found.append(end)
        end += len(turn.token_ids)
    return found


def outside_share(routes: np.ndarray, other: np.ndarray) -> np.ndarray:
    """[N, L] share of the K experts of ``routes`` [N, L, K] that are not among those of ``other``."""
    found = (routes[:, :, :, None] == other[:, :, None, :]).any(-1)
    return 1.0 - found.mean(-1)


def check_recompute(
    rollouts: Sequence[Rollout],
    logprobs: Sequence[np.ndarray],
    routes: Sequence[np.ndarray],
    dtype: Dtype,
    num_experts: int,
    max_gap: float,
    layers: Sequence[int],
) -> list[Finding]:
    """What was recorded while sampling against one prefill of the same tokens. ``logprobs`` [T'] and ``routes``
    [T'-1, L, K] are the prefill's; T' may be shorter than T by what the context holds. ``layers`` [L] are numbers."""
    shares, gaps, at_seams = [], [], []
    for rollout, scored, own in zip(rollouts, logprobs, routes, strict=True):
        assert rollout.routed_experts is not None
        share = outside_share(rollout.routed_experts[: len(own)], own)
        shares.append(share)
        # The token before the seam is the first that the new segment consumes.
        at_seams.append(share[[row for at in seams(rollout) for row in (at - 1, at) if row < len(own)]])
        mask = rollout.loss_mask[: len(scored)]
        gaps.append(np.abs(scored - rollout.rollout_logprobs[: len(scored)])[mask])
    share_NL, seam_NL, gap = np.concatenate(shares), np.concatenate(at_seams), np.concatenate(gaps)
    top_k = routes[0].shape[-1]
    chance = max(1.0 - top_k / num_experts, 1e-9)
    by_layer = share_NL.mean(0) / chance
    worst = int(by_layer.argmax())
    value = (
        f"{_percent((share_NL == 0).mean())} of {share_NL.size:,} (token, layer) sets equal; worst layer "
        f"{layers[worst]}: {_percent((share_NL[:, worst] == 0).mean())}"
    )
    far = float(by_layer[worst])
    if len(seam_NL):
        value += (
            f"; at {len(seam_NL)} tokens where a turn or a prefix goes on: {_percent((seam_NL == 0).mean())}"
        )
        far = max(far, float(seam_NL.mean()) / chance)
    limit = MAX_DISTANCE[dtype]
    recorded = Finding(name="routes of one prefill", value=value)
    if not far <= limit:
        recorded.way_out = (
            f"recorded and recomputed routes are {far:.2f} apart (0 equal, 1 chance, rounding stays below {limit:g}): "
            "the engine records routes of other tokens, layers or cached blocks"
        )
    scored_row = Finding(
        name="logprobs of one prefill",
        value=f"mean |difference| {gap.mean():.2g} nat over {len(gap):,} sampled tokens, largest {gap.max():.2g}",
    )
    if not gap.mean() <= max_gap:
        scored_row.way_out = (
            f"more than {max_gap:g} nat: sampling and prefill of the engine are different models"
        )
    return [recorded, scored_row]


def check_coverage(coverage: float) -> Finding:
    """Exactly 1: every consumed token followed its recorded route in every MoE layer."""
    finding = Finding(name="coverage", value="1 exactly" if coverage == 1.0 else f"{coverage:.6f}")
    if coverage != 1.0:
        finding.way_out = "some tokens have no route: the learner guesses where it should replay"
    return finding


def check_live_routes(mismatch: Mapping[str, float], dtype: Dtype) -> Finding:
    """Live top-k of the learner against the recorded sets; ``dtype`` is the coarser one of engine and learner."""
    layers = _by_layer(mismatch)
    value = f"{_percent(mismatch['route_mismatch'])} of (token, layer) sets differ from the recorded ones"
    worst = mismatch["route_mismatch"]
    if layers:
        layer = max(layers, key=lambda n: layers[n])
        worst = layers[layer]
        value += f"; worst layer {layer}: {_percent(worst)}"
    finding = Finding(name="live routes", value=value)
    if not worst <= MAX_LIVE_SHARE[dtype]:
        finding.way_out = (
            f"more than {_percent(MAX_LIVE_SHARE[dtype])}, which is no rounding: engine and learner hold other weights, "
            "or one of them routes by another rule"
        )
    return finding


def layer_numbers(mismatch: Mapping[str, float], num_layers: int) -> list[int]:
    """Numbers of the MoE layers in the model, dense ones counted, as far as the learner names them."""
    return sorted(_by_layer(mismatch)) or list(range(num_layers))


def _by_layer(mismatch: Mapping[str, float]) -> dict[int, float]:
    prefix = "route_mismatch/layer_"
    return {int(k.removeprefix(prefix)): v for k, v in mismatch.items() if k.startswith(prefix)}


def check_mismatch(mismatch: Mapping[str, float], comparison: Comparison, max_gap: float) -> list[Finding]:
    """Engine and learner agree under replay, and replay does not make it worse."""
    gap = np.abs(np.concatenate(comparison.replayed)).mean()
    agreement = Finding(name="learner against engine", value=f"mean |difference| {gap:.2g} nat with replay")
    if not gap <= max_gap:  # NaN is wrong too
        agreement.way_out = f"more than {max_gap:g} nat with equal routes: the two compute different models"
    return [agreement, _effect(mismatch, comparison)]


def _effect(mismatch: Mapping[str, float], comparison: Comparison) -> Finding:
    """Whether k3 is lower with replay, by the paired difference of rollouts and its standard error."""
    with_replay, without = mismatch["k3"], mismatch["k3_without"]
    finding = Finding(name="effect of replay", value=f"k3 {without:.2e} without, {with_replay:.2e} with")
    if mismatch["route_mismatch"] == 0:
        finding.value += ": no set differs, so there is nothing to lower"
        return finding
    gains = np.array(
        [_k3(a).sum() - _k3(b).sum() for a, b in zip(comparison.live, comparison.replayed, strict=True)]
    )
    error = gains.std(ddof=1) / np.sqrt(len(gains))
    score = gains.mean() / max(error, 1e-300)
    finding.value += f" (x {with_replay / max(without, 1e-300):.2f}, {score:+.1f} standard errors)"
    if score < -SIGNIFICANT:
        finding.value += ": replay raises it"
        finding.way_out = "with the engine's experts the learner is further from the engine than without them"
    elif with_replay < without:
        finding.value += ": replay lowers it" if score > SIGNIFICANT else ": lower, within chance"
    else:
        finding.value += ": not lower, within chance; more replay.num_rollouts would tell"
    return finding


def mismatch_rows(mismatch: Mapping[str, float], comparison: Comparison) -> list[list[str]]:
    """Rows of the table with and without replay: k3, F at the thresholds, mean and largest |difference|."""
    rows = []
    for label, suffix, values in (
        ("without replay", "_without", comparison.live),
        ("with replay", "", comparison.replayed),
    ):
        gap = np.abs(np.concatenate(values))
        shares = [f"{100 * mismatch[f'f{threshold}{suffix}']:.3f} %" for threshold in THRESHOLDS]
        rows.append(
            [label, f"{mismatch[f'k3{suffix}']:.2e}", *shares, f"{gap.mean():.2e}", f"{gap.max():.2e}"]
        )
    return rows


def broken_routes(
    routes: Sequence[np.ndarray], layers: Sequence[int], seed: int
) -> tuple[str, list[np.ndarray], float]:
    """Wrong routes of the right form: those of the first and the last MoE layer swapped; with one layer, shuffled
    among the tokens of each rollout. Returns (what was done, routes, share of (token, layer) sets that changed)."""
    if len(layers) > 1:
        name = f"routes of layers {layers[0]} and {layers[-1]} swapped"
        broken = [r.copy() for r in routes]
        for own, original in zip(broken, routes, strict=True):
            own[:, [0, -1]] = original[:, [-1, 0]]
    else:
        name = "routes shuffled among the tokens"
        rng = np.random.default_rng(seed)
        broken = [rng.permutation(r) for r in routes]
    changed = [outside_share(a, b) > 0 for a, b in zip(broken, routes, strict=True)]
    return name, broken, float(np.concatenate(changed).mean())


def check_control(
    name: str, changed: float, mismatch: Mapping[str, float], control: Mapping[str, float]
) -> Finding:
    """The measures see ``broken_routes``: ``changed`` of the sets are wrong, ``control`` is the mismatch under them."""
    factor = control["k3"] / max(mismatch["k3"], 1e-300)
    finding = Finding(
        name="control",
        value=f"{name}: {_percent(control['route_mismatch'])} of sets differ, k3 {control['k3']:.2e} (x {factor:.3g}): seen",
    )
    if control["route_mismatch"] < 0.5 * changed or changed == 0 or factor < CONTROL_FACTOR:
        finding.value = finding.value.removesuffix("seen") + "not seen"
        finding.way_out = (
            f"{_percent(changed)} of the sets are wrong on purpose and the measures do not show it: the learner does not "
            "follow the routes that it is given, or its experts hardly matter"
        )
    return finding


def check_gradient(zeros: float | None, num_elements: float | None, norm: float) -> Finding:
    """``zeros`` of ``num_elements`` router gradients are exactly 0 in a step under replay; None: no router is trained."""
    if zeros is None or not num_elements:
        return Finding(name="router gradient", value="not looked at: learner.freeze_router keeps it off")
    share = 1.0 - zeros / num_elements
    finding = Finding(
        name="router gradient",
        value=f"{_percent(share)} of {int(num_elements):,} elements are not 0 under replay; gradient norm {norm:.2g}",
    )
    if zeros >= num_elements:
        finding.way_out = "no gradient reaches the routers under replay: they would not be trained"
    return finding


def _k3(log_ratio: np.ndarray) -> np.ndarray:
    return np.expm1(log_ratio) - log_ratio


def _percent(share: float) -> str:
    """Never rounds to 100 or 0 what is not."""
    text = f"{100 * share:.2f}"
    if text == "100.00" and share < 1:
        text = "under 100"
    elif text == "0.00" and share > 0:
        text = f"{100 * share:.1e}"
    return f"{text} %"
