"""Which path answers a batch: measured on this machine, chosen per batch, corrected while serving.

    paths = mprec.paths.paths_from_checkpoints(["table.pt", "dhe.pt", "hybrid.pt"])
    profile = Profile.load_or_measure(paths, make_input=mprec.paths.sampler(test_set))
    dispatcher = Dispatcher(paths, profile)
    path = dispatcher.choose(batch_size=128, sla_s=0.010, queued_s=0.002)
    path.model(batch)

A *path* is one complete way to answer: a trained model, or one kernel of an op. Choosing among models (best
quality within a latency target) and among kernels (equal quality, so the fastest) is the same decision.
"""

from mprec.dispatch.dispatcher import Dispatcher, Explanation
from mprec.dispatch.fingerprint import fingerprint
from mprec.dispatch.microbenchmark import Samples, microbenchmark
from mprec.dispatch.paths import ScoringPath, shape_digest, unique_share
from mprec.dispatch.profile import BATCH_SIZES, Curve, Profile, ProfileError, ProfileMismatchError

__all__ = [
    "BATCH_SIZES",
    "Curve",
    "Dispatcher",
    "Explanation",
    "Profile",
    "ProfileError",
    "ProfileMismatchError",
    "Samples",
    "ScoringPath",
    "fingerprint",
    "microbenchmark",
    "shape_digest",
    "unique_share",
]
