"""Offline planning: which representation each feature gets, and on which device, within memory budgets.

    effects = fit_effects(features, [Measurement("table", 0.785), Measurement("dhe", 0.789), ...])
    choices = default_options(features, DheConfig(), effects)
    plan = plan(features, choices, [Device("cpu", 64 << 20, costs)])

After the idea of MP-Rec's offline stage (Hsia et al., ASPLOS 2023); the algorithm is ours. A plan is exact:
the per-feature choice is a multiple-choice knapsack, solved as an integer program, first for the highest
quality that fits, then, at that quality, for the least time. What it is exact *about* is a model: quality is
additive over features (:mod:`mprec.planner.quality`), time too (:mod:`mprec.planner.costs`).

Of paths that have been made and measured, :func:`paths_within` says which to hold side by side.
"""

from mprec.planner.costs import MeasuredCosts, RooflineCosts
from mprec.planner.options import Option, default_options, shapes_by_vocabulary
from mprec.planner.pareto import Candidate, front
from mprec.planner.paths import Held, paths_within
from mprec.planner.planner import Device, Placement, Plan, plan, plan_paths
from mprec.planner.quality import Measurement, effective_vocabulary, fit_effects
from mprec.planner.solver import Infeasible, solve

__all__ = [
    "Candidate",
    "Device",
    "Held",
    "Infeasible",
    "MeasuredCosts",
    "Measurement",
    "Option",
    "Placement",
    "Plan",
    "RooflineCosts",
    "default_options",
    "effective_vocabulary",
    "fit_effects",
    "front",
    "paths_within",
    "plan",
    "plan_paths",
    "shapes_by_vocabulary",
    "solve",
]
