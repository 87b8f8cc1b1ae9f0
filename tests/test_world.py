"""Worlds: colours lie where they should, CIELAB is CIELAB, a model's folder names its world."""

import colorsys
import json
import math

import pytest

from sliderspace.models.pipeline import asset_path
from sliderspace.portraits.world import (
    PORTRAITS_64,
    PORTRAITS_128,
    WORLDS,
    Along,
    Around,
    hex_of,
    lab_of,
    rgb_of,
    style_name,
    art_name,
    world_of,
    write_world,
)


def test_hexadecimal_colours_are_read_and_written():
    for colour in ("#000000", "#ffffff", "#1f1a17", "#f7b8cf"):
        assert hex_of(rgb_of(colour)) == colour
    assert hex_of((-0.1, 0.5, 1.2)) == "#0080ff"


# published values of CIELAB under D65, such as of Bruce Lindbloom's calculator
@pytest.mark.parametrize(
    "colour, expected",
    [
        ("#ffffff", (100, 0, 0)),
        ("#000000", (0, 0, 0)),
        ("#808080", (53.59, 0, 0)),
        ("#ff0000", (53.24, 80.09, 67.20)),
        ("#00ff00", (87.73, -86.18, 83.18)),
        ("#0000ff", (32.30, 79.19, -107.86)),
    ],
)
def test_lab(colour, expected):
    assert lab_of(colour) == pytest.approx(expected, abs=0.1)


def test_around_a_name():
    fixed = Around("#cf4429")
    assert not fixed.varies and fixed.at((1, -1, 0.5)) == "#cf4429"
    near = Around("#cf4429", hue=0.02, lightness=0.1, saturation=0.1)
    assert near.varies and near.at((0, 0, 0)) == "#cf4429"
    hue, lightness, saturation = colorsys.rgb_to_hls(*rgb_of("#cf4429"))
    moved = colorsys.rgb_to_hls(*rgb_of(near.at((1, -1, -1))))
    assert moved == pytest.approx((hue + 0.02, lightness - 0.1, saturation - 0.1), abs=0.01)
    assert rgb_of(Around("#ffffff", lightness=0.5).at((0, 1, 0)))[0] < 1  # never pure white


def test_along_a_path():
    path = ((0.0, "#ffffff"), (1.0, "#808080"), (2.0, "#000000"))
    name = Along(path, middle=1.0, reach=0.5)
    assert (
        name.at((0, 9, 9)) == "#808080"
        and name.at((-1,)) == "#c0c0c0"
        and name.at((1,)) == "#404040"
    )
    assert Along(path, middle=2.0, reach=0.5).at((1,)) == "#000000"  # beyond the end, the end
    assert not Along(path, middle=1.0, reach=0.0).varies


def test_names_of_arts_and_styles():
    assert (
        art_name("open peeps style") == "open-peeps"
        and style_name("open-peeps") == "open peeps style"
    )
    for world in WORLDS.values():
        assert [style_name(art_name(style)) for style in world.styles] == list(world.styles)


def test_worlds_share_factors_and_values_but_for_styles():
    small, large = PORTRAITS_64.factors, PORTRAITS_128.factors
    assert {f: v for f, v in small.items() if f != "style"} == {
        f: v for f, v in large.items() if f != "style"
    }
    assert PORTRAITS_128.continuous and not PORTRAITS_64.continuous


def test_a_models_folder_names_its_world(tmp_path):
    write_world(tmp_path, PORTRAITS_128)
    assert world_of(tmp_path) is PORTRAITS_128 and world_of(asset_path()) is PORTRAITS_64
    (tmp_path / "world.json").write_text(json.dumps({"world": "landscapes"}))
    with pytest.raises(ValueError, match="names the world 'landscapes': known ones are"):
        world_of(tmp_path)
    (tmp_path / "world.json").unlink()
    with pytest.raises(ValueError, match="has no world.json"):
        world_of(tmp_path)


def test_no_colour_name_covers_another():
    # places at random, so that a caption's colours can be told apart in what was drawn
    import random

    rng = random.Random(0)
    for palette in (PORTRAITS_128.palettes["hair"], PORTRAITS_128.palettes["background"]):
        means = {name: lab_of(one.at((0, 0, 0))) for name, one in palette.items()}
        right = 0
        for name, one in palette.items():
            for _ in range(100):
                lab = lab_of(one.at([rng.uniform(-1, 1) for _ in range(3)]))
                right += min(means, key=lambda other: math.dist(lab, means[other])) == name
        assert right >= 98 * len(palette)
