"""Asked-for sliders are measured along their own change, and held against found ones."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny import PROMPT, never, quiet, random_directions, random_space
from torch.testing import assert_close

from sliderspace.evaluation import search as asked
from sliderspace.evaluation.search import (
    alignment_matrix,
    measure_concepts,
    image_pairs_from_report,
    search_sliders,
)
from sliderspace.features.encoders import latent_encoder, pixel_encoder, encode_normalized
from sliderspace.evaluation.report import Report
from sliderspace.sampling.generate import sample_latents, sample, initial_noise
from sliderspace.sliders.space import SliderSpace

SWEEP = dict(
    samples=4, reference=8, strengths=(-1.0, 0.0, 1.0), encoder=pixel_encoder(8), progress=quiet
)


def turned(space):
    """The same sliders with their signs exchanged."""
    return replace(space, down={n: -w for n, w in space.down.items()})


def test_scores_are_along_the_other_halfs_change(tiny):
    space = random_space(tiny, ["one", "two"])
    report = measure_concepts(tiny, space, **SWEEP)
    phi = torch.stack(
        [encode_normalized(pixel_encoder(8), tiny.decode(x)) for x in report.latents[1]]
    )  # (S, n, d)
    base = encode_normalized(
        pixel_encoder(8), tiny.decode(sample_latents(tiny, PROMPT, range(2500, 2508)))
    )
    for n in range(4):
        others = [i for i in range(4) if i // 2 != n // 2]  # the other half
        axis = F.normalize((phi[2] - phi[0])[others].mean(0), dim=0)
        expected = (phi[:, n] - phi[1, n]) @ axis / (base @ axis).std()
        assert_close(report.score_change[1, :, n], expected, rtol=1e-3, atol=1e-4)
    row = report.space.card["sliders"][1]
    assert_close(
        row["effect"], ((report.score_change[1, 2] - report.score_change[1, 0]) / 2).mean().item()
    )


def test_signs_exchanged_tell_the_same(tiny):
    space = random_space(tiny, ["one", "two"])
    one, other = (measure_concepts(tiny, s, **SWEEP) for s in (space, turned(space)))
    assert_close(other.score_change, -one.score_change.flip(1), rtol=1e-3, atol=1e-3)
    for mine, theirs in zip(one.space.card["sliders"], other.space.card["sliders"], strict=True):
        for key in ("effect", "consistency", "monotonicity", "CR", "novelty", "distance"):
            assert_close(mine[key], theirs[key], rtol=1e-3, atol=1e-3)
    assert_close(one.space.ranges, -other.space.ranges.flip(1))


def test_noise_is_not_consistent():
    """Each sample's own change is no part of the axis it is held against."""
    change = torch.randn(64, 8, 400, generator=torch.Generator().manual_seed(0))
    cosines = F.cosine_similarity(change, asked._own_axis(change), dim=2)
    assert cosines.mean().abs() < 0.01 and cosines.abs().max() < 0.3
    assert F.cosine_similarity(change + 3, asked._own_axis(change + 3), dim=2).min() > 0.8


def test_prompts_that_take_turns_are_in_both_halves():
    """A change that is the same for all images of a prompt, and another for those of the next, is consistent."""
    change = torch.eye(2)[torch.arange(8) % 2].repeat_interleave(3, 1)[None]
    assert F.cosine_similarity(change, asked._own_axis(change), dim=2).min() > 0.7


def test_sliders_that_do_nothing_have_figures_and_a_file(tiny, tmp_path):
    space = random_space(tiny, ["one"])
    still = replace(space, up={n: 0 * w for n, w in space.up.items()})
    report = measure_concepts(tiny, still, **SWEEP)
    assert report.space.card["sliders"][0]["effect"] == 0
    assert "less than a tenth of a standard deviation" in report.diagnostics[0]
    report.space.save(tmp_path / "a.safetensors")


@pytest.mark.parametrize("samples", [2, 700])
def test_unchanged_images_have_noise_of_their_own(tiny, monkeypatch, samples):
    seen = []
    monkeypatch.setattr(
        asked, "sweep", lambda model, space, prompt, numbers, *args, **rest: seen.append({*numbers})
    )
    monkeypatch.setattr(
        asked,
        "sample_latents",
        lambda model, prompt, numbers, *args, **rest: seen.append({*numbers}) or never(),
    )
    with pytest.raises(AssertionError, match="work began"):
        measure_concepts(
            tiny, random_space(tiny), PROMPT, samples, 8, "pixels", (-1.0, 0.0, 1.0), progress=quiet
        )
    assert [*map(len, seen)] == [samples, 8] and not seen[0] & seen[1]


def test_words_are_scored_by_the_text_tower_too(model):
    words = {"positive": f"{PROMPT}, glasses", "negative": f"{PROMPT}, no glasses"}
    space = random_space(model, ["glasses", "from pictures"], card={"sliders": [words, {}]})
    report = measure_concepts(
        model, space, samples=2, reference=8, strengths=(-1.0, 0.0, 1.0), progress=quiet
    )
    one, two = report.space.card["sliders"]
    assert -1 < one["dclip"] < 1 and one["dclip"] != 0 and "dclip" not in two
    assert all(advice for advice in report.diagnostics) and "alignment" not in one


def test_measured_ranges_stay_with_the_space(tiny, tmp_path):
    measure_concepts(tiny, random_space(tiny, ["one"]), start=0.5, **SWEEP).space.save(
        tmp_path / "a.safetensors"
    )
    again = SliderSpace.load(tmp_path / "a.safetensors", tiny)
    assert again.card["measured_from"] == 0.5 and again.card["sliders"][0]["consistency"] <= 1


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(samples=1), "samples must be 2 or more, not 1"),
        (dict(reference=7), "reference must be 8 or more, not 7"),
        (dict(strengths=(-1, 1)), "with -1, 0 and 1 among them"),
        (dict(strengths=(1, 0, -1)), "must be ascending"),
        (dict(prompt=""), "prompt must be a non-empty text"),
        (dict(encoder="nothing"), "nothing"),
        (dict(start=2.0), "start"),
    ],
)
def test_bad_input_is_refused_before_any_work(tiny, monkeypatch, options, message):
    monkeypatch.setattr(asked, "sample_latents", never)
    monkeypatch.setattr("sliderspace.sliders.mixing.sample", never)
    with pytest.raises(ValueError, match=message):
        measure_concepts(tiny, random_space(tiny, ["one"]), **SWEEP | options)


def test_a_slider_gives_pairs(tiny):
    report = measure_concepts(tiny, random_space(tiny, ["one", "two"]), **SWEEP)
    shown = image_pairs_from_report(tiny, report, "two")
    assert list(shown) == [-1.0, 1.0]
    assert_close(shown[1.0], tiny.decode(report.latents[1, 2]), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="has strengths .* not 3"):
        image_pairs_from_report(tiny, report, "two", (-1.0, 3.0))
    with pytest.raises(KeyError, match="no slider 'three'"):
        image_pairs_from_report(tiny, report, "three")


def test_found_and_asked_for_are_compared(tiny):
    found = random_directions(tiny, latent_encoder(), steps=2)
    space = random_space(tiny, ["one", "two"], rank=2)
    cosines = alignment_matrix(tiny, space, found, rows=4)
    assert cosines.shape == (2, len(found.vectors)) and cosines.abs().max() <= 1
    assert_close(
        alignment_matrix(tiny, space.subset([1]), found, rows=4), cosines[[1]], rtol=1e-3, atol=1e-4
    )
    other = replace(
        found, samples=replace(found.samples, run=replace(found.samples.run, identity="another"))
    )
    with pytest.raises(ValueError, match="another"):
        alignment_matrix(tiny, space, other)


def test_a_slider_is_found_by_what_its_images_show(model):
    """Latents of real words in place of a sweep: nothing trained is needed."""
    words = ["beard", "blond hair", "dark skin"]
    noise = initial_noise(model, 0, range(6))
    ends = [
        torch.stack([sample(model, PROMPT, noise), sample(model, f"{PROMPT}, {w}", noise)])
        for w in words
    ]
    space = random_space(model, ["first", "second", "third"])
    report = Report(space, (-1.0, 1.0), torch.stack(ends), *[torch.zeros(3, 2, 6)] * 3)
    for word, label in zip(words, space.labels):
        (best, cosine), *_ = search_sliders(model, report, word)
        assert best == label and cosine > 0.2
    turned = replace(report, latents=report.latents.flip(1))
    assert search_sliders(model, turned, "beard")[0][1] < -0.2
    with pytest.raises(ValueError, match="has no text tower"):
        search_sliders(model, report, "glasses", encoder="pixels")
    with pytest.raises(ValueError, match="non-empty text"):
        search_sliders(model, report, " ")
