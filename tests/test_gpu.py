"""On a GPU: the same pictures and gradients as on the CPU, in bfloat16 too, in batches that follow from free memory."""

import pytest
import torch
from families import make
from test_loading import gradients
from tiny import PROMPT, quiet, random_space
from torch.testing import assert_close

from sliderspace import discover, load, train
from sliderspace.features.encoders import pixel_encoder
from sliderspace.models.batching import run_in_batches
from sliderspace.sampling.generate import sample, initial_noise

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=["sdxl", "flux-dev", "z-image-turbo"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu") / request.param
    make(request.param, folder)
    return folder


def loaded(folder, device="cuda", **options):
    return load(
        folder, device=device, **{"dtype": torch.float32, "size": (16, 16), "steps": 3} | options
    )


def test_pictures_are_those_of_the_cpu(folder):
    made = []
    for device in ("cpu", "cuda"):
        model = loaded(folder, device)
        with random_space(model).on(model, {0: 1.0, 1: -0.5}):
            made.append(sample(model, PROMPT, initial_noise(model, 0, [0, 1]), 3, 2.0).cpu())
    assert_close(*made, rtol=0, atol=1e-2)


def test_checkpointed_gradients_pass_through_the_gate(folder):
    # autograd runs the layers again in a thread of its own
    assert_close(
        gradients(loaded(folder, low_memory=True)), gradients(loaded(folder)), rtol=1e-2, atol=1e-3
    )


def test_text_encoders_rest_on_the_cpu(folder):
    model = loaded(folder, low_memory=True)
    sample(model, PROMPT, initial_noise(model, 0, [0]), 3, 2.0)
    assert model.pipe.text_encoder.device.type == "cpu" and model.denoiser.device.type == "cuda"


def test_training_in_bfloat16(folder):
    model = loaded(folder, dtype=torch.bfloat16)
    found = discover(
        model,
        PROMPT,
        samples=16,
        encoder=pixel_encoder(4),
        n_directions=4,
        guidance=1.0,
        progress=quiet,
    )
    space = train(
        model,
        found,
        sliders=2,
        training_steps=4,
        init_latents=3,
        n_held_out=3,
        encoder=pixel_encoder(4),
        progress=quiet,
    )
    assert all(
        p.dtype == torch.float32 and p.isfinite().all()
        for p in (*space.down.values(), *space.up.values())
    )
    assert {"training", "samples"} <= set(model.batch_sizes)  # chosen from what the first row took


def test_batches_follow_from_free_memory(folder):
    model, free = loaded(folder), torch.cuda.mem_get_info()[0]
    row = free // 10  # five rows or so fit, of bytes

    def work(part):
        return torch.empty(len(part) * row, dtype=torch.uint8, device="cuda").numel() // row

    parts = list(run_in_batches(model, "test", work, torch.arange(20), 16))
    assert sum(parts) == 20 and parts[0] == 1 and max(parts) in (4, 8)
