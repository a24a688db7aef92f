"""A table and a deep hash embedding side by side."""

from mprec.representations.base import Representation
from mprec.representations.dhe import DHE
from mprec.representations.table import TABLE

REPRESENTATION = Representation("hybrid", (TABLE, DHE), "#CC79A7")
