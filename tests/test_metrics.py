"""One judge for all trials: the same images, the same eyes, and sliders of one size where that is asked for."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny import never, quiet
from torch.testing import assert_close

from sliderspace.experiments import metrics as judging
from sliderspace.features.encoders import normalized_features, pixel_encoder
from sliderspace.experiments.metrics import (
    MEASURES,
    TrialEvaluation,
    rescale_to_distance,
    check_measures,
)
from sliderspace.sampling.generate import sample_latents
from sliderspace.experiments.trial import TrialConfig, Trial, run_trial

STEPS = {"steps": 2, "guidance": 1.5}
SMALL = dict(
    samples=24,
    encoder="pixels-4",
    judge="pixels-4",
    sliders=3,
    training_steps=2,
    init_latents=4,
    noised=4,
    held_out=2,
    mixed=8,
    loading=STEPS,
)


@pytest.fixture(scope="module")
def trial(tiny_folder):
    return run_trial(TrialConfig(str(tiny_folder())).vary(SMALL), 1, None, None, quiet)


@pytest.fixture(scope="module")
def judged(trial):
    return TrialEvaluation(trial)


def changed(trial, space=None, **setup):
    return TrialEvaluation(
        Trial(
            replace(trial.setup, **setup),
            trial.seed,
            trial.model,
            trial.found,
            space or trial.space,
        )
    )


def test_figures_are_numbers_or_one_for_each_slider(judged):
    for name in ("trained", "edits", "mixes"):
        for figure, value in MEASURES[name](judged).items():
            if figure in ("art", "art without sliders"):
                assert value is None  # there are renders of the bundled models' world alone
            else:
                assert (
                    len(value) == 3 if isinstance(value, list) else isinstance(value, (int, float))
                ), figure


def test_truth_is_unknown_of_another_model(judged):
    found = MEASURES["factors"](judged)
    assert {"style", "selectivity", "redundancy", "factors"} <= set(found) and set(
        found.values()
    ) == {None}


def test_weights_of_a_slider_are_counted(judged):
    space = judged.trial.space
    expected = sum(p.numel() for p in (*space.down.values(), *space.up.values())) / 3
    assert MEASURES["trained"](judged)["weights"] == expected


def test_shares_of_the_variance_are_of_principal_directions_alone(trial):
    assert "explained" in MEASURES["trained"](TrialEvaluation(trial))
    assert "explained" not in MEASURES["trained"](changed(trial, directions="random"))


def test_all_are_judged_on_the_same_new_images(trial):
    one, other = (
        TrialEvaluation(trial),
        changed(trial, replace(trial.space, card=trial.space.card | {"samples": 999})),
    )
    zero = one.report.strengths.index(0)
    assert torch.equal(one.report.latents[0, zero], other.report.latents[0, zero])
    new = one.report.latents[0, zero]
    expected = sample_latents(trial.model, trial.setup.prompt, [2000, 2001], 1_000_001, 2, 1.5)
    assert_close(new, expected, rtol=0, atol=1e-4)
    near = torch.cdist(new.flatten(1), trial.found.samples.latents[:].flatten(1))
    assert near.min() > 1


def test_mixes_are_of_new_noise(trial, monkeypatch):
    seeds = []
    real = judging.compare_generators
    monkeypatch.setattr(
        judging,
        "compare_generators",
        lambda *args, **options: seeds.append(args[6]) or real(*args, **options),
    )
    MEASURES["mixes"](TrialEvaluation(trial))
    assert seeds == [1_000_001]


def test_overlap_is_that_of_mean_changes(trial, judged):
    found, report = MEASURES["edits"](judged), judged.report
    low, high = (
        torch.stack(
            [
                normalized_features(trial.model, pixel_encoder(4), x)
                for x in report.latents[:, report.strengths.index(s)]
            ]
        )
        for s in (-1, 1)
    )
    unit = F.normalize((high - low).mean(1), dim=1)
    expected = [
        sum(abs(unit[i] @ unit[j]).item() for j in range(3) if i != j) / 2 for i in range(3)
    ]
    assert found["overlap"] == pytest.approx(expected, abs=1e-5)


def test_sliders_that_do_the_same_overlap_wholly(trial):
    one = trial.space
    down = {n: w[:1].expand(3, *w.shape[1:]).contiguous() for n, w in one.down.items()}
    up = {n: w[:, :1].expand(-1, 3, *w.shape[2:]).contiguous() for n, w in one.up.items()}
    assert MEASURES["edits"](changed(trial, replace(one, down=down, up=up)))[
        "overlap"
    ] == pytest.approx([1] * 3, abs=1e-4)


def test_sliders_that_do_nothing_leave_images_as_they_are(trial):
    still = changed(trial, replace(trial.space, up={n: 0 * w for n, w in trial.space.up.items()}))
    found = MEASURES["edits"](still)
    assert (
        found["similarity"] == pytest.approx([1] * 3)
        and found["distance"] == [0] * 3
        and found["overlap"] == [0] * 3
    )
    assert MEASURES["mixes"](still)["diversity"] == pytest.approx(0, abs=1e-6)


def test_mixes_are_of_the_first_sliders(trial, monkeypatch):
    seen = []
    monkeypatch.setattr(
        judging,
        "compare_generators",
        lambda ways, *a, **o: seen.append(ways) or {w.name: {} for w in ways},
    )
    MEASURES["mixes"](changed(trial, used=2))
    drawn = []
    monkeypatch.setattr(
        "sliderspace.evaluation.comparison.sample_mixtures",
        lambda model, space, mixes, *a, **o: (
            drawn.append(mixes) or torch.zeros(len(mixes), *model.latent_shape)
        ),
    )
    seen[0][1].generate([trial.setup.prompt], list(range(8)), 0)
    assert drawn[0].shape == (8, 3) and not drawn[0][:, 2].any() and (drawn[0][:, :2] == 1).all()


def test_several_judges_have_figures_of_their_own(trial):
    found = MEASURES["mixes"](changed(trial, judge=("pixels-4", "pixels-2")))
    alone = MEASURES["mixes"](changed(trial, judge="pixels-2"))
    assert found["diversity (pixels-2)"] == alone["diversity"] != found["diversity"]


def test_judged_prompts_stand_in_for_the_setups(trial):
    assert changed(trial, judged=("a hat", "a cat")).prompts == ["a hat", "a cat"]
    assert TrialEvaluation(trial).prompts == [trial.setup.prompt]


def test_a_window_says_in_how_many_steps_sliders_act(trial):
    late = replace(trial.space, card=trial.space.card | {"active_from": 0.7})
    assert MEASURES["edits"](TrialEvaluation(trial))["steps"] == 2
    assert MEASURES["edits"](changed(trial, late, used_from=0.7))["steps"] == 1


# --- sliders of one size ---------------------------------------------------------------------------------------------


def test_sliders_are_scaled_to_a_distance(trial):
    sized = changed(trial, distance=0.15)
    assert sized._distances()(sized.space).tolist() == pytest.approx([0.15] * 3, rel=0.1)
    assert sized.report.distance[:, [1, 3]].mean((1, 2)).tolist() == pytest.approx(
        [0.15] * 3, rel=0.4
    )  # other noise


def test_of_all_rounds_each_sliders_best_counts(trial):
    up = next(iter(trial.space.up))

    def measured(space):  # one grows with its square, one not at all, one jumps over what is wanted
        size = (space.up[up] / trial.space.up[up]).flatten(1)[0]
        return [4 * size[0] ** 2, torch.tensor(0.01), torch.tensor(5.0 if size[2] > 0.9 else 0.2)]

    found = rescale_to_distance(trial.space, 1.0, measured, rounds=8, most=2.0)
    size = (found.up[up] / trial.space.up[up]).flatten(1)[0]
    assert (
        size[0] == pytest.approx(0.5, abs=0.01)
        and size[1] == 1
        and size[2] == pytest.approx(1, abs=0.11)
    )
    assert all(torch.equal(found.down[n], trial.space.down[n]) for n in found.down)


# --- refused before any work -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setup, names, message",
    [
        (dict(model="sdxl"), ["factors"], "factors are known of the bundled models alone"),
        (
            dict(judge=("portraits-clip", "latents")),
            ["mixes"],
            "judge must look at images, and 'latents' looks at latents",
        ),
        (
            dict(judged=("a hat", "a cat")),
            ["words"],
            "words are compared with one prompt, not with 2",
        ),
        (
            dict(prompt=("a hat", "a cat", "a dog"), mixed=5),
            ["mixes"],
            "mixed must be 6 or more, two images of each prompt, not 5",
        ),
        (dict(judge="pixels"), ["words"], "judge must know words, and 'pixels-16' does not"),
    ],
)
def test_measures_that_cannot_be_taken_are_refused(setup, names, message, model):
    with pytest.raises(ValueError, match=message):
        check_measures(TrialConfig(**setup), names, never if setup.get("model") else lambda: model)


def test_words_know_which_prompt_was_judged(trial, monkeypatch):
    monkeypatch.setattr(
        judging,
        "label_with_clip",
        lambda model, ends, *rest: pytest.fail(f"{ends.prompt}, not the trial's"),
    )
    with pytest.raises(pytest.fail.Exception, match="a cat, not the trial's"):
        judging.label_metrics(
            TrialEvaluation(replace(trial, setup=replace(trial.setup, judged="a cat")))
        )


def test_what_is_known_of_training_needs_no_judge():
    check_measures(TrialConfig("sdxl"), ["trained"], never)


def test_renders_that_cannot_be_made_are_missed_early(monkeypatch, model):
    monkeypatch.setattr(judging, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"sliderspace\[portraits\]"):
        check_measures(TrialConfig(), ["mixes"], lambda: model)
