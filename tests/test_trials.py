"""Setups, what they make, and what is measured of it."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from tiny import never, quiet, random_space
from torch.testing import assert_close

from sliderspace import trials
from sliderspace.encoders import features, pixels
from sliderspace.sampling import decoded
from sliderspace.trials import MEASURES, Setup, Trial, directions_of, make_trial

STEPS = {"steps": 2, "guidance": 1.5}
SMALL = dict(samples=24, encoder="pixels-4", sliders=3, updates=2, start_rows=4, held_out=2, mixed=8, loading=STEPS)


@pytest.fixture(scope="module")
def setup(tiny_folder):
    return Setup(str(tiny_folder())).vary(SMALL)


@pytest.fixture(scope="module")
def tiny(setup):
    from sliderspace import load

    return load(setup.model, **STEPS)


@pytest.fixture(scope="module")
def trial(setup, tiny, tmp_path_factory):
    return make_trial(setup, 1, tmp_path_factory.mktemp("trial"), tiny, quiet)


BAD = {
    "train has no option 'rnak'": dict(rnak=1),
    "rank must be 1 or more, not 0": dict(rank=0),
    "timesteps must be one of .*, not 'late'": dict(timesteps="late"),
    "directions must be one of .*, not 'best'": dict(directions="best"),
    "parts must be one of .*, not 'halves'": dict(parts="halves"),
    "samples must be 16 or more, not 8": dict(samples=8),
    "sliders must be 1 or more, not 0": dict(sliders=0),
    "held_out must be 2 or more, not 1": dict(held_out=1),
    "used must be 1 or more, not 0": dict(used=0),
    "used_from must be 0 or more, below 1, not 1": dict(used_from=1),
    "prompt must be a non-empty text, not ' '": dict(prompt=["a hat", " "]),
    "parts are of the images of one prompt": dict(prompt=["a hat", "a cat"], parts="random", options={}),
    "timesteps must be 'final' for images of several models": dict(source=["portraits", "portraits-fast"]),
    "samples must be a multiple of 6": dict(source=["a", "b"], prompt=["x", "y", "z"], samples=20, timesteps="final"),
    "loading may have .*, not 'step'": dict(loading={"step": 2}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_values_are_named(message):
    with pytest.raises(ValueError, match=message):
        Setup().vary(BAD[message])


def test_options_of_the_other_kind_of_training_are_refused():
    assert Setup(parts="random").vary({"acts_from": 0.5}).options == {"acts_from": 0.5}
    with pytest.raises(ValueError, match="no option 'acts_from'"):
        Setup().vary({"acts_from": 0.5})


def test_a_setup_is_not_changed_by_its_variation():
    first = Setup(options={"rank": 2})
    second = first.vary({"rank": 4, "samples": 40, "prompt": ["a", "b"]})
    assert first == Setup(options={"rank": 2})
    assert (second.options, second.samples, second.prompt) == ({"rank": 4}, 40, ("a", "b"))


# --- directions ------------------------------------------------------------------------------------------------------


def test_random_directions_are_unit_rows_by_seed(setup, tiny, tmp_path):
    def vectors(seed):
        return directions_of(tiny, pixels(4), setup.vary({"directions": "random"}), seed, tmp_path, quiet).vectors

    first = vectors(0)
    assert_close(first.norm(dim=1), torch.ones(len(first)))
    assert torch.equal(first, vectors(0)) and not torch.allclose(first, vectors(1))
    principal = directions_of(tiny, pixels(4), setup, 0, tmp_path, quiet).vectors
    assert (first @ principal.T).diag().abs().max() < 0.9


def test_a_shared_direction_is_the_first_one(setup, tiny, tmp_path):
    usual, shared = (directions_of(tiny, pixels(4), setup.vary({"directions": kind}), 0, tmp_path, quiet)
                     for kind in ("principal", "shared"))
    assert torch.equal(shared.vectors, usual.vectors[:1].expand_as(usual.vectors))


def test_images_of_several_models_are_equal_parts(setup, tiny, tmp_path, tiny_folder):
    other = str(tiny_folder("epsilon", 7))
    both = setup.vary({"source": [setup.model, other], "timesteps": "final", "prompt": ["a hat", "a cat"]})
    found = directions_of(tiny, pixels(4), both, 0, tmp_path, quiet)
    assert found.samples.features.shape[:2] == (24, 1) and found.samples.run.samples == 24 and found.rows == 24
    alone = [directions_of(tiny, pixels(4), replace(both, source=name, samples=12), 0, tmp_path, quiet)
             for name in (setup.model, other)]
    assert torch.equal(found.samples.features, torch.cat([a.samples.features[:, -1:] for a in alone]))
    assert torch.equal(found.samples.latents[:], torch.cat([a.samples.latents[:] for a in alone]))
    assert not torch.equal(*(a.samples.latents[:] for a in alone))


def test_views_stand_before_the_image_itself(setup, tiny, tmp_path):
    plain = directions_of(tiny, pixels(4), setup, 0, tmp_path, quiet).samples
    seen = directions_of(tiny, pixels(4), setup.vary({"views": 3}), 0, tmp_path, quiet)
    assert seen.samples.features.shape == (24, 4, plain.features.shape[2]) and seen.rows == 96
    assert torch.equal(seen.samples.features[:, -1], plain.features[:, -1])
    away = (seen.samples.features[:, :-1] - plain.features[:, -1:]).norm(dim=2)
    assert (away > 1e-3).all()
    assert not torch.allclose(seen.samples.features[:, 0], seen.samples.features[:, 1])


def test_views_of_latents_are_of_images_that_were_encoded_again(setup, tiny, tmp_path):
    latent = setup.vary({"views": 1, "encoder": "latents"})
    trial = make_trial(latent, 0, tmp_path, tiny, quiet)
    assert trial.found.samples.features.shape == (24, 2, 4 * 8 * 8)


# --- what is made ----------------------------------------------------------------------------------------------------


def test_a_trial_is_made_once(setup, tiny, tmp_path, monkeypatch):
    first = make_trial(setup, 1, tmp_path, tiny, quiet)
    monkeypatch.setattr(trials, "train", never)
    again = make_trial(setup.vary({"used_from": 0.5, "used": 2, "mixed": 4}), 1, tmp_path, tiny, quiet)
    assert again.space.mark() == first.space.mark()
    assert (first.space.acts_from, again.space.acts_from) == (0, 0.5)
    for other in ({"rank": 2}, {"samples": 25}, {"held_out": 3}, {"directions": "random"}):
        with pytest.raises(AssertionError, match="work began"):
            make_trial(setup.vary(other), 1, tmp_path, tiny, quiet)
    with pytest.raises(AssertionError, match="work began"):
        make_trial(setup, 2, tmp_path, tiny, quiet)


def test_nothing_is_kept_without_a_folder_and_all_comes_out_the_same(setup, tiny, trial):
    assert make_trial(setup, 1, None, tiny, quiet).space.mark() == trial.space.mark()


@pytest.mark.parametrize("kind", ["random", "clusters"])
def test_parts_are_all_samples_once(setup, tiny, trial, kind):
    samples = trial.found.samples
    parts = trials._parts(samples, kind, 3, 5)
    assert sorted(torch.cat(parts).tolist()) == list(range(24)) and all(len(p) for p in parts)
    assert [p.tolist() for p in trials._parts(samples, kind, 3, 5)] == [p.tolist() for p in parts]
    if kind == "clusters":
        expected = KMeans(3, n_init=10, random_state=5).fit_predict(samples.features[:, -1].numpy())
        assert all(len(set(expected[p])) == 1 for p in parts)


def test_sliders_of_parts_learn_their_own_images(setup, tiny, monkeypatch):
    shown = {}

    def watched(model, images, prompt, **options):
        shown.update(images, prompt=prompt, options=options)
        return random_space(model, list(images))

    monkeypatch.setattr(trials, "train_images", watched)
    plain = Setup(setup.model).vary({n: v for n, v in SMALL.items() if n != "start_rows"} | {"parts": "random"})
    made = make_trial(plain, 1, None, tiny, quiet)
    latents = made.found.samples.latents
    part = trials._parts(made.found.samples, "random", 3, 1)[2]
    assert torch.equal(shown["part 2"], decoded(tiny, latents[part.tolist()]))
    assert shown["prompt"] == plain.prompt and shown["options"]["rank"] == 1 and shown["options"]["updates"] == 2


# --- measures --------------------------------------------------------------------------------------------------------


def with_space(trial, space):
    return Trial(trial.setup, trial.seed, trial.model, trial.encoder, trial.found, space)


def test_figures_are_numbers_or_one_for_each_slider(trial):
    for name in ("trained", "edits", "mixes"):
        for figure, value in MEASURES[name](trial).items():
            assert len(value) == 3 if isinstance(value, list) else isinstance(value, float), figure


def test_weights_of_a_slider_are_counted(trial):
    expected = sum(p.numel() for p in (*trial.space.down.values(), *trial.space.up.values())) / 3
    assert MEASURES["trained"](trial)["weights"] == expected


def test_overlap_is_that_of_mean_changes(trial):
    found, report = MEASURES["edits"](trial), trial.report
    low, high = (torch.stack([features(trial.model, trial.encoder, x) for x in report.latents[:, report.strengths.index(s)]])
                 for s in (-1, 1))
    unit = F.normalize((high - low).mean(1), dim=1)
    cosines = [abs(unit[i] @ unit[j]).item() for i in range(3) for j in range(3) if i != j]
    assert found["overlap"] == pytest.approx(sum(cosines) / 6, abs=1e-5)


def test_sliders_that_do_the_same_overlap_wholly(trial):
    one = trial.space
    down = {n: w[:1].expand(3, *w.shape[1:]).contiguous() for n, w in one.down.items()}
    up = {n: w[:, :1].expand(-1, 3, *w.shape[2:]).contiguous() for n, w in one.up.items()}
    assert MEASURES["edits"](with_space(trial, replace(one, down=down, up=up)))["overlap"] == pytest.approx(1, abs=1e-4)


def test_sliders_that_do_nothing_leave_images_as_they_are(trial):
    still = replace(trial.space, up={n: 0 * w for n, w in trial.space.up.items()})
    found = MEASURES["edits"](with_space(trial, still))
    assert found["similarity"] == pytest.approx([1] * 3) and found["effect"] == [0] * 3
    assert MEASURES["mixes"](with_space(trial, still))["diversity"] == pytest.approx(0, abs=1e-6)


def test_mixes_are_of_the_first_sliders(trial, monkeypatch):
    seen = []
    monkeypatch.setattr(trials, "compare_ways", lambda ways, *a, **o: seen.append(ways) or
                        {w.name: {"distance of pairs": 1.0} for w in ways})
    some = Trial(replace(trial.setup, used=2), trial.seed, trial.model, trial.encoder, trial.found, trial.space)
    MEASURES["mixes"](some)
    drawn = []
    monkeypatch.setattr("sliderspace.ways.mixed", lambda model, space, mixes, *a, **o: drawn.append(mixes) or
                        torch.zeros(len(mixes), *model.latent_shape))
    seen[0][1].draw([trial.setup.prompt], list(range(8)), 0)
    assert drawn[0].shape == (8, 3) and not drawn[0][:, 2].any() and (drawn[0][:, :2].abs() == 1).all()
