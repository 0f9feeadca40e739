"""Candidates with latency and importance become every Pareto-optimal plan, in one exact dynamic program.

In: chains of entries (start, stop, latency, importance) that may nest. Out: a `ParetoFrontier` of label arrays with
back-pointers. Knows numpy and no torch. Words: a *label* is one (latency, importance) that some plan has; *thinning*
keeps a bounded number of labels and reports the proven gap.
"""

from .dynamic_program import ParetoFrontier, solve_series

__all__ = ["ParetoFrontier", "solve_series"]
