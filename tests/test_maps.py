"""Maps hold neighbours together, say how far they can be trusted, and give samples back; pages need no network."""

import re

import pytest
import torch
import torch.nn.functional as F
from tiny import PROMPT, random_directions

from sliderspace.directions.discovery import fit_directions
from sliderspace.features.encoders import pixel_encoder
from sliderspace.directions.embedding import embed_2d
from sliderspace.viz.maps import scatter_widget, plot_images, plot_map, save_map, selected_samples
from sliderspace.figures import to_png
from sliderspace.features.collect import SamplingConfig, SampleFeatures


@pytest.fixture(scope="module")
def islands():
    """Samples in three groups that are far apart."""
    gen = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(3, 16, generator=gen), dim=-1)
    rows = centres.repeat(20, 1)[:, None] + 0.05 * torch.randn(60, 2, 16, generator=gen)
    run = SamplingConfig("tiny", "0" * 16, "pixels-4", [PROMPT], 60, 0, 2, 2.0)
    return fit_directions(
        SampleFeatures(run, F.normalize(rows, dim=-1), torch.zeros(60, 4, 8, 8)), 6
    )


@pytest.mark.parametrize("kind", ["umap", "pca"])
def test_islands_stay_apart(islands, kind):
    made = embed_2d(islands, kind, neighbours=10)
    groups = made.points.view(20, 3, 2)
    within = (groups - groups.mean(0)).norm(dim=-1).mean()
    between = torch.pdist(groups.mean(0)).min()
    assert between > 3 * within and made.trustworthiness > 0.7
    assert made.samples.tolist() == list(range(60)) and set(made.steps.tolist()) == {1}
    assert torch.equal(made.points, embed_2d(islands, kind, neighbours=10).points)
    assert f"trustworthiness {made.trustworthiness:.2f}" in repr(made)


def test_pca_is_scikit_learns(islands):
    from sklearn.decomposition import PCA

    rows = islands.samples.features[:, -1].numpy()
    theirs = PCA(2, random_state=0).fit_transform(rows)
    assert abs(embed_2d(islands, "pca").points.numpy() - theirs).max() < 1e-5


def test_all_steps_are_points_of_their_samples(islands):
    made = embed_2d(islands, "pca", steps="all")
    assert made.points.shape == (120, 2)
    assert made.samples[:4].tolist() == [0, 0, 1, 1] and made.steps[:4].tolist() == [0, 1, 0, 1]
    ax = plot_map(made, n_trajectories=5).axes[0]
    assert len(ax.lines) == 5 and len(ax.lines[0].get_xdata()) == 2


def test_colours_and_pictures(tiny, islands):
    made = embed_2d(islands, "pca")
    for colours in (None, ["$^", "b", "<i>"] * 20, torch.rand(60).tolist()):
        assert to_png(plot_map(made, made, color_by=colours, title="$"))[:4] == b"\x89PNG"
    assert to_png(plot_images(tiny, islands, made, 5))[:4] == b"\x89PNG"
    assert len(plot_images(tiny, islands, made, 5).axes[0].images) <= 25


def test_a_page_needs_nothing_and_runs_nothing(tiny, islands, tmp_path):
    evil = "</script><script>alert(1)</script>"
    page = save_map(
        tmp_path / "map.html", tiny, islands, embed_2d(islands, "pca"), [evil] * 60, evil
    ).read_text()
    assert "<script>alert" not in page
    assert not re.search(r'<(script|link|img)\b[^>]*(src|href)="https?://', page)
    assert page.count("data:image/png;base64") >= 60


def test_what_is_circled_comes_back_as_samples(tiny, islands):
    made = embed_2d(islands, "pca", steps="all")
    widget = scatter_widget(tiny, islands, made, color_by=["a", "b"] * 60)
    assert selected_samples(widget, made) == []
    widget.selection([0, 1, 5])
    assert selected_samples(widget, made) == [0, 2]


BAD = {
    "method must be 'umap' or 'pca', not 'tsne'": dict(method="tsne"),
    "steps must be 'final' or 'all', not 'first'": dict(steps="first"),
    "neighbours must be 2 to 23, not 24": dict(neighbours=24),
    "neighbours must be 2 to 23, not 1": dict(neighbours=1),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused(tiny, message):
    with pytest.raises(ValueError, match=message):
        embed_2d(random_directions(tiny, pixel_encoder(4)), **BAD[message])
