"""Plots, maps, boards, players and pages.

Boards render on a thread of their own; pages are single files that need no kernel."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:  # for editors; at run time a name is imported when it is first used
    from .plots import (
        plot_spectrum as plot_spectrum,
        plot_extremes as plot_extremes,
        plot_report as plot_report,
        sweep_strip as sweep_strip,
    )
    from .maps import plot_map as plot_map, save_map as save_map
    from .board_widget import board as board
    from .sample_explorer import explorer as explorer
    from .player import play as play
    from .gallery import write_gallery as write_gallery
    from .progress import live_progress as live_progress

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "plots": ["plot_spectrum", "plot_extremes", "plot_report", "sweep_strip"],
        "maps": ["plot_map", "save_map"],
        "board_widget": ["board"],
        "sample_explorer": ["explorer"],
        "player": ["play"],
        "gallery": ["write_gallery"],
        "progress": ["live_progress"],
    },
)
