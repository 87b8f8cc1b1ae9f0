"""The main directions in which features vary, before anything is trained.

Principal components, how many of them are more than chance, and the h-space baseline."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:  # for editors; at run time a name is imported when it is first used
    from .discovery import (
        Directions as Directions,
        discover as discover,
        fit_directions as fit_directions,
        coordinates as coordinates,
    )
    from .significance import (
        Significance as Significance,
        count_significant as count_significant,
        permutation_spectra as permutation_spectra,
    )
    from .embedding import Embedding2D as Embedding2D, embed_2d as embed_2d
    from .hspace import discover_hspace as discover_hspace

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "discovery": ["Directions", "discover", "fit_directions", "coordinates"],
        "significance": ["Significance", "count_significant", "permutation_spectra"],
        "embedding": ["Embedding2D", "embed_2d"],
        "hspace": ["discover_hspace"],
    },
)
