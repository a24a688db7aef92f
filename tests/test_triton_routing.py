"""CUDA tensors reach the Triton kernels: seen by tracing, and by compiling what would be launched."""

import cuda_kernels
import pytest
import torch
from mprec.triton_kernels import static
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import mprec.nn
from mprec.kernels import kernels
from mprec.names import MODES
from mprec.nn import FeatureConfig

FORWARD = ["embedding_bag", "embedding_bag_multi", "dhe_bag", "dhe_bag_multi"]
OTHERS = ["quantized_embedding_bag_multi", "table_sgd_", "table_rowwise_adagrad_", "cached_dhe_bag",
          "quantized_dhe_bag_multi"]  # fmt: skip
OPERATORS = [*FORWARD, *(f"{name}_backward" for name in FORWARD), *OTHERS]


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_have_a_cuda_implementation(name):
    assert kernels(name, "cuda")


def collection():
    features = [
        FeatureConfig("a", 100, 16, "table"),
        FeatureConfig("b", 100, 16, "table"),
        FeatureConfig("c", 100, 16, "dhe"),
        FeatureConfig("d", 100, 16, "dhe"),
    ]
    return mprec.nn.EmbeddingBagCollection(features)


def graph_of(module, bags: int, dynamic: bool | None = None, function=functional_call):
    """What torch.compile hands to its backend for CUDA tensors that are not there: (result, graph)."""
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    fake = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    with fake, static.absent_device("sm_90"), torch.no_grad():
        state = {
            name: torch.empty(t.shape, dtype=t.dtype, device="cuda")
            for name, t in module.state_dict().items()
        }
        indices = torch.zeros(50, dtype=torch.int64, device="cuda")
        offsets = torch.zeros(bags, dtype=torch.int64, device="cuda")
        call = torch.compile(
            lambda *bags: function(module, state, bags),
            backend=aot_autograd(fw_compiler=compiler), fullgraph=True, dynamic=dynamic,
        )  # fmt: skip
        out = call(indices, offsets)
    (graph,) = graphs
    return out, graph


def launched(graph) -> list[str]:
    """The kernels that are nodes of a graph, and mprec's operators that still are, in order."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    found = []
    for node in graph.graph.nodes:
        if "triton_kernel_wrapper" in str(node.target):
            kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            found.append(getattr(kernel, "fn", kernel).__name__)  # an Autotuner holds options of launches
        elif "mprec" in str(node.target):
            found.append(str(node.target).removeprefix("mprec.").removesuffix(".default"))
    return found


BAG, POOL, FUSED = "embedding_bag_kernel", "embedding_bag_kernel", "fused_kernel"


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    ("module", "kernels"),
    [
        (mprec.nn.EmbeddingBag(100, 16), [BAG]),
        (mprec.nn.DeepHashEmbeddingBag(16), [FUSED, POOL]),
    ],
    ids=["EmbeddingBag", "DeepHashEmbeddingBag"],
)
def test_compiled_modules_of_one_feature_are_kernels(module, kernels, dynamic):
    """Nothing waits for the device either: a fake tensor has no value to read."""
    out, graph = graph_of(module, 10, dynamic)
    assert (tuple(out.shape), out.device.type) == ((10, 16), "cuda")
    assert [name for name in launched(graph) if "report_faults" not in name] == kernels
    assert "report_faults" in str(graph.graph)


def test_a_compiled_gradient_is_kernels_and_matrix_products():
    # the operator itself: torch without CUDA aborts where autograd would call it

    def backward(module, state, bags):
        _, offsets = bags
        layers = range(len(module.decoder))
        stack = [[state[f"decoder.{i}.{kind}"] for i in layers] for kind in ("weight", "bias")]
        options = ("universal", "relu", "sigmoid", MODES["mean"], None, False, 3, False)
        grad = offsets.unsqueeze(1).expand(-1, 16).float()
        hashes = state["coefficients"]
        weights, _, _ = torch.ops.mprec.dhe_bag_backward(grad, *bags, hashes, *stack, *options)
        return weights[0]

    module = mprec.nn.DeepHashEmbeddingBag(16)
    out, graph = graph_of(module, 10, function=backward)
    assert out.shape == module.weights[0].shape
    assert set(launched(graph)) == {"layer_kernel", "layer_gradient_kernel", "sum_slices_kernel"}


def test_compiled_collections_are_one_node_per_kind():
    """Their launches go by addresses, which a graph cannot hold."""
    out, graph = graph_of(collection(), 41)
    assert (tuple(out.shape), out.device.type) == ((10, 64), "cuda")
    assert launched(graph) == ["embedding_bag_multi", "dhe_bag_multi"]


def test_export_keeps_the_operator():
    module = mprec.nn.DeepHashEmbeddingBag(16)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        module = module.requires_grad_(False).to_empty(device="cuda")
        bags = [torch.zeros(n, dtype=torch.int64, device="cuda") for n in (50, 10)]
    program = torch.export.export(module, tuple(bags)).run_decompositions({})
    assert "mprec.dhe_bag" in str(program.graph)


def test_the_cuda_implementation_launches_the_kernels():
    weights, biases = [torch.zeros(128, 1024), torch.zeros(16, 128)], [torch.zeros(128), torch.zeros(16)]
    indices, offsets = torch.zeros(64, dtype=torch.int64), torch.arange(64)
    coefficients = torch.ones(4, 1024, dtype=torch.int32)
    with static.recorded("sm_90") as launches:
        cuda_kernels.dhe_bag(indices, offsets, coefficients, weights, biases, "universal", "relu", "sigmoid")
        starts = torch.zeros(65, dtype=torch.int64)
        cuda_kernels.embedding_bag_multi([torch.zeros(10, 16)] * 4, indices, starts)
    kernels = [launch.kernel for launch in launches]
    assert kernels == [FUSED, POOL, BAG]


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_float8_decoders_run_where_there_are_float8_products(target):
    dhe = mprec.nn.DheConfig(k=64, hidden=(32,))
    features = [FeatureConfig("a", 100, 16, "dhe", dhe=dhe), FeatureConfig("b", 100, 16, "hybrid", dhe=dhe)]
    quantized = mprec.nn.QuantizedEmbeddingBagCollection(
        mprec.nn.EmbeddingBagCollection(features), decoders="float8"
    )
    stacks = quantized._stacks(quantized._dhe_groups[0])
    bags = torch.zeros(300, dtype=torch.int64), torch.arange(0, 301, 30)
    with static.recorded(target) as launches:
        arguments = (*bags, *stacks, "universal", "relu", "sigmoid")
        if target == "sm_80":
            with pytest.raises(TypeError, match=r"weights: float8_e4m3fn needs .* 9\.0 .* served as sm_80"):
                cuda_kernels.quantized_dhe_bag_multi(*arguments)
        else:
            out = cuda_kernels.quantized_dhe_bag_multi(*arguments)
            assert (out.shape, out.dtype) == ((5, 32), torch.float32)
            assert [launch.kernel for launch in launches] == [FUSED, POOL]
            assert launches[0].constants["DTYPE"] == "fp8e4nv"
