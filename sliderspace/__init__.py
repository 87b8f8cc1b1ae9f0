"""Discover, train and use the sliders that are already inside a text-to-image diffusion model."""

from importlib import import_module

__version__ = "0.1.0"

# Public name: the module that defines it. Names are imported when first used, so that `import sliderspace` is instant.
_MODULES = {
    "load": "models.loading",
    "Model": "models.pipeline",
    "sample": "sampling.generate",
    "expand_prompt": "sampling.prompts",
    "read_pictures": "sampling.prompts",
    "discover": "directions.discovery",
    "Directions": "directions.discovery",
    "coordinates": "directions.discovery",
    "how_many": "directions.significance",
    "SliderSpace": "sliders.space",
    "read_lora": "sliders.lora_files",
    "detach": "sliders.space",
    "train": "training.from_directions",
    "measure": "evaluation.report",
    "label_by_words": "evaluation.labels",
    "plot_spectrum": "viz.plots",
    "plot_ends": "viz.plots",
    "plot_leakage": "viz.plots",
    "plot_report": "viz.plots",
    "plot_rank": "viz.plots",
    "plot_ramps": "viz.plots",
    "make_map": "viz.maps",
    "plot_map": "viz.maps",
    "strip": "viz.plots",
    "board": "viz.board_widget",
    "explorer": "viz.sample_explorer",
    "play": "viz.player",
    "compare_ways": "evaluation.comparison",
    "decompose": "experiments.applications",
    "transfer": "experiments.applications",
}
__all__ = ["__version__", *_MODULES]


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    return value


def __dir__():
    return sorted({*globals(), *__all__})
