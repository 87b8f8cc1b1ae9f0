"""Any diffusers text-to-image pipeline behind one interface: latents, timesteps, predictions, decoding.

What differs between model families stands in one table (`registry`); the pipeline itself does the sampling."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:  # for editors; at run time a name is imported when it is first used
    from .loading import load as load
    from .pipeline import Model as Model, asset_path as asset_path
    from .registry import (
        PIPELINE_SPECS as PIPELINE_SPECS,
        PRESETS as PRESETS,
        PipelineSpec as PipelineSpec,
        Preset as Preset,
    )
    from .schedulers import Step as Step, x0_estimate as x0_estimate, alpha_sigma as alpha_sigma
    from .batching import run_in_batches as run_in_batches

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "loading": ["load"],
        "pipeline": ["Model", "asset_path"],
        "registry": ["PIPELINE_SPECS", "PRESETS", "PipelineSpec", "Preset"],
        "schedulers": ["Step", "x0_estimate", "alpha_sigma"],
        "batching": ["run_in_batches"],
    },
)
