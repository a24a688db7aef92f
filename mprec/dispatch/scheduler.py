"""Which queries are served next, by which path, on which executor; and which are refused at the door.

The rule is derived in ``docs/scheduling.md``. It is native code (``csrc/scheduler``), since a decision has to
cost less than what it decides about. The engine and the simulator use the same: nothing in it knows threads,
devices or tensors. Times are seconds on the caller's clock, which may be virtual.

    scheduler = Scheduler([Lane("cpu", [Option("table", 0.79, seconds_by_batch_size)])])
    ticket = scheduler.offer(now, size, deadline, item)    # or a Refusal
    job = scheduler.next(now)                              # until it gives None
    scheduler.done(job, now, seconds)                      # or failed(job, now, rest_s); then ask again

- :class:`Option`: a path on an executor. ``seconds[b]`` is the profiled mean time of a batch of b samples,
  b = 0 ... max_batch; ``inf`` where the path does not take the size.
- :class:`Lane`: an executor as the scheduler sees it. ``correction.factors`` are expected over profiled times
  by path.
- :class:`Ticket`: a query in the queue. ``item`` is the caller's; ``taken`` samples have been handed out.
- :class:`Job`: a batch for executor ``index``: ``pieces`` (:class:`Piece`: samples ``start`` to ``stop`` of a
  ticket) by ``path``, expected to take ``predicted_s``.
- :class:`Refusal`: ``reason`` is ``full``, ``overload`` or ``unsupported``; ``message`` is a sentence.
- :class:`Scheduler` ``(lanes, max_batch=2048, max_queue=2**20, admission=True, late_share=0.01)``: the queue
  of one engine and the choice of what to run. Not thread-safe: the caller holds a lock. ``query_s`` is the
  expected time of the caller's own work for each query of a batch, which predictions include.

The parts are shown for tests and studies: :class:`Traffic` (what arrives), :class:`Correction` (how fast the
machine is now), :class:`FluidPrice` (what time and samples are worth), :class:`Overflow` and :class:`Latest`
(what it costs others that an executor is taken). ``ValueError`` for arguments out of range.
"""

from mprec._native import (
    Correction,
    FluidPrice,
    Job,
    Lane,
    Latest,
    Option,
    Overflow,
    Piece,
    Refusal,
    Scheduler,
    Ticket,
    Traffic,
)

__all__ = [
    "Correction",
    "FluidPrice",
    "Job",
    "Lane",
    "Latest",
    "Option",
    "Overflow",
    "Piece",
    "Refusal",
    "Scheduler",
    "Ticket",
    "Traffic",
]
