"""Many trials from plain values: applications and ablations of the papers.

A trial is kept by its content, and goes on after a kill."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:  # for editors; at run time a name is imported when it is first used
    from .applications import decompose as decompose, transfer as transfer
    from .trial import TrialConfig as TrialConfig, run_trial as run_trial
    from .runner import (
        Experiment as Experiment,
        run_experiment as run_experiment,
        vary_one as vary_one,
    )
    from .results import Results as Results, plot_results as plot_results

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "applications": ["decompose", "transfer"],
        "trial": ["TrialConfig", "run_trial"],
        "runner": ["Experiment", "run_experiment", "vary_one"],
        "results": ["Results", "plot_results"],
    },
)
