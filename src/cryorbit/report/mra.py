"""The picture of ``cryorbit mra``: signal and shift density, with the truth behind them where it is known."""

import numpy as np
from numpy.typing import NDArray

from cryorbit.report.style import BLUE, GREY, figure, plain, png

Curves = tuple[NDArray[np.float64], NDArray[np.float64]]


def mra_figure(found: Curves, truth: Curves | None = None) -> bytes:
    """PNG of the recovered (signal, density), drawn over ``truth`` when given; all four arrays have one length."""
    made = figure(8.0, 3.0)
    for axes, name, i in zip(made.subplots(1, 2), ("signal", "probability of the shift"), (0, 1), strict=True):
        plain(axes, "sample" if i == 0 else "shift (samples)", name)
        if truth is not None:
            axes.plot(truth[i], color=GREY, linewidth=3.0, alpha=0.6, label="truth")
        axes.plot(found[i], color=BLUE, linewidth=1.4, label="recovered")
        if truth is not None and i == 0:
            axes.legend(frameon=False, fontsize=9)
    return png(made)
