"""Sliders start at the first-order solution, train side by side as they would alone, and leave the model as it was."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import never, quiet, random_directions, random_space, random_weights
from torch.testing import assert_close

from sliderspace.training import from_directions as training
from sliderspace.sliders.adapter import GatedAdapter, target_layers
from sliderspace.training.alignment import (
    SLIDERSPACE_RELEASE,
    AlignmentTrainer,
    AlignmentConfig,
    alignment_loss,
    held_out_cosines,
)
from sliderspace.features.encoders import (
    Encoder,
    normalized_features,
    latent_encoder,
    pixel_encoder,
)
from sliderspace.sampling.generate import initial_noise
from sliderspace.training.initialization import (
    gradient_init,
    low_rank,
    make_noised_latents,
    predict_latents,
    score_gradients,
    balanced_indices,
    standard_init,
)
from sliderspace.training.from_directions import calibrate, measure_effects, train

LAYERS = "keys-values"
SLIDERS = 3


@pytest.fixture(scope="module")
def shared(tiny_of):
    """A tiny model with directions; nobody leaves anything on it."""
    model = tiny_of("epsilon")
    return model, random_directions(model, latent_encoder(), steps=2)


@pytest.fixture(scope="module")
def pool(shared):
    return make_noised_latents(*shared, samples=list(range(20)), rows=12, seed=0)


def goal(model, pool, found):
    """Arguments of whatever differentiates the scores of three directions."""
    return (
        model,
        latent_encoder(),
        pool,
        found.vectors[:SLIDERS].to(pool.x0),
        found.score_std[:SLIDERS],
    )


def layer_weights(model, layers):
    return [model.denoiser.get_submodule(n).weight for n in layers]


@pytest.fixture(scope="module")
def start(shared, pool):
    """The first-order start of three sliders."""
    model, found = shared
    return gradient_init(*goal(model, pool, found), target_layers(model, LAYERS), progress=quiet)


@pytest.fixture
def adapter_of(shared):
    """Down- and up-projections, and which of their sliders -> an adapter, until the next one or the test's end."""
    made = []

    def adapter(down, up, at=None):
        at = list(range(len(next(iter(down.values()))))) if at is None else at
        if made:
            made.pop().remove()
        made.append(GatedAdapter(shared[0], list(down), len(at)))
        made[-1].load_weights(
            {n: a[at] for n, a in down.items()}, {n: b[:, at] for n, b in up.items()}
        )
        return made[-1]

    yield adapter
    for adapter in made:
        adapter.remove()


def weights(adapter, slider):
    """All weights of one slider in a row."""
    pairs = adapter.parameters().values()
    return torch.cat([torch.cat([a[slider], b[:, slider]]) for a, b in pairs]).detach().clone()


# --- the pool --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, count", [(5, 3), (5, 5), (5, 12), (1, 4), (7, 0)])
def test_shuffled_takes_everything_equally_often(n, count):
    drawn = balanced_indices(n, count, torch.Generator().manual_seed(0))
    often = torch.bincount(drawn, minlength=n)
    assert len(drawn) == count and often.max() - often.min() <= 1


def test_a_pool_holds_the_unchanged_models_answers(shared, pool):
    model, found = shared
    grid = model.timesteps(found.samples.run.steps)[0]
    assert torch.equal(pool.timestep, grid.repeat_interleave(len(pool.timestep) // len(grid)))
    for j in (0, 5, 11):
        out, x0 = model.predict(pool.latents[[j]], pool.timestep[j], pool.prompts[j], pool.guidance)
        assert_close(pool.base_prediction[[j]], out, rtol=1e-4, atol=1e-5)
        assert_close(pool.x0[[j]], x0, rtol=1e-3, atol=1e-3)
    mixed = torch.tensor([11, 3, 5, 10, 3])  # of three timesteps, out of order
    assert_close(
        predict_latents(model, pool, mixed)[0], pool.base_prediction[mixed], rtol=1e-4, atol=1e-5
    )


def test_a_pool_is_noise_on_the_samples_that_were_asked_for(shared):
    model, found = shared
    marks = (
        torch.arange(24.0).view(-1, 1, 1, 1).expand_as(found.samples.latents) * 100
    )  # far above the noise
    marked = replace(found, samples=replace(found.samples, latents=marks))
    pool = make_noised_latents(model, marked, [3, 20, 7], 12, seed=0)
    signal, noisy = (s.view(-1, 1, 1, 1) for s in (pool.alpha, pool.sigma))
    clean = (pool.latents / signal).mean((1, 2, 3)).div(100).round().long()
    assert sorted(clean.tolist()) == [3] * 4 + [7] * 4 + [20] * 4
    noise = (pool.latents - signal * 100 * clean.view(-1, 1, 1, 1)) / noisy
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    assert torch.equal(
        make_noised_latents(model, marked, [3, 20, 7], 12, seed=0).latents, pool.latents
    )
    assert not torch.equal(
        make_noised_latents(model, marked, [3, 20, 7], 12, seed=1).latents, pool.latents
    )


# --- the first-order start -------------------------------------------------------------------------------------------


@pytest.fixture
def doubled(fresh, monkeypatch):
    """A tiny model that computes in float64: finite differences need the digits."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    for part in (fresh.pipe.unet, fresh.pipe.vae, fresh.pipe.text_encoder):
        part.double()
    yield fresh, random_directions(fresh, latent_encoder(), steps=2)


def mean_scores(model, pool, found):
    phi = normalized_features(
        model, latent_encoder(), predict_latents(model, pool, torch.arange(len(pool.x0)))[1]
    )
    return (phi @ found.vectors[:SLIDERS].double().T / found.score_std[:SLIDERS]).mean(0)


@torch.no_grad()
def finite_difference(model, pool, found, change, h=1e-3):
    """Slope of the mean scores while the layers' weights move along `change`."""
    ends = []
    for step in (h, -2 * h):
        for name, delta in change.items():
            model.denoiser.get_submodule(name).weight.add_(step * delta)
        ends.append(mean_scores(model, pool, found))
    for name, delta in change.items():
        model.denoiser.get_submodule(name).weight.add_(h * delta)
    return (ends[0] - ends[1]) / (2 * h)


def test_gradients_and_start_are_those_of_finite_differences(doubled):
    model, found = doubled
    layers = target_layers(model, "attention")
    pool = make_noised_latents(model, found, list(range(20)), 6, seed=0)
    gradients = score_gradients(
        *goal(model, pool, found), layer_weights(model, layers), batch=4, progress=quiet
    )
    gen = torch.Generator().manual_seed(0)
    change = {n: torch.randn(g.shape[1:], generator=gen) * 0.1 for n, g in zip(layers, gradients)}
    ours = torch.stack([(g * change[n]).sum((1, 2)) for n, g in zip(layers, gradients)]).sum(0)
    assert ours.abs().min() > 1e-3
    assert_close(ours.double(), finite_difference(model, pool, found, change), rtol=1e-4, atol=1e-6)
    # and so a slider at the start moves its own score by `effect`
    down, up = gradient_init(*goal(model, pool, found), layers, effect=0.2, batch=4, progress=quiet)
    for k in range(SLIDERS):
        step = {n: up[n][:, [k]] @ down[n][[k]] for n in layers}
        assert_close(
            finite_difference(model, pool, found, step, h=1e-4)[k].item(), 0.2, rtol=1e-3, atol=0
        )
    assert not any(p.requires_grad or p.grad is not None for p in model.denoiser.parameters())


def test_gradients_leave_the_weights_alone_after_an_error(shared, pool):
    model, found = shared

    def broken(x):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        gradient_init(
            model,
            Encoder("latents", broken, "latents"),
            pool,
            found.vectors,
            found.score_std,
            target_layers(model),
            progress=quiet,
        )
    assert not hasattr(model.denoiser, "peft_config")
    assert not any(p.requires_grad for p in model.denoiser.parameters())


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_start_is_the_best_low_rank_part(rank):
    gen = torch.Generator().manual_seed(0)
    gradients = [torch.randn(2, *shape, generator=gen) for shape in ((6, 4), (5, 9))]
    inner = dict(zip(("one", "two"), gradients))
    down, up = low_rank(
        {n: torch.eye(g.shape[1]).expand(2, -1, -1) for n, g in inner.items()}, inner, rank, 0.3
    )
    for k in range(2):
        own = slice(k * rank, (k + 1) * rank)
        made = [up[n][:, own] @ down[n][own] for n in ("one", "two")]
        best = []
        for g in gradients:
            u, s, v = torch.linalg.svd(g[k], full_matrices=False)
            best.append(u[:, :rank] @ s[:rank].diag() @ v[:rank])
        effect = sum((g[k] * m).sum() for g, m in zip(gradients, made))
        scale = 0.3 / sum((g[k] * b).sum() for g, b in zip(gradients, best))  # one for all layers
        assert_close(effect, torch.tensor(0.3))
        for m, b in zip(made, best):
            assert_close(m, scale * b)


def test_a_direction_that_nothing_moves_starts_finite():
    down, up = low_rank(
        {"one": torch.eye(6).expand(2, -1, -1)}, {"one": torch.zeros(2, 6, 4)}, 1, 0.3
    )
    assert (up["one"] @ down["one"]).abs().max() == 0
    assert down["one"].isfinite().all() and up["one"].isfinite().all()


@pytest.mark.parametrize("most", [0, 2**30], ids=["never whole", "whole"])
@pytest.mark.parametrize("targets", ["attention", r"resnets\.0\.conv1$"])
def test_the_start_is_the_best_there_is_or_nearly(shared, pool, targets, most):
    # without forming a gradient, which would not fit into memory for large models, and with
    model, found = shared
    layers = target_layers(model, targets)
    whole = score_gradients(*goal(model, pool, found), layer_weights(model, layers), progress=quiet)
    spans = {n: torch.eye(len(g[0])).expand(SLIDERS, -1, -1) for n, g in zip(layers, whole)}
    best = low_rank(spans, dict(zip(layers, whole)), 1, 0.3)
    made = gradient_init(*goal(model, pool, found), layers, progress=quiet, max_gradient_bytes=most)
    gradients = torch.cat([g.flatten(1) for g in whole], 1)

    def slope(start):  # of each score, along its slider's change of the weights
        down, up = start
        changes = [
            torch.einsum("ok,ki->koi", up[n].flatten(1), down[n].flatten(1)).flatten(1)
            for n in layers
        ]
        return F.cosine_similarity(torch.cat(changes, 1), gradients)

    part = 0.99 if most else 0.8
    assert (slope(made) > part * slope(best)).all() and (slope(made) <= slope(best) + 1e-5).all()


# --- the objective ---------------------------------------------------------------------------------------------------


def test_alignment_loss_is_one_less_the_cosine():
    wanted = F.normalize(torch.randn(1, 8, generator=torch.Generator().manual_seed(0)))
    across = F.normalize(torch.ones(1, 8) - (wanted.sum() * wanted))
    for size in (1e-2, 1.0, 1e3):
        assert_close(alignment_loss(size * wanted, wanted), torch.zeros(1), rtol=0, atol=1e-6)
        assert_close(
            alignment_loss(-size * wanted, wanted), torch.full((1,), 2.0), rtol=0, atol=1e-6
        )
        assert_close(alignment_loss(size * across, wanted), torch.ones(1), rtol=0, atol=1e-6)
    gen = torch.Generator().manual_seed(1)
    change, directions = torch.randn(2, 5, 8, generator=gen)
    directions = F.normalize(directions)
    assert_close(alignment_loss(change, directions), 1 - F.cosine_similarity(change, directions))


def test_no_change_has_a_finite_loss_and_gradient():
    change = torch.zeros(2, 8, requires_grad=True)
    loss = alignment_loss(change, F.normalize(torch.ones(2, 8)))
    loss.sum().backward()
    assert_close(loss.detach(), torch.ones(2))
    assert change.grad.isfinite().all() and (change.grad < 0).all()  # towards the direction


# --- the updates -----------------------------------------------------------------------------------------------------


def trained(model, adapter, pool, vectors, training_steps=3, batch=64, **options):
    """Alignment of each update; the adapter is trained in place."""
    method = AlignmentConfig(training_steps=training_steps, **options)
    return torch.stack(
        list(AlignmentTrainer(model, latent_encoder(), adapter, pool, vectors, method, batch=batch))
    )


def test_together_is_as_one_by_one(shared, pool, start, adapter_of):
    model, found = shared
    together = adapter_of(*start)
    reached = trained(model, together, pool, found.vectors[:SLIDERS], lr=0.01)
    rows = [weights(together, k) for k in range(SLIDERS)]
    for k in range(SLIDERS):
        alone = adapter_of(*start, at=[k])
        before = weights(alone, 0)
        assert_close(
            trained(model, alone, pool, found.vectors[[k]], lr=0.01)[:, 0],
            reached[:, k],
            rtol=0,
            atol=1e-5,
        )
        assert (weights(alone, 0) - before).abs().max() > 1e-3  # something was trained
        assert_close(weights(alone, 0), rows[k], rtol=0, atol=1e-5)


def test_batches_change_nothing(shared, pool, start, adapter_of):
    model, found = shared
    whole = adapter_of(*start)
    trained(model, whole, pool, found.vectors[:SLIDERS], training_steps=2)
    expected = [weights(whole, k) for k in range(SLIDERS)]
    parts = adapter_of(*start)
    trained(model, parts, pool, found.vectors[:SLIDERS], training_steps=2, batch=5)
    for k in range(SLIDERS):
        assert_close(weights(parts, k), expected[k], rtol=0, atol=1e-5)


def test_updates_raise_the_alignment(shared, pool, start, adapter_of):
    model, found = shared
    adapter, vectors = adapter_of(*start), found.vectors[:SLIDERS]
    before = held_out_cosines(model, latent_encoder(), adapter, pool, vectors).mean(1).diag()
    trained(model, adapter, pool, vectors, training_steps=10)
    after = held_out_cosines(model, latent_encoder(), adapter, pool, vectors).mean(1).diag()
    assert (after > before + 0.005).all(), (before, after)


def test_a_leash_keeps_changes_small(shared, pool, start, adapter_of):
    model, found = shared

    @torch.no_grad()
    def moved(leash):
        adapter = adapter_of(*start)
        with torch.enable_grad():
            trained(
                model,
                adapter,
                pool,
                found.vectors[:SLIDERS],
                training_steps=6,
                lr=0.2,
                output_penalty=leash,
            )
        adapter.set_strengths(torch.ones(SLIDERS))
        out = predict_latents(model, pool, torch.arange(len(pool.x0)))[0]
        adapter.set_strengths(None)
        return (out - pool.base_prediction).pow(2).mean()

    free, held = moved(0.0), moved(100.0)
    assert held < 0.9 * free, (held, free)


def test_no_change_at_the_start_is_trained_from(shared, pool, start, adapter_of):
    # ups of zero, as ordinary LoRA begins: the first change is exactly none
    model, found = shared
    down, up = start
    adapter = adapter_of(down, {n: torch.zeros_like(b) for n, b in up.items()})
    reached = trained(model, adapter, pool, found.vectors[:SLIDERS])
    assert torch.equal(reached[0], torch.zeros(SLIDERS)) and reached.isfinite().all()
    assert all(weights(adapter, k).isfinite().all() for k in range(SLIDERS))


def test_a_direction_of_nan_does_not_spoil_the_others(shared, pool, start, adapter_of):
    model, found = shared
    broken = found.vectors[:SLIDERS].clone()
    broken[1] = torch.nan
    whole = adapter_of(*start)
    before = weights(whole, 1)
    trained(model, whole, pool, found.vectors[:SLIDERS], training_steps=2)
    expected = [weights(whole, k) for k in range(SLIDERS)]
    spoilt = adapter_of(*start)
    steps = AlignmentTrainer(
        model, latent_encoder(), spoilt, pool, broken, AlignmentConfig(training_steps=2)
    )
    reached = torch.stack(list(steps))
    assert reached[:, [0, 2]].isfinite().all() and reached[:, 1].isnan().all()
    assert steps.lost.tolist() == [0, 2, 0]
    for k in (0, 2):
        assert_close(weights(spoilt, k), expected[k], rtol=0, atol=1e-5)
    assert_close(weights(spoilt, 1), before)


def test_a_row_of_nan_does_not_spoil_the_update(shared, pool, start, adapter_of):
    model, found = shared
    broken = replace(
        pool,
        latents=pool.latents.clone(),
        base_prediction=pool.base_prediction.clone(),
        x0=pool.x0.clone(),
    )
    for part in (broken.latents, broken.base_prediction, broken.x0):
        part[3] = torch.nan
    adapter = adapter_of(*start)
    before = [weights(adapter, k) for k in range(SLIDERS)]
    reached = trained(
        model, adapter, broken, found.vectors[:SLIDERS], training_steps=1, latents_per_step=12
    )  # all rows, so this one too
    assert reached.isfinite().all() and (reached != 0).all()
    for k in range(SLIDERS):
        assert weights(adapter, k).isfinite().all()
        assert (weights(adapter, k) - before[k]).abs().max() > 1e-4, "the first update was lost"


def test_updates_leave_no_gradients_behind(shared, pool, start, adapter_of):
    model, found = shared
    adapter = adapter_of(*start)
    steps = AlignmentTrainer(
        model,
        latent_encoder(),
        adapter,
        pool,
        found.vectors[:SLIDERS],
        AlignmentConfig(training_steps=3),
    )
    next(iter(steps))
    steps.close()  # given up early
    assert not adapter.now.on
    assert not any(p.requires_grad or p.grad is not None for p in model.denoiser.parameters())


# --- the published recipe --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random", "orthonormal"])
@pytest.mark.parametrize("targets", ["attention", r"resnets\.0\.conv1$"])
def test_usual_starts_change_nothing(shared, pool, kind, targets):
    model, _ = shared
    layers = target_layers(model, targets)
    down, up = standard_init(model, kind, layers, 2, rank=3)
    adapter = GatedAdapter(model, layers, 2, 3)
    try:
        adapter.load_weights(down, up)
        adapter.set_strengths(torch.ones(2))
        assert_close(
            predict_latents(model, pool, torch.arange(4))[0],
            pool.base_prediction[:4],
            rtol=0,
            atol=1e-5,
        )
    finally:
        adapter.remove()
    for n in layers:
        if kind == "orthonormal":
            for columns in up[n].flatten(1).split(3, 1):
                assert_close(columns.T @ columns, torch.eye(3), rtol=0, atol=1e-5)
        assert (down[n] == 0).all() == (kind == "orthonormal") and (up[n] == 0).all() == (
            kind == "random"
        )


def test_the_published_recipe_moves_three_sliders_and_no_up_projection(shared, adapter_of):
    model, found = shared
    method = replace(SLIDERSPACE_RELEASE, training_steps=4, sliders_per_step=2)
    lazy = make_noised_latents(model, found, list(range(20)), 4, 0, precompute_base=False)
    adapter = adapter_of(
        *standard_init(model, "orthonormal", target_layers(model, LAYERS), SLIDERS)
    )
    ups = {n: b.detach().clone() for n, (_, b) in adapter.parameters().items()}
    steps = AlignmentTrainer(
        model, latent_encoder(), adapter, lazy, found.vectors[:SLIDERS], method
    )
    before, moved = [weights(adapter, k) for k in range(SLIDERS)], []
    for reached in steps:
        drawn = reached.isfinite()
        now = [weights(adapter, k) for k in range(SLIDERS)]
        assert [
            not torch.equal(a, b) for a, b in zip(before, now)
        ] == drawn.tolist() and drawn.sum() == 2
        before = now
        moved.append(drawn)
    assert torch.stack(moved).any(0).all()  # each had its turn
    assert all(torch.equal(b, ups[n]) for n, (_, b) in adapter.parameters().items())


def test_the_first_gradient_of_the_published_recipe_is_no_larger_than_later_ones():
    """Of a change of nothing: Adam's second moment would remember a gradient of a million for all of the training."""
    v = F.normalize(torch.ones(1, 8))

    def gradient(size, least):
        change = (
            size * v.roll(1) * torch.tensor([1.0, -1] * 4)
        ).requires_grad_()  # across the direction
        alignment_loss(change, v, least).sum().backward()
        return change.grad.norm().item()

    assert gradient(0.0, 1e-6) > 5e4 * gradient(0.1, 1e-6)
    assert gradient(0.0, SLIDERSPACE_RELEASE.min_change) <= 11 * gradient(
        0.1, SLIDERSPACE_RELEASE.min_change
    )


def test_a_published_update_is_that_of_torch(shared, adapter_of):
    """Of one slider, by hand: AdamW on -0.1 cos, over down-projections from 0 under fixed up-projections."""
    model, found = shared
    layers = target_layers(model, LAYERS)
    down, up = standard_init(model, "orthonormal", layers, 1)
    lazy = make_noised_latents(model, found, list(range(20)), 3, 0, precompute_base=False)
    adapter = adapter_of(down, up)
    steps = AlignmentTrainer(
        model,
        latent_encoder(),
        adapter,
        lazy,
        found.vectors[:1],
        replace(SLIDERSPACE_RELEASE, training_steps=3),
    )
    list(steps)
    mine = {n: a.detach().clone() for n, (a, _) in adapter.parameters().items()}

    adapter = adapter_of(down, up)
    params = [a.requires_grad_(True) for a, _ in adapter.parameters().values()]
    optimizer = torch.optim.AdamW(params, lr=2e-3)
    for row in steps.order:
        adapter.set_strengths(None)
        with torch.no_grad():
            base = normalized_features(
                model, latent_encoder(), predict_latents(model, lazy, row[None])[1]
            )
        change = (
            normalized_features(
                model,
                latent_encoder(),
                predict_latents(model, lazy, row[None], adapter, torch.ones(1, 1))[1],
            )
            - base
        )
        optimizer.zero_grad()
        (0.1 * alignment_loss(change, found.vectors[:1], min_change=0.01)).sum().backward()
        optimizer.step()
    for n, (a, _) in adapter.parameters().items():
        assert a.abs().max() > 1e-3
        assert_close(mine[n], a.detach(), rtol=1e-4, atol=1e-6)
    for p in params:
        p.requires_grad_(False).grad = None


def test_train_by_the_published_recipe(shared):
    model, found = shared
    space = train(
        model,
        found,
        sliders=3,
        method=SLIDERSPACE_RELEASE,
        training_steps=6,
        sliders_per_step=2,
        n_held_out=4,
        progress=quiet,
    )
    assert (space.card["init"], space.card["targets"], space.card["lr"]) == (
        "orthonormal",
        "keys-values",
        2e-3,
    )
    assert (
        set(space.down) == set(target_layers(model, "keys-values"))
        and space.card["training_steps"] == 6
    )
    assert all(a.abs().amax(1).min() > 0 for a in space.down.values())


def test_a_slider_that_has_stopped_growing_leaves_its_updates_to_the_others(
    shared, pool, start, adapter_of
):
    model, found = shared
    steps = AlignmentTrainer(
        model,
        latent_encoder(),
        adapter_of(*start),
        pool,
        found.vectors[:SLIDERS],
        AlignmentConfig(training_steps=12, patience=4),
    )
    taken = torch.zeros(SLIDERS)
    for reached in steps:
        taken += reached.isfinite()
        if steps.done == 3:  # nothing after this will count as growth
            steps.best[0] = 2.0
    assert taken[0] < 12 < taken[1:].max() and not steps.active[0]


def test_leakage_is_trained_away(shared, pool, start, adapter_of):
    model, found = shared

    def leaks(leakage):
        adapter = adapter_of(*start)
        trained(
            model,
            adapter,
            pool,
            found.vectors[:SLIDERS],
            training_steps=10,
            leakage_penalty=leakage,
        )
        cosines = held_out_cosines(model, latent_encoder(), adapter, pool, found.vectors[:SLIDERS])
        return (cosines.pow(2).sum(2) - cosines.diagonal(dim1=0, dim2=2).T.pow(2)).mean()

    assert leaks(20.0) < 0.9 * leaks(0.0)


# --- measures of training --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_held_out_cosines_are_the_mean_cosines(shared, pool, adapter_of):
    model, _ = shared
    adapter = adapter_of(*random_weights(model, target_layers(model, LAYERS), 2))
    changes = torch.zeros(
        2, 2, len(pool.x0), pool.x0[0].numel()
    )  # of each slider, sign and row; signs undone
    base = normalized_features(model, latent_encoder(), pool.x0)
    for k in range(2):
        for i, sign in enumerate((-1, 1)):
            adapter.set_strengths(sign * F.one_hot(torch.tensor(k), 2))
            changed = normalized_features(
                model, latent_encoder(), predict_latents(model, pool, torch.arange(len(pool.x0)))[1]
            )
            changes[k, i] = sign * F.normalize(changed - base)
    adapter.set_strengths(None)
    means = changes.mean((1, 2))
    planted = F.normalize(means)  # each slider's own mean change as its direction
    found = held_out_cosines(model, latent_encoder(), adapter, pool, planted, batch=7).mean(1)
    assert_close(found, means @ planted.T, rtol=0, atol=1e-4)
    assert (found.diag() > 0.3).all() and (found.diag() > found.fliplr().diag().abs() + 0.1).all()
    assert not adapter.now.on


@pytest.fixture
def planted(shared, adapter_of):
    """An adapter whose sliders move final images by 0.4, 2 and almost 0 standard deviations of their directions."""
    model, found = shared
    down, up = random_weights(model, target_layers(model, LAYERS), 3, std=0.1)
    adapter, run = adapter_of(down, up), found.samples.run
    with torch.no_grad():
        noise, change = initial_noise(model, run.seed, list(range(24, 30))), []
        for k in range(3):
            ends = []
            for sign in (-1, 1):
                adapter.set_strengths(sign * F.one_hot(torch.tensor(k), 3))
                ends.append(
                    normalized_features(
                        model,
                        latent_encoder(),
                        training.sample(model, run.prompt, noise, run.steps, run.guidance),
                    )
                )
            change.append((ends[1] - ends[0]).mean(0))
        adapter.set_strengths(None)
    samples = replace(
        found.samples, features=found.samples.features / 5
    )  # a small unit: effects stay proportional
    found = replace(found, vectors=F.normalize(torch.stack(change)), samples=samples)
    effect = measure_effects(
        model, latent_encoder(), adapter, found, [0, 1, 2], list(range(24, 30))
    )
    wanted = torch.tensor([0.4, 2.0, 1e-4])
    for down, _ in adapter.parameters().values():
        down.data.mul_((wanted / effect)[:, None])
    return model, found, adapter


def test_final_effects_are_changes_of_scores(planted):
    model, found, adapter = planted
    effects = measure_effects(
        model, latent_encoder(), adapter, found, [0, 1, 2], list(range(24, 30)), batch=8
    )
    assert_close(effects[0].item(), 0.4, rtol=0.1, atol=0)
    swapped = measure_effects(
        model, latent_encoder(), adapter, found, [1, 0, 2], list(range(24, 30))
    )
    assert swapped[0].abs() < effects[0]  # of its own direction, not of any


def test_calibration_reaches_one_standard_deviation_where_it_can(planted):
    model, found, adapter = planted
    before = [weights(adapter, k) for k in range(3)]
    calibrate(model, latent_encoder(), adapter, found, [0, 1, 2], list(range(24, 30)))
    effects = measure_effects(
        model, latent_encoder(), adapter, found, [0, 1, 2], list(range(24, 30))
    )
    assert (effects[:2] - 1).abs().max() < 0.15, effects
    assert_close(
        weights(adapter, 2), 4 * before[2]
    )  # 4 times a round, half of it in each of down and up
    assert not adapter.now.on


# --- train -----------------------------------------------------------------------------------------------------------

OPTIONS = dict(
    sliders=2,
    training_steps=2,
    latents_per_step=2,
    init_latents=24,
    n_held_out=4,
    targets=LAYERS,
    progress=quiet,
)


def files(space, tmp_path):
    space.save(tmp_path / "space.safetensors")
    return (tmp_path / "space.safetensors").read_bytes()


def same_weights(a, b):
    return all(torch.equal(a.down[n], b.down[n]) and torch.equal(a.up[n], b.up[n]) for n in a.down)


def test_one_seed_gives_one_file(shared, tmp_path):
    model, found = shared
    torch.manual_seed(1)
    first = files(train(model, found, **OPTIONS), tmp_path)
    torch.manual_seed(2)  # the global generator has no part in it
    assert files(train(model, found, **OPTIONS), tmp_path) == first
    assert files(train(model, found, seed=1, **OPTIONS), tmp_path) != first


@pytest.mark.parametrize(
    "eye, rank", [(latent_encoder(), 2), (pixel_encoder(4), 1)], ids=["latents", "pixels"]
)
def test_a_trained_space_says_what_it_is(tiny, eye, rank):
    found = random_directions(tiny, eye, steps=2)
    space = train(tiny, found, rank=rank, seed=4, **OPTIONS)
    space.check(tiny)
    assert (len(space), space.rank, space.card["training_seed"], space.card["training_steps"]) == (
        2,
        rank,
        4,
        2,
    )
    assert (space.card["prompts"], space.card["encoder"]) == (found.samples.run.prompts, eye.name)
    assert set(space.down) == set(target_layers(tiny, LAYERS))
    cosines = torch.tensor(space.card["cosines"])
    for i, row in enumerate(space.card["sliders"]):
        assert space.labels[i] == f"direction {row['direction']}"
        assert (
            row["alignment"] == cosines[i, i].item()
            and row["leakage"] == cosines[i, 1 - i].abs().item()
        )
        assert_close(row["explained"], found.explained_variance_ratio[row["direction"]].item())


def test_no_updates_are_the_calibrated_start(shared):
    space = train(*shared, **OPTIONS | dict(training_steps=0))
    assert space.card["training_steps"] == 0 and not same_weights(space, train(*shared, **OPTIONS))


def test_directions_of_the_step_alone_are_passed_over(shared):
    model, found = shared
    late = found.samples.features.clone()
    late[:, -1] += 10 * found.vectors[0]  # now the step explains direction 0
    passed = replace(found, samples=replace(found.samples, features=late))
    assert passed.step_variance_ratio[0] > 0.9 > 0.5 > passed.step_variance_ratio[1:3].max()
    space = train(model, passed, **OPTIONS)
    assert space.labels == ["direction 1", "direction 2"]
    with pytest.raises(ValueError, match="sliders must be 1 to 5 for 6 directions, not 6"):
        train(model, passed, **OPTIONS | dict(sliders=6))


def test_held_out_samples_are_not_trained_on(shared, monkeypatch):
    model, found = shared
    pools, noises = [], []
    monkeypatch.setattr(
        training,
        "make_noised_latents",
        lambda m, f, samples, *a: (pools.append(samples), make_noised_latents(m, f, samples, *a))[
            1
        ],
    )
    monkeypatch.setattr(
        training,
        "initial_noise",
        lambda m, seed, samples: (noises.append(samples), initial_noise(m, seed, samples))[1],
    )
    space = train(model, found, **OPTIONS)
    start, learnt, held = pools
    assert start == learnt
    assert (
        set(learnt) | set(held) == set(range(24)) and not set(learnt) & set(held) and len(held) == 3
    )
    assert noises and all(
        min(samples) >= 24 for samples in noises
    )  # calibration: noise of samples that nobody made

    def with_other(index):
        other = found.samples.latents.clone()
        other[index] = -other[index]
        return train(
            model, replace(found, samples=replace(found.samples, latents=other)), **OPTIONS
        )

    changed = with_other(slice(21, 24))
    assert same_weights(changed, space) and changed.card["cosines"] != space.card["cosines"]
    assert not same_weights(with_other(20), space)


@pytest.mark.parametrize(
    "options",
    [dict(), dict(method=SLIDERSPACE_RELEASE, sliders_per_step=1), dict(patience=3)],
    ids=["ours", "published", "patience"],
)
def test_a_run_that_is_stopped_goes_on_to_the_same_weights(shared, tmp_path, options, monkeypatch):
    options = OPTIONS | dict(training_steps=7, save_every=2) | options
    whole = train(*shared, **options)
    with pytest.raises(RuntimeError, match="power cut"):
        train(
            *shared,
            folder=tmp_path,
            **options | dict(progress=Stopped(5, RuntimeError("power cut"))),
        )
    [folder] = tmp_path.iterdir()
    kept = {p.name for p in folder.iterdir()}
    assert kept == {"state.safetensors"} | (
        {"start.safetensors"} if "method" not in options else set()
    )
    monkeypatch.setattr(
        training, "gradient_init", never
    )  # what has been computed is not computed again
    again = train(*shared, folder=tmp_path, **options)
    assert same_weights(again, whole) and again.card == whole.card
    assert same_weights(
        train(*shared, folder=tmp_path, **options | dict(progress=Stopped(0))), whole
    )  # nothing is left
    assert list(tmp_path.iterdir()) == [folder]
    monkeypatch.undo()
    train(*shared, folder=tmp_path, **options | dict(seed=1))
    assert len(list(tmp_path.iterdir())) == 2  # another run is kept beside it


def test_a_process_that_is_killed_goes_on_to_the_same_weights(shared, tiny_folder, tmp_path):
    """`kill -9` in the middle of an update."""
    script = f"""
import sys, os, signal
sys.path[:0] = [{str(Path(__file__).parent)!r}]
from sliderspace.training.alignment import AlignmentTrainer
from sliderspace.training.from_directions import train
from sliderspace.features.encoders import latent_encoder
from tiny import quiet, random_directions
from sliderspace import load
model = load({str(tiny_folder("epsilon"))!r}, device="cpu")
update, made = AlignmentTrainer._parts, []
def dying(self, *args):
    made.append(1)
    if len(made) == 6: os.kill(os.getpid(), signal.SIGKILL)
    return update(self, *args)
AlignmentTrainer._parts = dying
train(model, random_directions(model, latent_encoder(), steps=2), sliders=2, training_steps=7, latents_per_step=2, init_latents=24, n_held_out=4,
      targets="keys-values", progress=quiet, folder={str(tmp_path)!r}, save_every=2)
"""
    import subprocess
    import sys

    died = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert died.returncode == -9, died.stderr
    options = OPTIONS | dict(training_steps=7, save_every=2)
    assert same_weights(train(*shared, folder=tmp_path, **options), train(*shared, **options))


def test_nothing_finite_stops_training_with_a_reason(shared, monkeypatch):
    model, found = shared
    predict, calls = training.AlignmentTrainer._parts, []

    def breaking(self, *args):
        calls.append(1)
        yield from () if len(calls) > self.settings.training_steps - 12 else predict(self, *args)

    monkeypatch.setattr(training.AlignmentTrainer, "_parts", breaking)
    with pytest.warns(
        UserWarning, match="training stopped at step 14: all losses were non-finite for 10 steps"
    ):
        space = train(model, found, **OPTIONS | dict(training_steps=17))
    assert "non-finite for 10 steps" in space.card["ended"] and space.card["lost"] == [20.0, 20.0]
    calls.clear()
    with pytest.raises(FloatingPointError, match="training stopped at step 9"):
        train(model, found, **OPTIONS | dict(training_steps=12))


class Stopped:
    """A progress bar that lets some updates through, and then raises, or ends."""

    def __init__(self, updates, error=None):
        self.updates, self.error = updates, error

    def __call__(self, items, desc=None, **options):
        if desc != "training":
            return items
        return self.first(iter(items))

    def first(self, items):
        for _ in range(self.updates):
            yield next(items)
        if self.error:
            raise self.error


def test_ctrl_c_keeps_what_was_trained(shared):
    options = OPTIONS | dict(training_steps=6)
    stopped = train(*shared, **options | dict(progress=Stopped(3, KeyboardInterrupt())))
    assert same_weights(stopped, train(*shared, **options | dict(progress=Stopped(3))))
    assert not same_weights(stopped, train(*shared, **options | dict(progress=Stopped(0))))


def state(model):
    """What training could leave behind."""
    net = model.denoiser
    hooks = [n for n, m in net.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    wants = [n for n, p in net.named_parameters() if p.requires_grad or p.grad is not None]
    noise = initial_noise(model, 0, [0])
    answer = model.predict(noise, 500, "hat")[0].detach()
    return (
        [(n, type(m)) for n, m in net.named_modules()],
        hooks,
        wants,
        hasattr(net, "peft_config"),
        answer.tolist(),
    )


def failing_at(name):
    def progress(items, desc=None, **options):
        if desc == name:
            raise RuntimeError("out of memory")
        return items

    return progress


@pytest.mark.parametrize("error", [None, "first-order start", "training", "updates", "measures"])
def test_the_model_is_its_own_again(tiny, shared, monkeypatch, error):
    before = state(tiny)
    random_space(tiny).attach(tiny)  # a space that was in use is taken off, too
    options = OPTIONS | dict(progress=failing_at(error))
    if error == "updates":
        options["progress"] = Stopped(1, RuntimeError("out of memory"))
    if error == "measures":

        def broken(*args, **options):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(training, "held_out_cosines", broken)
    if error is None:
        train(tiny, shared[1], **options)
    else:
        with pytest.raises(RuntimeError, match="out of memory"):
            train(tiny, shared[1], **options)
    assert state(tiny) == before


BAD = {
    "sliders must be 1 to 6 for 6 directions, not 0; discover more": dict(sliders=0),
    "sliders must be 1 to 6 for 6 directions, not 7": dict(sliders=7),
    "sliders must be 1 to 6 for 6 directions, not -1": dict(sliders=-1),
    "sliders must be 1 to 6 for 6 directions, not 1.5": dict(sliders=1.5),
    "rank must be 1 or more, not 0": dict(rank=0),
    "training_steps must be 0 or more, not -1": dict(training_steps=-1),
    "lr must be 0 or more, and finite, not nan": dict(lr=float("nan")),
    "init must be one of .* not 'zero'": dict(init="zero"),
    "batch must be 1 or more, not 0": dict(batch=0),
    "save_every must be 1 or more, not 0": dict(save_every=0),
    "train has no option 'lerning_rate'; the options are rank, targets": dict(lerning_rate=1.0),
    "encoder 'pixels-5' is not the one .* found with: 'latents'": dict(encoder=pixel_encoder(5)),
    "targets='hats' matches no layer": dict(targets="hats"),
    "targets='[(]' is neither one of .* nor a regular expression": dict(targets="("),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_before_any_work(shared, monkeypatch, message):
    monkeypatch.setattr(training, "make_noised_latents", never)
    with pytest.raises(ValueError, match=message):
        train(*shared, **OPTIONS | BAD[message])


def test_too_few_samples_are_refused_before_any_work(shared, monkeypatch):
    monkeypatch.setattr(training, "make_noised_latents", never)
    few = random_directions(shared[0], latent_encoder(), samples=15)
    with pytest.raises(
        ValueError, match="training needs 16 samples or more, and the directions have 15"
    ):
        train(shared[0], few, **OPTIONS)
