"""Sliders scored against known factors: exact edits score as what they are, nothing scores as nothing."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import random_space

from sliderspace.portraits import ground_truth as truth
from sliderspace.portraits.classifier import score_factors
from sliderspace.portraits.renders import FACTORS, counterfactual_pairs
from sliderspace.portraits.ground_truth import (
    FactorReport,
    factor_changes,
    plot_truth,
    random_sliders,
    score_sliders,
)

names = list(FACTORS)
drawer = SimpleNamespace(decode=lambda x: x, device="cpu")  # a model whose latents are images


def images(arrays):
    return torch.from_numpy(np.asarray(arrays)).permute(0, 3, 1, 2) / 255


def edits(factor, value, count=6):
    """A sweep at -1, 0, 1 of an ideal slider: the value is there at 1 and not before."""
    before, after, _ = counterfactual_pairs(count, factor, value)
    return torch.stack([images(before), images(before), images(after)])


@pytest.fixture
def scored(monkeypatch):
    def scored(*sweeps):
        space = SimpleNamespace(
            labels=[f"slider {i}" for i in range(len(sweeps))], card={"prompts": ["p"]}
        )
        monkeypatch.setattr(truth, "sweep", lambda *args, **options: torch.stack(sweeps))
        return score_sliders(drawer, space, strengths=(-1, 0, 1), samples=len(sweeps[0][0]))

    return scored


def test_ideal_sliders_move_their_factor_alone(scored):
    wanted = {
        "glasses": "glasses",
        "hair": "red hair",
        "skin": "dark skin",
        "background": "pink background",
    }
    found = scored(*(edits(f, v) for f, v in wanted.items()))
    assert found.main_factor == list(wanted)
    assert found.selectivity.min() > 0.8
    for factor in FACTORS:
        assert (found.coverage[factor] > 0.4) == (factor in wanted)  # half of it: -1 is as it was
    assert found.redundancy.max() < 0.5
    assert found.stability > 0.9


def test_sliders_that_do_the_same_are_redundant(scored):
    one, other = edits("glasses", "glasses"), edits("hair", "red hair")
    found = scored(one, other, one.flip(0))  # the third takes glasses off
    assert found.redundancy[0, 2] > 0.99
    assert found.redundancy[0, 1] < 0.5
    assert found.redundancy.diag().eq(0).all()


def test_a_slider_that_does_nothing_scores_nothing(scored):
    still = edits("glasses", "glasses")[:1].expand(3, -1, -1, -1, -1)
    found = scored(still, still)
    assert (
        found.by_factor.eq(0).all()
        and found.selectivity.eq(0).all()
        and found.redundancy.eq(0).all()
    )


def test_changes_are_total_variation_and_only_of_what_is_drawn():
    def sure(**values):
        style = {"style": "lorelei style"} | values
        return {f: torch.eye(len(vs))[[vs.index(style.get(f, vs[0]))]] for f, vs in FACTORS.items()}

    same = factor_changes(sure(), sure())[0]
    assert same.eq(0).all()
    other = factor_changes(sure(glasses="glasses", hair="red hair"), sure())[0]
    assert [n for n, c in zip(names, other.tolist(), strict=True) if c == 1] == ["hair", "glasses"]
    bare = factor_changes(sure(style="shadows style", glasses="glasses"), sure())[0]
    assert bare[names.index("style")] == 1
    assert bare[names.index("glasses")].isnan() and bare[names.index("hair")].isnan()
    halfway = {
        f: (a + b) / 2
        for (f, a), b in zip(sure().items(), sure(glasses="glasses").values(), strict=True)
    }
    assert factor_changes(halfway, sure())[0, names.index("glasses")] == 0.5


def test_shows_itself_and_escapes(scored):
    sweep = edits("glasses", "glasses", 2)
    found = scored(sweep)
    hostile = FactorReport(
        ["<img src=x>", "$a$"],
        found.strengths,
        found.change.repeat(2, 1, 1, 1),
        found.seen.repeat(2, 1, 1, 1),
    )
    assert "&lt;img src=x&gt;" in hostile._repr_html_() and "<img" not in hostile._repr_html_()
    assert plot_truth(hostile)._repr_png_().startswith(b"\x89PNG")
    assert "1 sliders" in repr(found)


def test_random_sliders_are_as_large_as_the_space_and_others(model):
    space = random_space(model, rank=2, seed=7)
    null, again = random_sliders(space), random_sliders(space)
    for name in space.down:
        assert torch.allclose(null.down[name].norm(dim=1), space.down[name].norm(dim=1))
        assert torch.allclose(null.up[name].norm(dim=0), space.up[name].norm(dim=0))
        assert torch.equal(null.down[name], again.down[name])
        assert not torch.allclose(null.down[name], space.down[name])
    assert torch.allclose(random_sliders(space, scale=3.0).up[name], 3 * null.up[name])
    null.check(model)  # at home on the same model


def test_scores_final_images_of_the_model(model):
    space = random_space(model, ["a", "b"])
    found = score_sliders(model, space, samples=2, strengths=(-1, 0, 1), progress=lambda x, **k: x)
    assert found.change.shape == (2, 3, 2, len(FACTORS))
    assert found.change[:, 1].nan_to_num(0).eq(0).all()  # strength 0 is the unchanged image
    assert found.signature.shape == (2, sum(map(len, FACTORS.values())))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"samples": 1}, "samples must be 2 or more, not 1"),
        ({"strengths": (-2, 0, 2)}, "strengths must hold -1, 0 and 1"),
    ],
)
def test_bad_input_is_refused(model, options, words):
    with pytest.raises(ValueError, match=words):
        score_sliders(model, random_space(model), **options)


def test_the_classifier_reads_renders_of_any_size():
    _, after, people = counterfactual_pairs(12, "glasses", "glasses", size=128)
    scores = score_factors(images(after))
    assert all(
        s.shape == (12, len(FACTORS[f])) and torch.allclose(s.sum(1), torch.ones(12))
        for f, s in scores.items()
    )
    right = [
        FACTORS["style"][i] == p["style"]
        for i, p in zip(scores["style"].argmax(1).tolist(), people, strict=True)
    ]
    assert np.mean(right) > 0.9
