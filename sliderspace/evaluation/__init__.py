"""What sliders do to final images: numbers, names, comparisons with other ways to make images.

Everything is measured on noise that nothing was trained on."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:  # for editors; at run time a name is imported when it is first used
    from .report import Report as Report, measure as measure, sweep as sweep
    from .search import measure_concepts as measure_concepts, search_sliders as search_sliders
    from .image_metrics import (
        clip_score as clip_score,
        frechet_distance as frechet_distance,
        mean_pairwise_distance as mean_pairwise_distance,
    )
    from .labels import label_with_clip as label_with_clip
    from .vlm_labels import label_with_vlm as label_with_vlm
    from .comparison import compare_generators as compare_generators

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "report": ["Report", "measure", "sweep"],
        "search": ["measure_concepts", "search_sliders"],
        "image_metrics": ["clip_score", "frechet_distance", "mean_pairwise_distance"],
        "labels": ["label_with_clip"],
        "vlm_labels": ["label_with_vlm"],
        "comparison": ["compare_generators"],
    },
)
