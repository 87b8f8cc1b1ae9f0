"""Encoders see what their makers' own code sees, pass gradients on, and are refused by name when unknown."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import PREDICTION_TYPES
from torch.testing import assert_close
from torchvision.transforms.functional import pil_to_tensor

from sliderspace.features.encoders import (
    get_encoder,
    normalized_features,
    latent_encoder,
    open_clip_encoder,
    pixel_encoder,
    random_augmentation,
)
from sliderspace.models.loading import load
from sliderspace.models.pipeline import asset_path

# An ordinary open_clip model, only small: image size, mean and std are its own.
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 48, "layers": 2, "width": 64, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A folder as open_clip's `local-dir:` wants it."""
    import open_clip

    folder = tmp_path_factory.mktemp("clip") / "small-clip"
    folder.mkdir()
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**CONFIG).state_dict(), folder / "open_clip_model.safetensors")
    seen = {
        "mean": [0.48, 0.46, 0.41],
        "std": [0.27, 0.26, 0.28],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": CONFIG, "preprocess_cfg": seen})
    )
    return folder


@pytest.fixture(scope="module")
def known_name(tmp_path_factory):
    """The name of an architecture that open_clip knows from a configuration file."""
    import open_clip

    path = tmp_path_factory.mktemp("configs") / "small-known-clip.json"
    path.write_text(json.dumps(CONFIG))
    open_clip.add_model_config(path)
    return path.stem


def picture(size, seed=0):
    gen = torch.Generator().manual_seed(seed)
    blocks = torch.randint(256, (4, 4, 3), generator=gen, dtype=torch.uint8).numpy()
    return Image.fromarray(blocks).resize((size, size), Image.Resampling.BICUBIC)


def unit_range(image):
    return pil_to_tensor(image)[None] / 255


# --- open_clip -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def assert_sees_what_open_clip_sees(ours, source, pretrained, size):
    import open_clip

    net, _, preprocess = open_clip.create_model_and_transforms(
        source, pretrained=pretrained, precision="fp32"
    )
    image = picture(size)
    theirs = net.eval().encode_image(preprocess(image)[None])
    assert_close(ours(unit_range(image)), theirs, rtol=1e-4, atol=1e-4)


def test_the_bundled_clip_sees_what_open_clip_sees(model):
    ours = get_encoder(None, model)
    assert ours.name == "portraits-clip"
    assert_sees_what_open_clip_sees(ours, f"local-dir:{asset_path() / 'clip'}", None, 64)


def test_a_folder_sees_what_open_clip_sees(clip_folder):
    ours = get_encoder(str(clip_folder))
    assert ours.name == str(clip_folder)  # found again by its name
    assert_sees_what_open_clip_sees(ours, f"local-dir:{clip_folder}", None, 48)


def test_a_name_with_a_weights_file_sees_what_open_clip_sees(known_name, clip_folder):
    weights = str(clip_folder / "open_clip_model.safetensors")
    assert_sees_what_open_clip_sees(get_encoder(f"{known_name}:{weights}"), known_name, weights, 48)


@torch.no_grad()
def test_weights_get_the_activation_that_they_were_trained_with(
    known_name, clip_folder, monkeypatch
):
    # OpenAI's; open_clip's plain names have another, and it only warns
    import open_clip

    weights = str(clip_folder / "open_clip_model.safetensors")
    tag = {"url": "", "hf_hub": "", "quick_gelu": True}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, known_name, {"openai": tag})
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda *args, **options: weights)
    net, _, preprocess = open_clip.create_model_and_transforms(
        known_name, weights, force_quick_gelu=True
    )
    image = picture(48)
    theirs = net.eval().encode_image(preprocess(image)[None])
    assert_close(
        get_encoder(f"{known_name}:openai")(unit_range(image)), theirs, rtol=1e-4, atol=1e-4
    )


def test_other_sizes_are_resized_as_by_pillow(clip_folder):
    ours, image = get_encoder(str(clip_folder)), picture(96)
    small = image.resize((48, 48), Image.Resampling.BICUBIC)
    with torch.no_grad():
        assert_close(
            ours(unit_range(image)), ours(unit_range(small)), rtol=0, atol=5e-3
        )  # Pillow rounds to 1/255


def test_weights_do_not_want_gradients_and_images_get_them(clip_folder):
    ours, image = get_encoder(str(clip_folder)), unit_range(picture(32)).requires_grad_()
    ours(image)[:, 0].sum().backward()
    assert image.grad.isfinite().all() and (image.grad != 0).float().mean() > 0.9


# --- names -----------------------------------------------------------------------------------------------------------


def test_pixels_latents_and_callables(tiny):
    images = torch.rand(2, 3, 32, 32)
    assert get_encoder("pixels").name == "pixels-16" and get_encoder("pixels")(images).shape == (
        2,
        3 * 16**2,
    )
    assert_close(pixel_encoder(32)(images), images.flatten(1))
    assert (get_encoder("latents").space, get_encoder("latents").name) == ("latents", "latents")
    assert get_encoder(pixel_encoder(4)).name == "pixels-4"

    def brightness(images):
        return images.double().mean((2, 3))

    ours = get_encoder(brightness)
    assert ours.name == "brightness" and ours.space == "images"
    assert ours(images).dtype == torch.float32


@pytest.mark.parametrize("spec", ["pixels", "latents", pixel_encoder(5), "folder"])
def test_an_encoder_is_found_again_by_its_name(spec, clip_folder):
    # directions keep the name alone, and training and measuring ask for the encoder by it
    first = get_encoder(str(clip_folder) if spec == "folder" else spec)
    assert get_encoder(first.name).name == first.name


UNKNOWN = {
    "open_clip knows no model 'ViT-B-31'": "ViT-B-31",
    "pretrained='laion' is no weights file and no weights tag of ViT-B-32: .*'openai'": "ViT-B-32:laion",
    "pretrained=None is no weights file": "ViT-B-32",
    "encoder=None is only for the bundled model": None,
}


@pytest.mark.parametrize("message", UNKNOWN)
def test_what_is_unknown_is_refused(message):
    with pytest.raises(ValueError, match=message):
        get_encoder(UNKNOWN[message])


def test_the_default_is_for_the_bundled_model_alone(tiny, tiny_folder, tmp_path):
    with pytest.raises(ValueError, match="encoder=None is only for the bundled model"):
        get_encoder(None, tiny)
    (tmp_path / "portraits").symlink_to(tiny_folder("epsilon"))
    with pytest.raises(ValueError, match="encoder=None is only for the bundled model"):
        get_encoder(None, load(tmp_path / "portraits", device="cpu"))


def test_a_folder_with_broken_weights_is_refused(clip_folder, tmp_path):
    (tmp_path / "open_clip_config.json").write_bytes(
        (clip_folder / "open_clip_config.json").read_bytes()
    )
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match="could not be loaded"):
        open_clip_encoder(str(tmp_path))


# --- features --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eye", [latent_encoder(), pixel_encoder(8)], ids=lambda eye: eye.name)
@pytest.mark.parametrize("kind", PREDICTION_TYPES[:1])
def test_features_are_unit_rows_with_gradients(tiny_of, kind, eye):
    torch.manual_seed(0)
    x0 = torch.randn(3, *tiny_of(kind).latent_shape, requires_grad=True)
    rows = normalized_features(tiny_of(kind), eye, x0)
    assert rows.dtype == torch.float32
    assert_close(rows.norm(dim=1), torch.ones(3))
    rows[:, 0].sum().backward()
    assert x0.grad.isfinite().all() and x0.grad.abs().sum() > 0


def test_features_of_half_precision_are_unit_rows_in_float32(tiny_folder):
    model = load(tiny_folder("epsilon"), device="cpu", dtype=torch.bfloat16)
    rows = normalized_features(model, pixel_encoder(8), torch.randn(2, *model.latent_shape))
    assert rows.dtype == torch.float32
    assert_close(rows.norm(dim=1), torch.ones(2))


# --- random views ----------------------------------------------------------------------------------------------------


def test_a_view_is_the_same_for_all_images():
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for seed in range(4):
        view = random_augmentation(torch.Generator().manual_seed(seed))
        seen = view(images)
        assert torch.equal(view(torch.cat([images, images])), torch.cat([seen, seen]))
        assert_close(torch.cat([view(images[:1]), view(images[1:])]), seen)
        assert 0 <= seen.min() and seen.max() <= 1


def test_views_come_from_the_generator_alone():
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def views(seed):
        gen = torch.Generator().manual_seed(seed)
        return torch.stack([random_augmentation(gen)(images) for _ in range(3)])

    torch.manual_seed(1)
    first = views(0)
    torch.manual_seed(2)
    assert torch.equal(views(0), first)
    assert len(torch.unique(torch.cat([first, views(1)]).flatten(1), dim=0)) == 6


def test_views_stay_near_and_pass_gradients():
    images = picture(32)
    x = unit_range(images).requires_grad_()
    for seed in range(4):
        y = random_augmentation(torch.Generator().manual_seed(seed))(x)
        distance = min((y - x).abs().mean(), (y - x.flip(3)).abs().mean())
        assert distance < 0.15  # flipped or not, the picture can be made out
    y.sum().backward()
    assert x.grad.isfinite().all() and (x.grad != 0).float().mean() > 0.5
