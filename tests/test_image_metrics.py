"""Figures of sets of images are what their papers' formulas say, intervals hold what they promise, names are earned."""

import math
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import scipy.linalg
import torch
import torchvision
from torch.testing import assert_close

from sliderspace.evaluation.image_metrics import (
    cmmd,
    mean_pairwise_distance,
    frechet_distance,
    kernel_inception_distance,
    lpips,
    bootstrap_mean,
    metric_name,
    precision_recall,
    clip_score,
    vendi_score,
)


def cloud(n=60, d=8, seed=0, at=0.0):
    """Features with a covariance of their own."""
    gen = torch.Generator().manual_seed(seed)
    return at + torch.randn(n, d, generator=gen) @ torch.randn(d, d, generator=gen)


# --- Vendi score -----------------------------------------------------------------------------------------------------


def vendi_by_definition(x):
    """Of the n x n kernel: Friedman & Dieng 2023, definition 3.1."""
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    values = scipy.linalg.eigvalsh(unit @ unit.T / len(x))
    return math.exp(-sum(v * math.log(v) for v in values if v > 0))


@pytest.mark.parametrize("n, d", [(5, 40), (40, 5), (30, 30), (1, 3)])
def test_the_vendi_score_is_that_of_its_definition(n, d):
    x = cloud(n, d, at=0.5)
    assert vendi_score(x) == pytest.approx(vendi_by_definition(x.double().numpy()), rel=1e-9)


@pytest.mark.parametrize("n, d", [(5, 40), (40, 5)])
def test_the_vendi_score_is_that_of_its_authors_package(n, d):
    theirs = pytest.importorskip("vendi_score.vendi")
    x = cloud(n, d, at=0.5)
    assert vendi_score(x) == pytest.approx(theirs.score_dual(x.double().numpy()), rel=1e-9)


def test_the_vendi_score_counts_different_images():
    assert vendi_score(torch.ones(7, 3)) == pytest.approx(1)
    assert vendi_score(torch.eye(7)) == pytest.approx(7)
    assert vendi_score(torch.eye(3).repeat(4, 1)) == pytest.approx(3)  # each of them four times
    x = cloud()
    assert vendi_score(x * torch.linspace(0.1, 9, len(x))[:, None]) == pytest.approx(
        vendi_score(x), rel=1e-5
    )


# --- distance of pairs -----------------------------------------------------------------------------------------------


def pairs(x, metric):
    x = x.double()
    if metric == "euclidean":
        return torch.pdist(x)
    above = torch.ones(len(x), len(x)).triu(1).bool()
    return 1 - torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=2)[above]


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("n", [2, 20, 60])
def test_the_distance_of_pairs_is_that_of_all_pairs(n, metric):
    x = cloud(n)
    assert mean_pairwise_distance(x, metric=metric).value == pytest.approx(
        pairs(x, metric).mean().item(), rel=1e-5
    )


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_pairs_are_of_one_prompt(metric):
    x, groups = cloud(30), torch.arange(30) % 3
    x[groups == 1] += 100  # however far prompts are apart
    x[groups == 2] *= 5
    groups[groups == 2] = 7  # names, not counts
    expected = [pairs(x[groups == g], metric).mean().item() for g in (0, 1, 7)]
    assert mean_pairwise_distance(x, groups, metric).value == pytest.approx(
        sum(expected) / 3, rel=1e-5
    )


def test_large_sets_are_measured_in_parts():
    x = cloud(2100, 3)
    assert mean_pairwise_distance(x, n_bootstrap=20).value == pytest.approx(
        pairs(x, "euclidean").mean().item(), rel=1e-5
    )


@pytest.mark.parametrize("at", [0.0, 10.0])
def test_small_differences_of_large_features_count(at):
    # a collapsed model's images: what they have in common is not rounded into what sets them apart
    x = at + 1e-3 * cloud(60)
    assert mean_pairwise_distance(x).value == pytest.approx(
        pairs(x, "euclidean").mean().item(), rel=1e-3
    )


def test_small_differences_count_however_far_prompts_are_apart():
    groups = torch.arange(80) % 2
    x = 100 * groups[:, None] + 1e-2 * cloud(80)
    expected = sum(pairs(x[groups == g], "euclidean").mean().item() for g in (0, 1)) / 2
    assert mean_pairwise_distance(x, groups).value == pytest.approx(expected, rel=1e-3)


def test_equal_images_are_no_distance_apart():
    assert mean_pairwise_distance(cloud(1, 64).expand(60, -1)).value == pytest.approx(0, abs=1e-6)


# --- intervals -------------------------------------------------------------------------------------------------------

WIDE = 2 * math.exp(
    math.lgamma(4.5) - math.lgamma(4)
)  # expected distance of two points of a unit Gaussian in 8-d


def covered(figure, truth, tries=300):
    """How often intervals hold the truth."""
    found = [figure(seed) for seed in range(tries)]
    return sum(f.low <= truth <= f.high for f in found) / tries


def gaussian(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_intervals_of_means_cover_the_true_mean():
    assert (
        0.92 <= covered(lambda seed: bootstrap_mean(3 + gaussian(seed, 80), 200, seed), 3) <= 0.98
    )


@pytest.mark.parametrize("prompts, images", [(1, 60), (5, 60), (20, 60), (2, 10), (5, 25)])
def test_intervals_of_distances_cover_the_true_distance(prompts, images):
    groups = torch.arange(images) % prompts
    share = covered(
        lambda seed: mean_pairwise_distance(
            gaussian(seed, images, 8), groups, n_bootstrap=200, seed=seed
        ),
        WIDE,
    )
    assert 0.9 <= share <= 0.98


@pytest.mark.parametrize("each", [2, 3, 5])
def test_an_interval_holds_its_figure(each):
    found = mean_pairwise_distance(gaussian(0, 40 * each, 8), torch.arange(40 * each) % 40)
    assert found.low <= found.value <= found.high


def test_intervals_are_those_of_a_bootstrap_of_images():
    # as a loop: images drawn with replacement, and an image drawn twice is no pair with itself
    x, rng, means = gaussian(0, 12, 4), np.random.default_rng(0), []
    apart = torch.cdist(x, x).numpy()
    for _ in range(4000):
        drawn = rng.integers(0, len(x), len(x))
        other = drawn[:, None] != drawn[None]
        means.append(apart[np.ix_(drawn, drawn)][other].mean())
    low, high = np.quantile(means, [0.025, 0.975])
    found = mean_pairwise_distance(x, n_bootstrap=4000)
    assert abs(found.low - low) < 0.1 * (high - low) and abs(found.high - high) < 0.1 * (high - low)


def test_intervals_shrink_with_the_root_of_the_images():
    few, many = (bootstrap_mean(gaussian(0, n), 1000) for n in (400, 6400))
    assert 3 < (few.high - few.low) / (many.high - many.low) < 5.3  # 4, give or take


@pytest.mark.parametrize(
    "figure",
    [
        lambda seed: bootstrap_mean(cloud()[:, 0], seed=seed),
        lambda seed: mean_pairwise_distance(cloud(), seed=seed),
        lambda seed: clip_score(cloud(at=1), cloud(seed=1, at=1), seed=seed),
    ],
)
def test_a_seed_gives_one_interval_whatever_else_was_drawn(figure):
    torch.manual_seed(1)
    first, other = figure(0), figure(1)
    torch.manual_seed(2)
    assert figure(0) == first
    assert other.value == first.value and (other.low, other.high) != (first.low, first.high)


# --- text ------------------------------------------------------------------------------------------------------------


class Given(torch.nn.Module):
    """A CLIP, as torchmetrics calls it, that has seen everything before."""

    def __init__(self, images, text):
        super().__init__()
        self.images, self.text, self.config = images, text, SimpleNamespace()

    def get_image_features(self, *args):
        return self.images

    def get_text_features(self, *args):
        return self.text


def test_text_alignment_is_the_clip_score_of_torchmetrics():
    from torchmetrics.functional.multimodal import clip_score as torchmetrics_clip_score

    images, text = cloud(6, at=6.0), cloud(6, seed=1, at=6.0)
    asked = {
        "pixel_values": torch.zeros(6),
        "input_ids": torch.zeros(6, 4),
        "attention_mask": torch.zeros(6, 4),
    }
    words, net = ["a"] * 6, Given(images, text)
    theirs = torchmetrics_clip_score(
        list(torch.zeros(6, 3, 8, 8).byte()), words, lambda: (net, lambda *args, **options: asked)
    )
    assert (
        torch.cosine_similarity(images, text).min() > 0
    )  # those below are clipped one by one here, their mean there
    assert clip_score(images, text).value == pytest.approx(theirs.item(), rel=1e-5)


def test_images_against_their_words_count_nothing():
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert clip_score(x, -x).value == 0
    assert clip_score(x, torch.tensor([[3.0, 0.0], [0.0, -1.0]])).value == pytest.approx(50)


# --- distances from a reference --------------------------------------------------------------------------------------


def frechet_by_definition(x, y):
    """Heusel et al. 2017, eq. 6, with scipy's root of a matrix."""
    x, y = x.double().numpy(), y.double().numpy()
    a, b = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(a @ b).real
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * root)


@pytest.mark.parametrize("at", [0.0, 100.0])
def test_the_frechet_distance_is_that_of_its_definition(at):
    x, y = cloud(200, 16, at=at), cloud(90, 16, seed=1, at=at + 0.3)
    assert frechet_distance(x, y) == pytest.approx(frechet_by_definition(x, y), rel=1e-7)


def test_the_frechet_distance_of_fewer_images_than_features():
    # the trace of the root is a nuclear norm, which needs no covariance of full rank
    x, y = (rows.double() for rows in (cloud(20, 50), cloud(30, 50, seed=1)))
    a, b = ((rows - rows.mean(0)) / (len(rows) - 1) ** 0.5 for rows in (x, y))
    cross = torch.linalg.matrix_norm(a @ b.T, "nuc")
    expected = (
        (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * cross
    )
    assert frechet_distance(x, y) == pytest.approx(expected.item(), rel=1e-6)


def test_the_frechet_distance_of_a_shift_is_its_square():
    x, shift = cloud(), torch.linspace(-1, 1, 8)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(x + shift, x) == pytest.approx(shift.square().sum().item(), rel=1e-5)


def cubic_mmd(x, y):
    """Unbiased, of all images: Binkowski et al. 2018, eq. 4 and the kernel of sec. 4."""
    x, y = x.double(), y.double()

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    own = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (kernel(x, x), kernel(y, y))]
    return (sum(own) - 2 * kernel(x, y).mean()).item()


@pytest.mark.parametrize("size", [10, 1000])
def test_the_kernel_distance_is_that_of_the_whole_sets(size):
    # a mean over random subsets has the whole's as its expectation
    x, y = cloud(50), cloud(40, seed=1, at=3)
    mean, std = kernel_inception_distance(x, y, subsets=400, size=size)
    whole, error = cubic_mmd(x, y), std / 400**0.5
    assert abs(mean - whole) < 4 * error < 0.2 * whole


def test_the_kernel_distance_is_torch_fidelitys():
    from torch_fidelity.metric_kid import kid_features_to_metric

    x, y = cloud(50), cloud(50, seed=1)
    options = dict(
        kid_kernel="poly",
        kid_kernel_poly_degree=3,
        kid_kernel_poly_gamma=None,
        kid_kernel_poly_coef0=1.0,
        verbose=False,
        rng_seed=0,
    )
    whole = kid_features_to_metric(
        x.double(), y.double(), kid_subsets=1, kid_subset_size=50, **options
    )
    assert whole["kernel_inception_distance_mean"] == pytest.approx(cubic_mmd(x, y), rel=1e-9)
    theirs = kid_features_to_metric(
        x.double(), y.double(), kid_subsets=400, kid_subset_size=20, **options
    )
    mean, std = kernel_inception_distance(x, y, subsets=400, size=20)
    error = (2 / 400) ** 0.5 * std
    assert abs(mean - theirs["kernel_inception_distance_mean"]) < 4 * error
    assert std == pytest.approx(theirs["kernel_inception_distance_std"], rel=0.15)


def test_the_kernel_distance_has_no_bias_of_few_images():
    # the Frechet distance has: sets of one distribution are far apart when they are small
    found = torch.tensor(
        [
            kernel_inception_distance(gaussian(i, 30, 8), gaussian(-1 - i, 30, 8), 1)[0]
            for i in range(60)
        ]
    )
    assert abs(found.mean()) < 3 * found.std() / 60**0.5 and found.min() < 0 < found.max()


def test_the_kernel_distance_draws_from_its_seed_alone():
    x, y, state = cloud(), cloud(seed=1), torch.get_rng_state()
    first = kernel_inception_distance(x, y, 5, 10)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert (
        kernel_inception_distance(x, y, 5, 10)
        == first
        != kernel_inception_distance(x, y, 5, 10, seed=1)
    )


def gaussian_mmd(x, y, sigma):
    """Biased, times 1000: Jayasumana et al. 2024, eq. 2."""
    x, y = (torch.nn.functional.normalize(rows.double()) for rows in (x, y))

    def mean(a, b):
        return torch.exp(-(a[:, None] - b[None]).square().sum(2) / (2 * sigma**2)).mean()

    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y)).item()


@pytest.mark.parametrize("sigma", [10.0, 0.5])
def test_cmmd_is_that_of_its_definition(sigma):
    x, y = cloud(50, at=0.2), cloud(40, seed=1)
    assert cmmd(x, y, sigma) == pytest.approx(gaussian_mmd(x, y, sigma), rel=1e-9)
    assert cmmd(3 * x, y * torch.linspace(1, 5, 40)[:, None], sigma) == pytest.approx(
        cmmd(x, y, sigma), rel=1e-5
    )
    assert cmmd(x, x, sigma) == pytest.approx(0, abs=1e-12)


def test_cmmd_of_large_sets_is_measured_in_parts():
    x, y = cloud(2100, 2), cloud(30, 2, seed=1)
    assert cmmd(x, y) == pytest.approx(gaussian_mmd(x, y, 10), rel=1e-9)


def naive_precision_recall(x, y, k):
    """Kynkaanniemi et al. 2019, eq. 1 and 2, an image at a time."""
    x, y = x.double().numpy(), y.double().numpy()

    def share(points, of):
        inside = 0
        for p in points:
            for i, q in enumerate(of):
                others = sorted(np.linalg.norm(q - r) for j, r in enumerate(of) if j != i)
                if np.linalg.norm(p - q) <= others[k - 1]:
                    inside += 1
                    break
        return inside / len(points)

    return share(x, y), share(y, x)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_those_of_a_loop(k):
    x, y = cloud(40, 3, at=0.5), 0.6 * cloud(30, 3, seed=1)
    expected = naive_precision_recall(x, y, k)
    assert precision_recall(x, y, k) == pytest.approx(expected, abs=1e-6)
    assert (
        0.1 < expected[0] < 0.9 and expected[0] != expected[1]
    )  # there is something to tell apart


def test_precision_is_of_the_images_and_recall_of_the_reference():
    near, far = cloud(30), cloud(30, seed=1) + 1000
    assert precision_recall(near, near) == (1, 1)
    assert precision_recall(near, far) == (0, 0)
    assert precision_recall(near, torch.cat([near, far])) == (
        1,
        0.5,
    )  # half of what there is, and nothing else
    assert precision_recall(torch.cat([near, far]), near) == (0.5, 1)


# --- names -----------------------------------------------------------------------------------------------------------

NAMES = {  # a published name -> encoders that it is not of
    "FID": [
        "inception",
        "inception:file.pth",
        "inception-fidelity",
        "my-inception-fid",
        "inception-fid2",
        "dreamsim",
        "portraits-clip",
        "ViT-L-14-336:openai",
        "timm:inception_v3",
        "",
    ],
    "CMMD": [
        "ViT-L-14:openai",
        "ViT-L-14-336:laion2b",
        "ViT-L-14-336",
        "ViT-L-14-336:openai2",
        "portraits-clip",
        "inception-fid",
        "x:ViT-L-14-336:openai",
    ],
    "DreamSim": [
        "dinov2",
        "dreamsim2",
        "my dreamsim",
        "portraits-clip",
        "pixels-16",
        "inception-fid",
    ],
    "CLIP score": [
        "portraits-clip",
        "ViT-B-32:laion2b_s34b_b79k",
        "openai",
        "ViT-B-32:openai2",
        "dreamsim",
    ],
}
NAMES["KID"] = NAMES["FID"]


@pytest.mark.parametrize(
    "measure, encoder", [(m, e) for m, encoders in NAMES.items() for e in encoders]
)
def test_a_stand_in_does_not_get_the_published_name(measure, encoder):
    named = metric_name(measure, encoder)
    assert measure not in named.removesuffix(f"({encoder})") and named.endswith(f" ({encoder})")


ORIGINALS = {
    ("FID", "inception-fid"): "FID",
    ("KID", "inception-fid"): "KID",
    ("DreamSim", "dreamsim"): "DreamSim",
    ("CMMD", "ViT-L-14-336:openai"): "CMMD",
    ("FID", "inception-fid:file.pth"): "FID",
    ("CLIP score", "ViT-B-32:openai"): "CLIP score (ViT-B-32:openai)",
}


@pytest.mark.parametrize("measure, encoder", ORIGINALS)
def test_the_original_gets_its_name(measure, encoder):
    assert metric_name(measure, encoder) == ORIGINALS[measure, encoder]


def test_figures_of_any_features_name_them():
    for measure in ("Vendi score", "precision", "recall"):
        assert metric_name(measure, "dreamsim") == f"{measure} (dreamsim)"
    with pytest.raises(ValueError, match="measure must be one of .*'FID'.* not 'IS'"):
        metric_name("IS", "inception-fid")


# --- LPIPS -----------------------------------------------------------------------------------------------------------

TAPS = {
    "alex": (1, 4, 7, 9, 11),
    "squeeze": (1, 4, 7, 9, 10, 11, 12),
    "vgg": (3, 8, 15, 22, 29),
}  # layers compared


def backbone(network):
    """torchvision's layers at random weights."""
    torch.manual_seed(0)
    if network == "vgg":  # without its classifier, which is most of it
        return torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    kind = {"alex": torchvision.models.alexnet, "squeeze": torchvision.models.squeezenet1_1}[
        network
    ]
    return kind(weights=None).features


@pytest.mark.parametrize("network", TAPS)
@torch.no_grad()
def test_lpips_is_that_of_the_paper(network, monkeypatch):
    # Zhang et al. 2018, eq. 1: squared differences of unit activations, weighted by channel, averaged over places
    import torchmetrics.functional.image.lpips as theirs

    monkeypatch.setattr(
        theirs, "_get_tv_model_features", lambda name, pretrained: backbone(network)
    )
    folder = theirs.os.path.dirname(theirs.__file__)
    weights = torch.load(f"{folder}/lpips_models/{network}.pth", "cpu", weights_only=True)
    gen = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 3, 3, 64, 64, generator=gen)
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    x, y, expected = (a - mean) / std, (b - mean) / std, 0
    for i, layer in enumerate(backbone(network)):
        x, y = layer(x), layer(y)
        if i in TAPS[network]:
            w = weights[f"lin{TAPS[network].index(i)}.model.1.weight"]
            apart = (torch.nn.functional.normalize(x) - torch.nn.functional.normalize(y)) ** 2
            expected = expected + (w * apart).sum(1).mean((1, 2))
    found = lpips(network=network)(a, b)
    assert found.shape == (3,) and found.min() > 1e-3
    assert_close(found, expected, rtol=1e-3, atol=0)  # it adds 1e-8 to squares, to divide by
    assert lpips(network=network)(a, a).eq(0).all()


def test_lpips_passes_gradients_to_images_alone(monkeypatch):
    import torchmetrics.functional.image.lpips as theirs

    monkeypatch.setattr(
        theirs, "_get_tv_model_features", lambda name, pretrained: backbone("squeeze")
    )
    a, b = torch.rand(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    distance = lpips(network="squeeze")(a.requires_grad_(), b)
    distance.sum().backward()
    assert a.grad.isfinite().all() and (a.grad != 0).float().mean() > 0.9


def test_lpips_without_weights_says_what_to_do(monkeypatch):
    def offline(*args, **options):
        raise URLError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(
        ValueError, match="weights of 'lpips-alex' could not be loaded .*no network.* run it once"
    ):
        lpips()
    with pytest.raises(ValueError, match="network must be one of .*'squeeze'.* not 'resnet'"):
        lpips(network="resnet")


# --- what is refused -------------------------------------------------------------------------------------------------

X, NAN = cloud(10), cloud(10).masked_fill(torch.eye(10, 8).bool(), torch.nan)
BAD = {
    "no matrix": (
        lambda: vendi_score(torch.ones(3)),
        r"(x|features) must be a tensor \(n, d\) .* not \(3,\)",
    ),
    "no tensor": (lambda: vendi_score([[1.0]]), "(x|features) must be a tensor .* not list"),
    "no rows": (lambda: vendi_score(torch.ones(0, 3)), "(x|features) must be .* 1 rows or more"),
    "a single image": (
        lambda: mean_pairwise_distance(X[:1]),
        "(x|features) must be .* 2 rows or more",
    ),
    "nan": (lambda: vendi_score(NAN), "(x|features) hold NaN"),
    "infinity": (lambda: mean_pairwise_distance(X / 0), "(x|features) hold NaN or infinity"),
    "metric": (
        lambda: mean_pairwise_distance(X, metric="l1"),
        "metric must be one of .*'cosine'.* not 'l1'",
    ),
    "groups of other images": (
        lambda: mean_pairwise_distance(X, [0, 1]),
        "groups must be 10 numbers, .* not 2",
    ),
    "a group of one": (
        lambda: mean_pairwise_distance(X, [0] * 9 + [1]),
        "groups must have 2 images or more each",
    ),
    "groups in columns": (
        lambda: mean_pairwise_distance(X, torch.zeros(10, 1)),
        "groups must be 10 numbers",
    ),
    "rounds": (
        lambda: bootstrap_mean(X[:, 0], n_bootstrap=19),
        "n_bootstrap must be 20 or more, not 19",
    ),
    "broken rounds": (
        lambda: bootstrap_mean(X[:, 0], n_bootstrap=20.5),
        "n_bootstrap must be 20 or more, not 20.5",
    ),
    "values of nan": (lambda: bootstrap_mean(NAN[:, 0]), "values hold NaN"),
    "values in columns": (lambda: bootstrap_mean(X), "values must be"),
    "values in a list": (lambda: bootstrap_mean([1.0, 2.0]), "values must be"),
    "text of others": (
        lambda: clip_score(X, X[:9]),
        r"text must be \(10, 8\), as the images, not \(9, 8\)",
    ),
    "text in a list": (lambda: clip_score(X, X.tolist()), "text must be"),
    "text of nan": (lambda: clip_score(X, NAN), "text hold"),
    "reference of nan": (lambda: frechet_distance(X, NAN), "reference hold NaN"),
    "reference of others": (
        lambda: cmmd(X, X[:, :3]),
        "reference must have 8 features an image, .* not 3",
    ),
    "reference of one": (lambda: frechet_distance(X, X[:1]), "reference must be .* 2 rows or more"),
    "subsets of two": (
        lambda: kernel_inception_distance(X[:2], X),
        "(x|features) must be .* 3 rows or more",
    ),
    "subsets": (lambda: kernel_inception_distance(X, X, subsets=0), "subsets"),
    "size": (lambda: kernel_inception_distance(X, X, size=1), "size"),
    "sigma": (lambda: cmmd(X, X, 0.0), "sigma"),
    "too few neighbours": (
        lambda: precision_recall(X[:3], X),
        "(x|features) must be .* 4 rows or more",
    ),
    "neighbours": (lambda: precision_recall(X, X, 0), "neighbours"),
    "negative neighbours": (lambda: precision_recall(X, X, -1), "neighbours"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_by_name(what):
    call, message = BAD[what]
    with pytest.raises(ValueError, match=message):
        call()
