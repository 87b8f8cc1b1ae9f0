"""Setups, and what they make."""

import json
from dataclasses import asdict, fields, replace

import pytest
import torch
from sklearn.cluster import KMeans
from tiny import never, quiet, random_space
from torch.testing import assert_close

from sliderspace.features import collect as store
from sliderspace.training import from_directions as training
from sliderspace.experiments import trial as trials
from sliderspace.training.alignment import AlignmentTrainer, AlignmentConfig
from sliderspace.features.encoders import pixel_encoder
from sliderspace.training.prediction_matching import ConceptConfig
from sliderspace.sampling.generate import decode_latents
from sliderspace.experiments.trial import TrialConfig, trial_directions, trial_key, run_trial

STEPS = {"steps": 2, "guidance": 1.5}
SMALL = dict(
    samples=24,
    encoder="pixels-4",
    sliders=3,
    training_steps=2,
    init_latents=4,
    noised=4,
    loading=STEPS,
)


@pytest.fixture(scope="module")
def setup(tiny_folder):
    return TrialConfig(str(tiny_folder())).vary(SMALL)


@pytest.fixture(scope="module")
def tiny(setup):
    from sliderspace import load

    return load(setup.model, **STEPS)


@pytest.fixture(scope="module")
def trial(setup, tiny, tmp_path_factory):
    return run_trial(setup, 1, tmp_path_factory.mktemp("trial"), tiny, quiet)


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
    "used must be 1 to 8, not 9": dict(used=9),
    "used must be 1 or more, not True": dict(used=True),
    "data_views must be 0 or more, not False": dict(data_views=False),
    "timesteps must be 'final' for views": dict(data_views=2),
    "distance must be above 0, not 0": dict(distance=0),
    "sliders must be 1 to 15 for 16 final images, not 16": dict(
        samples=16, sliders=16, timesteps="final"
    ),
    "there are 16 samples for 20 parts": dict(samples=16, sliders=20, parts="random"),
    "prompt must be a non-empty text, not ' '": dict(prompt=["a hat", " "]),
    "prompt must be a non-empty text, not ''": dict(judged=""),
    "parts are of the images of one prompt": dict(
        prompt=["a hat", "a cat"], parts="random", options={}
    ),
    "timesteps must be 'final' for images of several models": dict(
        source=["portraits", "portraits-fast"]
    ),
    "loading may have .*, not 'step'": dict(loading={"step": 2}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_values_are_named(message):
    with pytest.raises(ValueError, match=message):
        TrialConfig().vary(BAD[message])


def test_no_field_has_the_name_of_an_option():
    options = {f.name for kind in (AlignmentConfig, ConceptConfig) for f in fields(kind)}
    assert not options & {f.name for f in fields(TrialConfig)}
    assert not options & {"options"}


def test_setups_are_plain_values():
    first = TrialConfig(
        prompt=["a", "b"], judge=["portraits-clip", "efficientnet-lite0"], options={"rank": 2}
    )
    assert TrialConfig(**json.loads(json.dumps(asdict(first)))) == first and first.prompt == (
        "a",
        "b",
    )
    with pytest.raises(ValueError, match="sliders must be 1 or more"):
        TrialConfig(sliders=0)


def test_options_of_the_other_kind_of_training_are_refused():
    assert TrialConfig(parts="random").vary({"active_from": 0.5}).options == {"active_from": 0.5}
    with pytest.raises(ValueError, match="no option 'active_from'"):
        TrialConfig().vary({"active_from": 0.5})


def test_a_setup_is_not_changed_by_its_variation():
    first = TrialConfig(options={"rank": 2})
    second = first.vary({"rank": 4, "samples": 40, "prompt": ["a", "b"]})
    assert first == TrialConfig(options={"rank": 2})
    assert (second.options, second.samples, second.prompt) == ({"rank": 4}, 40, ("a", "b"))


# --- directions ------------------------------------------------------------------------------------------------------


def test_random_directions_are_unit_rows_by_seed(setup, tiny, tmp_path):
    def vectors(seed):
        return trial_directions(
            tiny, pixel_encoder(4), setup.vary({"directions": "random"}), seed, tmp_path, quiet
        ).vectors

    first = vectors(0)
    assert_close(first.norm(dim=1), torch.ones(len(first)))
    assert torch.equal(first, vectors(0)) and not torch.allclose(first, vectors(1))
    principal = trial_directions(tiny, pixel_encoder(4), setup, 0, tmp_path, quiet).vectors
    assert (first @ principal.T).diag().abs().max() < 0.9


def test_a_shared_direction_is_the_first_one(setup, tiny, tmp_path):
    usual, shared = (
        trial_directions(
            tiny, pixel_encoder(4), setup.vary({"directions": kind}), 0, tmp_path, quiet
        )
        for kind in ("principal", "shared")
    )
    assert torch.equal(shared.vectors, usual.vectors[:1].expand_as(usual.vectors))


def test_images_of_several_models_are_equal_parts(setup, tiny, tmp_path, tiny_folder):
    other = str(tiny_folder("epsilon", 7))
    both = setup.vary(
        {"source": [setup.model, other], "timesteps": "final", "prompt": ["a hat", "a cat"]}
    )
    found = trial_directions(tiny, pixel_encoder(4), both, 0, tmp_path, quiet)
    assert (
        found.samples.features.shape[:2] == (24, 1)
        and found.samples.run.samples == 24
        and found.n_rows == 24
    )
    alone = [
        trial_directions(
            tiny, pixel_encoder(4), replace(both, source=name), 0, tmp_path, quiet
        ).samples
        for name in (setup.model, other)
    ]
    assert not torch.equal(*(a.latents[:] for a in alone))
    for i in range(
        24
    ):  # each has its own noise, both have all prompts and a part in the last ones, which are held out
        assert torch.equal(found.samples.latents[i], alone[i // 2 % 2].latents[i])
        assert torch.equal(found.samples.features[i, 0], alone[i // 2 % 2].features[i, -1])


def test_views_stand_before_the_image_itself(setup, tiny, tmp_path):
    plain = trial_directions(tiny, pixel_encoder(4), setup, 0, tmp_path, quiet).samples
    seen = trial_directions(
        tiny,
        pixel_encoder(4),
        setup.vary({"data_views": 3, "timesteps": "final"}),
        0,
        tmp_path,
        quiet,
    )
    assert seen.samples.features.shape == (24, 4, plain.features.shape[2]) and seen.n_rows == 96
    assert torch.equal(seen.samples.features[:, -1], plain.features[:, -1])
    away = (seen.samples.features[:, :-1] - plain.features[:, -1:]).norm(dim=2)
    assert (away > 1e-3).all()
    assert not torch.allclose(seen.samples.features[:, 0], seen.samples.features[:, 1])


def test_views_of_latents_are_of_images_that_were_encoded_again(setup, tiny, tmp_path):
    latent = setup.vary({"data_views": 1, "timesteps": "final", "encoder": "latents"})
    trial = run_trial(latent, 0, tmp_path, tiny, quiet)
    assert trial.found.samples.features.shape == (24, 2, 4 * 8 * 8)


# --- what is made ----------------------------------------------------------------------------------------------------


def test_a_trial_is_made_once(setup, tiny, tmp_path, monkeypatch):
    first = run_trial(setup, 1, tmp_path, tiny, quiet)
    monkeypatch.setattr(trials, "train", never)
    looked_at = {
        "used_from": 0.5,
        "used": 2,
        "mixed": 4,
        "held_out": 3,
        "judge": "latents",
        "judged": "a",
        "distance": 1,
    }
    again = run_trial(setup.vary(looked_at), 1, tmp_path, tiny, quiet)
    assert again.space.weights_hash() == first.space.weights_hash()
    assert (first.space.active_from, again.space.active_from) == (0, 0.5)
    for other in ({"rank": 2}, {"samples": 25}, {"noised": 5}, {"directions": "random"}):
        with pytest.raises(AssertionError, match="work began"):
            run_trial(setup.vary(other), 1, tmp_path, tiny, quiet)
    with pytest.raises(AssertionError, match="work began"):
        run_trial(setup, 2, tmp_path, tiny, quiet)


def interrupt(*args, **options):
    raise KeyboardInterrupt


def test_an_interrupted_trial_is_not_taken_for_a_whole_one(setup, tiny, tmp_path, monkeypatch):
    whole = run_trial(setup, 1, None, tiny, quiet).space.weights_hash()
    for module, name in ((AlignmentTrainer, "_parts"), (training, "calibrate")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                run_trial(setup, 1, tmp_path, tiny, quiet)
        assert not list(tmp_path.glob("*.safetensors"))
    assert run_trial(setup, 1, tmp_path, tiny, quiet).space.weights_hash() == whole
    assert not list((tmp_path / "training").iterdir())  # of no more use


def test_interrupted_sampling_is_not_taken_for_a_smaller_one(setup, tiny, tmp_path):
    def stopping(items, desc="", **options):
        for i, item in enumerate(items):
            if desc == "samples" and i == 1:
                raise KeyboardInterrupt
            yield item

    larger = setup.vary({"samples": 48})
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="32 of 48"):
        run_trial(larger, 1, tmp_path, tiny, stopping)
    assert len(run_trial(larger, 1, tmp_path, tiny, quiet).found.samples.latents) == 48


def test_other_code_or_weights_make_other_keys(setup, tiny, tiny_of, tiny_folder, monkeypatch):
    source = setup.vary({"source": str(tiny_folder("epsilon", 7))})
    keys = [
        trial_key(setup, 0, tiny),
        trial_key(setup, 1, tiny),
        trial_key(setup, 0, tiny_of("epsilon", 7)),
        trial_key(source, 0, tiny),
        trial_key(setup.vary({"held_out": 3}), 0, tiny),
    ]
    keys.append(trial_key(setup, 0, tiny, judged=False))
    assert trial_key(setup.vary({"held_out": 3}), 0, tiny, judged=False) == keys[-1]
    monkeypatch.setattr(trials, "_code", lambda: "other")
    keys.append(trial_key(setup, 0, tiny))
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"used_from": 0.9999}, "leaves none of the 2 steps"),
        ({"targets": "atention"}, "targets='atention' matches no layer"),
        ({"rank": 4096}, "rank must be 1 to .* for these layers, not 4096"),
        ({"encoder": "no-such-thing"}, "no-such-thing"),
    ],
)
def test_what_does_not_suit_the_model_is_refused_before_any_work(
    setup, tiny, monkeypatch, changes, message
):
    monkeypatch.setattr(trials, "collect_features", never)
    with pytest.raises(ValueError, match=message):
        run_trial(setup.vary(changes), 1, None, tiny, quiet)


def test_other_code_draws_its_own_samples(setup, tiny, tmp_path, monkeypatch):
    trial_directions(tiny, pixel_encoder(4), setup, 0, tmp_path, quiet)
    monkeypatch.setattr(store, "_drawn", never)
    trial_directions(tiny, pixel_encoder(4), setup, 0, tmp_path, quiet)
    monkeypatch.setattr(trials, "_code", lambda: "other")
    with pytest.raises(AssertionError, match="work began"):
        trial_directions(tiny, pixel_encoder(4), setup, 0, tmp_path, quiet)


def test_a_source_is_loaded_at_the_setups_size_and_its_own_steps(setup, tiny, monkeypatch):
    monkeypatch.setattr(trials, "load", lambda name, **how: pytest.fail(f"{name} {how}"))
    sized = replace(
        setup,
        source="other",
        loading={"steps": 2, "guidance": 1.5, "size": (16, 16), "low_memory": True},
    )
    with pytest.raises(
        pytest.fail.Exception, match=r"other \{'size': \(16, 16\), 'low_memory': True\}"
    ):
        trial_directions(tiny, pixel_encoder(4), sized, 0, None, quiet)


def test_nothing_is_kept_without_a_folder_and_all_comes_out_the_same(setup, tiny, trial):
    assert run_trial(setup, 1, None, tiny, quiet).space.weights_hash() == trial.space.weights_hash()


@pytest.mark.parametrize("kind", ["random", "clusters"])
def test_parts_are_all_samples_once(setup, tiny, trial, kind):
    samples = trial.found.samples
    parts = trials._parts(samples, kind, 3, 5)
    assert (
        sorted(torch.cat(parts).tolist()) == list(range(24))
        and all(len(p) for p in parts)
        and len(parts) == 3
    )
    if kind == "random":
        assert [len(p) for p in trials._parts(samples, kind, 7, 5)] == [4, 4, 4, 3, 3, 3, 3]
    assert [p.tolist() for p in trials._parts(samples, kind, 3, 5)] == [p.tolist() for p in parts]
    if kind == "clusters":
        expected = KMeans(3, n_init=10, random_state=5).fit_predict(samples.features[:, -1].numpy())
        assert all(len(set(expected[p])) == 1 for p in parts)


def test_sliders_of_parts_learn_their_own_images(setup, tiny, monkeypatch):
    shown = {}

    def watched(model, images, prompt, **options):
        shown.update(images, prompt=prompt, options=options)
        return random_space(model, list(images), card={"ended": ""})

    monkeypatch.setattr(trials, "train_customization", watched)
    plain = TrialConfig(setup.model).vary(
        {n: v for n, v in SMALL.items() if n not in ("init_latents", "noised")}
        | {"parts": "random"}
    )
    made = run_trial(plain, 1, None, tiny, quiet)
    latents = made.found.samples.latents
    part = trials._parts(made.found.samples, "random", 3, 1)[2]
    assert torch.equal(shown["part 2"], decode_latents(tiny, latents[part.tolist()]))
    assert (
        shown["prompt"] == plain.prompt
        and shown["options"]["rank"] == 1
        and shown["options"]["training_steps"] == 2
    )
