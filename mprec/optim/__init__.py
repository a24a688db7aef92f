"""Optimizers for embedding tables, applied during the backward pass.

The gradient of a table is a few rows. torch lays it out as a sparse tensor, coalesces it and then walks it
again to update the rows; here one native pass sorts the IDs, sums each row's gradient in registers and
updates the row (see ``csrc/gradient/README.md``). Nothing of the table's size is ever written. Tables on
CUDA: SGD and RowWiseAdagrad, by Triton kernels.

An optimizer of this module takes over the tables that it is given: from then on ``loss.backward()`` updates
them, their ``.grad`` stays ``None`` and ``step()`` has nothing left to do for them. So a backward pass is a
step: one for each table, however often the pass met it. Gradients are not accumulated over several passes
(a pass within a pass, as of reentrant checkpointing, is one of its own), and cannot be clipped or scaled in
between. ``torch.nn.utils.clip_grad_norm_`` cannot tell: it passes by parameters without ``.grad``, so these
tables have been updated by all of their gradient, the others are clipped by the norm of the others, and the
norm of tables alone is 0.0. ``torch.autograd.grad`` updates nothing. The results are those of torch's
optimizer of the same name with ``sparse=True`` gradients, to rounding, and do not depend on the number of
threads.

With ``in_backward=False`` the gradient goes to ``.grad`` as any other's does, and ``step()`` updates the
table by the same kernels: for gradient accumulation, clipping, ``torch.amp.GradScaler``, hooks, and for
replicas whose gradients ``DistributedDataParallel`` exchanges. A sparse gradient (modules with
``sparse=True``) updates the rows that it has, a dense one every row, with zeros for those that no batch met.

``weight_decay=λ`` is decoupled (Loshchilov and Hutter 2019): a row is multiplied by ``1 - lr·λ`` in each step
that has a gradient for it, and its gradient is as without. Rows that no batch meets do not decay, as in
FBGEMM: to let them, every step would have to write every row. For tables on the CPU.

Tables of float16 and bfloat16, on the CPU, are updated in float32: the row is read, its gradient is summed
and the step is taken in float32, states are float32, and the row is rounded once, when it is written.
``rounding="stochastic"``, the default, takes one of the two neighbours, the nearer one the more often, so
that the mean is the float32 number: of updates far below a weight's last place as much arrives as should.
``rounding="nearest"`` is torch's cast, which loses all of those. As in that, infinity stands where the number
after the largest finite one would: what is further out becomes infinite, so that a table that has outgrown
its type is seen. NaN stays NaN. Below 2⁻¹⁴ the mean in float16 is right to 2⁻³⁸. A gradient that goes to
``.grad`` is rounded to the table's type there, as any parameter's; ``torch.amp.GradScaler`` refuses those of
float16.

The noise is a function of ``seed``, the table's place among the optimizer's, its step, row and column, and of
nothing else: results do not depend on the number of threads, replicas round alike, and a training that goes
on from a state_dict, which holds seeds and steps, equals one that was not cut off.

Gradients that backward passes apply are not exchanged between processes. Where ``torch.distributed`` runs
with more than one, such a pass raises ``RuntimeError`` rather than let replicas drift apart;
``sharded=True`` says that each process holds tables of its own.

    model = DLRM(...)
    tables, rest = mprec.optim.split_parameters(model)
    optimizers = [RowWiseAdagrad(tables, lr=0.02), torch.optim.Adam(rest)]
"""

from mprec.optim.parameters import split_parameters
from mprec.optim.rules import SGD, Adagrad, Adam, RowWiseAdagrad

__all__ = ["SGD", "Adagrad", "Adam", "RowWiseAdagrad", "split_parameters"]
