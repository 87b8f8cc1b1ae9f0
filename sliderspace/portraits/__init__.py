"""The bundled model: the world that it draws, its networks and recipe, and ground truth for what sliders do.

Every image of this world is made from known factors, so claims about sliders can be checked."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:  # for editors; at run time a name is imported when it is first used
    from .world import PORTRAITS_64 as PORTRAITS_64, PORTRAITS_128 as PORTRAITS_128, World as World
    from .renders import (
        portrait as portrait,
        dataset as dataset,
        counterfactual_pairs as counterfactual_pairs,
    )
    from .classifier import score_factors as score_factors, score_numbers as score_numbers
    from .ground_truth import (
        FactorReport as FactorReport,
        score_sliders as score_sliders,
        random_sliders as random_sliders,
    )

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "world": ["PORTRAITS_64", "PORTRAITS_128", "World"],
        "renders": ["portrait", "dataset", "counterfactual_pairs"],
        "classifier": ["score_factors", "score_numbers"],
        "ground_truth": ["FactorReport", "score_sliders", "random_sliders"],
    },
)
