"""Tiny random pipelines of every family, made in code from configurations: the mechanics need no trained weights."""

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from tiny import pipeline_of, tiny_parts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerFast

CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def tiny_tokenizer(length=16):
    """A byte-level tokenizer, as T5's, Qwen's and Gemma's are called."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["portrait of a person", "user assistant"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        "$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        model_max_length=length,
        chat_template=CHAT,
    )


def t5(width=32):
    config = transformers.T5Config(
        vocab_size=512, d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4
    )
    return transformers.T5EncoderModel(config)


def decoder_config(kind, layers=2, width=32, **more):
    """Configuration of a decoder-only language model as those that encode prompts today."""
    return kind(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=37,
        num_hidden_layers=layers,
        head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
        **more,
    )


def kl(channels=4, **more):
    """Autoencoder of 16x16 pixels to 8x8 latents."""
    blocks = dict(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2
    )
    return AutoencoderKL(
        sample_size=16,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=channels,
        **blocks,
        **more,
    )


def sd15():
    return pipeline_of(tiny_parts())


def sdxl(scheduler=None):
    parts = tiny_parts()
    unet = diffusers.UNet2DConditionModel.from_config(
        parts["unet"].config,
        cross_attention_dim=64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
        use_linear_projection=True,
    )
    second = CLIPTextModelWithProjection(parts["text_encoder"].config)
    if scheduler:
        parts["scheduler"] = scheduler.from_config(parts["scheduler"].config)
    return diffusers.StableDiffusionXLPipeline(
        **parts | {"unet": unet},
        text_encoder_2=second,
        tokenizer_2=parts["tokenizer"],
        add_watermarker=False,
    )


def flux(guided):
    parts = tiny_parts()
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=guided,
        axes_dims_rope=(4, 4, 8),
    )
    return diffusers.FluxPipeline(
        transformer=transformer,
        vae=kl(shift_factor=0.1, scaling_factor=0.4),
        text_encoder_2=t5(),
        tokenizer_2=tiny_tokenizer(),
        text_encoder=parts["text_encoder"],
        tokenizer=parts["tokenizer"],
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guided),
    )


def sd3():
    parts = tiny_parts()
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    clip = CLIPTextModelWithProjection(parts["text_encoder"].config)
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=clip,
        vae=kl(shift_factor=0.1, scaling_factor=0.4),
        tokenizer=parts["tokenizer"],
        text_encoder_2=clip,
        tokenizer_2=parts["tokenizer"],
        text_encoder_3=t5(64),
        tokenizer_3=tiny_tokenizer(),
    )


def flux2():
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * 16,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    text = transformers.Qwen3ForCausalLM(
        decoder_config(transformers.Qwen3Config, layers=28, width=16)
    )
    return diffusers.Flux2KleinPipeline(
        FlowMatchEulerDiscreteScheduler(), vae, text, tiny_tokenizer(), transformer
    )


def z_image():
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[4, 6, 6],
        axes_lens=[64, 32, 32],
    )
    for pad in (transformer.x_pad_token, transformer.cap_pad_token):  # made by torch.empty
        torch.nn.init.normal_(pad)
    text = transformers.Qwen3Model(decoder_config(transformers.Qwen3Config))
    return diffusers.ZImagePipeline(
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        kl(shift_factor=0.1),
        text,
        tiny_tokenizer(),
        transformer,
    )


def qwen_image():
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.0, 2.0, 0.5, 1.5],
    )
    text = decoder_config(
        transformers.Qwen2_5_VLTextConfig,
        rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2], "rope_type": "default"},
    )
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32)
    config = transformers.Qwen2_5_VLConfig(text_config=text.to_dict(), vision_config=vision)
    return diffusers.QwenImagePipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae,
        transformers.Qwen2_5_VLForConditionalGeneration(config),
        tiny_tokenizer(256),
        transformer,
    )


def sana(sprint):
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        caption_channels=32,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        sample_size=32,
        guidance_embeds=sprint,
        qk_norm="rms_norm_across_heads" if sprint else None,
    )
    vae = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        scaling_factor=0.41407,
    )
    text = transformers.Gemma2Model(decoder_config(transformers.Gemma2Config))
    scheduler = (
        diffusers.SCMScheduler()
        if sprint
        else diffusers.DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
        )
    )
    kind = diffusers.SanaSprintPipeline if sprint else diffusers.SanaPipeline
    return kind(tiny_tokenizer(), text, vae, transformer, scheduler)


def pixart(kind=diffusers.PixArtSigmaPipeline):
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return kind(tiny_tokenizer(), t5(), kl(), transformer, scheduler)


def lcm():
    parts = tiny_parts()
    unet = diffusers.UNet2DConditionModel.from_config(parts["unet"].config, time_cond_proj_dim=32)
    scheduler = diffusers.LCMScheduler.from_config(parts["scheduler"].config)
    return diffusers.LatentConsistencyModelPipeline(
        **parts | {"unet": unet, "scheduler": scheduler},
        safety_checker=None,
        feature_extractor=None,
    )


def chroma():
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    return diffusers.ChromaPipeline(
        FlowMatchEulerDiscreteScheduler(), kl(shift_factor=0.1), t5(), tiny_tokenizer(), transformer
    )


def lumina2():
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        cap_feat_dim=32,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(512, 32, 32),
    )
    text = transformers.Gemma2Model(decoder_config(transformers.Gemma2Config))
    return diffusers.Lumina2Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(), kl(shift_factor=0.1), text, tiny_tokenizer()
    )


def auraflow():
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pos_embed_max_size=64,
    )
    config = transformers.UMT5Config(
        vocab_size=512, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4
    )
    with torch.no_grad():
        for p in transformer.parameters():
            p.mul_(4)  # at their usual scale so few layers hardly hear the prompt
    return diffusers.AuraFlowPipeline(
        tiny_tokenizer(),
        transformers.UMT5EncoderModel(config),
        kl(),
        transformer,
        FlowMatchEulerDiscreteScheduler(),
    )


def cogview4():
    transformer = diffusers.CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
        rope_axes_dim=(16, 16),
        sample_size=8,
    )
    text = transformers.GlmModel(decoder_config(transformers.GlmConfig))
    return diffusers.CogView4Pipeline(
        tiny_tokenizer(),
        text,
        kl(),
        transformer,
        FlowMatchEulerDiscreteScheduler(
            base_shift=0.25,
            max_shift=0.75,
            base_image_seq_len=256,
            use_dynamic_shifting=True,
            time_shift_type="linear",
        ),
    )


FAMILIES = {
    "sd15": sd15,
    "sdxl": sdxl,
    "sdxl-euler": lambda: sdxl(diffusers.EulerDiscreteScheduler),
    "sdxl-dmd2": lambda: sdxl(diffusers.LCMScheduler),
    "flux-schnell": lambda: flux(False),
    "flux-dev": lambda: flux(True),
    "sd35": sd3,
    "flux2-klein": flux2,
    "z-image-turbo": z_image,
    "qwen-image": qwen_image,
    "sana": lambda: sana(False),
    "sana-sprint": lambda: sana(True),
    "pixart-sigma": pixart,
}
OTHERS = {  # without a preset, and most without an entry in the table: the generic way
    "lcm": lcm,
    "chroma": chroma,
    "lumina2": lumina2,
    "auraflow": auraflow,
    "cogview4": cogview4,
    "pixart-alpha": lambda: pixart(diffusers.PixArtAlphaPipeline),
}


def make(name, folder, seed=0):
    """Write a family's tiny pipeline into a folder."""
    torch.manual_seed(seed)
    pipe = (FAMILIES | OTHERS)[name]()
    for part in (
        getattr(pipe, "unet", None) or pipe.transformer,
    ):  # some start at zero and would say nothing
        for p in part.parameters():
            if not p.any():
                torch.nn.init.normal_(p, std=0.1)
    pipe.save_pretrained(folder)
