"""Discover, train and use the sliders that are already inside a text-to-image diffusion model."""

from importlib import import_module

__version__ = "0.1.0"

# Public name: the module that defines it. Names are imported when first used, so that `import sliderspace` is instant.
_MODULES = {
    "load": "loading",
    "Model": "models",
    "sample": "sampling",
    "expand_prompt": "sources",
    "read_pictures": "sources",
    "discover": "directions",
    "Directions": "directions",
    "coordinates": "directions",
    "how_many": "rank",
    "SliderSpace": "sliders",
    "read_lora": "loras",
    "detach": "sliders",
    "train": "training",
    "measure": "measures",
    "label_by_words": "labels",
    "plot_spectrum": "plots",
    "plot_ends": "plots",
    "plot_leakage": "plots",
    "plot_report": "plots",
    "plot_rank": "plots",
    "plot_ramps": "plots",
    "make_map": "maps",
    "plot_map": "maps",
    "strip": "plots",
    "board": "widgets",
    "explorer": "explorers",
    "play": "players",
    "compare_ways": "ways",
    "decompose": "applications",
    "transfer": "applications",
}
__all__ = ["__version__", *_MODULES]


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    return value


def __dir__():
    return sorted({*globals(), *__all__})
