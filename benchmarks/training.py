"""The published recipe against this project's way of training: python benchmarks/training.py [--seeds 3] [--readme].

Same model, directions, held-out samples and seeds; each run in a process of its own. Now and then a run's sliders are
calibrated, so that alignments are compared at the same effect, measured on held-out samples, and put back; the clock and
the count of denoiser passes stand still meanwhile. Other ways to train: --ways recipe first-order random ..., see WAYS.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from portraits import table, write_figures

from sliderspace.training.alignment import DEFAULT, SLIDERSPACE_RELEASE

WAYS = {
    "recipe": SLIDERSPACE_RELEASE,
    "ours": DEFAULT,
    "first-order": replace(DEFAULT, training_steps=300),  # starts, with everything else ours
    "random": replace(DEFAULT, training_steps=300, init="random"),
    "orthonormal": replace(DEFAULT, training_steps=300, init="orthonormal"),
    "24 rows": replace(DEFAULT, training_steps=300, init_latents=24),
    "192 rows": replace(DEFAULT, training_steps=300, init_latents=192),
    "keys-values": replace(DEFAULT, training_steps=300, targets="keys-values"),
    "cross-attention": replace(DEFAULT, training_steps=300, targets="cross-attention"),
    "full": replace(DEFAULT, training_steps=300, targets="full"),
    "one sign": replace(DEFAULT, training_steps=300, two_sided=False),
    "no views": replace(DEFAULT, training_steps=300, augmented=False),
    "no leash": replace(DEFAULT, training_steps=300, output_penalty=0.0),
    "leakage": replace(DEFAULT, training_steps=300, leakage_penalty=1.0),
    "rank 4": replace(DEFAULT, training_steps=300, rank=4),
}
AT = (0, 10, 30, 100, 300, 450, 1000)


class Watch:
    """Goes between the updates of a training as its progress bar, and measures."""

    def __init__(self, model, found, chosen, test):
        self.model, self.found, self.chosen, self.test = model, found, chosen, test
        self.seconds, self.passes, self.points = 0.0, 0, []
        self.hook = model.denoiser.register_forward_hook(self._count)
        self.since = time.perf_counter()

    def _count(self, net, args, output):
        self.passes += len((output[0] if isinstance(output, tuple) else output.sample))

    def __call__(self, items, desc=None, **options):
        return self.between(items) if desc == "training" else items

    def between(self, steps):
        def look():
            self.seconds += time.perf_counter() - self.since
            seconds, passes = self.seconds, self.passes
            point = self.measure(steps, last=steps.done == steps.settings.training_steps)
            self.points.append(point | dict(seconds=seconds, passes=passes))
            self.passes = passes
            self.since = time.perf_counter()

        if steps.settings.init == "first-order":
            look()
        for reached in steps:
            yield reached
            early = (
                steps.done < 100 and not steps.settings.precompute_base
            )  # nothing to see yet, and each look takes half a minute
            if (steps.done in AT and not early) or steps.done == steps.settings.training_steps:
                look()

    def measure(self, steps, last):
        """Held-out figures of the sliders as they are now, at the effect that strength 1 is to have."""
        import torch

        from sliderspace.training.alignment import held_out_cosines
        from sliderspace.training.from_directions import calibrate, measure_effects

        adapter, run, own = (
            steps.adapter,
            self.found.samples.run,
            (steps.model, steps.encoder, steps.adapter),
        )
        before = [p.detach().clone() for pair in adapter.parameters().values() for p in pair]
        calibrate(
            *own,
            self.found,
            self.chosen,
            list(range(run.samples, run.samples + 4)),
            max_rescale=16.0,
        )
        effect = measure_effects(
            *own, self.found, self.chosen, list(range(run.samples + 10, run.samples + 18))
        )
        mean = held_out_cosines(*own, self.test, steps.vectors).nanmean(1)
        others = mean - mean.diag().diag()
        point = dict(
            training_steps=steps.done,
            alignment=mean.diag().mean().item(),
            effect=effect.mean().item(),
            dominant=int((mean.argmax(1) == torch.arange(len(mean))).sum()),
            leakage=others.abs().amax(1).mean().item(),
        )
        if last:
            point |= self.truth(steps)
        with torch.no_grad():
            for p, kept in zip([p for pair in adapter.parameters().values() for p in pair], before):
                p.copy_(kept)
        return point

    def truth(self, steps):
        """What the sliders do to known factors."""
        import torch

        from sliderspace.portraits.renders import PROMPT
        from sliderspace.sampling.generate import sample, initial_noise
        from sliderspace.portraits.ground_truth import score_images

        run, strengths = self.found.samples.run, (-1.0, 0.0, 1.0)
        noise = initial_noise(
            steps.model, run.seed, list(range(run.samples + 30, run.samples + 38))
        )

        def images(k, strength):
            steps.adapter.set_strengths(
                strength
                * torch.nn.functional.one_hot(torch.tensor(k), steps.adapter.sliders).float()
            )
            return sample(steps.model, PROMPT, noise, run.steps, run.guidance)

        labels = [str(k) for k in range(steps.adapter.sliders)]
        latents = torch.stack(
            [torch.stack([images(k, s) for s in strengths]) for k in range(len(labels))]
        )
        steps.adapter.set_strengths(None)
        return dict(
            selectivity=score_images(steps.model, labels, strengths, latents)
            .selectivity.mean()
            .item()
        )


def run(way, seed, samples, sliders, folder):
    """Train one way; its points, its time and its peak of memory."""
    import torch

    from sliderspace import discover, load
    from sliderspace.portraits.renders import PROMPT
    from sliderspace.training.initialization import make_noised_latents
    from sliderspace.training.from_directions import choose_directions, train

    torch.set_num_threads(2)
    model = load("portraits", steps=4)
    found = discover(
        model,
        PROMPT,
        samples=samples,
        n_directions=sliders + 8,
        seed=seed,
        folder=folder,
        progress=lambda x, **k: x,
    )
    last = samples - max(2, samples // 8)
    test = make_noised_latents(model, found, list(range(last, samples)), 32, seed + 1)
    watch = Watch(model, found, choose_directions(found, sliders), test)
    train(
        model, found, sliders, WAYS[way], seed=seed, progress=watch, n_held_out=10, calibrated=False
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return dict(way=way, seed=seed, points=watch.points, peak=peak)


def reach(points, goal, what):
    """Seconds or passes after which the alignment is at a goal, linear between points; nan if it never is."""
    before = dict(alignment=0.0, seconds=0.0, passes=0)
    for point in points:
        if point["alignment"] >= goal:
            part = (goal - before["alignment"]) / (point["alignment"] - before["alignment"])
            if before["seconds"] == 0.0:
                part = 1.0  # a start that is there already took its whole time
            return before[what] + part * (point[what] - before[what])
        before = point
    return float("nan")


def spread(values, form="{:.2f}"):
    """Mean and standard deviation over seeds."""
    import statistics

    if any(v != v for v in values):
        return "not reached"
    more = f" ± {form.format(statistics.stdev(values))}" if len(values) > 1 else ""
    return form.format(statistics.mean(values)) + more


def figures(runs, ways):
    """The table of all ways, measured against the first."""
    by = {
        way: sorted((r for r in runs if r["way"] == way), key=lambda r: r["seed"]) for way in ways
    }
    goals = [r["points"][-1]["alignment"] for r in by[ways[0]]]
    rows = []
    for part in (0.5, 0.9, 1.0):
        for what, form in (("seconds", "{:.0f}"), ("passes", "{:.0f}")):
            rows.append(
                [f"{what} to {part:.0%} of the {ways[0]}'s final alignment"]
                + [
                    spread([reach(r["points"], part * g, what) for r, g in zip(by[w], goals)], form)
                    for w in ways
                ]
            )
    for what, form in (
        ("seconds", "{:.0f}"),
        ("passes", "{:.0f}"),
        ("alignment", "{:.3f}"),
        ("dominant", "{:.1f}"),
        ("leakage", "{:.3f}"),
        ("effect", "{:.2f}"),
        ("selectivity", "{:.3f}"),
    ):
        rows.append(
            [f"{what} in the end"]
            + [spread([r["points"][-1][what] for r in by[w]], form) for w in ways]
        )
    rows.append(["peak memory, MiB"] + [spread([r["peak"] for r in by[w]], "{:.0f}") for w in ways])
    points = [["alignment after updates", *map(str, AT)]] + [
        [w]
        + [
            spread(v, "{:.3f}")
            if (
                v := [
                    p["alignment"] for r in by[w] for p in r["points"] if p["training_steps"] == n
                ]
            )
            else ""
            for n in AT
        ]
        for w in ways
    ]
    return table(["", *ways], rows) + "\n\n" + table(points[0], points[1:])


def picture(runs, ways, path):
    """Alignment over time, a line a seed."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(7, 4), layout="constrained")
    ax = fig.subplots()
    for i, way in enumerate(ways):
        for r in (r for r in runs if r["way"] == way):
            x, y = ([p[n] for p in r["points"]] for n in ("seconds", "alignment"))
            ax.semilogx(x, y, ".-", color=f"C{i}", label=way if r["seed"] == 0 else None)
    ax.set(xlabel="seconds", ylabel="held-out alignment at one standard deviation", ylim=(0, None))
    for numbers in (ax.xaxis.set_major_formatter, ax.xaxis.set_minor_formatter):
        numbers(lambda x, _: f"{x:g}")
    ax.legend(frameon=False)
    fig.savefig(path, dpi=120)


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--ways", nargs="+", default=["recipe", "ours"], choices=WAYS)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--samples", type=int, default=400)
    p.add_argument("--sliders", type=int, default=16)
    p.add_argument(
        "--folder",
        type=Path,
        default=Path("benchmarks/output"),
        help="what is measured is kept and not measured again",
    )
    p.add_argument(
        "--readme", action="store_true", help="write table and picture into docs/report.md too"
    )
    p.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = p.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.child:
        way, seed = args.child
        print(json.dumps(run(way, int(seed), args.samples, args.sliders, args.folder / "samples")))
        return
    runs = []
    for seed in range(args.seeds):
        for way in args.ways:
            kept = (
                args.folder
                / f"training-{way.replace(' ', '-')}-{seed}-{args.samples}-{args.sliders}.json"
            )
            if not kept.exists():
                made = subprocess.run(
                    [
                        sys.executable,
                        __file__,
                        "--child",
                        way,
                        str(seed),
                        "--samples",
                        str(args.samples),
                        "--sliders",
                        str(args.sliders),
                        "--folder",
                        str(args.folder),
                    ],
                    stdout=subprocess.PIPE,
                    check=True,
                )
                kept.write_bytes(made.stdout.splitlines()[-1])
            runs.append(json.loads(kept.read_text()))
            end = runs[-1]["points"][-1]
            print(way, seed, {n: round(v, 3) for n, v in end.items()}, file=sys.stderr, flush=True)
    print(figures(runs, args.ways))
    picture(runs, args.ways, args.folder / "training.png")
    if args.readme:
        root = Path(__file__).parents[1]
        write_figures(root / "docs/report.md", figures(runs, args.ways), "training")
        picture(runs, args.ways, root / "pictures/training.png")


if __name__ == "__main__":
    main()
