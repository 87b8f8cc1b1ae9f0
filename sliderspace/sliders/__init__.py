"""Low-rank adapters that are switched, mixed, windowed, saved and exported.

`SliderSpace` holds the weights of many sliders; `GatedAdapter` puts them into a denoiser."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:  # for editors; at run time a name is imported when it is first used
    from .space import SliderSpace as SliderSpace, detach as detach
    from .adapter import (
        GatedAdapter as GatedAdapter,
        TARGETS as TARGETS,
        target_layers as target_layers,
    )
    from .lora_files import load_lora as load_lora
    from .mixing import (
        iter_mixtures as iter_mixtures,
        sample_mixtures as sample_mixtures,
        sparse_mixtures as sparse_mixtures,
        gaussian_mixtures as gaussian_mixtures,
    )

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "space": ["SliderSpace", "detach"],
        "adapter": ["GatedAdapter", "TARGETS", "target_layers"],
        "lora_files": ["load_lora"],
        "mixing": ["iter_mixtures", "sample_mixtures", "sparse_mixtures", "gaussian_mixtures"],
    },
)
