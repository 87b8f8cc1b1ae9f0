"""Images to feature vectors: the encoders through which directions are found and sliders are judged.

`collect_features` samples a model, encodes the clean-image estimate of each step, and keeps both on disk."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:  # for editors; at run time a name is imported when it is first used
    from .encoders import (
        Encoder as Encoder,
        get_encoder as get_encoder,
        pixel_encoder as pixel_encoder,
        latent_encoder as latent_encoder,
        normalized_features as normalized_features,
        encode_latents as encode_latents,
    )
    from .collect import (
        SampleFeatures as SampleFeatures,
        SamplingConfig as SamplingConfig,
        collect_features as collect_features,
    )

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "encoders": [
            "Encoder",
            "get_encoder",
            "pixel_encoder",
            "latent_encoder",
            "normalized_features",
            "encode_latents",
        ],
        "collect": ["SampleFeatures", "SamplingConfig", "collect_features"],
    },
)
