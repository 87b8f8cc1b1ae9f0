"""The papers' applications on the bundled models, against truth: python benchmarks/applications.py [--parts ...] [--seeds 0 1 2] [--readme].

Spaces of sliders of the four-step model are trained once (nine minutes each on one core) and kept in --folder, with all
features that were seen; figures are kept in --results. What is there is not made again. Tables are means ± standard
deviations over seeds.
"""

import argparse
import random
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from portraits import drawn, measured, table, write_figures
from training import spread
from truth import as_strong

from sliderspace import Directions, SliderSpace, discover, load, measure, train
from sliderspace.experiments.applications import (
    decompose,
    mixing_strategies,
    recovered_fraction,
    baselines,
    transfer,
)
from sliderspace.evaluation.search import measure_concepts
from sliderspace.training.from_text import Concept, train_concepts
from sliderspace.features.encoders import get_encoder
from sliderspace.directions.hspace import discover_hspace, sweep_hspace
from sliderspace.evaluation.labels import (
    EditPairs,
    edit_pairs_from_report,
    label_with_clip,
    null_pairs,
)
from sliderspace.evaluation.report import sweep
from sliderspace.sliders.mixing import sparse_mixtures
from sliderspace.portraits.renders import FACTORS, PROMPT, caption, sample_factors
from sliderspace.sampling.generate import sample_latents
from sliderspace.portraits.ground_truth import random_sliders, score_images
from sliderspace.evaluation.comparison import (
    Comparison,
    compare_generators,
    compute_metrics,
    reference_features,
    rephrased_prompts,
    slider_mixtures,
)

CLIP, LITE = "portraits-clip", "EfficientNet-Lite0"
STYLES = FACTORS["style"]
# What language models name when they are asked for styles of portraits; the bundled model knows the first two alone.
NAMED = [
    "pixel art style",
    "voxel art style",
    "oil painting",
    "watercolour",
    "pencil sketch",
    "comic style",
    "anime style",
    "line art",
    "flat vector style",
    "woodcut",
    "pop art",
    "charcoal drawing",
]


def quiet(parts, **_):
    return parts


def captions(count=600, seed=5):
    "Random captions at all levels, no two alike: the prompts of a generic space."
    rng = random.Random(seed)
    return list(dict.fromkeys(caption(sample_factors(rng), rng) for _ in range(count)))


CONCEPTS = {  # name -> prompt, whether the samples are the teacher's, sliders
    "person": (PROMPT, False, 16),
    "pixel art": (f"{PROMPT}, pixel art style", False, 16),
    "long hair": (f"{PROMPT}, long hair", False, 16),
    "teacher's persons": (PROMPT, True, 16),
    "teacher's captions": (captions(), True, 32),
}
DECOMPOSED = ["person", "pixel art", "long hair"]


class Bench:
    "Models, encoders, and whatever is kept on disk."

    def __init__(self, args):
        self.args, self.student, self.teacher = args, load("portraits-fast"), load("portraits")
        self.encoders = [
            get_encoder(None, self.student),
            replace(get_encoder("efficientnet-lite0"), name=LITE),
        ]
        self.features = args.folder / "features"

    def space(self, name, seed):
        "A space of the student, measured, with its directions."
        stem = self.args.folder / f"{name.replace(' ', '-')}-{seed}-{self.args.updates}"
        files = [stem.with_name(f"{stem.name}-{kind}.safetensors") for kind in ("space", "found")]
        if all(f.exists() for f in files):
            return SliderSpace.load(files[0], self.student), Directions.load(files[1])
        prompt, teachers, sliders = CONCEPTS[name]
        found = discover(
            self.student,
            prompt,
            samples=600,
            n_directions=sliders + 8,
            seed=seed,
            progress=quiet,
            source=self.teacher if teachers else None,
            folder=self.args.folder / "store",
        )
        space = train(
            self.student,
            found,
            sliders=sliders,
            training_steps=self.args.updates,
            seed=seed,
            folder=self.args.folder / "training",
            progress=quiet,
        )
        space = measure(self.student, space, found, progress=quiet).space
        found.save(files[1])
        space.save(files[0])
        return space, found

    def compare(self, ways, prompts, seed, reference=None):
        return compare_generators(
            ways,
            prompts,
            self.args.images,
            self.encoders,
            reference,
            self.student,
            seed,
            folder=self.features,
            progress=quiet,
        )

    def renders(self):
        return drawn(self.args.images, 987_654)[0]


def plainly(comparison):
    "Figures as numbers that JSON keeps."
    return {
        way: {n: getattr(v, "value", v) for n, v in row.items()}
        for way, row in comparison.rows.items()
    }


def decomposition(bench, seed):
    "Each concept: the unchanged model, and mixes of its sliders; random sliders as strong as they are as a control."
    out = {}
    for name in DECOMPOSED:
        space, found = bench.space(name, seed)
        control = as_strong(bench.student, bench.encoders[0], space)[0]
        seen = decompose(
            bench.student,
            space,
            found,
            bench.args.images,
            bench.encoders,
            control,
            seed=seed,
            folder=bench.features,
            progress=quiet,
        )
        out[name] = plainly(seen)
    return out


def asked_sliders(bench, seed):
    "Sliders in words for factors that few found ones are about."
    ends = {
        "glasses": ("glasses", "no glasses"),
        "beard": ("beard", "no beard"),
        "hair": ("blond hair", "black hair"),
        "skin": ("dark skin", "light skin"),
        "length": ("long hair", "short hair"),
        "style": ("pixel art style", "lorelei style"),
        "background": ("blue background", "pink background"),
    }
    concepts = [
        Concept(PROMPT, f"{PROMPT}, {a}", f"{PROMPT}, {b}", label=f) for f, (a, b) in ends.items()
    ]
    return train_concepts(
        bench.student,
        concepts,
        training_steps=100,
        seed=seed,
        folder=bench.args.folder / "asked",
        progress=quiet,
    )


def labels(bench, seed):
    "Labels by the encoder's words against the factor that truth says changes most, and how sure they are of nothing."
    spaces = {name: bench.space(name, seed)[0] for name in DECOMPOSED} | {
        "asked": asked_sliders(bench, seed)
    }
    kind_of = {value: kind for kind, values in FACTORS.items() for value in values}
    rows, sure = [], {}
    for name, space in spaces.items():
        for null in (False, True):
            if name == "asked" and null:
                continue
            these = as_strong(bench.student, bench.encoders[0], space)[0] if null else space
            report = measure_concepts(
                bench.student,
                these,
                PROMPT if name == "asked" else None,
                samples=16,
                strengths=(-1.0, 0.0, 1.0),
                progress=quiet,
            )
            named = label_with_clip(bench.student, edit_pairs_from_report(report), FACTORS)
            truth = score_images(bench.student, these.labels, report.strengths, report.latents)
            if null:
                sure.setdefault("random sliders as strong", []).extend(
                    row.confident for row in named.rows
                )
                small = measure_concepts(
                    bench.student,
                    random_sliders(space),
                    samples=16,
                    strengths=(-1.0, 0.0, 1.0),
                    progress=quiet,
                )
                got = label_with_clip(bench.student, edit_pairs_from_report(small), FACTORS)
                sure.setdefault("random sliders of the same norms", []).extend(
                    row.confident for row in got.rows
                )
                continue
            moved = truth._moved((-1, 1))
            values = [v for vs in FACTORS.values() for v in vs]
            for k, row in enumerate(named.rows):
                first, second = truth.by_factor[k].sort(descending=True).values[:2].tolist()
                main = truth.main_factor[k]
                at = [i for i, v in enumerate(values) if kind_of[v] == main]
                most = (values[at[moved[k, at].argmax()]], values[at[moved[k, at].argmin()]])
                rows.append(
                    dict(
                        space=name,
                        main=main,
                        clear=first - second > 0.1,
                        named=kind_of[row.high],
                        ends=(row.high, row.low) == most,
                        confident=row.confident,
                    )
                )
    base = sample_latents(bench.student, PROMPT, range(7000, 7128), seed)
    nothing = label_with_clip(bench.student, null_pairs(base, PROMPT, 100, 16, seed), FACTORS)
    sure["pairs of unchanged images"] = [row.confident for row in nothing.rows]
    return dict(rows=rows, sure={k: sum(v) / len(v) for k, v in sure.items()})


def name_sliders(bench, names, seed):
    "A Concept Slider for each name of a style, against the prompt without it."
    concepts = [Concept(PROMPT, f"{PROMPT}, {n}", PROMPT, label=n) for n in names]
    return train_concepts(
        bench.student,
        concepts,
        training_steps=60,
        seed=seed,
        folder=bench.args.folder / "names",
        progress=quiet,
    )


def slider_ways(bench, space, found, strengths=(1.5,), led=(1.0,)):
    """The mixes of `mixing_strategies`, the best of them at other strengths, and on from the teacher's first step.

    Which is the best, and that more strength helps the bare prompt, was seen with seed 0; the other seeds are the test."""

    def best(ways):
        return [w for w in ways if w.name.startswith("by singular value")]

    first = bench.student.with_first_steps_from(bench.teacher)
    after = [
        w
        for s in led
        for w in best(mixing_strategies(first, space, found, strength=s, start=0.2, transfer=True))
    ]
    return [
        *mixing_strategies(bench.student, space, found),
        *(
            w
            for s in strengths
            for w in best(mixing_strategies(bench.student, space, found, strength=s))
        ),
        *(replace(w, name=f"its first step, then {w.name}") for w in after),
    ]


def styles(bench, seed):
    "One prompt that names no style against renders of all nine."
    space, found = bench.space("teacher's persons", seed)
    named, known = ({PROMPT: [f"{PROMPT}, {n}" for n in names]} for names in (NAMED, STYLES))
    asked, told = name_sliders(bench, NAMED, seed), name_sliders(bench, STYLES, seed)
    ways = [
        *baselines(bench.student, bench.teacher),
        *slider_ways(bench, space, found),
        rephrased_prompts(bench.student, named, "names of a language model"),
        rephrased_prompts(bench.student, known, "names of all nine"),
        *(
            slider_mixtures(
                bench.student, s, f"Concept Sliders of {of}", partial(sparse_mixtures, len(s))
            )
            for s, of in ((asked, "a language model's names"), (told, "all nine"))
        ),
    ]
    return plainly(bench.compare(ways, [PROMPT], seed, bench.renders()))


def diversity(bench, seed):
    "Held-out captions of all levels: how much of what distillation lost comes back?"
    space, found = bench.space("teacher's captions", seed)
    prompts = captions(1200, 99)[-20:]
    words = [v for vs in FACTORS.values() for v in vs]
    rng = random.Random(seed)
    expanded = {p: [f"{p}, {rng.choice(words)}" for _ in range(8)] for p in prompts}
    ways = [
        *baselines(bench.student, bench.teacher, (1.5, 2.0)),
        *slider_ways(bench, space, found, (0.25, 0.5), (0.25, 0.5)),
        rephrased_prompts(bench.student, expanded, "expanded prompts"),
    ]
    return plainly(bench.compare(ways, prompts, seed, bench.renders()))


def moved(bench, seed):
    "Every concept's space on every concept's prompt."
    spaces = {name: bench.space(name, seed) for name in DECOMPOSED}
    prompts = [CONCEPTS[name][0] for name in DECOMPOSED]
    seen = transfer(bench.student, spaces, prompts, progress=quiet)
    return dict(
        alignment=[a.mean(1).tolist() for a in seen.alignment],
        effect=[e.mean(1).tolist() for e in seen.effect],
    )


def bottleneck(bench, seed):
    "Directions of h-space beside sliders and random ones, on the same noise."
    space, _ = bench.space("person", seed)
    found = discover_hspace(
        bench.student, PROMPT, samples=600, n_directions=len(space), seed=seed, progress=quiet
    )
    fresh, out = list(range(5000, 5016)), {}
    sets = {
        f"h-space, strength {s:g}": sweep_hspace(
            bench.student, found, fresh, seed, (-s, 0.0, s), progress=quiet
        )
        for s in (1.0, 3.0)
    }
    for name, these in (
        ("sliders", space),
        ("random sliders as strong", as_strong(bench.student, bench.encoders[0], space)[0]),
    ):
        sets[name] = sweep(
            bench.student, these, PROMPT, fresh, seed, (-1.0, 0.0, 1.0), progress=quiet
        )
    for name, latents in sets.items():
        truth = score_images(bench.student, space.labels, (-1.0, 0.0, 1.0), latents)
        named = label_with_clip(
            bench.student, EditPairs(space.labels, latents[:, [0, 2]], PROMPT), FACTORS
        )
        out[name] = dict(
            change=truth.by_factor.mean().item(),
            selectivity=truth.selectivity.mean().item(),
            redundancy=truth.mean_redundancy,
            confident=sum(r.confident for r in named.rows) / len(space),
            factors=sum(c >= 0.25 for c in truth.coverage.values()),
        )
    out["explained by the first direction of h-space"] = found.explained_variance_ratio[0].item()
    return out


def measuring(bench, seed):
    "Seconds to measure 10,000 images: features by portraits-clip, and every figure from them."
    images = drawn(1000, 4321)[0].repeat(10, 1, 1, 1)
    images = (
        images + 0.02 * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    ).clamp(0, 1)
    prompts, seconds = captions(100, 7), {}
    for e in bench.encoders[:1]:
        began = time.perf_counter()
        x = reference_features(images, [e])[e.name]
        seconds[f"features ({e.name})"] = time.perf_counter() - began
        began = time.perf_counter()
        text = None if e.text is None else e.text(prompts)
        compute_metrics(e, x, torch.arange(len(x)) % len(prompts), text, x.flip(0))
        seconds[f"figures ({e.name})"] = time.perf_counter() - began
    return seconds


PARTS = {
    "decomposition": decomposition,
    "labels": labels,
    "styles": styles,
    "diversity": diversity,
    "transfer": moved,
    "h-space": bottleneck,
    "measuring": measuring,
}
PAIRS, WORDS, FRECHET = (
    f"distance of pairs ({CLIP})",
    f"text alignment ({CLIP})",
    f"Frechet distance ({CLIP})",
)
OTHER = f"distance of pairs ({LITE})", f"Frechet distance ({LITE})"


def over(runs, form="{:.2f}"):
    """A function of one run's result to its mean and spread over runs."""
    return lambda of: spread([of(r) for r in runs], form)


def decomposition_table(runs):
    rows = []
    for concept in [c for c in DECOMPOSED if c in runs[0]]:
        for way in runs[0][concept]:

            def change(m, way=way, concept=concept):
                return over(runs, "{:+.1%}")(
                    lambda r: r[concept][way][m] / r[concept]["unchanged"][m] - 1
                )

            if way != "unchanged":
                rows.append([concept, way, change(PAIRS), change(OTHER[0]), change(WORDS)])
    return table(
        ["concept", "mixes", f"diversity ({CLIP})", f"diversity ({LITE})", "text alignment"], rows
    )


def nearness_table(runs):
    """Figures of each way, and how much of what lies between the unchanged model and the other one came back."""

    def back(r, way, m):
        return recovered_fraction(Comparison(r, {}, 0, []), m)[way]

    rows = []
    for way in runs[0]:
        cells = [
            over(runs, form)(lambda r, way=way, m=m: r[way][m])
            for m, form in (
                (PAIRS, "{:.3f}"),
                (FRECHET, "{:,.0f}"),
                (f"recall ({CLIP})", "{:.2f}"),
                (WORDS, "{:.1f}"),
                (OTHER[1], "{:,.0f}"),
            )
        ]
        mine = way not in ("the other model", "unchanged")
        shares = [
            over(runs, "{:.0%}")(lambda r, way=way, m=m: back(r, way, m)) if mine else ""
            for m in (PAIRS, FRECHET)
        ]
        rows.append([way, *cells, *shares])
    return table(
        [
            "",
            "distance of pairs",
            "Frechet distance",
            "recall",
            "text alignment",
            f"Frechet distance ({LITE})",
            "of the distance",
            "of the Frechet distance",
        ],
        rows,
    )


def labels_table(runs):
    rows = [row for r in runs for row in r["rows"]]
    common = {
        s: max(FACTORS, key=lambda f, s=s: sum(r["main"] == f for r in rows if r["space"] == s))
        for s in {r["space"] for r in rows}
    }
    lines = []
    for name, keep in {
        "all sliders": lambda r: True,
        "found, clear main factor": lambda r: r["clear"] and r["space"] != "asked",
        "of them not about the background": lambda r: (
            r["clear"] and r["space"] != "asked" and r["main"] != "background"
        ),
        "asked for, clear main factor": lambda r: r["clear"] and r["space"] == "asked",
    }.items():
        these = [r for r in rows if keep(r)]
        if these:
            lines.append(
                [
                    name,
                    len(these),
                    *(
                        f"{sum(of(r) for r in these) / len(these):.0%}"
                        for of in (
                            lambda r: r["named"] == r["main"],
                            lambda r: r["named"] == r["main"] and r["ends"],
                            lambda r: r["confident"],
                            lambda r: common[r["space"]] == r["main"],
                        )
                    ),
                ]
            )
    nulls = [
        [name, "", "", "", over(runs, "{:.0%}")(lambda r, name=name: r["sure"][name]), ""]
        for name in runs[0]["sure"]
    ]
    return table(
        [
            "",
            "sliders",
            "factor right",
            "both ends right",
            "confident",
            "always the space's most frequent factor",
        ],
        lines + nulls,
    )


def transfer_table(runs):
    def cell(r, i, j):
        return r["alignment"][i][j], r["effect"][i][j]

    names = DECOMPOSED[: len(runs[0]["alignment"])]
    return table(
        ["alignment / effect, space by prompt", *names],
        [
            [
                name,
                *(
                    " / ".join(
                        over(runs)(lambda r, i=i, j=j, k=k: cell(r, i, j)[k]) for k in (0, 1)
                    )
                    for j in range(len(names))
                ),
            ]
            for i, name in enumerate(names)
        ],
    )


def bottleneck_table(runs):
    names = [n for n in runs[0] if isinstance(runs[0][n], dict)]
    return table(
        ["", *runs[0][names[0]]],
        [[n, *(over(runs)(lambda r, n=n, k=k: r[n][k]) for k in runs[0][n])] for n in names],
    )


def measuring_table(runs):
    return table(
        ["10,000 images", "seconds"],
        [[n, over(runs, "{:.0f}")(lambda r, n=n: r[n])] for n in runs[0]],
    )


TABLES = {
    "decomposition": decomposition_table,
    "labels": labels_table,
    "styles": nearness_table,
    "diversity": nearness_table,
    "transfer": transfer_table,
    "h-space": bottleneck_table,
    "measuring": measuring_table,
}


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--parts", nargs="+", default=[*PARTS], choices=[*PARTS])
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--images", type=int, default=200, help="of each way")
    p.add_argument("--updates", type=int, default=450, help="of the found sliders")
    p.add_argument(
        "--folder",
        type=Path,
        default=Path("benchmarks/output/applications"),
        help="what is measured is kept and not measured again",
    )
    p.add_argument(
        "--results",
        type=Path,
        default=Path(__file__).parent / "results/applications",
        help="figures are kept here",
    )
    p.add_argument(
        "--kept",
        action="store_true",
        help="only what was measured before: some parts may have fewer seeds",
    )
    p.add_argument("--readme", action="store_true", help="write the tables into docs/report.md too")
    args = p.parse_args()
    for folder in (args.folder, args.results):
        folder.mkdir(parents=True, exist_ok=True)
    bench = None if args.kept else Bench(args)
    for part in args.parts:
        runs = []
        for seed in args.seeds:
            path = args.results / f"{part}-{seed}-{args.images}-{args.updates}.json"
            if (run := measured(path, partial(PARTS[part], bench, seed), args.kept)) is not None:
                runs.append(run)
                print(part, seed, file=sys.stderr, flush=True)
        if runs:
            text = f"{len(runs)} seed{'s' * (len(runs) > 1)}:\n\n{TABLES[part](runs)}\n"
            print(f"\n## {part}\n\n{text}", flush=True)
            if args.readme:
                write_figures(Path(__file__).parents[1] / "docs/report.md", text, part)


if __name__ == "__main__":
    main()
