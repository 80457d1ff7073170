"""Define guidance weights omega(c, s, t): networks, tables and formulas, their files and pictures."""

from typing import TYPE_CHECKING

from lgd_kernels.runtime.first_use import lazily

if TYPE_CHECKING:
    from lgd_kernels.omega import files as files
    from lgd_kernels.omega import forms as forms
    from lgd_kernels.omega import network as network
    from lgd_kernels.omega import plot as plot
    from lgd_kernels.omega import table as table
else:
    __getattr__, __dir__ = lazily(__name__, "files", "forms", "network", "plot", "table")
