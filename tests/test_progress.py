"""What is shown while work goes on, and what is left when it ends early."""

from io import BytesIO

import pytest
import torch
from PIL import Image
from tiny import PROMPT, never, quiet

from sliderspace import discover, train
from sliderspace.training.from_text import Concept, train_concepts
from sliderspace.features.encoders import latent_encoder
from sliderspace.viz.progress import live_progress

FEW = dict(steps=2, n_directions=4, encoder=latent_encoder())


def size(image):
    return Image.open(BytesIO(image.value)).size


def test_watching_changes_nothing_but_what_is_shown(tiny):
    shown = live_progress(tiny, PROMPT, every=0.0, sliders=2)
    found = discover(tiny, PROMPT, samples=40, progress=shown, **FEW)
    assert shown.says.value == "samples: 2 of 2" and shown.bar.value == shown.bar.max == 2
    assert size(shown.plot)[0] > 100 and size(shown.pictures)[0] > 8 * tiny.image_size[1]
    assert torch.equal(
        found.vectors, discover(tiny, PROMPT, samples=40, progress=quiet, **FEW).vectors
    )

    options = dict(
        encoder=latent_encoder(),
        training_steps=3,
        init_latents=8,
        n_held_out=4,
        calibrated=False,
        targets="keys-values",
    )
    space = train(tiny, found, 3, progress=shown, **options)
    alone = train(tiny, found, 3, progress=quiet, **options)
    assert all(torch.equal(space.up[n], alone.up[n]) for n in space.up)
    width, height = tiny.image_size[::-1]
    assert size(shown.pictures) == (
        3 * (width + 2) + 2,
        2 * (height + 2) + 2,
    )  # two sliders at -1, 0 and 1
    assert shown.says.value == "training: 3 of 3"


def test_asked_for_sliders_are_watched_too(tiny):
    shown = live_progress(tiny, PROMPT, every=0.0)
    concept = Concept(PROMPT, f"{PROMPT}, hat", f"{PROMPT}, no hat", label="hat")
    train_concepts(
        tiny, concept, training_steps=2, steps=2, rank=2, targets="keys-values", progress=shown
    )
    assert size(shown.plot) and len(shown.reached) == 2


def test_what_cannot_be_shown_does_not_end_the_work(tiny, monkeypatch):
    shown = live_progress(tiny, PROMPT, every=0.0)
    monkeypatch.setattr("sliderspace.viz.progress.decode_latents", never)
    discover(tiny, PROMPT, samples=40, progress=shown, **FEW)
    assert "nothing to see: AssertionError" in shown.says.value


def stopped_after(parts):
    def progress(items, **options):
        for i, item in enumerate(items):
            if i == parts:
                raise KeyboardInterrupt
            yield item

    return progress


def test_sampling_that_is_stopped_keeps_what_there_is(tiny):
    with pytest.warns(UserWarning, match="interrupted: 32 of 100 samples"):
        found = discover(tiny, PROMPT, samples=100, progress=stopped_after(1), **FEW)
    whole = discover(tiny, PROMPT, samples=32, progress=quiet, **FEW)
    assert found.samples.run == whole.samples.run and torch.equal(found.vectors, whole.vectors)
    with pytest.raises(KeyboardInterrupt):
        discover(tiny, PROMPT, samples=100, progress=stopped_after(0), **FEW)


def test_few_samples_have_few_directions(tiny):
    options = dict(FEW, n_directions=40, timesteps="final")
    with pytest.warns(UserWarning, match="interrupted"):
        found = discover(tiny, PROMPT, samples=100, progress=stopped_after(1), **options)
    assert len(found.vectors) == 31
