"""Prompts and noise to latents and images, and images back to noise.

Noise follows from seed and sample id alone, so any sample can be made again anywhere."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:  # for editors; at run time a name is imported when it is first used
    from .generate import (
        sample as sample,
        initial_noise as initial_noise,
        sample_latents as sample_latents,
        decode_latents as decode_latents,
        generate_images as generate_images,
    )
    from .prompts import (
        expand_prompt as expand_prompt,
        local_llm as local_llm,
        load_image_folder as load_image_folder,
        ImageFolder as ImageFolder,
    )
    from .inversion import invert as invert, replay as replay, prompt_to_prompt as prompt_to_prompt

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "generate": [
            "sample",
            "initial_noise",
            "sample_latents",
            "decode_latents",
            "generate_images",
        ],
        "prompts": ["expand_prompt", "local_llm", "load_image_folder", "ImageFolder"],
        "inversion": ["invert", "replay", "prompt_to_prompt"],
    },
)
