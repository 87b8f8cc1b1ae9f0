"""Discover, train and use the sliders that are already inside a text-to-image diffusion model."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:  # for editors; at run time a name is imported when it is first used
    from .models.loading import load as load
    from .models.pipeline import Model as Model
    from .sampling.generate import sample as sample
    from .sampling.prompts import (
        expand_prompt as expand_prompt,
        load_image_folder as load_image_folder,
    )
    from .directions.discovery import (
        discover as discover,
        Directions as Directions,
        coordinates as coordinates,
    )
    from .directions.significance import count_significant as count_significant
    from .sliders.space import SliderSpace as SliderSpace, detach as detach
    from .sliders.lora_files import load_lora as load_lora
    from .training.from_directions import train as train
    from .training.from_text import Concept as Concept, train_concepts as train_concepts
    from .training.from_images import train_image_pairs as train_image_pairs
    from .evaluation.report import measure as measure
    from .evaluation.search import measure_concepts as measure_concepts
    from .evaluation.labels import label_with_clip as label_with_clip
    from .evaluation.comparison import compare_generators as compare_generators
    from .viz.plots import (
        plot_spectrum as plot_spectrum,
        plot_extremes as plot_extremes,
        plot_leakage as plot_leakage,
        plot_report as plot_report,
        plot_significance as plot_significance,
        plot_traversals as plot_traversals,
        sweep_strip as sweep_strip,
    )
    from .directions.embedding import embed_2d as embed_2d
    from .viz.maps import plot_map as plot_map
    from .viz.board_widget import board as board
    from .viz.sample_explorer import explorer as explorer
    from .viz.player import play as play
    from .viz.gallery import write_gallery as write_gallery
    from .experiments.applications import decompose as decompose, transfer as transfer

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "models.loading": ["load"],
        "models.pipeline": ["Model"],
        "sampling.generate": ["sample"],
        "sampling.prompts": ["expand_prompt", "load_image_folder"],
        "directions.discovery": ["discover", "Directions", "coordinates"],
        "directions.significance": ["count_significant"],
        "sliders.space": ["SliderSpace", "detach"],
        "sliders.lora_files": ["load_lora"],
        "training.from_directions": ["train"],
        "training.from_text": ["Concept", "train_concepts"],
        "training.from_images": ["train_image_pairs"],
        "evaluation.report": ["measure"],
        "evaluation.search": ["measure_concepts"],
        "evaluation.labels": ["label_with_clip"],
        "evaluation.comparison": ["compare_generators"],
        "viz.plots": [
            "plot_spectrum",
            "plot_extremes",
            "plot_leakage",
            "plot_report",
            "plot_significance",
            "plot_traversals",
            "sweep_strip",
        ],
        "directions.embedding": ["embed_2d"],
        "viz.maps": ["plot_map"],
        "viz.board_widget": ["board"],
        "viz.sample_explorer": ["explorer"],
        "viz.player": ["play"],
        "viz.gallery": ["write_gallery"],
        "experiments.applications": ["decompose", "transfer"],
    },
)
__all__ = ["__version__", *__all__]
