"""Planted directions are counted, noise is not; spectra and ramps say what they should."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny import PROMPT, quiet
from torch.testing import assert_close

from sliderspace.directions.discovery import coordinates, fit_directions
from sliderspace.features.encoders import pixel_encoder
from sliderspace.figures import to_png
from sliderspace.viz.plots import plot_traversals, plot_significance, plot_variance_by_step
from sliderspace.directions.significance import (
    count_significant,
    permutation_spectra,
    subspace_overlap,
    split_half_overlaps,
)
from sliderspace.features.collect import SamplingConfig, SampleFeatures


def planted(k, samples=300, width=200, steps=3, signal=3.0, seed=0, drift=2.0):
    """Directions of rows in which k random directions hold more than noise, and the step adds a mean of its own."""
    gen = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, width, generator=gen))[0]
    codes = (
        torch.randn(samples, 1, k, generator=gen) * torch.linspace(signal, signal / 2, k)
        if k
        else torch.zeros(samples, 1, 0)
    )
    rows = codes @ basis[:k] + 0.5 * torch.randn(samples, steps, width, generator=gen)
    rows = (
        rows + drift * torch.arange(steps)[:, None] * basis[-1] + 10 * basis[-2]
    )  # far from 0: nearly flat when normed
    run = SamplingConfig("tiny", "0" * 16, "pixels-4", [PROMPT], samples, 0, steps, 2.0)
    return fit_directions(
        SampleFeatures(run, F.normalize(rows, dim=-1), torch.zeros(samples, 4, 8, 8)), 20
    )


@pytest.mark.parametrize("k", [0, 3, 8])
def test_planted_directions_are_counted(k):
    real = count_significant(planted(k), shuffles=10, splits=10, progress=quiet)
    assert abs(real.recommended - k) <= 1, real.reasons
    assert real.n_above_null - k in (0, 1, 2), real.reasons
    assert str(real.recommended) in real.reasons and len(real.variances) == 200


def test_one_step_and_other_seeds():
    finals = fit_directions(planted(5).samples, 20, timesteps="final")
    for seed in (0, 1):
        assert (
            abs(count_significant(finals, 10, 10, seed=seed, progress=quiet).recommended - 5) <= 1
        )
    a, b = (count_significant(finals, 3, 3, seed=0, progress=quiet) for _ in range(2))
    assert torch.equal(a.null, b.null) and torch.equal(a.overlaps, b.overlaps)


def test_shuffling_keeps_each_features_variance():
    found = planted(3)
    rows = found.samples.features.double()
    total = (rows - rows.mean(0)).flatten(0, 1).var(0).sum()
    assert_close(
        permutation_spectra(found, 4, progress=quiet).sum(1).double(),
        total.expand(4),
        rtol=1e-3,
        atol=0,
    )


def test_overlap_is_the_cosines_of_principal_angles():
    gen = torch.Generator().manual_seed(0)
    a, b = (torch.linalg.qr(torch.randn(12, 5, generator=gen))[0] for _ in range(2))
    from scipy.linalg import subspace_angles

    theirs = [
        torch.from_numpy(subspace_angles(a[:, :k].numpy(), b[:, :k].numpy())).cos().pow(2).mean()
        for k in range(1, 6)
    ]
    assert_close(subspace_overlap(a, b), torch.stack(theirs).float(), rtol=0, atol=1e-5)
    assert_close(subspace_overlap(a, a), torch.ones(5))


def test_too_few_samples_for_halves_are_refused():
    found = planted(2, samples=40)
    few = replace(
        found,
        samples=replace(
            found.samples,
            run=replace(found.samples.run, samples=3),
            features=found.samples.features[:3],
        ),
    )
    with pytest.raises(
        ValueError, match="halves need 4 samples or more, and the directions have 3"
    ):
        split_half_overlaps(few, progress=quiet)


def test_ramps_rise_and_spectra_are_each_steps_own():
    found = planted(3)
    for direction in range(3):
        ramp = found.traversal(direction, 9)
        scores = found.scores[ramp, -1, direction]
        assert len(set(ramp)) == 9 and (scores.diff() >= 0).all()
        assert scores[-1] - scores[0] > 2 * found.score_std[direction]
    rows = found.samples.features[:, 1].double()
    assert_close(
        found.spectrum_by_step()[1].double(),
        torch.linalg.svdvals(rows - rows.mean(0)),
        rtol=1e-5,
        atol=1e-5,
    )
    assert_close(found.variance_by_step[-1], found.score_std**2)


def test_whitened_coordinates_have_unit_variance(tiny):
    found = planted(3)
    placed = found.project(found.samples.features[:, -1])
    assert_close(placed.mean(0), torch.zeros(20), rtol=0, atol=1e-4)
    assert_close(placed.std(0), torch.ones(20), rtol=0, atol=1e-4)


def test_images_of_the_samples_are_where_the_samples_are(tiny):
    from sliderspace import discover

    found = discover(
        tiny, PROMPT, samples=8, n_directions=4, encoder=pixel_encoder(4), steps=2, progress=quiet
    )
    images = tiny.decode(found.samples.latents[:])
    assert_close(
        coordinates(tiny, found, images),
        found.project(found.samples.features[:, -1]),
        rtol=0,
        atol=1e-3,
    )
    with pytest.raises(ValueError, match="is not the one the directions were found with"):
        coordinates(tiny, found, images, encoder=pixel_encoder(5))


def test_pictures_of_it_are_drawn(tiny):
    found = planted(3)
    real = count_significant(found, 4, 4, progress=quiet)
    for picture in (
        plot_significance(found, real),
        plot_variance_by_step(found),
        plot_traversals(tiny, found, range(2), 5),
    ):
        assert to_png(picture)[:4] == b"\x89PNG"
    assert f"{real.n_above_null} above chance" in plot_significance(found, real).axes[0].get_title()
