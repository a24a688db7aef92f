"""What the package offers, for type checkers: at run time each module is imported on first use."""

from mprec import _C as _C
from mprec import cache as cache
from mprec import checkpoint as checkpoint
from mprec import data as data
from mprec import dispatch as dispatch
from mprec import errors as errors
from mprec import hashing as hashing
from mprec import huge_pages as huge_pages
from mprec import metrics as metrics
from mprec import models as models
from mprec import nn as nn
from mprec import ops as ops
from mprec import optim as optim
from mprec import paths as paths
from mprec import planner as planner
from mprec import reference as reference
from mprec import report as report
from mprec import serving as serving
from mprec import simulate as simulate
from mprec import testing as testing
from mprec import training as training
from mprec.models import compile_path as compile_path

__version__: str
