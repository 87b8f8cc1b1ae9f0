"""The procedural world: every style draws, one factor changes alone, captions say what is drawn, indices repeat."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from sliderspace.portraits import (
    FACTORS, PROMPT, FactorClassifier, _art, _options, _style, caption, dataset, draw_factors, factor_ids, factors_of,
    jitter, parse_caption, render,
)

each_style = pytest.mark.parametrize("style", FACTORS["style"])


def person(style, seed=0, **given):
    return draw_factors(random.Random(seed), style=style, **given)


# --- drawing ---------------------------------------------------------------------------------------------------------


@each_style
def test_every_style_draws(style):
    people = [person(style, seed) for seed in range(3)]
    images = [render(p, seed, size=32) for seed, p in enumerate(people)]
    assert all(image.size == (32, 32) and image.mode == "RGB" for image in images)
    assert all(np.asarray(image).std() > 10 for image in images)  # something is on them
    assert len({image.tobytes() for image in images}) == 3
    assert render(people[0], 0, size=32).tobytes() == images[0].tobytes()


@each_style
def test_the_background_is_the_one_that_was_asked_for(style):
    from PIL import ImageColor

    from sliderspace.portraits import _BACKGROUND

    for background, colour in _BACKGROUND.items():
        image = render(person(style, background=background), 1, size=64)
        assert image.getpixel((0, 0)) == ImageColor.getrgb(colour)


def edits(style):
    """(factors, the same with another value, the factor) for every factor of a style and each of its values."""
    first = person(style)
    for factor in factors_of(style)[1:]:
        for value in FACTORS[factor]:
            if value != first[factor]:
                yield first, first | {factor: value}, factor


@each_style
def test_one_factor_changes_one_option(style):
    options = {}
    for before, after, factor in edits(style):
        a, b = _options(before, 7), _options(after, 7)
        changed = {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)}
        assert len(changed) == 1, (factor, changed)
        options.setdefault(factor, set()).update(changed)
    assert len({frozenset(keys) for keys in options.values()}) == len(options) == len(factors_of(style)) - 1


@each_style
def test_options_are_the_styles_own(style):
    # DiceBear takes names that it does not know without a word, and draws something else
    from dicebear import Avatar

    checked = set()
    for pair in edits(style):
        for factors in pair[:2]:
            options = _options(factors, 3)
            drawn = Avatar(_style(_art(style)), options).to_json()["options"]
            for key in options.keys() & drawn.keys():
                if key.endswith(("Variant", "Color")) and drawn[key] is not None:
                    got = drawn[key] if isinstance(drawn[key], list) else [drawn[key]]
                    assert set(got) <= set(options[key]), (key, got, options[key])
                    checked.add(key)
    assert checked == {key for key in options if key.endswith(("Variant", "Color"))}


@each_style
def test_an_edit_can_be_seen_and_leaves_the_rest(style):
    for before, after, factor in edits(style):
        seen = [ImageChops.difference(render(before, s, 64), render(after, s, 64)).getbbox() for s in range(3)]
        assert all(seen), f"{factor}: {before[factor]} and {after[factor]} look alike"
        if factor == "mouth":  # at least a fifth of the picture has nothing to do with it
            assert all((b[2] - b[0]) * (b[3] - b[1]) < 0.8 * 64**2 for b in seen)


# --- factors and captions --------------------------------------------------------------------------------------------


def test_values_are_told_apart_by_their_words_alone():
    values = [v for vs in FACTORS.values() for v in vs]
    assert len(values) == len(set(values)) and not any("," in v for v in values)


def test_factors_are_even():
    rng = random.Random(0)
    people = [draw_factors(rng) for _ in range(4500)]
    for factor, values in FACTORS.items():
        often = Counter(p[factor] for p in people if factor in p)
        assert set(often) == set(values)
        expected = often.total() / len(values)
        assert all(abs(n - expected) < 5 * expected**0.5 for n in often.values()), often


def test_given_factors_are_held_and_choose_the_style():
    rng = random.Random(0)
    people = [draw_factors(rng, glasses="glasses", hair="red hair") for _ in range(100)]
    assert {(p["glasses"], p["hair"]) for p in people} == {("glasses", "red hair")}
    able = {s for s in FACTORS["style"] if {"glasses", "hair"} <= set(factors_of(s))}
    assert {p["style"] for p in people} == able < set(FACTORS["style"])


BAD = {
    "ears='big': known factors and values": dict(ears="big"),
    "hair='green hair': known factors and values": dict(hair="green hair"),
    "hair=None: known factors": dict(hair=None),
    "style='oil style': known factors": dict(style="oil style"),
    "line face style draws only .*, not all of .*'glasses'": dict(style="line face style", glasses="glasses"),
}


@pytest.mark.parametrize("message", BAD)
def test_unknown_and_absent_factors_are_refused(message):
    with pytest.raises(ValueError, match=message):
        draw_factors(random.Random(0), **BAD[message])


def test_unknown_styles_are_refused():
    with pytest.raises(ValueError, match="style must be one of .*, not 'lorelei'"):
        factors_of("lorelei")


@each_style
def test_captions_are_read_back(style):
    for seed in range(20):
        factors, rng = person(style, seed), random.Random(seed)
        assert parse_caption(caption(factors)) == factors
        some = caption(factors, rng)
        assert some.startswith(PROMPT) and parse_caption(some).items() <= factors.items()
        assert caption(parse_caption(some)) == some


def test_other_words_are_not_taken_for_factors():
    assert parse_caption("a man with glasses, smilingly, Red Hair,, ") == {}
    assert parse_caption("hat,  red hair ,no glasses") == {"hair": "red hair", "glasses": "no glasses"}


def test_every_style_meets_the_bare_caption_equally_often():
    # otherwise the plain prompt would mean the styles with few factors
    rng, count = random.Random(0), 500
    for style in FACTORS["style"]:
        bare = sum(caption(draw_factors(rng, style=style), rng) == PROMPT for _ in range(count))
        assert abs(bare / count - 0.2) < 4 * (0.2 * 0.8 / count) ** 0.5, style


# --- data ------------------------------------------------------------------------------------------------------------


def test_a_sample_depends_on_its_index_and_seed_alone():
    images, people = dataset(4, seed=3, size=24)
    random.seed(1)
    fewer, same = dataset(2, seed=3, size=24)
    assert images.shape == (4, 24, 24, 3) and images.dtype == np.uint8
    assert np.array_equal(images[:2], fewer) and people[:2] == same
    others, _ = dataset(4, seed=4, size=24)
    assert len({image.tobytes() for image in [*images, *others]}) == 8


def test_progress_wraps_the_counter():
    seen = []
    dataset(2, size=8, progress=lambda items: (seen.append(len(items)), items)[1])
    assert seen == [2]


def test_jitter_keeps_the_size_and_fills_with_the_background():
    image = Image.new("RGB", (40, 40), "teal")
    image.paste("white", (10, 12, 30, 32))
    seen = [jitter(image, random.Random(seed)) for seed in range(20)]
    assert {(j.size, j.mode) for j in seen} == {((40, 40), "RGB")}
    assert len({j.tobytes() for j in seen}) == 20
    assert all(j.getpixel(corner) == image.getpixel((0, 0)) for j in seen for corner in ((0, 0), (39, 0), (0, 39)))
    assert jitter(image, random.Random(3)).tobytes() == seen[3].tobytes()
    share = np.stack([(np.asarray(j)[..., 0] > 128).mean() for j in seen])  # of the white square
    assert abs(share / 0.25 - 1).max() < 0.25 and share.std() > 0


def test_the_classifier_has_an_answer_for_every_factor():
    people = [person(style) for style in FACTORS["style"]]
    ids = factor_ids(people)
    logits = FactorClassifier(width=4).eval()(torch.zeros(2, 3, 64, 64))
    for factor, values in FACTORS.items():
        assert logits[factor].shape == (2, len(values))
        assert ids[factor].tolist() == [values.index(p[factor]) if factor in p else -1 for p in people]
    assert ids["glasses"].min() == -1 and ids["style"].tolist() == list(range(len(FACTORS["style"])))
