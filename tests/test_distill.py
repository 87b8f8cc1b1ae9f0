"""Distillation: the student samples as its pipeline does, the loss has the published gradient, teacher and rest stay put."""

import pytest
import torch
from tiny import PROMPT, pipeline_of, tiny_parts

from sliderspace.portraits.distill import (
    STUDENT_STEPS,
    TEACHER_GUIDANCE,
    TEACHER_STEPS,
    Distillation,
    make_student,
    matching_loss,
    new_student_scheduler,
    student_x0,
    teacher_pairs,
)
from sliderspace.portraits.networks import new_scheduler
from sliderspace.portraits.recipe import Build


@pytest.fixture(scope="module")
def parts():
    return tiny_parts("v_prediction") | {"scheduler": new_student_scheduler()}


def embedder(parts):
    pipe = pipeline_of(parts)
    return lambda captions: pipe.encode_prompt(captions, "cpu", 1, False)[0].detach()


@pytest.fixture(scope="module")
def words(parts):
    return embedder(parts)([PROMPT] * 3)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def test_all_steps_equal_the_pipeline(parts, words):
    pipe = pipeline_of(parts)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(3, 4, 8, 8, generator=gen(1))
    theirs = pipe(
        prompt_embeds=words,
        latents=noise,
        num_inference_steps=STUDENT_STEPS,
        guidance_scale=1.0,
        generator=gen(2),
        output_type="latent",
    ).images
    with torch.no_grad():
        ours = student_x0(parts["unet"], words, noise, STUDENT_STEPS - 1, gen(2))
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_gradients_come_from_the_last_step_alone(parts, words):
    unet, noise = parts["unet"], torch.randn(3, 4, 8, 8, generator=gen(1))
    calls = []
    hook = unet.register_forward_hook(
        lambda module, args, out: calls.append(out.sample.requires_grad)
    )
    x0 = student_x0(unet, words, noise, 2, gen(2))
    hook.remove()
    assert calls == [False, False, True] and x0.requires_grad


def test_gradient_of_the_matching_loss():
    x0, real, fake = (torch.randn(5, 4, 8, 8, generator=gen(i)) for i in range(3))
    x0.requires_grad_(True)
    matching_loss(x0, real, fake).backward()
    size = (x0 - real).abs().mean((1, 2, 3), keepdim=True)
    assert torch.allclose(x0.grad * x0.numel(), ((fake - real) / size).detach(), atol=1e-5)


def test_matching_is_finite_and_still_where_all_agree():
    x0 = torch.randn(2, 4, 8, 8, generator=gen()).requires_grad_(True)
    matching_loss(x0, x0.detach(), x0.detach()).backward()
    assert x0.grad.abs().max() == 0


def test_pairs_are_what_the_teachers_pipeline_draws(parts):
    pipe = pipeline_of(parts | {"scheduler": new_scheduler()})
    pipe.set_progress_bar_config(disable=True)
    captions = [PROMPT, "portrait of a person, red hair"]
    noise, drawn = teacher_pairs(parts["unet"], embedder(parts), captions, (4, 8, 8), gen(3))
    theirs = pipe(
        captions,
        latents=noise,
        num_inference_steps=TEACHER_STEPS,
        guidance_scale=TEACHER_GUIDANCE,
        output_type="latent",
    ).images
    assert torch.allclose(drawn, theirs, atol=1e-4)


@pytest.fixture
def distillation(parts):
    people = [dict(style="pixel art style"), dict(style="lorelei style", hair="red hair")]
    nets = torch.nn.ModuleDict({k: tiny_parts("v_prediction")["unet"] for k in ("student", "fake")})
    teacher, captions = (
        tiny_parts("v_prediction", seed=1)["unet"].requires_grad_(False),
        [PROMPT] * 4,
    )
    pairs = (*teacher_pairs(teacher, embedder(parts), captions, (4, 8, 8), gen()), captions)
    return Distillation(nets, teacher, embedder(parts), people, pairs, batch=4)


@pytest.mark.parametrize("share, moved", [(0.0, {"fake"}), (1.0, {"fake", "student"})])
def test_who_learns(distillation, share, moved):
    distillation.share = share
    loss = distillation(gen())
    assert loss.isfinite()
    loss.backward()
    nets = distillation.model
    assert {
        k
        for k, net in nets.items()
        if any(p.grad is not None and p.grad.any() for p in net.parameters())
    } == moved
    assert all(p.grad is None for p in distillation.teacher.parameters())


def test_matching_moves_the_student_alone(distillation, words):
    x0 = torch.randn(3, 4, 8, 8, generator=gen()).requires_grad_(True)
    distillation.matching(x0, words, gen()).backward()
    assert x0.grad.abs().sum() > 0
    assert all(p.grad is None for p in distillation.model.parameters())


def test_holding_is_zero_for_a_student_that_draws_the_pairs(distillation):
    noise, drawn, captions = distillation.pairs
    with torch.no_grad():
        own = student_x0(distillation.model.student, distillation.embed(captions), noise, 0, gen())
    distillation.pairs = noise, own, captions
    assert (
        distillation.holding(0, gen()).item() < 1e-6
    )  # c_out of the sampler's boundary term is not quite 1
    distillation.pairs = noise, drawn, captions
    assert distillation.holding(0, gen()).item() > 1e-3


def test_a_folder_without_a_teacher_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="holds no finished model: run sliderspace.portraits.recipe"
    ):
        make_student(Build(tmp_path))
