"""Tables of the ablations in docs/report.md: python benchmarks/ablations.py. Nothing is measured here.

Each notebook of nbs/ablations writes its table to nbs/ablations/tables when it is run in full.
"""

from pathlib import Path

from portraits import table, write_figures

from sliderspace.experiments.results import Results

ROOT = Path(__file__).parents[1]
SHOWN = {  # study -> figures
    "no_pca": [
        "overlap",
        "redundancy",
        "factors",
        "distance",
        "diversity",
        "text alignment",
        "art",
        "art without sliders",
    ],
    "pixel_space": [
        "selectivity",
        "redundancy",
        "factors",
        "diversity",
        "text alignment",
        "art",
        "art without sliders",
        "art (efficientnet-lite0)",
        "art without sliders (efficientnet-lite0)",
    ],
    "data_diversity": [
        "alignment",
        "selectivity",
        "factors",
        "diversity",
        "text alignment",
        "art",
        "art without sliders",
    ],
    "rank": ["weights", "seconds", "alignment", "leakage", "effect", "selectivity", "redundancy"],
    "number_of_directions-mixes": ["diversity", "text alignment", "art", "art without sliders"],
    "window": ["steps", "effect", "distance", "similarity", "selectivity", "overlap"],
    "additions": [
        "alignment",
        "leakage",
        "effect",
        "monotonicity",
        "selectivity",
        "diversity",
        "text alignment",
        "art",
        "art without sliders",
    ],
}


def main():
    parts = []
    for name, figures in SHOWN.items():
        path = ROOT / "nbs/ablations/tables" / f"{name}.json"
        if not path.exists():
            print(f"{name}: not run in full yet")
            continue
        results = Results.load(path)
        head, *rows = results[figures].table()
        seeds = len({row["seed"] for row in results.rows})
        parts.append(f"*{name}*, {seeds} seeds:\n\n{table(head, rows)}\n")
    write_figures(ROOT / "docs/report.md", "\n".join(parts), "ablations")


if __name__ == "__main__":
    main()
