"""Sliders from directions (SliderSpace), from text and from image pairs (Concept Sliders).

One resumable loop (`trainer`) runs every objective."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:  # for editors; at run time a name is imported when it is first used
    from .from_directions import train as train, calibrate as calibrate
    from .alignment import (
        AlignmentConfig as AlignmentConfig,
        DEFAULT as DEFAULT,
        SLIDERSPACE_RELEASE as SLIDERSPACE_RELEASE,
    )
    from .from_text import (
        Concept as Concept,
        load_concepts as load_concepts,
        train_concepts as train_concepts,
    )
    from .from_images import (
        load_image_pairs as load_image_pairs,
        train_image_pairs as train_image_pairs,
        train_customization as train_customization,
    )
    from .prediction_matching import ConceptConfig as ConceptConfig

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "from_directions": ["train", "calibrate"],
        "alignment": ["AlignmentConfig", "DEFAULT", "SLIDERSPACE_RELEASE"],
        "from_text": ["Concept", "load_concepts", "train_concepts"],
        "from_images": ["load_image_pairs", "train_image_pairs", "train_customization"],
        "prediction_matching": ["ConceptConfig"],
    },
)
