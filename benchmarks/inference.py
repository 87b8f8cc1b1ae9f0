"""What sliders cost in use: python benchmarks/inference.py [--readme].

Seconds of a denoiser call on the bundled model, in one process, the ways taking turns: the unchanged model, one slider,
64 sliders in the gated adapter (three of them on), the same 64 as 64 adapters of peft (three active), and the same three
folded into one LoRA. Beside it what a change of the mix takes, and the memory of the weights."""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from portraits import table, write_figures

from sliderspace.sliders.adapter import target_layers
from sliderspace.models.loading import load
from sliderspace.portraits.renders import PROMPT
from sliderspace.sampling.generate import initial_noise
from sliderspace.sliders.space import SliderSpace, detach
from sliderspace.training.initialization import standard_init

SLIDERS, BATCH, ON = 64, 8, {3: 1.0, 20: -0.5, 50: 0.7}


def random_space(model, sliders):
    layers = target_layers(model, "attention")
    down, up = standard_init(model, "random", layers, sliders)
    gen = torch.Generator().manual_seed(0)
    up = {n: 0.05 * torch.randn(b.shape, generator=gen) for n, b in up.items()}
    card = dict(
        model=model.name, fingerprint=model.fingerprint(layers), denoiser=model.denoiser_name
    )
    return SliderSpace(
        down, up, [f"s{i}" for i in range(sliders)], torch.tensor([[-1.0, 1.0]] * sliders), 1, card
    )


def weights(model):
    """Bytes of all parameters of the denoiser."""
    return sum(p.numel() * p.element_size() for p in model.denoiser.parameters())


def timed(work, *args):
    start = time.perf_counter()
    work(*args)
    return time.perf_counter() - start


class Gated:
    def __init__(self, model, space):
        self.space, self.adapter = space, space.attach(model)

    def switch(self, mix):
        self.adapter.set_strengths(self.space.strengths(mix))


class Peft:
    """The same sliders as LoRA files in diffusers' own hands."""

    def __init__(self, model, space, folder, mix=None):
        self.pipe, self.mix = model.pipe, mix
        self.names = []
        for i, path in enumerate(space.export(folder, mix)):
            self.names.append(f"a{i}")
            self.pipe.load_lora_weights(
                path.parent, weight_name=path.name, adapter_name=self.names[-1]
            )

    def switch(self, mix):
        if self.mix is None:
            self.pipe.set_adapters([self.names[i] for i in mix], list(mix.values()))


@torch.no_grad()
def measured(laps):
    """For every way its seconds a call, seconds a switch, and bytes of weights."""
    names = ("unchanged", "one slider", "64 sliders, gated", "64 adapters of peft", "folded")
    models = {name: load("portraits") for name in names}
    space = random_space(models["unchanged"], SLIDERS)
    ways, mixes = {}, [ON, {0: 1.0, 1: 0.5, 2: -1.0}]
    ways["one slider"] = Gated(models["one slider"], space.subset([3]))
    ways["64 sliders, gated"] = Gated(models["64 sliders, gated"], space)
    ways["64 adapters of peft"] = Peft(models["64 adapters of peft"], space, tempfile.mkdtemp())
    ways["folded"] = Peft(models["folded"], space, tempfile.mkdtemp(), ON)
    noise, calls, switches = (
        initial_noise(models["unchanged"], 0, list(range(BATCH))),
        {w: [] for w in models},
        {},
    )
    t = models["unchanged"].timesteps(models["unchanged"].steps)[0][2]
    for name, way in ways.items():
        each = [{0: m} for m in (1.0, -0.5)] if name == "one slider" else mixes
        switches[name] = statistics.median(timed(way.switch, each[i % 2]) for i in range(11))
        way.switch(each[0])
    for lap in range(laps + 1):
        for name, model in models.items():
            seconds = timed(model.predict, noise, t, PROMPT, 1.0)
            if lap:  # the first warms
                calls[name].append(seconds)
    same = [models[w].predict(noise, t, PROMPT, 1.0)[0] for w in names[2:]]
    for other in same[1:]:
        torch.testing.assert_close(
            other, same[0], rtol=1e-3, atol=1e-3
        )  # the same mix, or the comparison means nothing
    found = [
        (n, statistics.median(calls[n]), switches.get(n), weights(m)) for n, m in models.items()
    ]
    for model in models.values():
        detach(model)
    return found


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--laps", type=int, default=30)
    p.add_argument("--readme", action="store_true", help="write the table into docs/report.md too")
    args = p.parse_args()
    torch.set_num_threads(2)
    found = measured(args.laps)
    base = found[0]
    rows = [
        [
            n,
            f"{1000 * s:.0f} ms",
            f"{s / base[1]:.2f}",
            "" if w is None else f"{1000 * w:.1f} ms",
            f"{(b - base[3]) / 2**20:.1f} MiB",
        ]
        for n, s, w, b in found
    ]
    text = table(
        ["", f"a call of {BATCH} images", "over unchanged", "a change of the mix", "more weights"],
        rows,
    )
    print(text)
    if args.readme:
        write_figures(Path(__file__).parents[1] / "docs/report.md", text, "inference")


if __name__ == "__main__":
    main()
