"""The map explorer: samples by number or circled, one's own image, and the board that goes where they are."""

import builtins
from io import BytesIO

import pytest
from PIL import Image
from tiny import PROMPT, quiet, random_directions, random_space
from torch.testing import assert_close
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from sliderspace import discover
from sliderspace.features.encoders import pixel_encoder
from sliderspace.viz.sample_explorer import explorer
from sliderspace.directions.embedding import embed_2d
from sliderspace.viz.board_widget import board


@pytest.fixture(scope="module")
def found(model):
    return discover(model, PROMPT, samples=24, n_directions=4, progress=quiet)


@pytest.fixture
def live(model):
    space = random_space(
        model, ["one", "two", "three"], card={"sliders": [{"direction": 2}, {"direction": 0}, {}]}
    )
    shown = board(model, space, steps=1, thumbnails=False)
    yield shown
    shown.close()


def test_a_sample_by_number_and_the_board_at_its_place(model, found, live):
    shown = explorer(model, found, embed_2d(found, "pca", neighbours=5), live)
    shown.sample.value = 5
    at = found.project(found.samples.features[5:6, -1])[0]
    assert_close(shown.at, at)
    picture = pil_to_tensor(Image.open(BytesIO(shown.picture.value)))[:, ::2, ::2]
    own = pil_to_tensor(to_pil_image(model.decode(found.samples.latents[5:6])[0]))
    assert (picture.int() - own.int()).abs().max() <= 1
    shown.set_from_coordinates.click()
    expected = {"one": at[2], "two": at[0]}
    assert live.mix == {
        n: max(-2.0, min(2.0, round(s.item(), 1)))
        for n, s in expected.items()
        if round(s.item(), 1)
    }


def test_circled_points_come_back_as_samples(model, found):
    made = embed_2d(found, "pca", steps="all", neighbours=5)
    shown = explorer(model, found, made)
    shown._circled([0, 1, made.samples.tolist().index(7), made.samples.tolist().index(3)])
    assert (
        shown.samples == sorted({made.samples[0].item(), made.samples[1].item(), 7, 3})
        and shown.set_from_coordinates.disabled
    )
    shown._circled([])  # nothing circled: what was shown stays
    assert len(shown.samples) > 1


def test_ones_own_image_is_placed_and_a_file_that_is_none_is_said(model, found, live):
    shown = explorer(model, found, embed_2d(found, "pca", neighbours=5), live)
    image, data = to_pil_image(model.decode(found.samples.latents[3:4])[0]), BytesIO()
    image.save(data, "png")
    shown._try(shown._read, memoryview(data.getvalue()))
    assert shown.says.value.startswith("your image lies at") and not shown.samples
    assert_close(
        shown.at, found.project(found.samples.features[3:4, -1])[0], rtol=0, atol=0.3
    )  # but for the autoencoder
    shown._try(shown._read, memoryview(b"<script>"))
    assert "UnidentifiedImageError" in shown.says.value and shown.says._view_name == "LabelView"


def test_without_the_map_widget_samples_are_chosen_by_number(model, found, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **options):
        if name == "jscatter":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    shown = explorer(model, found, embed_2d(found, "pca", neighbours=5))
    still, says = shown.scatter.children
    assert (
        bytes(still.value).startswith(b"\x89PNG") and "choose samples by their number" in says.value
    )
    shown.sample.value = 2
    assert shown.samples == [2]


def test_sliders_without_directions_have_no_place(tiny):
    found = random_directions(tiny, pixel_encoder(4))
    live = board(tiny, random_space(tiny, ["one"]), PROMPT, steps=1, thumbnails=False)
    shown = explorer(tiny, found, embed_2d(found, "pca", neighbours=5), live)
    shown.set_from_coordinates.click()
    assert (
        "none of these sliders was found along a direction" in shown.says.value and live.mix == {}
    )
    with pytest.raises(ValueError, match="none of these sliders"):
        live.set_from_coordinates(shown.at)
    live.close()
