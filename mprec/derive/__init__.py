"""From one trained model to several measured ways to answer with it.

    found = derive(model, metadata, dataset.split())
    bundle.save("bundle", kept(found), metadata)

The paths of a model share its MLPs and differ in their embeddings: rows in fewer bits, rows of low rank,
decoders taught by rows, decoders decoded into rows (:mod:`mprec.derive.recipes`). Nothing is trained on
labels again. All are measured on the same samples and side by side on this machine, and those that another
one matches in everything are marked (:mod:`mprec.planner.pareto`).
"""

from mprec.derive.derive import Derived, derive, kept
from mprec.derive.distil import distil
from mprec.derive.factorise import low_rank
from mprec.derive.recipes import Source, make
from mprec.derive.sensitivity import sensitivity

__all__ = ["Derived", "Source", "derive", "distil", "kept", "low_rank", "make", "sensitivity"]
