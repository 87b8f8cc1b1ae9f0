"""Directions are the exact principal components, in whatever pieces the rows come, and files repeat byte for byte."""

from dataclasses import asdict, replace
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.decomposition import PCA
from tiny import PROMPT, never, quiet, random_space
from torch.testing import assert_close

from sliderspace.directions.discovery import (
    Directions,
    RunningCovariance,
    discover,
    fit_directions,
    pca_from_moments,
)
from sliderspace.features.encoders import pixel_encoder
from sliderspace.features.collect import SamplingConfig, SampleFeatures


def moments_of(rows):
    return RunningCovariance(rows.shape[1]).add(rows)


def random_rows(count=60, width=8, seed=0):
    """Correlated rows, float64."""
    gen = torch.Generator().manual_seed(seed)
    rows, mix = (torch.randn(n, width, generator=gen, dtype=torch.float64) for n in (count, width))
    return rows @ mix + 3


def samples_of(features):
    """Samples with these features, whatever they were made from."""
    run = random_samples().run
    run = replace(run, samples=len(features), steps=features.shape[1])
    return SampleFeatures(run, features, torch.zeros(len(features), 1))


def random_samples(samples=12, steps=3, width=8, seed=0):
    """Samples of unit rows whose later steps are further from the origin of the first."""
    rows = random_rows(samples * steps, width, seed).float().reshape(samples, steps, width)
    rows = F.normalize(rows + torch.arange(steps)[:, None], dim=-1)
    run = SamplingConfig("tiny", "0" * 16, "pixels-4", [PROMPT], samples, seed, steps, 2.0)
    return SampleFeatures(run, rows, torch.zeros(samples, 4, 8, 8))


def assert_same_axes(vectors, components, tolerance):
    """Unit rows are the same, up to their signs."""
    cosines = vectors.double() @ torch.from_numpy(components).T
    assert_close(cosines.abs(), torch.eye(len(components)).double(), rtol=0, atol=tolerance)


# --- principal directions --------------------------------------------------------------------------------------------


def planted(variances, rows=200, width=12, seed=0):
    """Rows whose singular value decomposition is known exactly: centred scores without correlation."""
    gen = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, len(variances), generator=gen, dtype=torch.float64)
    scores = torch.linalg.qr(scores - scores.mean(0))[0]
    directions = torch.linalg.qr(
        torch.randn(width, len(variances), generator=gen, dtype=torch.float64)
    )[0].T
    singular = (torch.tensor(variances, dtype=torch.float64) * (rows - 1)).sqrt()
    return scores * singular @ directions + 5, directions, singular


@pytest.mark.parametrize(
    "variances", [(9, 4, 1), (1, 0.99, 0.98), (1e4, 1, 1e-4), (5, 4, 3, 2, 1e-3, 1e-3)]
)
def test_a_planted_subspace_is_found_again(variances):
    rows, directions, singular = planted(variances)
    distinct = len(set(variances))
    vectors, values = pca_from_moments(moments_of(rows), len(variances))
    assert_close(values[: len(variances)], singular, rtol=1e-6, atol=0)
    assert_close(
        (vectors @ directions.T).abs()[: distinct - 1],
        torch.eye(len(variances)).double()[: distinct - 1],
        rtol=0,
        atol=1e-6,
    )
    # directions of one variance are a plane: any basis of it is right
    assert_close(vectors.T @ vectors, directions.T @ directions, rtol=0, atol=1e-6)


@pytest.mark.parametrize("count, width", [(60, 8), (6, 20)], ids=["many rows", "few rows"])
def test_directions_are_sklearns(count, width):
    rows = random_rows(count, width)
    keep = min(count - 1, width)
    theirs = PCA(keep, svd_solver="full").fit(rows.numpy())
    vectors, values = pca_from_moments(moments_of(rows), keep)
    assert len(values) == keep
    assert_close(values, torch.from_numpy(theirs.singular_values_), rtol=1e-9, atol=0)
    assert_same_axes(vectors, theirs.components_, 1e-9)


def test_directions_are_orthonormal_with_the_largest_coordinate_positive():
    for seed in range(5):
        vectors, values = pca_from_moments(moments_of(random_rows(seed=seed)), 8)
        assert_close(vectors @ vectors.T, torch.eye(8).double(), rtol=0, atol=1e-12)
        assert (vectors.gather(1, vectors.abs().argmax(1, keepdim=True)) > 0).all()
        assert (values.diff() <= 0).all()


def test_negated_rows_have_the_same_directions():
    rows = random_rows()
    assert_close(pca_from_moments(moments_of(-rows), 4), pca_from_moments(moments_of(rows), 4))


@pytest.mark.parametrize(
    "rows, width, count, limit",
    [(5, 8, 5, 4), (60, 8, 9, 8), (60, 8, 0, 8), (60, 8, -1, 8), (1, 8, 1, 0), (0, 8, 1, -1)],
)
def test_counts_that_the_rows_cannot_hold_are_refused(rows, width, count, limit):
    message = f"count must be 1 to {limit} for {rows} rows of {width} features, not {count}"
    with pytest.raises(ValueError, match=message):
        pca_from_moments(moments_of(random_rows(rows, width)), count)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(bad):
    samples = random_samples()
    samples.features[3, 1, 2] = bad
    with pytest.raises(ValueError, match="features hold NaN or infinity: look at the encoder"):
        fit_directions(samples, 2)


# --- moments ---------------------------------------------------------------------------------------------------------


def scatter_of(rows):
    return torch.from_numpy(np.cov(rows.double().numpy(), rowvar=False) * (len(rows) - 1))


def assert_moments_of(moments, rows, tolerance=1e-9):
    """The moments are those of the rows: relative to their sizes."""
    assert moments.n == len(rows)
    mean, scatter = rows.double().mean(0), scatter_of(rows)
    assert_close(moments.mean, mean, rtol=0, atol=tolerance * mean.abs().max().item())
    assert_close(moments.scatter, scatter, rtol=0, atol=tolerance * scatter.abs().max().item())


@pytest.mark.parametrize("cuts", [(), (1,), (30,), (1, 2, 3), (10, 10, 59), (0, 7, 60)], ids=str)
def test_batches_of_any_sizes_add_up(cuts):
    rows, moments = random_rows(), RunningCovariance(8)
    for part in rows.tensor_split(cuts):  # some are empty
        moments.add(part)
    assert_moments_of(moments, rows)


@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_splits_and_merges_equals_one_pass(seed):
    rng, rows = np.random.default_rng(seed), random_rows(seed=seed)
    cuts = sorted(rng.integers(0, len(rows), 6).tolist())
    sets = [moments_of(part) for part in rows[rng.permutation(len(rows))].tensor_split(cuts)]
    while len(sets) > 1:  # a random tree, empty sets in it
        one, other = (
            sets.pop(i) for i in sorted(rng.choice(len(sets), 2, replace=False), reverse=True)
        )
        sets.append(one.merge(other.n, other.mean, other.scatter))
    assert_moments_of(sets[0], rows)
    vectors, values = pca_from_moments(moments_of(rows), 8)
    merged, merged_values = pca_from_moments(sets[0], 8)
    assert_close(merged_values, values, rtol=1e-9, atol=0)
    assert_close(merged, vectors, rtol=0, atol=1e-9)


def test_empty_sets_merge():
    empty, rows = RunningCovariance(8), random_rows()
    empty.merge(0, torch.zeros(8).double(), torch.zeros(8, 8).double())
    assert empty.n == 0 and (empty.mean == 0).all()
    assert_moments_of(empty.add(rows), rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_mean_costs_no_accuracy(dtype):
    # in float32 the sum of squares would lose all of the variance
    rows = (random_rows(500) * 1e-2 + 1e4).to(dtype)
    moments = RunningCovariance(8)
    for part in rows.split(37):
        moments.add(part)
    assert moments.mean.dtype == torch.float64
    assert_moments_of(moments, rows)


def test_adding_keeps_no_graph_and_leaves_rows_alone():
    rows = random_rows().requires_grad_(True)
    before = rows.detach().clone()
    assert not moments_of(rows).scatter.requires_grad and torch.equal(rows, before)


# --- directions of samples -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timesteps, rows", [("all", 36), ("final", 12)])
def test_rows_are_every_estimate_or_the_final_images(timesteps, rows):
    samples = random_samples()
    found = fit_directions(samples, 4, timesteps)
    features = samples.features if timesteps == "all" else samples.features[:, -1]
    features = features.reshape(-1, 8).double()
    theirs = PCA(svd_solver="full").fit(features.numpy())
    assert (found.n_rows, found.timesteps) == (rows, timesteps) and len(features) == rows
    assert_close(found.mean, features.mean(0).float())
    assert_close(
        found.singular_values.numpy(), theirs.singular_values_.astype("f4"), rtol=1e-5, atol=1e-5
    )
    assert_same_axes(found.vectors, theirs.components_[:4], 1e-5)
    assert_close(
        found.explained_variance_ratio.numpy(), theirs.explained_variance_ratio_[:4].astype("f4")
    )
    scores = (samples.features.double() - features.mean(0)) @ found.vectors.double().T
    assert_close(found.scores, scores.float(), rtol=0, atol=1e-5)


def test_other_words_for_timesteps_are_refused():
    with pytest.raises(ValueError, match="timesteps must be 'all' or 'final', not 'last'"):
        fit_directions(random_samples(), 2, "last")


def test_explained_shares_are_of_the_whole_variance():
    samples = random_samples()
    shares = [fit_directions(samples, count).explained_variance_ratio for count in (1, 4, 8)]
    for few, more in combinations(shares, 2):
        assert torch.equal(few, more[: len(few)])
    assert (shares[1] > 0).all() and shares[1].sum() < 1
    assert_close(shares[2].sum(), torch.tensor(1.0))


@pytest.fixture
def composed():
    """Directions of samples that vary along e0 with the step alone and along e1 with the sample alone."""
    of_sample = torch.tensor([3.0, -1, 0, 2, -4, 1, -2, 1.5])
    features = torch.zeros(8, 4, 6)
    features[:, :, 0] = 10 * torch.arange(4.0)
    features[:, :, 1] = of_sample[:, None]
    features[:, :, 2] = 0.01 * of_sample.sin()[:, None] * torch.tensor([1.0, -1, 1, -1])
    return fit_directions(samples_of(features), 2), of_sample


def test_timing_is_the_share_that_the_step_explains(composed):
    found, _ = composed
    assert_close(found.vectors.abs(), torch.eye(6)[:2], rtol=0, atol=1e-3)
    assert_close(found.step_variance_ratio, torch.tensor([1.0, 0.0]), rtol=0, atol=1e-3)


def test_timing_is_in_between_where_step_and_sample_both_matter():
    samples = random_samples()
    scores = fit_directions(samples, 4).scores.double().numpy()  # analysis of variance, written out
    between = ((scores.mean(0) - scores.mean((0, 1))) ** 2).mean(0)
    timing = fit_directions(samples, 4).step_variance_ratio
    assert_close(
        timing.numpy(), (between / ((scores - scores.mean((0, 1))) ** 2).mean((0, 1))).astype("f4")
    )
    assert ((timing > 0) & (timing < 1)).all()


def test_the_unit_is_the_spread_of_the_final_images(composed):
    found, of_sample = composed
    assert_close(found.score_std[1], of_sample.std(), rtol=1e-4, atol=0)
    assert_close(
        found.score_std[0], torch.tensor(0.0), rtol=0, atol=0.02
    )  # all end at the same step


@pytest.mark.parametrize("count", [1, 3, 8])
def test_ends_are_the_lowest_and_the_highest_samples(composed, count):
    found, of_sample = composed
    order = of_sample.argsort().tolist()
    assert found.extremes(1, count) == (order[:count], order[-count:])


def test_the_table_escapes_the_prompt():
    found = random_samples()
    found = fit_directions(
        SampleFeatures(
            replace(found.run, prompts=["<script>x</script>"]), found.features, found.latents
        ),
        3,
    )
    html = found._repr_html_()
    assert "&lt;script&gt;x" in html and "<script>" not in html
    assert html.count("<tr><td>") == 3 and f"{found.explained_variance_ratio[0].item():.1%}" in html


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_file_holds_all_of_it(tmp_path):
    found = fit_directions(random_samples(), 4)
    found.save(tmp_path / "one.safetensors")
    again = Directions.load(tmp_path / "one.safetensors")
    for name in ("vectors", "singular_values", "mean"):
        assert torch.equal(getattr(again, name), getattr(found, name))
    for name in ("features", "latents"):
        assert torch.equal(getattr(again.samples, name)[:], getattr(found.samples, name)[:])
    assert (again.n_rows, again.timesteps, asdict(again.samples.run)) == (
        36,
        "all",
        asdict(found.samples.run),
    )
    assert torch.equal(again.scores, found.scores) and again._repr_html_() == found._repr_html_()


def test_one_content_always_makes_the_same_bytes(tmp_path):
    # many times: an order that is drawn by chance agrees often enough
    found, path, files = fit_directions(random_samples(), 4), tmp_path / "found.safetensors", set()
    for _ in range(10):
        found.save(path)
        files.add(path.read_bytes())
        found = Directions.load(path)
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
def test_a_damaged_file_is_a_clear_error(tmp_path, damage):
    path = tmp_path / "found.safetensors"
    fit_directions(random_samples(), 4).save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="found.safetensors' is damaged or not a safetensors file"):
        Directions.load(path)


def test_foreign_and_missing_files_are_refused(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(
        ValueError, match="other.safetensors' is not a sliderspace file, wanted: directions"
    ):
        Directions.load(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="no such file: .*none.safetensors"):
        Directions.load(tmp_path / "none.safetensors")


def test_a_space_file_is_refused(tiny, tmp_path):
    random_space(tiny, targets="keys-values").save(tmp_path / "space.safetensors")
    with pytest.raises(ValueError, match="is a sliderspace space file, wanted: directions"):
        Directions.load(tmp_path / "space.safetensors")


# --- discovery -------------------------------------------------------------------------------------------------------

OPTIONS = dict(
    samples=5, n_directions=3, encoder=pixel_encoder(4), steps=2, guidance=2.0, progress=quiet
)

BAD = {
    "prompt must be a non-empty text, not ''": dict(prompt=""),
    "prompt must be a non-empty text, not '\\\\n'": dict(prompt="\n"),
    "timesteps must be 'all' or 'final', not 'none'": dict(timesteps="none"),
    "steps must be 1 or more, not 0": dict(steps=0),
    r"n_directions must be 1 to 9 for 5 samples \(10 rows\), not 10": dict(n_directions=10),
    r"n_directions must be 1 to 4 for 5 samples \(5 rows\), not 5": dict(
        n_directions=5, timesteps="final"
    ),
    r"n_directions must be 1 to 9 for 5 samples \(10 rows\), not 0": dict(n_directions=0),
    r"n_directions must be 1 to 0 for 0 samples \(0 rows\), not 3": dict(samples=0),
    "encoder=None is only for the bundled model": dict(encoder=None),
    "open_clip knows no model 'eyes'": dict(encoder="eyes:open"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_before_any_sampling(tiny, monkeypatch, message):
    monkeypatch.setattr(tiny.denoiser, "forward", never)
    with pytest.raises(ValueError, match=message):
        discover(tiny, **dict(prompt=PROMPT) | OPTIONS | BAD[message])


def test_more_directions_than_features_are_refused(tiny):
    with pytest.raises(
        ValueError, match="n_directions must be 1 to 3, the width of 'pixels-1''s features, not 5"
    ):
        discover(tiny, PROMPT, **OPTIONS | dict(encoder=pixel_encoder(1), n_directions=5))


def test_discovery_is_the_pca_of_what_was_collected(tiny):
    found = discover(tiny, PROMPT, **OPTIONS, timesteps="final")
    assert found.samples.features.shape == (5, 2, 48) and found.samples.run.prompt == PROMPT
    theirs = PCA(3, svd_solver="full").fit(found.samples.features[:, -1].double().numpy())
    assert_same_axes(found.vectors, theirs.components_, 1e-5)


def test_two_runs_with_one_seed_write_the_same_bytes(tiny, tmp_path):
    store, files = dict(folder=tmp_path / "store"), []
    for name, options in {
        "plain": {},
        "stored": store,
        "resumed": store,
        "other seed": dict(seed=1),
    }.items():
        torch.manual_seed(len(name))  # the caller's own randomness is nobody's business
        found = discover(tiny, PROMPT, **OPTIONS | dict(batch=2) | options)
        found.save(tmp_path / name)
        files.append((tmp_path / name).read_bytes())
    assert [data == files[0] for data in files] == [True, True, True, False]
