"""The page of the BlockDrop experiment, made from its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from effkern.report.plots import block_usage, curves
from experiments import blockdrop_runs as plan
from experiments.common import spread, table

#: Pieces of results.json that no call makes again: another recipe, kept for comparison.
EARLIER = "earlier recipe, gamma "
#: Heads of what :func:`_ended` gives.
ENDED = ("top-1 %", "points under dense", "blocks", "policies")
STARTED_TEXT = (
    "Those weights were made from all training images of the original data set, the ones held out here among them, so "
    "held-out accuracy flatters; every number below is of the test images. Images that went through JPEG are harder "
    "than the original pixels, so numbers are not to be compared with a paper's."
)
#: What the experiment is to reach: points under the dense network, and share of its blocks.
MOST_LOST, MOST_USED = 1.0, 0.7
BEYOND = 0.5, 0.6  # likewise, wished for
SHOWN = 6.0  # points under the best that the plot goes down to
#: Likewise of time: how far its share may lie above that of multiply-adds, at which batch.
MOST_LATE, TIMED = 0.05, 64
HALF_TEXT = (
    "A smaller policy, which sees the image at half its size (`policy.pool`) and takes a quarter of the multiply-adds, "
    "on two cores, in front of the network of run {run}, which stays as it is: trained alone by policy gradient, or as "
    "a copy, which learns the probabilities of that run's own policy (6 passes over training images):\n\n"
)
RELAY_TEXT = (
    "A relay (`longer_taught.toml`) of joint phases from the longer recipe's base ({top1:.2f} %): three rounds on one "
    "H100, each from a run of the round before, with a dense network of {teacher:.2f} % as the teacher (a repetition "
    "of the one above, whose weights were not kept, cut short by its seconds). Before the first round the policy was "
    "trained alone, {alone}. In the last round, runs 3 to 5 leave the policy's weights and train the network on its "
    "decisions, which is worth 0.1 to 0.3 points. Which runs to go on from was chosen with a look at all of this "
    "table; of the last round the one is taken that is best on held-out images. Every run ended when its seconds were "
    "spent, with the schedule played to its end: 21 to 23, 47 to 54 and 35 to 36 passes. Over static: points over the "
    "best static mixture of as many blocks on the run's own network, chosen on all held-out images; another search "
    "gives other decisions, so differences of some tenths are chance (run 2.2 is one static decision itself). All of "
    "them, like the taught ones, learned for longer than the dense network.\n\n"
)
CREDIT_TEXT = "by {} ({:.2f} % with {:.2f} blocks, {:.0f} decisions)"
TAUGHT_TEXT = (
    "With the dense network as a teacher (`taught.toml`): base and joint phase learn its answers besides the labels, "
    "which the published method does not. Trained on two cores, the networks in bfloat16. The teacher here has "
    "{teacher[top1]:.2f} % ({teacher[passes]:g} passes on two cores; the weights of the dense network above were not "
    "kept), the base {base[top1]:.2f} %, and the policy alone ends at {policy[top1]:.2f} % with {policy[blocks]:.2f} "
    "blocks and {policy[patterns]:.0f} decisions:\n\n"
)
FURTHER_TEXT = (
    "Gone on from there at a smaller penalty and learning rate: "
    + "; ".join(
        f"gamma {g:g} for {passes} passes, the policy at {rate:g} of it" for g, (passes, rate) in plan.FURTHER.items()
    )
    + ". The last is faster than the network follows:\n\n"
)
LONGER_TEXT = (
    "A longer recipe (`longer.toml`): the base goes on from the given weights for 34 passes ({base[top1]:.2f} %), the "
    "policy alone ends at {policy[top1]:.2f} % with {policy[blocks]:.2f} blocks and {policy[patterns]:.0f} decisions, "
    "the joint phase takes 60 passes. It is worth almost a point at equal blocks, and makes of these penalties one "
    "static choice of 7 blocks or little more; which of the three ends higher is chance:\n\n"
)
EARLIER_TEXT = (
    "An earlier recipe, against the same dense network: a base trained on for 26 passes at a learning rate of 0.1 "
    "(87.98 %), the joint phase for 28 passes at 2e-3. It gave up more of what the weights held, but of what keeps to "
    "70 % of the blocks its gamma 5 is the most accurate. (Before that, a joint phase of 6 passes on two cores ended "
    "at 87.11 % with 10.03 blocks, 1.68 points under a dense network of 88.79 %.)\n\n"
)


def headline(made: Mapping[str, Any]) -> dict[str, Any]:
    """Dense and learned, side by side."""
    result: dict[str, Any] = {}
    if "dense" in made:
        result["dense"] = {"top1": made["dense"]["top1"]}
    if "analysis" in made:
        found = made["analysis"]
        rows = {f"batch{row['batch']}": row["time_left"] for row in made.get("time", [])}
        result["dense"] |= {"blocks_used": found["of_blocks"], "macs_left": 1.0, "time_left": dict.fromkeys(rows, 1.0)}
        result["blockdrop"] = {
            "top1": found["top1"],
            "blocks_used": found["blocks_used"],
            "macs_left": found["macs"]["left"],
            "time_left": rows,
        }
    return result


def page(results: Mapping[str, Any]) -> tuple[str, dict[str, bytes]]:
    """Everything that is there yet."""
    made = {name: piece["result"] for name, piece in results["pieces"].items()}
    parts, plots = [], {}
    gammas = _of_kind(made, "gamma ")
    if "dense" in made:
        begun = f", begun with `{made['dense']['began_with']}`" if made["dense"]["began_with"] else ""
        parts.append(
            f"The dense network, fine-tuned on these images{begun}: {made['dense']['top1']:.2f} % on the test images. "
            + (STARTED_TEXT if begun else "")
        )
    if gammas:
        rows = [
            [
                gamma,
                *(one["joint"][key] for key in ("top1", "blocks")),
                int(one["joint"]["patterns"]),
                one["policy"]["top1"],
                one["policy"]["blocks"],
                one["base"]["top1"],
            ]
            for gamma, one in sorted(gammas.items(), key=lambda item: float(item[0]))
        ]
        heads = ["gamma", "top-1 %", "blocks", "policies", "policy alone, %", "its blocks", "base, %"]
        parts.append("Penalty of a wrong answer in the joint phase:\n\n" + table(heads, rows))
        parts += _target_part(made, gammas, results["pieces"])
        points = [[row[2], row[1]] for row in rows]
        series = {"policy": points}
        for begin, name in ((plan.LONG, "policy, longer"), (plan.RELAYED, "policy, relay")):
            if others := _of_kind(made, begin):
                series[name] = [[one["joint"]["blocks"], one["joint"]["top1"]] for one in others.values()]
        if small := _halves(made):
            series["policy, half-size"] = [[one["policy"]["blocks"], one["policy"]["top1"]] for one in small.values()]
        static = [b for b in made.get("analysis", {}).get("baselines", []) if b["rule"].startswith("best static")]
        if own := [[b["blocks"], b["top1"]] for b in static if b["network"] == "the policy's network"]:
            series["best static"] = own
        best = max(top1 for line in series.values() for _, top1 in line)
        series = {name: sorted(point for point in line if point[1] > best - SHOWN) for name, line in series.items()}
        plots["accuracy.png"] = curves({"x": "blocks an image", "y": "top-1, %", "series": series})
        parts.append(
            f"![accuracy against blocks](accuracy.png)\n\nThe plot leaves out two recipes (taught, earlier) and what "
            f"lies more than {SHOWN:g} points under the best; the tables have all."
        )
    if "analysis" in made:
        found = made["analysis"]
        parts.append(
            f"From here on the network of run {plan.CHOSEN} with the copied policy. It is "
            f"right on {found['top1']:.2f} % ({found['top1'] - made['dense']['top1']:+.2f} points against the dense "
            "network). "
            f"It runs {found['blocks_used']:.2f} ± {found['blocks_deviation']:.2f} of {found['of_blocks']} blocks, "
            f"{found['unique_policies']} different decisions on the test images, {100 * found['macs']['left']:.1f} % "
            "of the multiply-adds (without the policy network: "
            f"{100 * found['macs']['left_without_policy']:.1f} %). Decisions that do not look at the image, with as "
            "many blocks:\n\n"
            + table(
                ["rule", "network", "top-1 %", "blocks"],
                [[b["rule"], b["network"], b["top1"], b["blocks"]] for b in found["baselines"]],
            )
        )
        rules = {b["rule"]: b for b in reversed(found["baselines"])}
        static = rules.get(plan.MIXTURE, rules["best static"])
        parts.append(
            f"Against the {static['rule']} on its own network the policy is {found['top1'] - static['top1']:+.2f} "
            f"points with {found['blocks_used'] - static['blocks']:+.2f} blocks"
            + ("." if static["rule"] == plan.MIXTURE else ": a static choice runs whole blocks.")
            + _searched_before(made)
        )
        parts.append(
            "Blocks by class:\n\n"
            + table(["class", "blocks"], sorted(found["by_class"].items(), key=lambda item: item[1] or 0))
        )
        parts.append(
            "Images by the number of blocks they run:\n\n"
            + table(
                ["blocks", "images", "top-1 %"],
                [[r["blocks"], r["images"], r["top1"]] for r in found["accuracy_by_blocks"]],
            )
        )
        parts.append("![blocks](blocks.png)\n\n![images with the fewest and the most blocks](easy_and_hard.png)")
        plots["blocks.png"] = block_usage(found["by_block"])
    if "time" in made:
        left = made.get("analysis", {}).get("macs", {}).get("left")
        forms = (plan.LAYERS, "masked", "gathered", "image by image")
        rows = [
            [
                r["batch"],
                r["ms"]["blockdrop"],
                r["time_left"],
                None if left is None else r["time_left"] - left,
                r["of_pytorch"],
                *(r["ms"].get(form) for form in forms),
            ]
            for r in made["time"]
        ]
        heads = [
            "batch",
            "ms an image",
            "time left",
            "less MACs left",
            "of dense PyTorch",
            *(f"{form}, ms" for form in forms),
        ]
        parts.append(
            "Time of `effkern.optimize(net)`, the policy plain and included, against the fastest of three dense forms "
            "of effkern, optimized ones among them, and of four of PyTorch. The last columns are the same decisions "
            "without `optimize`, and in plain PyTorch. "
            + results["pieces"]["time"].get("note", "")
            + "\n\n"
            + table(heads, rows)
        )
        late = {r["batch"]: r["time_left"] - left for r in made["time"]} if left is not None else {}
        if TIMED in late:
            met = "reached" if late[TIMED] <= MOST_LATE else "**missed**"
            parts.append(
                f"Asked for: at batch {TIMED}, a time left at most {MOST_LATE} above the multiply-adds left; {met}, "
                f"with {late[TIMED]:.2f}."
            )
    if "step time" in made:
        parts.append(
            f"Time of a training step. {results['pieces']['step time'].get('note', '')}\n\n"
            + table(["step", "ms"], [[r["step"], r["ms"]] for r in made["step time"]])
        )
    steps = {kind: made[f"two steps, {kind}"] for kind in plan.STATISTICS if f"two steps, {kind}" in made}
    if steps:
        rows = [[kind, one["policy"], one["joint"], one["blocks"]] for kind, one in steps.items()]
        heads = ["batch statistics", "before, %", "after, %", "blocks"]
        note = results["pieces"][f"two steps, {next(iter(steps))}"].get("note", "")
        parts.append(f"The first two steps of the joint phase, with Adam at 1e-3. {note}\n\n" + table(heads, rows))
    parts += _course_part(made, plots)
    if "resnet101" in made:
        rows = [
            [r["batch"], r["usage"], r["macs_left"], r["time_left"], r["time_left"] - r["macs_left"]]
            for r in made["resnet101"]
        ]
        heads = ["batch", "blocks run", "MACs left", "time left", "difference"]
        parts.append(
            "ResNet-101 at 224x224, random weights and decisions, ResNet-10 policy included, all optimized, against "
            "the skipping form that is given no mask:\n\n" + table(heads, rows)
        )
    return "\n\n".join(parts), plots


def _of_kind(made: Mapping[str, Any], begin: str) -> dict[str, Any]:
    """Results by what follows ``begin`` in their pieces' names, the smallest penalty first."""
    found = {name.removeprefix(begin): made[name] for name in made if name.startswith(begin)}
    return dict(sorted(found.items(), key=lambda item: float(item[0])))


def _target_part(made: Mapping[str, Any], gammas: Mapping[str, Any], pieces: Mapping[str, Any]) -> list[str]:
    """What was asked for against what was reached, how long it was trained for, and what came before."""
    parts = []
    if "analysis" in made:
        dense, blocks = made["dense"]["top1"], made["analysis"]["of_blocks"]
        runs = {f"gamma {gamma}": one["joint"] for gamma, one in gammas.items()}
        runs |= {f"half-size policy, {name}": one["policy"] for name, one in _halves(made).items()}
        for begin in (plan.RELAYED, plan.LEARNED, plan.ON, plan.LONG, EARLIER):
            runs |= {f"{begin}{gamma}": one["joint"] for gamma, one in _of_kind(made, begin).items()}
        ends = [(name, dense - one["top1"], one["blocks"] / blocks) for name, one in runs.items()]
        said = _nearest(ends, MOST_LOST, MOST_USED)
        met = any(lost <= MOST_LOST and used <= MOST_USED for _, lost, used in ends)
        parts.append(
            f"Asked for: at most {MOST_LOST:.1f} point under the dense network with at most {100 * MOST_USED:.0f} % of "
            f"its {blocks} blocks. **{'Reached' if met else 'Missed'}**; nearest, of all recipes on this page: "
            f"{'; '.join(said)}. " + _beyond(ends)
        )
        teacher = next((one["teacher"]["top1"] for one in _of_kind(made, plan.LEARNED).values()), None)
        taught = [
            (name, teacher - runs[name]["top1"], used)
            for name, _, used in ends
            if name.startswith((plan.LEARNED, plan.ON))
        ]
        said = [f"{name} ends {lost:.2f} points under it with {100 * used:.1f} %" for name, lost, used in taught]
        if said:
            own = any(lost <= MOST_LOST and used <= MOST_USED for _, lost, used in taught)
            parts.append(
                f"The taught networks began with a dense network of {teacher:.2f} %, and learned for longer than it: "
                f"{'; '.join(said)}. Held against it, the target is {'met' if own else 'missed'}."
            )
    device = pieces[f"gamma {plan.FIRST:g}"]["machine"].get("device") if f"{plan.FIRST:g}" in gammas else None
    if device:
        lengths = [
            f"{name} {_range([one[name]['seconds'] for one in gammas.values()])} s, "
            f"{_range([one[name]['steps'] for one in gammas.values()])} steps"
            for name in ("base", "policy", "joint")
        ]
        parts.append(
            f"Trained on one {device}, several trainings at once. Every phase ended when its seconds were spent, with "
            f"the schedule played to its end: {'; '.join(lengths)}. So a repetition takes other steps and gives other "
            "numbers; `config.toml` names the passes that were done. Base and policy are shared."
        )
    parts += _relay_part(made)
    for begin, text in (
        (plan.LEARNED, TAUGHT_TEXT),
        (plan.ON, FURTHER_TEXT),
        (plan.LONG, LONGER_TEXT),
        (EARLIER, EARLIER_TEXT),
    ):
        if found := _of_kind(made, begin):
            rows = [[gamma, *_ended(made, one["joint"]), one["joint"]["steps"]] for gamma, one in found.items()]
            heads = ["gamma", *ENDED, "joint steps"]
            parts.append(text.format(**next(iter(found.values()))) + table(heads, rows))
    return parts


def _ended(made: Mapping[str, Any], test: Mapping[str, Any]) -> list[Any]:
    """Where a training ended on the test images, beside the dense network."""
    return [test["top1"], made["dense"]["top1"] - test["top1"], test["blocks"], int(test["patterns"])]


def _nearest(ends: Sequence[tuple[str, float, float]], most_lost: float, most_used: float) -> list[str]:
    """What uses the fewest blocks of those that lost little enough, and lost least of those that use few enough."""
    near = [
        min((end for end in ends if end[1] <= most_lost), key=lambda end: end[2], default=None),
        min((end for end in ends if end[2] <= most_used), key=lambda end: end[1], default=None),
    ]
    told = [
        f"{name} ends {lost:.2f} points under it with {100 * used:.1f} %" for name, lost, used in filter(None, near)
    ]
    return list(dict.fromkeys(told))


def _beyond(ends: Sequence[tuple[str, float, float]]) -> str:
    lost, used = BEYOND
    met = any(end[1] <= lost and end[2] <= used for end in ends)
    return (
        f"Wished for beyond: at most {lost} points under it with at most {100 * used:.0f} %; "
        f"{'reached' if met else 'missed'}; nearest: {'; '.join(_nearest(ends, lost, used))}."
    )


def _halves(made: Mapping[str, Any]) -> dict[str, Any]:
    found = {f"gamma {gamma}": one for gamma, one in _of_kind(made, plan.HALF).items()}
    return found | ({"copied": made[plan.COPIED]} if plan.COPIED in made else {})


def _relay_part(made: Mapping[str, Any]) -> list[str]:
    """Every run of the relay, and what static decisions reach on its network."""
    found = {name: made[f"{plan.RELAYED}{name}"] for name in plan.RELAY if f"{plan.RELAYED}{name}" in made}
    if not found:
        return []
    named = {"answer": "right answers", "probability": "the probability given to the label (`policy.credit`)"}
    alone = {credit: made[f"{plan.ALONE}{credit}"] for credit in plan.CREDITS if f"{plan.ALONE}{credit}" in made}
    if not alone:
        return []
    said = [
        CREDIT_TEXT.format(named[credit], *(one["policy"][key] for key in ("top1", "blocks", "patterns")))
        for credit, one in alone.items()
    ]
    rows = []
    for name, one in found.items():
        after, _, own = plan.RELAY[name]
        joint = one["joint"]
        rows.append(
            [
                name,
                after,
                ", ".join(f"{key.rpartition('.')[2]} {value}" for key, _, value in (s.partition("=") for s in own)),
                *_ended(made, joint),
                one["held_out"],
                joint["top1"] - one["static"]["mixed"],
            ]
        )
    heads = ["run", "from", "settings", *ENDED, "held out, %", "over static"]
    text = RELAY_TEXT.format(
        top1=next(iter(alone.values()))["base"]["top1"],
        teacher=next(iter(found.values()))["teacher"]["top1"],
        alone=" or ".join(said),
    )
    parts = [text + table(heads, rows)]
    if small := _halves(made):
        rows = [[name, *_ended(made, one["policy"])] for name, one in small.items()]
        parts.append(HALF_TEXT.format(run=plan.CHOSEN) + table(["trained", *ENDED], rows))
    return parts


def _searched_before(made: Mapping[str, Any]) -> str:
    """The same network's other search for static decisions."""
    before = made.get(f"{plan.RELAYED}{plan.CHOSEN}")
    if before is None:
        return ""
    over = before["joint"]["top1"] - before["static"]["mixed"]
    return f" (An earlier search found better ones: {over:+.2f} for this network with its large policy.)"


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return low if low == high else f"{low} to {high}"


def _course_part(made: Mapping[str, Any], plots: dict[str, bytes]) -> list[str]:
    rows, series = [], {}
    for name in plan.COURSES:
        found = [one for key, one in made.items() if key.startswith(f"K = 45, {name}, seed")]
        if not found:
            continue
        rows.append(
            [
                name,
                len(found),
                *(spread([one["policy"][key] for one in found]) for key in ("top1", "blocks", "patterns")),
                spread([one["base"] for one in found]),
            ]
        )
        steps = zip(*(one["course"] for one in found), strict=False)
        series[name] = [[step[0][0], mean(row[1] for row in step)] for step in steps]
    if not rows:
        return []
    plots["curriculum.png"] = curves({"x": "step", "y": "top-1 on held-out images, %", "series": series})
    heads = ["45 blocks, policy alone", "seeds", "top-1 %", "blocks", "policies", "base, %"]
    return [table(heads, rows) + "\n\n![curriculum](curriculum.png)"]
