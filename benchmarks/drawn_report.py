"""docs/results.md: what runs on drawn sets show, each method beside two others on the same seeds."""

import math
import statistics

from benchmarks.table_report import about_machines, as_markdown, shown_mean

FIGURES = {"R1": "Rank-1", "mAP": "mAP"}
BASELINES = {"clip": "CLIP", "sdm": "sdm"}  # the row of each, and its name
PARTS = {  # a row, and the one that has a part less: what is in it besides
    ("rde", "rde_no_division"): "division",
    ("rde_no_division", "tal"): "token selection",
    ("rda", "rde"): "second captions",
    ("nam", "sdm_masked"): "masks by similarity instead of any masks",
    ("sdm_masked", "sdm"): "masks",
    ("irra_clean", "irra"): "masks for mlm only",
    ("irra_ema", "irra"): "averaged weights",
    ("sdm_mlm", "sdm_masked"): "the mlm loss",
    ("tbps_views", "tbps"): "views, their augmentations and losses",
}
# two-sided 95 % quantiles of Student's t for 1, 2, … degrees of freedom
T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145),
    *(2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048),
    *(2.045, 2.042),
)


# ---- the test ----


def paired(values, others):
    """(mean of the differences, half the width of its 95 % confidence interval): paired t.

    values, others: of the same seeds, in the same order; of fewer than two the half width is None.

    >>> paired([12.0, 13.0, 17.0], [10.0, 12.0, 14.0])  # differences 2, 1, 3: mean 2, deviation 1
    (2.0, 2.4843382034834594)
    """
    differences = [one - other for one, other in zip(values, others, strict=True)]
    mean, n = statistics.fmean(differences), len(differences)
    if n < 2:
        return mean, None
    t = T95[min(n - 1, len(T95)) - 1]  # of more than 30 the interval is a little too wide
    return mean, t * statistics.stdev(differences) / math.sqrt(n)


def difference(runs, others, figure):
    """paired() of the last epoch over the seeds that both have; None where there is none, or it is itself."""
    ours, theirs = (figures_of(group, figure) for group in (runs, others))
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds or runs is others:
        return None
    return paired([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])


def figures_of(runs, figure):
    return {run["seed"]: run["last"]["t2i"][figure] for run in runs}


def shown_difference(found):
    if found is None:
        return "–"
    mean, half = found
    return f"{mean:+.2f}" if half is None else f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


# ---- the page ----


def page(runs, rows, noise_of):
    return f"""# Methods compared on drawn sets

Made by `python -m benchmarks.drawn --write`; do not edit. The runs, a line each, are in
benchmarks/results/drawn.json. Anybody can make them on two CPU cores; what is interrupted goes on with the
same command:

```bash
python -m benchmarks.drawn --rows all --seeds 1-5 --jobs 2    # or --rows irra,clip for some
python -m benchmarks.drawn --write                            # this page, of these runs
python -m benchmarks.drawn --check                            # whether the page is what the kept runs give
```

{ABOUT}

{tables(runs, rows, noise_of)}
"""


ABOUT = """What the figures say: whether a method brings something to a small CLIP, trained on 3200 other
drawn persons before (configs/small_clip.yaml), on drawn pedestrians in groups of two to four who differ in
one attribute only, half of the images with something large in front (datasets/synthetic_hard.py). What they
do not say: what it brings to CLIP's weights on photographs; the published figures of that are in the README.
Trainings are short and share one rate, which was tuned for none of them: what learns slowly is behind.

The truth of a drawn set is known. Each test sentence fits one person of the test split only; training
sentences may fit several, and `python -m datasets.synthetic --hard small` says how many do. Wrong captions
are in the training split only, and describe another person than the image shows. For rda each training
caption has a second one (`--rewritten`), which says all that the person of the first wears.

A seed is that of a training and of a drawing, so that persons vary over seeds too; rows of one seed have
the same set. Figures are of the last epoch, text to image, in percent: mean ± standard deviation over
seeds. Differences are paired by seed, with the 95 % confidence interval of a paired t test in brackets. Of
twenty such intervals of methods that change nothing, one does not hold 0."""


def tables(runs, rows, noise_of):
    """A section for each share of wrong captions."""
    parts = []
    for noise in dict.fromkeys(noise_of.values()):
        names = [name for name in rows if noise_of[name] == noise]
        groups = {name: [run for run in runs if run["row"] == name] for name in names}
        parts.append(f"## {f'{noise:.0%} of the training captions wrong' if noise else 'No wrong captions'}")
        if any(groups.values()):
            measured = {name: group for name, group in groups.items() if group}
            parts += [table(measured, rows, names), verdicts(measured, names), of_parts(measured)]
        if empty := [name for name, group in groups.items() if not group]:
            parts.append(f"Not run: {', '.join(empty)}.")
    return "\n\n".join(part for part in [*parts, about_machines(runs)] if part)


def baselines_of(names):
    """{row: its name} of those that the rows of a section are held against."""
    return {row: BASELINES[method_of(row)] for row in names if method_of(row) in BASELINES}


def table(groups, rows, names):
    baselines = baselines_of(names)
    heads = ["row", "options", *FIGURES.values()]
    heads += [f"{title} − {name}" for title in FIGURES.values() for name in baselines.values()]
    lines = []
    for name, group in groups.items():
        cells = [name, f"`{rows[name].words}`"]
        cells += [shown_mean(list(figures_of(group, figure).values())) for figure in FIGURES]
        for figure in FIGURES:
            for baseline in baselines:
                cells.append(shown_difference(difference(group, groups.get(baseline, []), figure)))
        seconds = [run["seconds"] for run in group if run.get("seconds")]
        cells += [f"{statistics.median(seconds):.0f}" if seconds else "–", str(len(group))]
        lines.append(cells)
    return as_markdown([*heads, "CPU seconds a run", "runs"], lines)


def verdicts(groups, names):
    """For each baseline the rows above it, below it, and those of which that cannot be said."""
    lines = []
    for baseline, title in baselines_of(names).items():
        kinds = {"better": [], "worse": [], "no difference shown": []}
        for name, group in groups.items():
            found = difference(group, groups.get(baseline, []), "R1")
            if found and found[1] is not None:
                mean, half = found
                kind = "better" if mean > half else "worse" if mean < -half else "no difference shown"
                kinds[kind].append(name)
        said = "; ".join(f"{kind}: {', '.join(of) or 'none'}" for kind, of in kinds.items())
        if any(kinds.values()):
            lines.append(f"- Rank-1 against {title}: {said}.")
    return "\n".join(lines)


def method_of(row):
    return row.split("_noise")[0]


def of_parts(groups):
    """What each part by itself brings to Rank-1: a table of the pairs of which both rows were run."""
    by_method = {method_of(row): group for row, group in groups.items()}
    lines = []
    for (row, without), what in PARTS.items():
        if found := difference(by_method.get(row, []), by_method.get(without, []), "R1"):
            lines.append([what, f"{row} − {without}", shown_difference(found)])
    return as_markdown(["part", "rows", "Rank-1"], lines) if lines else ""
