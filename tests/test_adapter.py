"""A gated adapter at zero is the base model bit for bit, at a mix it is peft's own adapters, and it leaves no trace."""

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from tiny import PROMPT, random_space, random_weights
from torch.testing import assert_close

from sliderspace.sliders.adapter import TARGETS, GatedAdapter, target_layers
from sliderspace.sampling.generate import sample, initial_noise

CLOSE = dict(rtol=2e-6, atol=2e-6)
MIX = torch.tensor([1.0, 0, -1.5])


@pytest.fixture
def make(tiny_of):
    """Targets, sliders and rank -> an adapter of random sliders on the shared tiny model; taken off after the test."""
    made, model = [], tiny_of("epsilon")

    def adapter(targets="attention", sliders=3, rank=2, on=model):
        layers = target_layers(on, targets)
        made.append(GatedAdapter(on, layers, sliders, rank))
        made[-1].load_weights(*random_weights(on, layers, sliders, rank, std=0.15))
        return made[-1]

    yield adapter
    for adapter in reversed(made):
        if adapter.name in getattr(adapter.model.denoiser, "peft_config", {}):
            adapter.remove()


@pytest.fixture
def user_lora():
    """Loads a user's own LoRA, as a file would come, on layers of a model: (model, targets) -> None."""

    def load_one(model, targets="attention", name="mine", seed=7):
        space = random_space(model, ["one"], rank=2, seed=seed, targets=targets)
        model.pipe.load_lora_weights(space.to_lora_state_dict({0: 1.0}), adapter_name=name)

    return load_one


@torch.no_grad()
def predict(model, images=2, timestep=500, guidance=1.0):
    """The denoiser's answer to some noise."""
    return model.predict(initial_noise(model, 0, range(images)), timestep, PROMPT, guidance)[0]


@torch.no_grad()
def denoise(model, times):
    """The denoiser's answer to some noise, an image at each of the timesteps."""
    words = model.pipe.encode_prompt(PROMPT, "cpu", len(times), False)[0]
    return model.denoiser(initial_noise(model, 0, range(len(times))), times, words)[0]


def from_pipe(model, images=2, guidance=3.0):
    """Final latents of a plain call of the pipeline."""
    noise = initial_noise(model, 0, range(images))
    return model.pipe(
        PROMPT,
        num_images_per_prompt=images,
        latents=noise,
        num_inference_steps=2,
        guidance_scale=guidance,
        output_type="latent",
    ).images


def state(net):
    """What must be as it was: every parameter's name, whether it is trained, its bytes, and what is active where."""
    parameters = {
        n: (p.requires_grad, p.detach().clone().numpy().tobytes())
        for n, p in net.named_parameters()
    }
    layers = {n: m for n, m in net.named_modules() if isinstance(m, LoraLayer)}
    active = {n: (tuple(m.active_adapters), dict(m.scaling)) for n, m in layers.items()}
    return parameters, active, sorted(getattr(net, "peft_config", {}))


# --- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "targets, blocks, ends",
    [
        ("keys-values", {"attn2"}, {"to_k", "to_v"}),
        ("cross-attention", {"attn2"}, {"to_q", "to_k", "to_v", "out.0"}),
        ("attention", {"attn1", "attn2"}, {"to_q", "to_k", "to_v", "out.0"}),
        (r"attn1\.to_q$", {"attn1"}, {"to_q"}),
    ],
)
def test_targets_name_layers(tiny, targets, blocks, ends):
    names = target_layers(tiny, targets)
    assert len(set(names)) == len(names)
    assert {b for n in names for b in ("attn1", "attn2") if f".{b}." in n} == blocks
    assert {e for n in names for e in ("to_q", "to_k", "to_v", "out.0") if n.endswith(e)} == ends
    attentions = (
        sum(n.endswith(("attn1", "attn2")) for n, _ in tiny.denoiser.named_modules())
        // 2
        * len(blocks)
    )
    assert len(names) == attentions * len(ends)


def test_layers_have_the_same_names_when_adapters_are_on_them(tiny, make):
    names = {t: target_layers(tiny, t) for t in (*TARGETS, "ff|time_emb")}
    make()
    assert {t: target_layers(tiny, t) for t in names} == names


def test_a_model_has_the_same_identity_when_adapters_are_on_it(tiny, make):
    layers = target_layers(tiny)
    before = tiny.identity(), tiny.fingerprint(layers)
    make().set_strengths(MIX)
    assert (tiny.identity(), tiny.fingerprint(layers)) == before


@pytest.mark.parametrize(
    "targets, message",
    [
        (
            "attn(",
            r"targets='attn\(' is neither one of \['keys-values', .*\] nor a regular expression \(missing",
        ),
        ("*", "nor a regular expression"),
        (
            "keys_values",
            r"targets='keys_values' matches no layer of tiny; of the named ones \['keys-values'",
        ),
        ("norm1", "matches no layer"),
    ],
)
def test_targets_without_layers_are_refused(tiny, targets, message):
    with pytest.raises(ValueError, match=message):
        target_layers(tiny, targets)


# --- strength 0 ------------------------------------------------------------------------------------------------------


CALLS = [*((t, 1.0) for t in TARGETS), (r"to_q$|ff\.net", 1.0), ("attention", 3.0)]


@pytest.mark.parametrize("targets, guidance", CALLS)
def test_without_strengths_it_is_the_base_model_bit_for_bit(tiny, make, targets, guidance):
    base = predict(tiny, guidance=guidance)
    adapter = make(targets)
    assert torch.equal(predict(tiny, guidance=guidance), base)  # attached
    adapter.set_strengths(MIX)
    assert (predict(tiny, guidance=guidance) - base).abs().max() > 1e-3
    for off in (torch.zeros(3), torch.zeros(2, 3), -torch.zeros(3), None):
        adapter.set_strengths(MIX)
        adapter.set_strengths(off)
        assert torch.equal(predict(tiny, guidance=guidance), base)
    adapter.set_strengths(MIX)
    adapter.remove()
    assert torch.equal(predict(tiny, guidance=guidance), base)


@pytest.mark.parametrize("targets", ["attention", r"to_q$|ff\.net", "full"])
def test_only_the_sliders_that_are_on_are_computed(tiny, make, targets, monkeypatch):
    adapter = make(targets, rank=1)
    adapter.set_strengths(torch.tensor([0.0, 0.7, 0.0]))
    some, widths = predict(tiny), set()
    linear, conv = torch.nn.functional.linear, torch.nn.Conv2d._conv_forward

    def watched(work, at):
        def call(*args):
            widths.add(len(args[at])) if len(args[at]) in (1, 2, 3) else None
            return work(*args)

        return call

    monkeypatch.setattr("sliderspace.sliders.adapter.F.linear", watched(linear, 1))
    monkeypatch.setattr(torch.nn.Conv2d, "_conv_forward", watched(conv, 2))
    assert torch.equal(predict(tiny), some) and widths == {1}
    adapter.set_strengths(MIX)
    predict(tiny)
    assert widths == {1, 2}
    adapter.set_strengths(None)
    widths.clear()
    predict(tiny)
    assert not widths


def test_an_attachment_that_fails_leaves_nothing(fresh, make, user_lora, monkeypatch):
    user_lora(fresh)
    base, before = predict(fresh), state(fresh.denoiser)
    to = torch.nn.Linear.to
    left = [5]

    def full(self, *args, **options):
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError("no memory")
        return to(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "to", full)
        with pytest.raises(torch.OutOfMemoryError):
            GatedAdapter(fresh, target_layers(fresh), 3)
    assert torch.equal(predict(fresh), base)
    adapter = make(on=fresh)
    adapter.set_strengths(MIX)
    once = predict(fresh)
    adapter.remove()
    assert torch.equal(predict(fresh), base) and not torch.equal(once, base)
    assert state(fresh.denoiser)[1] == before[1]


def test_a_lora_that_is_fused_later_takes_the_sliders_off(fresh, make, user_lora):
    user_lora(fresh)
    adapter = make(on=fresh)
    assert adapter.is_attached
    with pytest.raises(ValueError, match="sliders have no one change"):
        fresh.pipe.fuse_lora(components=["unet"])
    assert not adapter.is_attached
    for layer in fresh.denoiser.modules():
        if getattr(layer, "merged", False):
            layer.unmerge()


def test_sliders_are_not_merged_into_the_weights(tiny, make):
    base, adapter = predict(tiny), make()
    adapter.set_strengths(MIX)
    for safe in (False, True):
        with pytest.raises(ValueError, match=r"save the mix with space\.export"):
            tiny.pipe.fuse_lora(components=["unet"], safe_fusing=safe)
    adapter.remove()
    assert torch.equal(predict(tiny), base)


def test_an_image_at_strength_0_is_the_base_models_beside_others(tiny, make):
    base, adapter = predict(tiny), make()
    adapter.set_strengths(torch.stack([torch.zeros(3), MIX]))
    mixed = predict(tiny)
    assert torch.equal(mixed[0], base[0]) and not torch.equal(mixed[1], base[1])


# --- strengths -------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_peft(fresh):
    """Sliders -> a model with each of them as an adapter of its own, made by peft: strengths -> that model, set."""

    def build(adapter):
        names = [f"slider-{k}" for k in range(adapter.sliders)]
        for k, name in enumerate(names):
            config = LoraConfig(
                r=adapter.rank, lora_alpha=adapter.rank, target_modules=adapter.layers
            )
            fresh.denoiser.add_adapter(config, name)
            rows = slice(k * adapter.rank, (k + 1) * adapter.rank)
            for path, (down, up) in adapter.parameters().items():
                layer = fresh.denoiser.get_submodule(path)
                layer.lora_A[name].weight.data = down.detach()[rows].clone()
                layer.lora_B[name].weight.data = up.detach()[:, rows].clone()

        def at(strengths):
            fresh.denoiser.set_adapters(names, strengths.tolist())
            return fresh

        return at

    return build


MIXES = [(1, 0, 0), (0, -1, 0), (0.5, 2, -1.5), (-2, -0.25, 1)]


@pytest.mark.parametrize("targets, rank", [("attention", 1), ("attention", 2), ("keys-values", 3)])
def test_a_mix_is_pefts_sum_of_separate_adapters(tiny, make, with_peft, targets, rank):
    base, adapter = predict(tiny), make(targets, rank=rank)
    at = with_peft(adapter)
    for mix in map(torch.tensor, MIXES):
        adapter.set_strengths(mix.float())
        ours = predict(tiny)
        assert_close(ours, predict(at(mix)), **CLOSE)
        assert (ours - base).abs().max() > 1e-3


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_mix_is_pefts_in_a_call_of_the_pipeline(tiny, make, with_peft, guidance):
    adapter = make()
    adapter.set_strengths(MIX)
    theirs = from_pipe(with_peft(adapter)(MIX), guidance=guidance)
    assert_close(from_pipe(tiny, guidance=guidance), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_every_image_of_a_batch_has_its_own_mix(tiny, make, guidance):
    adapter, mixes = make(), torch.tensor(MIXES).float()
    grown = {
        n: v * (2 * guidance - 1) for n, v in CLOSE.items()
    }  # g a - (g - 1) b has the rounding of a and of b
    adapter.set_strengths(mixes)
    together, predicted = from_pipe(tiny, 4, guidance), predict(tiny, 4, guidance=guidance)
    for i, mix in enumerate(mixes):
        adapter.set_strengths(mix)
        assert_close(together[i], from_pipe(tiny, 4, guidance)[i], rtol=1e-5, atol=1e-5)
        assert_close(predicted[i], predict(tiny, 4, guidance=guidance)[i], **grown)
    assert len(torch.unique(together.flatten(1), dim=0)) == 4


def test_strengths_are_gone_with_the_next_set(tiny, make):
    adapter = make()
    adapter.set_strengths(MIX)
    first = predict(tiny)
    adapter.set_strengths(-MIX, (0.0, 0.5))
    adapter.set_strengths(MIX)
    assert torch.equal(predict(tiny), first)


def test_the_samplers_own_loop_agrees_with_the_pipeline(tiny, make):
    make().set_strengths(MIX)
    ours = sample(tiny, PROMPT, initial_noise(tiny, 0, [0, 1]), 2, 3.0)
    assert_close(ours, from_pipe(tiny, guidance=3.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "strengths, message",
    [
        (torch.zeros(2), r"strengths must be \(3,\) or \(images, 3\), not \(2,\)"),
        (torch.zeros(3, 2), r"not \(3, 2\)"),
        (torch.zeros(1, 2, 3), r"not \(1, 2, 3\)"),
        (torch.tensor(1.0), r"not \(\)"),
        (torch.zeros(0), r"not \(0,\)"),
        (torch.tensor([0, float("nan"), 0]), "strengths must be finite, not .*nan"),
        (torch.tensor([[0, 0, 0], [0, float("inf"), 0]]), "strengths must be finite, not .*inf"),
    ],
)
def test_bad_strengths_are_refused_and_change_nothing(tiny, make, strengths, message):
    adapter = make()
    adapter.set_strengths(MIX)
    before = predict(tiny)
    with pytest.raises(ValueError, match=message):
        adapter.set_strengths(strengths)
    assert torch.equal(predict(tiny), before)


def test_strengths_for_another_number_of_images_are_refused(tiny, make):
    make().set_strengths(MIX.expand(3, 3))
    with pytest.raises(
        ValueError, match="strengths are for 3 images, the denoiser was given a batch of 4"
    ):
        predict(tiny, 2, guidance=3.0)


# --- windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "window, inside",
    [
        ((0.0, 1.0), {999, 750, 749, 500, 499, 1, 0}),
        ((0.25, 0.5), {749, 500}),  # the start belongs to the window, the stop does not
        ((0.5, 1.0), {499, 1, 0}),
        ((0.0, 0.25), {999, 750}),
        ((0.5, 0.5), set()),
    ],
)
def test_sliders_act_inside_their_window_only(tiny, make, window, inside):
    adapter, times = make(), torch.tensor([999, 750, 749, 500, 499, 1, 0])  # an image each
    base = denoise(tiny, times)
    adapter.set_strengths(MIX)
    everywhere = denoise(tiny, times)
    adapter.set_strengths(MIX, window)
    within = denoise(tiny, times)
    for i, t in enumerate(times.tolist()):
        assert torch.equal(within[i], everywhere[i] if t in inside else base[i]), t
        assert not torch.equal(everywhere[i], base[i]), t


def test_guidance_doubles_the_timesteps_too(tiny, make):
    adapter = make()
    times = torch.tensor([900, 100, 900, 100])
    base = denoise(tiny, times)
    adapter.set_strengths(torch.stack([MIX, -MIX]), (0.5, 1.0))
    mixed = denoise(tiny, times)
    assert [torch.equal(m, b) for m, b in zip(mixed, base)] == [True, False, True, False]


def test_a_window_of_the_whole_schedule_is_none(tiny, make):
    adapter = make()
    adapter.set_strengths(MIX)
    plain = from_pipe(tiny)
    adapter.set_strengths(MIX, (0.0, 1.0))
    assert torch.equal(from_pipe(tiny), plain)
    adapter.set_strengths(MIX, (0.6, 1.0))  # of two steps, at 501 and at 1, the second
    late = from_pipe(tiny)
    adapter.set_strengths(None)
    base = from_pipe(tiny)
    assert len(torch.unique(torch.stack([plain, late, base]).flatten(1), dim=0)) == 3


@pytest.mark.parametrize(
    "window", [(0.6, 0.4), (-0.1, 1.0), (0.0, 1.1), (float("nan"), 1.0), (0.0, float("nan"))]
)
def test_bad_windows_are_refused_and_change_nothing(tiny, make, window):
    adapter = make()
    adapter.set_strengths(MIX)
    before = predict(tiny)
    with pytest.raises(ValueError, match="window must be 0 <= start <= stop <= 1, not "):
        adapter.set_strengths(-MIX, window)
    assert torch.equal(predict(tiny), before)


# --- no trace --------------------------------------------------------------------------------------------------------


def test_nothing_is_left_after_removal(tiny, make):
    before, modules = state(tiny.denoiser), [(n, type(m)) for n, m in tiny.denoiser.named_modules()]
    adapter = make()
    adapter.set_strengths(MIX)
    predict(tiny)
    adapter.remove()
    assert state(tiny.denoiser) == before and not hasattr(tiny.denoiser, "peft_config")
    assert [(n, type(m)) for n, m in tiny.denoiser.named_modules()] == modules
    assert not tiny.denoiser._forward_pre_hooks


def test_what_is_trained_stays_trained(fresh, make):
    # a base that somebody fine-tunes: on layers with sliders and on others
    trained = ("attn2.to_k.weight", "ff.net.2.bias", "conv_in.weight")
    for name, p in fresh.denoiser.named_parameters():
        p.requires_grad_(name.endswith(trained))
    before = state(fresh.denoiser)
    adapter = make(on=fresh)
    flags = {
        n.replace(".base_layer", ""): p.requires_grad for n, p in fresh.denoiser.named_parameters()
    }
    assert {n for n, on in flags.items() if on} == {n for n, (on, _) in before[0].items() if on}
    adapter.remove()
    assert state(fresh.denoiser) == before


def test_nothing_is_trained_until_somebody_asks(tiny, make):
    adapter = make()
    assert not any(p.requires_grad for p in tiny.denoiser.parameters())
    assert all(p.dtype == torch.float32 for pair in adapter.parameters().values() for p in pair)


SHARED = [
    ("attention", "attention"),
    ("attention", "keys-values"),
    ("keys-values", "attention"),
    ("attention", r"ff\.net"),
]


@pytest.mark.parametrize("theirs, ours", SHARED)
def test_a_users_own_lora_stays_on(fresh, make, user_lora, theirs, ours):
    base = predict(fresh)
    user_lora(fresh, theirs)
    fresh.pipe.set_adapters("mine", 0.7)
    before, with_lora = state(fresh.denoiser), predict(fresh)
    assert (with_lora - base).abs().max() > 1e-3
    adapter = make(ours, on=fresh)
    assert torch.equal(predict(fresh), with_lora)
    adapter.set_strengths(MIX)
    assert not torch.equal(predict(fresh), with_lora)
    adapter.remove()
    assert torch.equal(predict(fresh), with_lora)
    assert state(fresh.denoiser) == before
    fresh.pipe.unload_lora_weights()
    assert torch.equal(predict(fresh), base)


def test_a_users_lora_and_sliders_add_up(fresh, make, user_lora):
    user_lora(fresh, "cross-attention")
    fresh.pipe.set_adapters("mine", 0.7)
    space, adapter = random_space(fresh, ["a", "b", "c"], rank=2), make(on=fresh)
    adapter.load_weights(space.down, space.up)
    adapter.set_strengths(MIX)
    ours = predict(fresh)
    adapter.remove()
    fresh.pipe.load_lora_weights(space.to_lora_state_dict(MIX), adapter_name="sliders")
    fresh.pipe.set_adapters(["mine", "sliders"], [0.7, 1.0])
    assert_close(ours, predict(fresh), rtol=1e-5, atol=1e-5)


def test_a_users_lora_that_is_off_stays_off(fresh, make, user_lora):
    user_lora(fresh, name="one", seed=7)
    user_lora(fresh, name="two", seed=8)
    fresh.pipe.set_adapters("two", -0.5)
    before, with_two = state(fresh.denoiser), predict(fresh)
    adapter = make(on=fresh)
    assert torch.equal(predict(fresh), with_two)
    adapter.remove()
    assert torch.equal(predict(fresh), with_two)
    assert state(fresh.denoiser) == before


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.fixture
def trainable(make):
    adapter = make(rank=2)
    for pair in adapter.parameters().values():
        for p in pair:
            p.requires_grad_(True)
    return adapter


def gradients(model, adapter, images=2, only=slice(None)):
    """For each slider, the largest gradient of its down- and its up-projections."""
    output = model.predict(initial_noise(model, 0, range(images)), 500, PROMPT, 3.0)[0]
    output[only].pow(2).sum().backward()
    down, up = zip(*adapter.parameters().values())
    sizes = [
        torch.stack([p.grad.movedim(dim, 0).reshape(3, -1).abs().amax(1) for p in part])
        for part, dim in ((down, 0), (up, 1))
    ]
    for p in (*down, *up):
        p.grad = None
    return torch.stack([size.amax(0) for size in sizes])  # (2, K)


@pytest.mark.parametrize("mix", MIXES)
def test_gradients_reach_the_chosen_sliders_only(tiny, trainable, mix):
    trainable.set_strengths(torch.tensor(mix).float())
    found = gradients(tiny, trainable)
    assert torch.equal(found != 0, (torch.tensor(mix) != 0).expand(2, 3)) and found.isfinite().all()
    assert not any(
        p.grad is not None for n, p in tiny.denoiser.named_parameters() if "lora_" not in n
    )


def test_gradients_of_an_image_reach_its_own_sliders_only(tiny, trainable):
    trainable.set_strengths(torch.eye(3)[[2, 0]])
    for image, slider in enumerate((2, 0)):
        assert (gradients(tiny, trainable, only=image) != 0).tolist() == [
            [k == slider for k in range(3)]
        ] * 2


def test_strengths_keep_no_graph(tiny, make):
    strengths = MIX.clone().requires_grad_(True)
    adapter = make()
    adapter.set_strengths(strengths)
    assert not adapter.now.strengths.requires_grad and not predict(tiny).requires_grad


def test_weights_go_in_and_come_out(tiny, make):
    adapter = make("keys-values", sliders=4, rank=2)
    down, up = random_weights(tiny, adapter.layers, 4, 2, seed=5)
    adapter.load_weights(down, up)
    for name, (a, b) in adapter.parameters().items():
        assert (
            torch.equal(a, down[name])
            and torch.equal(b, up[name])
            and a.shape[0] == b.shape[1] == 8
        )
