"""CUDA tensors reach the Triton kernels: seen by tracing, and by compiling what would be launched."""

import pytest
import torch
from mprec.triton_kernels import static
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

import mprec.nn
from mprec.ops import _cuda

FORWARD = ["embedding_bag", "embedding_bag_multi", "dhe_bag", "dhe_bag_multi"]
OPERATORS = [*FORWARD, *(f"{name}_backward" for name in FORWARD)]


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_have_a_cuda_implementation(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mprec::{name}", "CUDA")


@pytest.mark.parametrize(
    ("module", "operator"),
    [
        (mprec.nn.EmbeddingBag(100, 16), "embedding_bag"),
        (mprec.nn.DeepHashEmbeddingBag(16), "dhe_bag"),
    ],
    ids=["EmbeddingBag", "DeepHashEmbeddingBag"],
)
def test_compiled_modules_call_the_operator_on_cuda_tensors(module, operator):
    seen = []

    def backend(graph, inputs):
        seen.extend((node.target, node.meta["example_value"].device.type) for node in graph.graph.nodes
                    if node.op == "call_function" and "mprec" in str(node.target))  # fmt: skip
        return graph.forward

    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        state = {
            name: torch.empty(t.shape, dtype=t.dtype, device="cuda")
            for name, t in module.state_dict().items()
        }
        indices = torch.zeros(50, dtype=torch.int64, device="cuda")
        offsets = torch.zeros(10, dtype=torch.int64, device="cuda")
        call = torch.compile(
            lambda *bags: functional_call(module, state, bags), backend=backend, fullgraph=True
        )
        out = call(indices, offsets)
    assert out.shape == (10, 16)
    assert out.device.type == "cuda"
    targets = [str(target) for target, device in seen if device == "cuda"]
    assert any(f"mprec.{operator}" in target for target in targets), seen


def test_the_cuda_implementation_launches_the_kernels():
    weights, biases = [torch.zeros(128, 1024), torch.zeros(16, 128)], [torch.zeros(128), torch.zeros(16)]
    indices, offsets = torch.zeros(64, dtype=torch.int64), torch.arange(64)
    coefficients = torch.ones(4, 1024, dtype=torch.int32)
    with static.recorded("sm_90") as launches:
        _cuda.dhe_bag(indices, offsets, coefficients, weights, biases, "universal", "relu", "sigmoid")
        _cuda.embedding_bag_multi([torch.zeros(10, 16)] * 4, indices, torch.zeros(65, dtype=torch.int64))
    kernels = [launch.kernel for launch in launches]
    assert kernels == ["fused_kernel", "embedding_bag_kernel", "embedding_bag_kernel"]
