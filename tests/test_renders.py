"""The procedural world: every style draws, one factor changes alone, captions say what is drawn, indices repeat."""

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from sliderspace.models.pipeline import asset_path
from sliderspace.portraits.classifier import (
    FactorClassifier,
    factor_ids,
    score_factors,
    score_numbers,
)
from sliderspace.portraits.renders import (
    FACTORS,
    NUMBERS,
    PROMPT,
    Placement,
    Portrait,
    _options,
    _style,
    caption,
    colours_of,
    dataset,
    dataset_numbers,
    sample_factors,
    sample_placement,
    edit_factors,
    counterfactual_pairs,
    factors_of,
    jitter,
    numbers_of,
    parse_caption,
    portrait,
    render,
)
from sliderspace.portraits.world import PORTRAITS_64, PORTRAITS_128, WORLDS, art_name, world_of

each_world = pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
STYLES = [(world, style) for world in WORLDS.values() for style in [*world.styles, *world.held_out]]
each_style = pytest.mark.parametrize(
    "world, style", STYLES, ids=lambda value: getattr(value, "name", value)
)


def person(world, style, seed=0, **given):
    return sample_factors(random.Random(seed), world, style=style, **given)


# --- drawing ---------------------------------------------------------------------------------------------------------


@each_style
def test_every_style_draws(world, style):
    people = [person(world, style, seed) for seed in range(3)]
    images = [render(p, seed, 32, world) for seed, p in enumerate(people)]
    assert all(image.size == (32, 32) and image.mode == "RGB" for image in images)
    assert all(np.asarray(image).std() > 10 for image in images)  # something is on them
    assert len({image.tobytes() for image in images}) == 3
    assert render(people[0], 0, 32, world).tobytes() == images[0].tobytes()
    assert render(people[0], 0, world=world).size == (world.size, world.size)


@each_style
def test_the_background_is_the_one_that_was_asked_for(world, style):
    from PIL import ImageColor

    for background, palette in world.palettes["background"].items():
        factors = person(world, style, background=background)
        colour = colours_of(factors, 1, world)["background"]
        assert render(factors, 1, world=world).getpixel((0, 0)) == ImageColor.getrgb(colour)
        assert palette.varies or colour == palette.colour


def edits(world, style):
    """(factors, the same with another value, the factor) for every factor of a style and each of its values."""
    first = person(world, style)
    for factor in factors_of(style, world)[1:]:
        for value in world.factors[factor]:
            if value != first[factor]:
                yield first, first | {factor: value}, factor


@each_style
def test_one_factor_changes_options_of_its_own(world, style):
    options = {}
    for before, after, factor in edits(world, style):
        a, b = _options(before, 7, world), _options(after, 7, world)
        changed = {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)}
        assert len(changed) == 1 or (
            factor == "hair" and changed == {"hairColor", "facialHairColor"}
        ), changed
        options.setdefault(factor, set()).update(changed)
    assert len(options) == len(factors_of(style, world)) - 1
    assert sum(map(len, options.values())) == len(
        set().union(*options.values())
    )  # no two factors share one


@each_style
def test_options_are_the_styles_own(world, style):
    # DiceBear takes names that it does not know without a word, and draws something else
    from dicebear import Avatar

    checked = set()
    for pair in edits(world, style):
        for factors in pair[:2]:
            options = _options(factors, 3, world)
            drawn = Avatar(_style(art_name(style), "beard" in factors), options).to_json()[
                "options"
            ]
            for key in options.keys() & drawn.keys():
                if key.endswith(("Variant", "Color")) and drawn[key] is not None:
                    got = drawn[key] if isinstance(drawn[key], list) else [drawn[key]]
                    assert set(got) <= set(options[key]), (key, got, options[key])
                    checked.add(key)
    assert checked == {key for key in options if key.endswith(("Variant", "Color"))}


@each_style
def test_an_edit_can_be_seen_and_leaves_the_rest(world, style):
    for before, after, factor in edits(world, style):
        pairs = [(render(before, s, 64, world), render(after, s, 64, world)) for s in range(3)]
        seen = [ImageChops.difference(*pair).getbbox() for pair in pairs]
        assert all(seen), f"{factor}: {before[factor]} and {after[factor]} look alike"
        if factor == "mouth":  # at least a fifth of the picture has nothing to do with it
            assert all((b[2] - b[0]) * (b[3] - b[1]) < 0.8 * 64**2 for b in seen)


@pytest.mark.parametrize("style", PORTRAITS_128.styles)
def test_a_person_can_see_every_factor_of_the_large_world(style):
    # on any skin, under any hair, with a beard or without: at least forty of the pixels change plainly
    rng = random.Random(f"seen {style}")
    for _ in range(12):
        first = person(PORTRAITS_128, style, rng.random())
        for factor in ("length", "hair", "skin", "glasses", "beard", "mouth"):
            value = rng.choice([v for v in PORTRAITS_128.factors[factor] if v != first[factor]])
            seed = rng.random()
            pair = [
                render(p, seed, world=PORTRAITS_128)
                for p in (first, edit_factors(first, PORTRAITS_128, **{factor: value}))
            ]
            difference = np.abs(np.subtract(*(np.asarray(image, int) for image in pair))).max(-1)
            assert (difference > 24).sum() >= 40, (first, factor, value, seed)


def test_every_style_of_the_large_world_draws_every_factor():
    assert all(
        factors_of(style, PORTRAITS_128) == list(PORTRAITS_128.factors)
        for style in PORTRAITS_128.styles
    )
    assert len(PORTRAITS_128.held_out) == 5 and not set(PORTRAITS_128.held_out) & set(
        PORTRAITS_128.styles
    )


# --- colours and numbers ---------------------------------------------------------------------------------------------


def test_colours_vary_around_their_names_by_the_seed_alone():
    first = person(PORTRAITS_128, "micah style", hair="red hair", skin="tan skin")
    colours = [colours_of(first, seed, PORTRAITS_128) for seed in range(50)]
    assert all(len({c[factor] for c in colours}) > 30 for factor in ("hair", "skin", "background"))
    assert colours_of(first, 3, PORTRAITS_128) == colours[3]
    changed = [
        colours_of(edit_factors(first, PORTRAITS_128, hair="blue hair"), s, PORTRAITS_128)
        for s in range(50)
    ]
    assert all(
        a["skin"] == b["skin"] and a["background"] == b["background"]
        for a, b in zip(colours, changed)
    )
    assert not {c["hair"] for c in colours} & {c["hair"] for c in changed}
    assert colours_of(first, 1) == colours_of(
        first, 2
    )  # in the small world each name is one colour


def test_skins_run_from_light_to_dark_without_overlap():
    lightness = {}
    for name in PORTRAITS_128.factors["skin"]:
        people = [
            Portrait({"style": "micah style", "skin": name}, str(s), Placement(False, 1, 0, 0, 0))
            for s in range(300)
        ]
        people = [
            Portrait(p.factors | {"background": "white background"}, p.seed, p.placement)
            for p in people
        ]
        lightness[name] = [numbers_of(p, PORTRAITS_128)["skin L*"] for p in people]
    light, tan, dark = lightness.values()
    assert min(light) > max(tan) and min(tan) > max(dark)
    assert min(light) - max(tan) < 2 and min(tan) - max(dark) < 2  # and they all but meet


def test_numbers_are_those_of_the_picture():
    from PIL import ImageColor

    from sliderspace.portraits.world import lab_of

    one = portrait(5, 1, PORTRAITS_128)
    numbers = numbers_of(one, PORTRAITS_128)
    assert list(numbers) == NUMBERS
    corner = one.image(world=PORTRAITS_128).getpixel((0, 0))
    colour = colours_of(one.factors, one.seed, PORTRAITS_128)["background"]
    assert corner == ImageColor.getrgb(colour)
    assert [numbers[f"background {axis}"] for axis in ("L*", "a*", "b*")] == list(lab_of(colour))
    placed = [numbers[name] for name in ("mirrored", "zoom", "shift x", "shift y", "tilt")]
    assert placed == [
        one.placement.mirrored,
        one.placement.zoom,
        one.placement.shift_x,
        one.placement.shift_y,
        one.placement.tilt,
    ]


def test_numbers_need_no_drawing_and_fit_the_data_set():
    numbers = dataset_numbers(40, 2, PORTRAITS_128)
    images, _ = dataset(3, 2, world=PORTRAITS_128)
    for i, picture in enumerate(images):
        one = portrait(2, i, PORTRAITS_128)
        assert np.array_equal(picture, np.asarray(one.image(world=PORTRAITS_128)))
        assert np.allclose(numbers[i], list(numbers_of(one, PORTRAITS_128).values()))
    assert np.isfinite(numbers).all() and (numbers.std(0) > 0).all()


def test_numbers_of_what_a_style_does_not_draw_are_unknown():
    one = Portrait(person(PORTRAITS_64, "shadows style"), "0", sample_placement(random.Random(0)))
    numbers = numbers_of(one)
    assert np.isnan([numbers["skin L*"], numbers["hair b*"]]).all() and np.isfinite(
        numbers["background L*"]
    )


# --- factors and captions --------------------------------------------------------------------------------------------


def test_values_are_told_apart_by_their_words_alone():
    values = [v for vs in FACTORS.values() for v in vs]
    assert len(values) == len(set(values)) and not any("," in v for v in values)


@each_world
def test_factors_are_even(world):
    rng = random.Random(0)
    people = [sample_factors(rng, world) for _ in range(4500)]
    for factor, values in world.factors.items():
        often = Counter(p[factor] for p in people if factor in p)
        assert set(often) == set(values)
        expected = often.total() / len(values)
        assert all(abs(n - expected) < 5 * expected**0.5 for n in often.values()), often


def test_given_factors_are_held_and_choose_the_style():
    rng = random.Random(0)
    people = [sample_factors(rng, glasses="glasses", hair="red hair") for _ in range(100)]
    assert {(p["glasses"], p["hair"]) for p in people} == {("glasses", "red hair")}
    able = {s for s in FACTORS["style"] if {"glasses", "hair"} <= set(factors_of(s))}
    assert {p["style"] for p in people} == able < set(FACTORS["style"])


BAD = {
    "ears='big': known factors and values": dict(ears="big"),
    "hair='green hair': known factors and values": dict(hair="green hair"),
    "hair=None: known factors": dict(hair=None),
    "style='oil style': known factors": dict(style="oil style"),
    "line face style draws only .*, not all of .*'glasses'": dict(
        style="line face style", glasses="glasses"
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_unknown_and_absent_factors_are_refused(message):
    with pytest.raises(ValueError, match=message):
        sample_factors(random.Random(0), **BAD[message])


def test_unknown_styles_are_refused():
    with pytest.raises(ValueError, match="style must be one of .*, not 'lorelei'"):
        factors_of("lorelei")
    with pytest.raises(ValueError, match="style='micah style': known factors and values"):
        sample_factors(random.Random(0), style="micah style")  # of the other world


def test_held_out_styles_are_drawn_when_asked_for_and_never_otherwise():
    rng = random.Random(0)
    assert {sample_factors(rng, PORTRAITS_128)["style"] for _ in range(300)} == set(
        PORTRAITS_128.styles
    )
    shadow = person(PORTRAITS_128, "shadows style")
    assert parse_caption(caption(shadow), PORTRAITS_128) == shadow
    assert factor_ids([shadow], PORTRAITS_128)["style"].tolist() == [-1]


@each_style
def test_captions_are_read_back(world, style):
    for seed in range(20):
        factors, rng = person(world, style, seed), random.Random(seed)
        assert parse_caption(caption(factors), world) == factors
        some = caption(factors, rng)
        named = parse_caption(some, world)
        assert some.startswith(PROMPT) and named.items() <= factors.items()
        assert caption(named) == some


def test_other_words_are_not_taken_for_factors():
    assert parse_caption("a man with glasses, smilingly, Red Hair,, ") == {}
    assert parse_caption("hat,  red hair ,no glasses") == {
        "hair": "red hair",
        "glasses": "no glasses",
    }


@each_world
def test_every_style_meets_the_bare_caption_equally_often(world):
    # otherwise the plain prompt would mean the styles with few factors
    rng, count = random.Random(0), 500
    for style in world.styles:
        bare = sum(
            caption(sample_factors(rng, world, style=style), rng) == PROMPT for _ in range(count)
        )
        assert abs(bare / count - 0.2) < 4 * (0.2 * 0.8 / count) ** 0.5, style


# --- data ------------------------------------------------------------------------------------------------------------


@each_world
def test_a_sample_depends_on_its_index_and_seed_alone(world):
    images, people = dataset(4, seed=3, size=24, world=world)
    random.seed(1)
    fewer, same = dataset(2, seed=3, size=24, world=world)
    assert images.shape == (4, 24, 24, 3) and images.dtype == np.uint8
    assert np.array_equal(images[:2], fewer) and people[:2] == same
    others, _ = dataset(4, seed=4, size=24, world=world)
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
    assert all(
        j.getpixel(corner) == image.getpixel((0, 0))
        for j in seen
        for corner in ((0, 0), (39, 0), (0, 39))
    )
    assert jitter(image, random.Random(3)).tobytes() == seen[3].tobytes()
    share = np.stack([(np.asarray(j)[..., 0] > 128).mean() for j in seen])  # of the white square
    assert abs(share / 0.25 - 1).max() < 0.25 and share.std() > 0


@each_world
def test_placements_stay_within_the_worlds_bounds_and_reach_them(world):
    placed = [sample_placement(random.Random(seed), world) for seed in range(400)]
    for name, bound in (("shift_x", world.shift), ("shift_y", world.shift), ("tilt", world.tilt)):
        values = np.array([getattr(p, name) for p in placed])
        assert (
            abs(values).max() <= bound
            and abs(values).max() >= 0.98 * bound
            and abs(values.mean()) <= 0.1 * bound
        )
    zooms = np.array([p.zoom for p in placed])
    assert (
        abs(zooms - 1).max() <= world.zoom + 1e-12 and 150 < sum(p.mirrored for p in placed) < 250
    )


def test_what_a_shift_uncovers_continues_the_drawing():
    image = Image.new("RGB", (40, 40), "teal")
    image.paste("white", (10, 20, 30, 40))  # shoulders that end at the lower edge
    down = Placement(False, 1.0, 0.0, 0.05, 0.0)
    assert down.apply(image, extend=False).getpixel((20, 39)) == image.getpixel((0, 0))
    assert down.apply(image, extend=True).getpixel((20, 39)) == (255, 255, 255)
    still = Placement(False, 1.0, 0.0, 0.0, 0.0)
    assert all(still.apply(image, extend).tobytes() == image.tobytes() for extend in (False, True))


def test_mirrored_zoomed_shifted_tilted_as_the_numbers_say():
    image = Image.new("RGB", (100, 100), "teal")
    image.paste("white", (60, 40, 80, 50))  # right of the middle, a little above it

    def middle(placement):
        rows, columns = np.nonzero(np.asarray(placement.apply(image, True))[..., 0] > 128)
        return columns.mean() + 0.5, rows.mean() + 0.5, len(rows)

    x, y, size = middle(Placement(False, 1.0, 0.0, 0.0, 0.0))
    assert (x, y, size) == (70, 45, 200)
    assert middle(Placement(True, 1.0, 0.0, 0.0, 0.0))[:2] == (30, 45)
    assert middle(Placement(False, 1.0, 0.1, -0.1, 0.0))[:2] == pytest.approx((60, 55), abs=0.1)
    assert middle(Placement(False, 2.0, 0.0, 0.0, 0.0))[2] == pytest.approx(50, rel=0.15)
    tilted = middle(
        Placement(False, 1.0, 0.0, 0.0, 90.0)
    )  # the window turns, so the portrait does the other way
    assert tilted[:2] in (pytest.approx((45, 30), abs=1), pytest.approx((55, 70), abs=1))


# --- classifier ------------------------------------------------------------------------------------------------------


@each_world
def test_the_classifier_has_an_answer_for_every_factor(world):
    people = [person(world, style) for style in world.styles]
    ids = factor_ids(people, world)
    logits = FactorClassifier(4, world).eval()(torch.zeros(2, 3, world.size, world.size))
    for factor, values in world.factors.items():
        assert logits[factor].shape == (2, len(values))
        assert ids[factor].tolist() == [
            values.index(p[factor]) if factor in p else -1 for p in people
        ]
    assert ids["style"].tolist() == list(range(len(world.styles)))
    assert (ids["glasses"].min() == -1) == (
        world is PORTRAITS_64
    )  # not every style of the small one has them


def test_numbers_are_read_beside_the_factors():
    network = FactorClassifier(4, PORTRAITS_128).eval()
    x = torch.rand(2, 3, 128, 128) * 2 - 1
    logits, numbers = network.read(x)
    assert numbers.shape == (2, len(NUMBERS))
    assert all(torch.equal(logits[factor], plain) for factor, plain in network(x).items())


def test_the_bundled_classifier_names_factors_and_knows_no_numbers():
    images, people = dataset(20, seed=77)
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    seen, ids = score_factors(x), factor_ids(people)
    assert all(
        (seen[f].argmax(1) == ids[f])[ids[f] >= 0].float().mean() > 0.9
        for f in FACTORS
        if f != "mouth"
    )
    with pytest.raises(
        ValueError, match="a model of portraits-64, whose numbers nothing was trained to read"
    ):
        score_numbers(x, asset_path())


def test_edit_pairs_of_either_world_differ_in_one_factor():
    for world in WORLDS.values():
        before, after, people = counterfactual_pairs(3, "glasses", "glasses", size=32, world=world)
        assert before.shape == after.shape == (3, 32, 32, 3) and all(
            p["glasses"] == "glasses" for p in people
        )
        assert all((a != b).any() for a, b in zip(before, after))


# --- the next model --------------------------------------------------------------------------------------------------


def test_the_next_model_reads_its_world():
    folder = Path(__file__).parents[1] / "portraits-next"
    assert world_of(folder) is PORTRAITS_128
    images, people = dataset(48, seed=78, world=PORTRAITS_128)
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    seen, ids = score_factors(x, folder), factor_ids(people, PORTRAITS_128)
    assert all((seen[f].argmax(1) == ids[f]).float().mean() > 0.9 for f in ids)
    truth = torch.from_numpy(dataset_numbers(48, 78, PORTRAITS_128))
    explained = 1 - (score_numbers(x, folder) - truth).pow(2).mean(0) / truth.var(0, correction=0)
    assert explained.min() > 0.6 and explained.mean() > 0.9


def test_the_next_model_draws_what_captions_name():
    from sliderspace import load
    from sliderspace.sampling.generate import generate_images

    folder = Path(__file__).parents[1] / "portraits-next"
    model = load(str(folder), steps=8, guidance=3.0, device="cpu")
    people = [person(PORTRAITS_128, style, seed=5) for style in PORTRAITS_128.styles]
    images = generate_images(model, [caption(one) for one in people], len(people), seed=1)
    assert images.shape == (6, 3, 128, 128)
    seen = score_factors(images, folder)["style"].argmax(1)
    assert (seen == torch.arange(6)).sum() >= 5
