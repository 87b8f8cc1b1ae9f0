"""Sliders act in any call inside their `with` and nowhere else; files keep them; exports work without this package."""

import gc
from collections import namedtuple
from dataclasses import replace
from weakref import ref

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import PROMPT, random_directions, random_space
from torch.testing import assert_close

from sliderspace import load
from sliderspace.features.encoders import pixel_encoder
from sliderspace.sampling.generate import generate_images
from sliderspace.sliders.space import SliderSpace, detach

LABELS = ["hair", "hat", "age"]


@pytest.fixture
def space(tiny):
    return random_space(tiny, LABELS)


def images(model, count=2, guidance=3.0):
    """Images from a plain call of a pipeline: of a model, or of a pipeline on its own."""
    pipe = getattr(model, "pipe", model)
    noise = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return pipe(
        PROMPT,
        num_images_per_prompt=count,
        latents=noise,
        num_inference_steps=2,
        guidance_scale=guidance,
        output_type="pt",
    ).images


def with_sliders(space, model, mix, **options):
    with space.on(model, mix, **options):
        return images(model)


def assert_same_tensors(one, other):
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# --- on and off ------------------------------------------------------------------------------------------------------


def test_sliders_change_images_inside_the_with_only(tiny, space):
    base = images(tiny)
    with space.on(tiny, {"hat": 1.5}) as inside:
        assert inside is space
        assert (images(tiny) - base).abs().max() > 1e-3
    assert torch.equal(images(tiny), base)  # attached still, and off
    assert torch.equal(with_sliders(space, tiny, {}), base)
    assert torch.equal(with_sliders(space, tiny, {"hat": 0}), base)
    detach(tiny)
    assert torch.equal(images(tiny), base)
    detach(tiny)  # nothing is there: nothing happens


def test_a_with_in_a_with_restores_the_outer_mix_and_window(tiny, space):
    outer, inner = {"hair": 1}, {"hair": -1, "age": 1}
    alone = with_sliders(space, tiny, inner)
    with space.on(tiny, outer, start=0.6):
        before = images(tiny)
        with space.on(tiny, inner):
            assert torch.equal(images(tiny), alone)
        assert torch.equal(images(tiny), before)
    assert not torch.equal(before, alone) and not torch.equal(before, images(tiny))


def test_an_exception_inside_the_with_switches_off(tiny, space):
    base = images(tiny)
    with pytest.raises(InterruptedError):
        with space.on(tiny, {"hat": 1}):
            raise InterruptedError
    assert torch.equal(images(tiny), base)


def test_a_bad_mix_inside_a_with_changes_nothing(tiny, space):
    with space.on(tiny, {"hat": 1}):
        before = images(tiny)
        for bad, options in (
            ({"hat": float("nan")}, {}),
            ({"hat": -1}, {"start": 0.7, "stop": 0.2}),
        ):
            with pytest.raises(ValueError):
                with_sliders(space, tiny, bad, **options)
        assert torch.equal(images(tiny), before)


def test_another_space_takes_the_place_of_one_that_is_off(tiny, space):
    other = random_space(tiny, ["nose"], rank=2, seed=3, targets="keys-values")
    alone = with_sliders(other, tiny, {0: 1})
    first = with_sliders(space, tiny, {0: 1})
    assert torch.equal(with_sliders(other, tiny, {0: 1}), alone) and not torch.equal(first, alone)
    with space.on(tiny, {0: 1}):
        with pytest.raises(
            ValueError, match="sliders of another space are on: leave its `with` first"
        ):
            with_sliders(other, tiny, {0: 1})
        assert torch.equal(images(tiny), first)


def test_a_window_keeps_the_first_steps(tiny, space):
    whole = with_sliders(space, tiny, {0: 2})
    assert torch.equal(with_sliders(space, tiny, {0: 2}, start=0.0, stop=1.0), whole)
    assert torch.equal(
        with_sliders(space, tiny, {0: 2}, start=0.999), images(tiny)
    )  # the last step is at t=1
    late, early = (
        with_sliders(space, tiny, {0: 2}, **w) for w in (dict(start=0.6), dict(stop=0.6))
    )
    assert len(torch.unique(torch.stack([whole, late, early]).flatten(1), dim=0)) == 3


def test_a_model_can_be_forgotten(tiny_folder):
    # a space must not keep the models alive that it was used on: each is some gigabytes
    model = load(tiny_folder("epsilon"), device="cpu")
    space = random_space(model, targets="keys-values")
    space.attach(model)
    net = ref(model.denoiser)
    del model
    gc.collect()
    assert net() is None


def test_sliders_work_again_after_the_user_unloads_a_lora(fresh):
    # `unload_lora_weights` takes every adapter off, the one of the sliders too
    space, other = (random_space(fresh, ["one", "two"], seed=s) for s in (0, 1))
    expected = with_sliders(space, fresh, {0: 1})
    fresh.pipe.load_lora_weights(other.to_lora_state_dict({1: 1}), adapter_name="mine")
    fresh.pipe.unload_lora_weights()
    assert_close(with_sliders(space, fresh, {0: 1}), expected, rtol=0, atol=1e-5)


def test_sliders_work_beside_a_lora_that_comes_later(fresh):
    space, other = (random_space(fresh, ["one", "two"], seed=s) for s in (0, 1))
    fresh.pipe.load_lora_weights(other.to_lora_state_dict({1: 1}), adapter_name="mine")
    expected, lora = with_sliders(space, fresh, {0: 1}), images(fresh)
    assert not torch.equal(expected, lora)
    detach(fresh)
    fresh.pipe.unload_lora_weights()
    space.attach(fresh)
    fresh.pipe.load_lora_weights(other.to_lora_state_dict({1: 1}), adapter_name="mine")
    fresh.pipe.set_adapters("mine")
    assert_close(images(fresh), lora, rtol=0, atol=1e-5)
    assert_close(with_sliders(space, fresh, {0: 1}), expected, rtol=0, atol=1e-5)


# --- mixes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mix, expected",
    [
        ({"hat": 1.5}, [0, 1.5, 0]),
        ({1: 1.5}, [0, 1.5, 0]),
        ({-1: -2, "hair": 1}, [1, 0, -2]),
        ({}, [0, 0, 0]),
        ([1, 0, -0.5], [1, 0, -0.5]),
        ((1, 0, -0.5), [1, 0, -0.5]),
        (torch.tensor([1, 0, -0.5]), [1, 0, -0.5]),
        ([{"hat": 1}, {-1: 2}], [[0, 1, 0], [0, 0, 2]]),
        ([{"hat": 1}, [1, 2, 3]], [[0, 1, 0], [1, 2, 3]]),
        (torch.eye(3)[:2], [[1, 0, 0], [0, 1, 0]]),
    ],
    ids=str,
)
def test_mixes_come_in_many_ways(space, mix, expected):
    assert_close(space.strengths(mix), torch.tensor(expected).float(), rtol=0, atol=0)


def test_labels_that_look_like_numbers_are_labels(tiny):
    space = random_space(tiny, ["1", "0", "-1"])
    assert [space.index(s) for s in ("1", "0", "-1", 1, 0, -1)] == [0, 1, 2, 1, 0, 2]


@pytest.mark.parametrize("slider", ["beard", 3, -4, None, 1.0, "0"])
def test_unknown_sliders_are_refused(tiny, space, slider):
    message = (
        r"no slider {!r}: there are numbers 0 to 2 and labels \['hair', 'hat', 'age'\]".format(
            slider
        )
    )
    for use in (
        lambda: space.index(slider),
        lambda: space.strengths({slider: 1}),
        lambda: space.subset([slider]),
        lambda: space.strengths([{0: 1}, {slider: 1}]),
        lambda: with_sliders(space, tiny, {slider: 1}),
    ):
        with pytest.raises(KeyError, match=message):
            use()


@pytest.mark.parametrize(
    "mix, shape",
    [
        ([1, 2], "(2,)"),
        ([], "(0,)"),
        ([[1, 2]], "(2,)"),
        (1.0, "()"),
        (torch.zeros(2, 2, 3), "(2, 2, 3)"),
    ],
    ids=str,
)
def test_mixes_of_another_length_are_refused(space, mix, shape):
    with pytest.raises(ValueError) as error:
        space.strengths(mix)
    assert str(error.value) == f"a mix has one strength for each of 3 sliders, not shape {shape}"


def test_every_image_has_its_own_mix(tiny, space):
    mixes = [{"hair": 1}, {"age": -2, 1: 0.5}]
    both = with_sliders(space, tiny, mixes)
    for i, mix in enumerate(mixes):
        assert_close(both[i], with_sliders(space, tiny, mix)[i], rtol=0, atol=1e-5)
    assert (both - images(tiny)).abs().amax((1, 2, 3)).min() > 1e-3


def test_ways_to_name_a_slider_give_one_image(tiny, space):
    named = [with_sliders(space, tiny, mix) for mix in ({"age": -1}, {2: -1}, {-1: -1}, [0, 0, -1])]
    assert all(torch.equal(one, named[0]) for one in named)


def test_our_own_sampler_sees_the_sliders(tiny, space):
    base = generate_images(tiny, PROMPT, 1, steps=2)
    with space.on(tiny, {"hat": 1}):
        assert (generate_images(tiny, PROMPT, 1, steps=2) - base).abs().max() > 1e-3
    assert torch.equal(generate_images(tiny, PROMPT, 1, steps=2), base)


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_file_holds_all_of_it(tiny, tmp_path):
    rows = [{"alignment": 0.5, "leakage": 0.1}] * 3
    space = random_space(tiny, ["héllo 頭", "", "a/b"], rank=2, card={"sliders": rows})
    space = replace(space, ranges=torch.rand(3, 2))
    expected = with_sliders(space, tiny, {0: 1, 2: -1})
    space.save(tmp_path / "space.safetensors")
    again = SliderSpace.load(tmp_path / "space.safetensors", tiny)
    assert (again.labels, again.rank, again.card) == (space.labels, 2, space.card)
    assert torch.equal(again.ranges, space.ranges)
    assert_same_tensors(again.down, space.down)
    assert_same_tensors(again.up, space.up)
    assert torch.equal(with_sliders(again, tiny, {"héllo 頭": 1, "a/b": -1}), expected)


def test_one_content_always_makes_the_same_bytes(tiny, space, tmp_path):
    # many times: an order that is drawn by chance agrees often enough
    files = set()
    for _ in range(10):
        space.save(tmp_path / "space")
        (exported,) = space.export(tmp_path, {0: 1})
        files.add((tmp_path / "space").read_bytes() + exported.read_bytes())
    assert len(files) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-8],
        lambda data: data[:3],
        lambda data: b"{}" + data,
        lambda data: b"",
        lambda data: b"not tensors",
    ],
)
def test_a_damaged_file_is_a_clear_error(space, tmp_path, damage):
    path = tmp_path / "space.safetensors"
    space.save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="space.safetensors' is damaged or not a safetensors file"):
        SliderSpace.load(path)


def test_foreign_and_missing_files_are_refused(tiny, tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "lora.safetensors")
    random_directions(tiny, pixel_encoder(2)).save(tmp_path / "found.safetensors")
    with pytest.raises(
        ValueError, match="lora.safetensors' is not a sliderspace file, wanted: space"
    ):
        SliderSpace.load(tmp_path / "lora.safetensors")
    with pytest.raises(
        ValueError, match="found.safetensors' is a sliderspace directions file, wanted: space"
    ):
        SliderSpace.load(tmp_path / "found.safetensors")
    with pytest.raises(FileNotFoundError, match="no such file: .*none"):
        SliderSpace.load(tmp_path / "none")


# --- other models ----------------------------------------------------------------------------------------------------


def uses(space, model, path, **options):
    """The ways to bring a space onto a model."""
    space.save(path)
    return (
        lambda: SliderSpace.load(path, model, **options),
        lambda: space.attach(model, **options),
        lambda: with_sliders(space, model, {0: 1}, **options),
    )


def test_other_weights_are_refused_but_for_a_transfer(space, tiny_of, tmp_path):
    other = tiny_of("epsilon", seed=1)
    base = images(other)
    for use in uses(space, other, tmp_path / "space"):
        with pytest.raises(
            ValueError, match="made for the weights of 'tiny', and 'tiny' has others; transfer=True"
        ):
            use()
    assert torch.equal(images(other), base)
    *_, use = uses(space, other, tmp_path / "space", transfer=True)
    try:
        assert (use() - base).abs().max() > 1e-3
        assert SliderSpace.load(tmp_path / "space", other, transfer=True).labels == LABELS
    finally:
        detach(other)


@pytest.mark.parametrize("transfer", [False, True])
def test_other_shapes_are_refused(space, tiny_of, tmp_path, transfer):
    other = tiny_of("epsilon", words=48)
    for use in uses(space, other, tmp_path / "space", transfer=transfer):
        with pytest.raises(
            ValueError, match="made for 'tiny', whose layers have other shapes than 'tiny''s"
        ):
            use()
    assert not hasattr(other.denoiser, "peft_config")


def test_missing_layers_are_refused(tiny, space, tmp_path):
    moved = replace(
        space,
        down={f"elsewhere.{n}": a for n, a in space.down.items()},
        up={f"elsewhere.{n}": b for n, b in space.up.items()},
    )
    for use in uses(moved, tiny, tmp_path / "space", transfer=True):
        with pytest.raises(
            ValueError, match="tiny lacks layers of these sliders .*elsewhere.*made for tiny"
        ):
            use()


def test_a_model_with_sliders_on_it_is_the_same_model(tiny, space):
    space.attach(tiny)
    random_space(tiny, ["other"]).check(tiny)
    space.check(tiny)


def test_one_space_serves_two_models(space, tiny, fresh):
    expected = with_sliders(space, tiny, {0: 1})
    with space.on(tiny, {1: 1}):
        assert_close(with_sliders(space, fresh, {0: 1}), expected, rtol=0, atol=1e-6)
        assert not torch.equal(images(tiny), expected)


# --- parts and sums --------------------------------------------------------------------------------------------------


def test_some_of_the_sliders_are_taken(tiny):
    rows = [{"alignment": a} for a in (0.1, 0.2, 0.3)]
    space = replace(
        random_space(tiny, LABELS, rank=2, card={"sliders": rows}),
        ranges=torch.arange(6.0).reshape(3, 2),
    )
    part = space.subset(["age", 0])
    assert len(part) == 2 and (part.labels, part.card["sliders"]) == (
        ["age", "hair"],
        [rows[2], rows[0]],
    )
    assert torch.equal(part.ranges, space.ranges[[2, 0]])
    assert len(space) == 3 and space.card["sliders"] == rows  # untouched
    assert_close(
        with_sliders(part, tiny, [2, -1]), with_sliders(space, tiny, [-1, 0, 2]), rtol=0, atol=1e-5
    )


def test_parts_and_sums_keep_what_was_measured_in_step(tiny):
    cosines = torch.rand(3, 3)
    card = {
        "sliders": [{"alignment": a} for a in cosines.diag().tolist()],
        "cosines": cosines.tolist(),
    }
    space = random_space(tiny, LABELS, card=card)
    for other in (space.subset([2, 0]), space + space):
        assert "cosines" not in other.card or len(other.card["cosines"]) == len(other)


@pytest.mark.parametrize("rank", [1, 2])
def test_spaces_add_up(tiny, rank):
    one, other = random_space(tiny, LABELS, rank), random_space(tiny, ["nose", "hat"], rank, seed=1)
    both = one + other
    assert both.labels == [*LABELS, "nose", "hat (2)"] and both.ranges.shape == (5, 2)
    assert_close(
        with_sliders(both, tiny, {"hat": 1}), with_sliders(one, tiny, {"hat": 1}), rtol=0, atol=1e-5
    )
    assert_close(
        with_sliders(both, tiny, {"hat (2)": 1}),
        with_sliders(other, tiny, {"hat": 1}),
        rtol=0,
        atol=1e-5,
    )
    assert torch.equal(
        both.up["mid_block.attentions.0.transformer_blocks.0.attn2.to_k"][:, : 3 * rank],
        one.up["mid_block.attentions.0.transformer_blocks.0.attn2.to_k"],
    )


@pytest.mark.parametrize(
    "labels", [(["a"], ["a"], ["a"]), (["a"], ["a", "a (2)"]), (["a", "a (2)"], ["a"])], ids=str
)
def test_labels_stay_unique(tiny, labels):
    first, *others = (random_space(tiny, names, targets="keys-values") for names in labels)
    total = sum(others, first)
    assert len(set(total.labels)) == len(total) == sum(map(len, labels))
    assert total.labels[: len(first)] == first.labels


def test_a_sum_keeps_each_sliders_measures(tiny, space):
    measured = random_space(tiny, ["nose"], seed=1, card={"sliders": [{"alignment": 0.75}]})
    assert (space + measured).card["sliders"] == [{}, {}, {}, {"alignment": 0.75}]


def test_spaces_over_different_layers_add_up(tiny, space):
    narrow = random_space(tiny, ["nose"], rank=2, seed=1, targets="keys-values")
    for both in (space + narrow, narrow + space):
        assert set(both.down) == set(space.down) | set(narrow.down) and both.rank == max(
            space.rank, narrow.rank
        )
        both.check(tiny)
        for own, label in ((space, LABELS[0]), (narrow, "nose")):
            with own.on(tiny, {label: 1.5}):
                alone = generate_images(tiny, PROMPT, 2)
            with both.on(tiny, {label: 1.5}):
                assert_close(generate_images(tiny, PROMPT, 2), alone, rtol=0, atol=1e-5)
    detach(tiny)


def other_weights(space):
    marks = space.card["fingerprint"]
    return dict(
        card={"fingerprint": marks | {"weights": dict.fromkeys(marks["weights"], "0" * 12)}}
    )


def test_misfits_do_not_add_up(tiny, space):
    elsewhere = random_space(tiny, card={"model": "another"})
    moved = replace(
        elsewhere,
        down={f"else.{n}": w for n, w in elsewhere.down.items()},
        up={f"else.{n}": w for n, w in elsewhere.up.items()},
    )
    for other in (
        random_space(tiny, card={"fingerprint": {}}),
        random_space(tiny, **other_weights(space)),
        moved,
    ):
        for one, two in ((space, other), (other, space)):
            with pytest.raises(ValueError, match="only spaces of one model add up, not of "):
                one + two


# --- exports ---------------------------------------------------------------------------------------------------------

Exported = namedtuple("Exported", "space model pipe")


@pytest.fixture(scope="module")
def exported(tiny_of, tiny_folder):
    """Sliders on our model, and a plain pipeline that never saw this package."""
    space = random_space(tiny_of("epsilon"), LABELS, rank=2)
    yield Exported(
        space, tiny_of("epsilon"), StableDiffusionPipeline.from_pretrained(tiny_folder("epsilon"))
    )
    detach(tiny_of("epsilon"))


def loaded(pipe, path, scale=1.0):
    """Images of a plain pipeline with one LoRA file, which is taken off again."""
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name="file")
    pipe.set_adapters("file", scale)
    try:
        return images(pipe)
    finally:
        pipe.unload_lora_weights()


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_a_file_for_each_slider_loads_elsewhere(exported, tmp_path, format):
    space, model, pipe = exported
    paths = space.export(tmp_path / "new", format=format)
    assert [p.name for p in paths] == [
        "00-hair.safetensors",
        "01-hat.safetensors",
        "02-age.safetensors",
    ]
    base = images(pipe)
    for i, (path, scale) in enumerate(zip(paths, (1.0, -1.5, 0.5))):
        theirs = loaded(pipe, path, scale)
        assert (theirs - base).abs().max() > 1e-3
        assert_close(theirs, with_sliders(space, model, {i: scale}), rtol=0, atol=1e-4)
    assert_close(images(pipe), base, rtol=0, atol=0)


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
@pytest.mark.parametrize("mix", [{"hair": 1, "age": -2}, [0.5, 0, 0]], ids=str)
def test_a_folded_mix_loads_elsewhere(exported, tmp_path, format, mix):
    space, model, pipe = exported
    (path,) = space.export(tmp_path, mix, format)
    assert path.name == "mix.safetensors"
    assert_close(loaded(pipe, path), with_sliders(space, model, mix), rtol=0, atol=1e-4)
    used = sum(s != 0 for s in space.strengths(mix).tolist())
    ranks = {
        t.shape[0]
        for k, t in load_file(path).items()
        if k.endswith(("lora_down.weight", "lora_A.weight"))
    }
    assert ranks == {used * space.rank}  # sliders at 0 take no room


def test_formats_have_their_own_names(exported, tmp_path):
    keys = {
        f: load_file(exported.space.export(tmp_path / f, {0: 1}, f)[0])
        for f in ("kohya", "diffusers")
    }
    assert all(k.startswith("lora_unet_") for k in keys["kohya"])
    assert all(
        k.startswith("unet.") and k.endswith(("lora_A.weight", "lora_B.weight"))
        for k in keys["diffusers"]
    )
    alphas = {t.item() for k, t in keys["kohya"].items() if k.endswith(".alpha")}
    assert alphas == {2} and len(keys["kohya"]) == 3 * len(exported.space.down)


def test_a_file_says_its_range(exported, tmp_path):
    space = replace(exported.space, ranges=torch.tensor([[-1, 2], [-3, 4], [0, 1.5]]))
    hints = []
    for path in (*space.export(tmp_path), *space.export(tmp_path, {0: 1})):
        with safe_open(path, "pt") as f:
            hints.append(f.metadata()["modelspec.usage_hint"])
    assert (
        hints[1] == "strength -3.0 to 4.0"
        and hints[3] == "hair -1.0 to 2.0, hat -3.0 to 4.0, age 0.0 to 1.5"
    )


ODD = [
    "../../etc/passwd",
    "a/b\\c:d*?",
    "",
    "  ",
    "naïve 帽子",
    "same",
    "same!",
    "x" * 300,
    "con\n\t",
    "帽" * 100,
]


def test_labels_with_odd_characters_make_plain_file_names(tiny, tmp_path):
    space = random_space(tiny, ODD, targets="keys-values")
    paths = space.export(tmp_path / "out")
    assert sorted(tmp_path.rglob("*.safetensors")) == sorted(paths) and len(set(paths)) == len(ODD)
    for i, path in enumerate(paths):
        assert path.parent == tmp_path / "out" and path.name.startswith(f"{i:02d}")
        assert not set(path.stem) & set('/\\:*?"<>| \n\t.') and path.stat().st_size
    assert "naïve-帽子" in paths[4].name


@pytest.mark.parametrize("mix", [{}, {"hair": 0}, [0, 0, 0], [[1, 0, 0], [0, 1, 0]]], ids=str)
def test_mixes_that_are_no_lora_are_refused(space, tmp_path, mix):
    with pytest.raises(
        ValueError, match="a mix to fold is one set of strengths, not all of them 0"
    ):
        space.export(tmp_path / "out", mix)


def test_a_mix_that_is_not_finite_is_not_written(space, tmp_path):
    with pytest.raises(ValueError, match="finite"):
        space.export(tmp_path, {"hair": float("nan")})


def test_bad_exports_are_refused(space, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="format must be 'kohya' or 'diffusers', not 'comfy'"):
        space.export(tmp_path, format="comfy")
    with pytest.raises(ValueError, match="cannot write into folder .*name another folder"):
        space.export(tmp_path / "file" / "out")
    with pytest.raises(KeyError, match="no slider 'beard'"):
        space.export(tmp_path, {"beard": 1})


# --- tables ----------------------------------------------------------------------------------------------------------


def test_the_table_escapes_labels(tiny):
    rows = [{"alignment": 0.123, "leakage": None}, {}]
    odd = {"model": "<b>m</b>", "prompts": ["<i>p</i>"], "sliders": rows}
    html = random_space(
        tiny, ["<script>alert(1)</script>", "a & b"], targets="keys-values", card=odd
    )._repr_html_()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html and "a &amp; b" in html
    assert not any(tag in html for tag in ("<script", "<b>", "<i>"))
    assert html.count("<tr><td>") == 2 and "0.12" in html and "-2.0 to 2.0" in html
