"""The papers' applications: which images are made, from what, and what is refused before any is."""

import pytest
import torch
from tiny import PROMPT, never, quiet, random_directions, random_space
from torch.testing import assert_close

from sliderspace.experiments.applications import decompose, mixing_strategies, baselines, transfer
from sliderspace.features.encoders import Encoder, pixel_encoder, encode_normalized
from sliderspace.evaluation.report import sweep
from sliderspace.sliders.mixing import sample_mixtures, sparse_mixtures
from sliderspace.sampling.generate import decode_latents, generate_images
from sliderspace.evaluation.comparison import compare_generators

DIRECTED = {"sliders": [{"direction": d} for d in (0, 2, 5)], "steps": 3, "guidance": 2.0}


@pytest.fixture
def space(tiny):
    return random_space(tiny, card=DIRECTED)


@pytest.fixture
def found(tiny):
    return random_directions(tiny, pixel_encoder(4))


def test_the_papers_mixes_are_three_sliders_at_strength_one(tiny, space):
    way = mixing_strategies(tiny, space, steps=2)[0]
    images = way.generate([PROMPT], [4, 7], 3)
    mixes = sparse_mixtures(3, [4, 7])
    assert mixes.eq(1).all()  # three of three
    expected = decode_latents(
        tiny, sample_mixtures(tiny, space, mixes, PROMPT, [4, 7], 3, 2, progress=quiet)
    )
    assert_close(images, expected, rtol=0, atol=1e-4)


def test_ways_without_directions_need_no_spectrum(tiny, space, found):
    names = [way.name for way in mixing_strategies(tiny, space)]
    assert names == ["sparse 3", "both signs", "both signs, in range"]
    assert [way.name for way in mixing_strategies(tiny, space, found)] == [
        *names,
        "by singular value",
        "as the scores vary",
    ]


def test_other_strengths_are_named(tiny, space):
    plain, weak = (
        mixing_strategies(tiny, space, count=2)[0],
        mixing_strategies(tiny, space, count=2, strength=0.5)[0],
    )
    assert (plain.name, weak.name) == (
        "sparse 2",
        "sparse 2, strength 0.5",
    ) and plain.card != weak.card


def test_all_kinds_of_mixes_are_of_one_length(tiny, space, found, monkeypatch):
    made = []

    def keep(model, space, mixes, *args, **options):
        made.append(mixes)
        return torch.zeros(len(mixes), *model.latent_shape)

    monkeypatch.setattr("sliderspace.evaluation.comparison.sample_mixtures", keep)
    for way in mixing_strategies(tiny, space, found, count=2, strength=1.5):
        way.generate([PROMPT], list(range(400)), 0)
    for mixes in made:
        assert mixes.pow(2).sum(1).mean().sqrt().item() == pytest.approx(1.5 * 2**0.5, rel=0.06)


def test_chances_follow_singular_values(tiny, space, found, monkeypatch):
    made = []
    monkeypatch.setattr(
        "sliderspace.evaluation.comparison.sample_mixtures",
        lambda m, s, mixes, *a, **k: made.append(mixes) or torch.zeros(len(mixes), *m.latent_shape),
    )
    way = next(
        w for w in mixing_strategies(tiny, space, found, count=1) if w.name == "by singular value"
    )
    way.generate([PROMPT], list(range(3000)), 0)
    chance = found.singular_values[[0, 2, 5]]
    assert_close(made[0].abs().mean(0), chance / chance.sum(), rtol=0, atol=0.03)


def test_a_concept_is_taken_apart_beside_a_control(tiny, space, found):
    control = random_space(tiny, seed=7, card=DIRECTED)
    seen = decompose(
        tiny,
        space,
        found,
        images=6,
        encoders=[pixel_encoder(4)],
        control=control,
        count=2,
        progress=quiet,
        steps=2,
    )
    assert list(seen.rows) == [
        "unchanged",
        "sparse 2",
        "both signs",
        "both signs, in range",
        "by singular value",
        "as the scores vary",
        "control",
    ]
    assert seen.prompts == [PROMPT] and all(
        x.shape == (6, 3, 16, 16) for x in seen.pictures.values()
    )
    assert not torch.equal(seen.pictures["control"], seen.pictures["sparse 2"])


def test_rivals_start_from_the_same_noise(tiny, tiny_of):
    other = tiny_of("epsilon", 1)
    ways = baselines(tiny, other, guidances=(3.0,), steps=3)
    assert [w.name for w in ways] == [
        "unchanged",
        "the other model",
        "its first step",
        "guidance 3",
    ]
    images = [w.generate([PROMPT], [0, 1], 0) for w in ways]
    assert_close(images[0], generate_images(tiny, PROMPT, [0, 1], steps=3), rtol=0, atol=1e-5)
    assert_close(
        images[1], generate_images(other, PROMPT, [0, 1]), rtol=0, atol=1e-5
    )  # at its own pace
    assert all(not torch.equal(images[0], x) for x in images[1:])


def test_transfer_is_what_a_sweep_changes(tiny, space):
    found = random_directions(tiny, pixel_encoder(16))  # an encoder that is found again by its name
    other = f"{PROMPT}, glasses"
    moved = transfer(tiny, {"mine": (space, found)}, [PROMPT, other], samples=3, progress=quiet)
    assert moved.alignment[0].shape == moved.effect[0].shape == (2, 3) and moved.latents[0].shape[
        :4
    ] == (2, 3, 3, 3)
    fresh = [24 + 4000 + i for i in range(3)]
    latents = sweep(
        tiny, space, other, fresh, 0, (-1.0, 0.0, 1.0), steps=3, guidance=2.0, progress=quiet
    )
    assert_close(moved.latents[0][1], latents, rtol=0, atol=1e-5)
    phi = encode_normalized(pixel_encoder(16), tiny.decode(latents.flatten(0, 2))).view(3, 3, 3, -1)
    change, axes = phi[:, 2] - phi[:, 0], found.vectors[[0, 2, 5]]
    assert_close(
        moved.alignment[0][1],
        torch.cosine_similarity(change, axes[:, None], dim=2).mean(1),
        rtol=0,
        atol=1e-4,
    )
    assert_close(
        moved.effect[0][1],
        (change * axes[:, None]).sum(2).mean(1) / 2 / found.score_std[[0, 2, 5]],
        rtol=1e-3,
        atol=1e-4,
    )


def test_a_table_of_transfer_names_spaces_and_prompts(tiny, space):
    found = random_directions(tiny, pixel_encoder(16))
    moved = transfer(tiny, {"<b>": (space, found)}, [PROMPT], samples=1, progress=quiet)
    assert moved.table()[0] == ["alignment / effect", PROMPT] and moved.table()[1][0] == "<b>"
    assert "<b>" not in moved._repr_html_() and "&lt;b&gt;" in moved._repr_html_()


REFUSED = {
    "more sliders than there are": (
        lambda m, s, f: mixing_strategies(m, s, count=4),
        "count must be 1 to 3",
    ),
    "sliders of other directions": (
        lambda m, s, f: mixing_strategies(m, s, random_directions(m, pixel_encoder(4), count=3)),
        "other directions",
    ),
    "sliders of no direction": (
        lambda m, s, f: mixing_strategies(m, random_space(m), f),
        "other directions",
    ),
    "a space without a prompt": (
        lambda m, s, f: decompose(m, random_space(m, card={"prompts": None}), progress=quiet),
        "prompt must be",
    ),
    "no samples": (
        lambda m, s, f: transfer(m, {"a": (s, f)}, [PROMPT], samples=0),
        "samples must be 1 or more",
    ),
    "an empty prompt": (lambda m, s, f: transfer(m, {"a": (s, f)}, [" "]), "prompt must be"),
    "another encoder": (
        lambda m, s, f: transfer(m, {"a": (s, f)}, [PROMPT], encoder="pixels-8"),
        "is not the one",
    ),
    "one space of many that does not fit": (
        lambda m, s, f: transfer(m, {"a": (s, f), "b": (random_space(m), f)}, [PROMPT]),
        "other directions",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_is_refused_before_any_image(tiny, space, found, monkeypatch, what):
    monkeypatch.setattr("sliderspace.sliders.mixing.sample", never)
    monkeypatch.setattr("sliderspace.evaluation.comparison.sample", never)
    call, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        call(tiny, space, found)


def test_sliders_of_another_model_are_refused(tiny_of, space):
    with pytest.raises(ValueError, match="transfer=True"):
        mixing_strategies(tiny_of("epsilon", 1), space)


def test_a_comparison_may_have_several_eyes(tiny, space):
    bright = Encoder("bright", lambda x: torch.stack([x.mean((1, 2, 3)), torch.ones(len(x))], 1))
    seen = compare_generators(
        mixing_strategies(tiny, space, count=2, steps=2)[:2],
        PROMPT,
        4,
        [pixel_encoder(4), bright],
        progress=quiet,
    )
    assert {n.partition(" (")[2] for n in seen["sparse 2"]} == {"pixels-4)", "bright)"}
