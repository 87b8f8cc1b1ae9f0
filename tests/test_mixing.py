"""Mixes come from seed and number alone, and their images are the sampler's own, however they are put into batches."""

from itertools import islice

import pytest
import scipy.stats
import torch
from tiny import PROMPT, never, quiet, random_space
from torch.testing import assert_close

from sliderspace.sliders import mixing as mixes
from sliderspace import load
from sliderspace.sliders.mixing import (
    iter_mixtures,
    sample_mixtures,
    gaussian_mixtures,
    sparse_mixtures,
    clamp_to_ranges,
)
from sliderspace.sampling.generate import sample_latents, sample, initial_noise
from sliderspace.sliders.space import detach

OPTIONS = dict(seed=3, steps=2, guidance=2.0, progress=quiet)
MIXES = torch.tensor(
    [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [-1.0, 0.0, 0.5], [0.0, 0.0, 0.0], [0.0, 0.0, 2.0]]
)
SAMPLES = [7, 4, 0, 9, 7]  # two images of one noise


def alone(model, space, mix, number, prompt=PROMPT, **options):
    """One image, by the public way to switch sliders on."""
    with space.on(model, mix, **options):
        return sample(model, prompt, initial_noise(model, 3, [number]), 2, 2.0)[0]


# --- images ----------------------------------------------------------------------------------------------------------


def test_images_at_strength_0_are_the_unchanged_models(tiny):
    got = sample_mixtures(tiny, random_space(tiny), MIXES, PROMPT, SAMPLES, **OPTIONS)
    assert torch.equal(got[[1, 3]], sample_latents(tiny, PROMPT, [4, 9], 3, 2, 2.0))


def test_each_image_has_its_own_mix_and_noise(tiny):
    space = random_space(tiny)
    got = sample_mixtures(tiny, space, MIXES, PROMPT, SAMPLES, **OPTIONS)
    for image, mix, number in zip(got, MIXES, SAMPLES):
        assert_close(image, alone(tiny, space, mix, number), rtol=0, atol=1e-4)
    assert (got[4] - got[0]).abs().max() > 1e-2  # of the same noise


def test_images_of_the_bundled_model():
    model = load("portraits-fast", device="cpu")
    space, strengths = random_space(model), sparse_mixtures(3, range(4), 2, 0.5)
    strengths[1] = 0
    got = sample_mixtures(model, space, strengths, PROMPT, range(4), progress=quiet)
    base = sample_latents(model, PROMPT, range(4))
    assert torch.equal(got[1], sample_latents(model, PROMPT, [1])[0])
    for i in (0, 2, 3):
        with space.on(model, strengths[i]):
            assert_close(got[i], sample_latents(model, PROMPT, [i])[0], rtol=0, atol=1e-4)
        assert (got[i] - base[i]).abs().max() > 1e-2


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_batches_make_no_difference(tiny, batch):
    space = random_space(tiny)
    whole = sample_mixtures(tiny, space, MIXES, PROMPT, SAMPLES, **OPTIONS)
    assert_close(
        sample_mixtures(tiny, space, MIXES, PROMPT, SAMPLES, batch=batch, **OPTIONS),
        whole,
        rtol=0,
        atol=1e-4,
    )


def test_unchanged_images_come_first(tiny):
    parts = [
        rows
        for rows, _ in iter_mixtures(
            tiny, random_space(tiny), MIXES, PROMPT, SAMPLES, batch=2, **OPTIONS
        )
    ]
    assert parts == [[1, 3], [0, 2], [4]]


def test_prompts_take_turns_by_the_number_of_the_sample(tiny):
    space, prompts = random_space(tiny), ["hat", PROMPT]
    got = sample_mixtures(tiny, space, MIXES, prompts, SAMPLES, **OPTIONS)
    for image, mix, number in zip(got, MIXES, SAMPLES):
        assert_close(image, alone(tiny, space, mix, number, prompts[number % 2]), rtol=0, atol=1e-4)


def test_sliders_act_from_where_they_are_told_or_were_trained(tiny):
    late = random_space(tiny, card={"active_from": 0.6})
    for start in (None, 0.0, 0.6):
        got = sample_mixtures(tiny, late, MIXES[:1], PROMPT, [7], start=start, **OPTIONS)[0]
        assert_close(got, alone(tiny, late, MIXES[0], 7, start=start), rtol=0, atol=1e-4)
    early, late = (
        sample_mixtures(tiny, late, MIXES[:1], PROMPT, [7], start=s, **OPTIONS) for s in (0.0, None)
    )
    assert (early - late).abs().max() > 1e-2


def test_a_mix_that_was_on_is_off_meanwhile_and_on_again(tiny):
    space = random_space(tiny)
    expected, before = (
        sample_mixtures(tiny, space, MIXES, PROMPT, SAMPLES, **OPTIONS),
        alone(tiny, space, {0: 2}, 1),
    )
    with space.on(tiny, {0: 2}):
        assert torch.equal(
            sample_mixtures(tiny, space, MIXES, PROMPT, SAMPLES, **OPTIONS), expected
        )
        assert torch.equal(sample(tiny, PROMPT, initial_noise(tiny, 3, [1]), 2, 2.0)[0], before)


def test_images_that_nobody_waits_for_leave_the_model_as_it_was(tiny):
    base = sample_latents(tiny, PROMPT, [0], 3, 2, 2.0)
    images = iter_mixtures(tiny, random_space(tiny), MIXES, PROMPT, SAMPLES, batch=1, **OPTIONS)
    assert len(list(islice(images, 3))) == 3  # in the midst of changed ones
    images.close()
    assert torch.equal(sample_latents(tiny, PROMPT, [0], 3, 2, 2.0), base)
    assert not hasattr(tiny.denoiser, "_sliderspace")


def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_made_twice(tiny, monkeypatch):
    made, expected = (
        [],
        sample_mixtures(tiny, random_space(tiny), MIXES, PROMPT, SAMPLES, **OPTIONS),
    )

    def small(model, prompt, noise, *args):
        if len(noise) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        made.append(noise)
        return sample(model, prompt, noise, *args)

    monkeypatch.setattr(mixes, "sample", small)
    tiny.batch_sizes.clear()
    got = sample_mixtures(tiny, random_space(tiny), MIXES, PROMPT, SAMPLES, **OPTIONS)
    tiny.batch_sizes.clear()
    assert_close(got, expected, rtol=0, atol=1e-4)
    assert torch.equal(
        torch.cat(made), initial_noise(tiny, 3, [SAMPLES[i] for i in (1, 3, 0, 2, 4)])
    )


# --- images that are refused -----------------------------------------------------------------------------------------

BAD = {
    r"mixes must be \(5, 3\), a row a sample, not \(4, 3\)": dict(mixes=MIXES[:4]),
    r"mixes must be \(5, 3\), a row a sample, not \(3,\)": dict(mixes=MIXES[0]),
    "a mix has one strength for each of 3 sliders, not shape \\(5, 2\\)": dict(mixes=MIXES[:, :2]),
    "prompt must be a non-empty text, not ' '": dict(prompt=["hat", " "]),
    r"prompt must be a non-empty text, not \[\]": dict(prompt=[]),
    "window must be 0 <= start <= stop <= 1": dict(start=1.5),
    "must be finite": dict(mixes=MIXES.masked_fill(MIXES == 2, torch.nan)),
    "batch must be 1 or more, not 0": dict(batch=0),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_before_any_image(tiny, monkeypatch, message):
    monkeypatch.setattr(mixes, "sample", never)
    options = dict(mixes=MIXES, prompt=PROMPT, samples=SAMPLES, progress=quiet)
    with pytest.raises(ValueError, match=message):
        sample_mixtures(tiny, random_space(tiny), **options | BAD[message])


def test_another_model_is_refused_but_for_a_transfer(tiny, tiny_of, monkeypatch):
    space, other = random_space(tiny), tiny_of("epsilon", 1)
    with monkeypatch.context() as patch:
        patch.setattr(mixes, "sample", never)
        with pytest.raises(ValueError, match="made for the weights of .* transfer=True uses them"):
            sample_mixtures(other, space, MIXES, PROMPT, SAMPLES, **OPTIONS)
    got = sample_mixtures(other, space, MIXES, PROMPT, SAMPLES, transfer=True, **OPTIONS)
    assert_close(got[0], alone(other, space, MIXES[0], 7, transfer=True), rtol=0, atol=1e-4)
    detach(other)


# --- sparse mixes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sliders, count", [(1, 1), (5, 3), (5, 5), (64, 3)])
@pytest.mark.parametrize("strength", [1.0, -0.5])
@pytest.mark.parametrize("both", [False, True])
def test_sparse_mixes_have_so_many_sliders_of_one_strength(sliders, count, strength, both):
    got = sparse_mixtures(sliders, range(200), count, strength, both)
    assert got.shape == (200, sliders) and got.dtype == torch.float32
    assert ((got != 0).sum(1) == count).all()
    assert set(got.unique().tolist()) - {0} == ({strength, -strength} if both else {strength})


def test_a_mix_depends_on_seed_and_number_alone():
    whole = sparse_mixtures(8, range(50), 3, random_signs=True)
    torch.manual_seed(1)
    assert torch.equal(sparse_mixtures(8, [40, 3, 3], 3, random_signs=True), whole[[40, 3, 3]])
    assert len(whole.unique(dim=0)) > 40
    other = sparse_mixtures(8, range(50), 3, random_signs=True, seed=1)
    assert (other != whole).any(1).float().mean() > 0.9
    scores = gaussian_mixtures(torch.eye(8), range(50))
    torch.manual_seed(2)
    assert torch.equal(gaussian_mixtures(torch.eye(8), [40, 3]), scores[[40, 3]])
    assert (gaussian_mixtures(torch.eye(8), range(50), seed=1) != scores).all()
    pairs = [
        (0, 0),
        (1, 0),
        (0, 1),
        (1, 11),
        (11, 1),
        (111, 0),
        (1, 110),
        (110, 1),
    ]  # of a seed and a number
    assert len(
        torch.cat([gaussian_mixtures(torch.eye(8), [i], seed=seed) for seed, i in pairs]).unique(
            dim=0
        )
    ) == len(pairs)


def likely(counts, expected=None):
    """Whether a chi-squared test finds nothing: one in a thousand would not."""
    return scipy.stats.chisquare(counts, expected).pvalue > 1e-3


def test_all_sliders_and_signs_are_drawn_alike():
    got = sparse_mixtures(6, range(3000), 1, random_signs=True)
    assert likely(torch.cat([(got > 0).sum(0), (got < 0).sum(0)]))
    three = sparse_mixtures(6, range(3000), 3)
    kinds, counts = three.unique(dim=0, return_counts=True)
    assert len(kinds) == 20 and likely(counts)  # every set of three
    up = (sparse_mixtures(6, range(3000), 3, random_signs=True) > 0).sum(1)
    assert likely(up.bincount(), 3000 * torch.tensor([1, 3, 3, 1]) / 8)  # each sign by itself


def test_weights_are_chances():
    weights = torch.tensor([4.0, 0.0, 2.0, 1.0, 1.0])
    got = sparse_mixtures(5, range(3000), 1, weights=weights).sum(0)
    assert got[1] == 0 and likely(got[[0, 2, 3, 4]], 3000 * weights[[0, 2, 3, 4]] / 8)
    assert (
        sparse_mixtures(5, range(300), 4, weights=weights) == torch.tensor([1, 0, 1, 1, 1])
    ).all()


@pytest.mark.parametrize(
    "weights",
    [
        [1, 2],
        [1, -1, 1, 1],
        [1, float("nan"), 1, 1],
        [1, float("inf"), 1, 1],
        [0, 0, 0, 0],
        [1, 1, 0, 0],
    ],
)
def test_weights_that_are_no_chances_are_refused(weights):
    with pytest.raises(
        ValueError, match="weights must be 4 finite numbers, 3 or more of them above 0"
    ):
        sparse_mixtures(4, [0], 3, weights=weights)


@pytest.mark.parametrize("count", [0, 5, -1, 1.5])
def test_a_count_out_of_range_is_refused(count):
    with pytest.raises(
        ValueError, match=f"count must be 1 to 4, the number of sliders, not {count}"
    ):
        sparse_mixtures(4, [0], count)


# --- mixes that vary as scores do ------------------------------------------------------------------------------------


def test_score_mixes_vary_together_as_they_are_told():
    gen = torch.Generator().manual_seed(0)
    root = torch.randn(4, 4, generator=gen, dtype=torch.float64)
    together = root @ root.T
    got = gaussian_mixtures(together, range(4000), 2.0).double()
    expected = 4 * together / together.trace()
    error = (
        (expected.diag().outer(expected.diag()) + expected**2) / 4000
    ).sqrt()  # of a covariance, of Gaussians
    assert ((got.T @ got / 4000 - expected).abs() < 4 * error).all()
    assert (got.mean(0).abs() < 4 * (expected.diag() / 4000).sqrt()).all()


def test_score_mixes_are_as_long_as_sparse_ones():
    got = gaussian_mixtures(torch.eye(64), range(500))
    assert got.square().sum(1).mean() == pytest.approx(3, rel=0.05)  # three sliders at strength 1


def test_sliders_that_go_together_go_together():
    got = gaussian_mixtures(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), range(20))
    assert_close(got[:, 0], -got[:, 1])
    assert gaussian_mixtures(torch.ones(1, 1), [0], 2.0).shape == (1, 1)


@pytest.mark.parametrize(
    "together",
    [
        torch.ones(3),
        torch.ones(2, 3),
        torch.ones(1, 3),
        torch.tensor([[1.0, 2.0], [0.0, 1.0]]),
        torch.zeros(2, 2),
        torch.full((2, 2), torch.nan),
        torch.full((2, 2), torch.inf),
    ],
    ids=lambda t: f"{t.tolist()}",
)
def test_what_is_no_covariance_is_refused(together):
    with pytest.raises(ValueError, match=r"together must be a .*symmetric \(K, K\) matrix"):
        gaussian_mixtures(together, [0])


def test_strengths_end_where_the_range_does():
    ranges = torch.tensor([[-1.0, 2.0], [0.0, 0.0], [-0.5, 0.0]])
    got = clamp_to_ranges(
        torch.tensor([[3.0, 1.0, 1.0], [-3.0, -1.0, -1.0], [0.5, 0.0, -0.25]]), ranges
    )
    assert torch.equal(got, torch.tensor([[2.0, 0.0, 0.0], [-1.0, 0.0, -0.5], [0.5, 0.0, -0.25]]))
