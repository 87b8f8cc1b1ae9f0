"""Score a space's sliders against the known factors of the bundled model's world, beside two nulls.

    sliderspace demo --output demo
    python benchmarks/truth.py demo/space.safetensors --output demo/truth

The nulls: random sliders with the same weight norms, and random sliders scaled until they change final images as much
(mean distance of portraits-clip features at strengths -1 and 1). A few minutes on two cores.
"""

import argparse
from pathlib import Path

import torch
from portraits import table

from sliderspace import SliderSpace, load
from sliderspace.features.encoders import get_encoder as encoder_of
from sliderspace.features.encoders import normalized_features
from sliderspace.files import ensure_writable_dir, write_bytes
from sliderspace.evaluation.report import sweep
from sliderspace.figures import to_png
from sliderspace.portraits.ground_truth import plot_truth, random_sliders, score_sliders


@torch.no_grad()
def reach(model, encoder, space, samples=4):
    "Mean distance of features between images at strengths -1 and 1 and the unchanged ones."
    card = space.card
    latents = sweep(
        model,
        space,
        card["prompts"],
        list(range(2000, 2000 + samples)),
        card["seed"],
        (-1.0, 0.0, 1.0),
        steps=card["steps"],
        guidance=card["guidance"],
        progress=lambda x, **k: x,
    )
    phi = torch.cat(
        [normalized_features(model, encoder, x) for x in latents.flatten(0, 2).split(64)]
    ).unflatten(0, latents.shape[:3])
    return (phi[:, [0, 2]] - phi[:, [1]]).norm(dim=-1).mean().item()


def as_strong(model, encoder, space, rounds=6):
    "Random sliders that change images as much as the space's own, and how much that is."
    wanted, scale = reach(model, encoder, space), 1.0
    for _ in range(rounds):
        got = reach(model, encoder, random_sliders(space, scale=scale))
        scale *= min(2.0, (wanted / max(got, 1e-6)) ** 0.5)
    null = random_sliders(space, scale=scale)
    return null, wanted, reach(model, encoder, null)


def row(name, truth):
    return [
        name,
        f"{truth.selectivity.mean():.2f} ± {truth.selectivity.std():.2f}",
        f"{truth.mean_redundancy:.2f}",
        f"{truth.stability:.2f}",
        *(f"{c:.2f}" for c in truth.coverage.values()),
    ]


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("space", type=Path)
    p.add_argument("--samples", type=int, default=8, help="images of each slider and strength")
    p.add_argument(
        "--output", type=Path, default=Path("truth"), help="folder of table and pictures"
    )
    args = p.parse_args()
    output, model = ensure_writable_dir(args.output), load("portraits")
    space, encoder = SliderSpace.load(args.space, model), encoder_of("portraits-clip")
    null, wanted, got = as_strong(model, encoder, space)
    spaces = {
        "the space": space,
        "random, same norms": random_sliders(space),
        "random, same change": null,
    }
    truths = {name: score_sliders(model, s, args.samples) for name, s in spaces.items()}
    rows = [row(name, truth) for name, truth in truths.items()]
    head = ["sliders", "selectivity", "redundancy", "stability", *truths["the space"].coverage]
    text = table(head, rows)
    print(
        f"change of images at strengths -1 and 1: {wanted:.3f}, of the last null {got:.3f}\n\n{text}\n"
    )
    print(
        "\n".join(
            f"{label}: {main} ({s:.2f})"
            for label, main, s in zip(
                space.labels,
                truths["the space"].main_factor,
                truths["the space"].selectivity.tolist(),
            )
        )
    )
    write_bytes(output / "table.md", (text + "\n").encode())
    for name, truth in truths.items():
        write_bytes(
            output / f"{name.replace(', ', '-').replace(' ', '-')}.png", to_png(plot_truth(truth))
        )


if __name__ == "__main__":
    main()
