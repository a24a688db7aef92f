"""DLRMs in ONNX Runtime, as peers of whole paths: the model, and its two MLPs alone.

The graphs are written node by node, without an exporter's detours. Bags hold one ID, so that pooling is a
``Gather``. Tables are inputs that are bound once: a model with tables inside may not be larger than 2 GiB.
"""

import importlib.util
import io
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mprec.models import DLRM

OPSET, IR = 17, 8


def available() -> bool:
    return all(map(importlib.util.find_spec, ("onnx", "onnxruntime")))


class _Graph:
    """Nodes and constants of a graph under construction."""

    def __init__(self) -> None:
        self.nodes: list = []
        self.constants: list = []

    def constant(self, values: Tensor) -> str:
        import onnx

        name = f"constant{len(self.constants)}"
        self.constants.append(onnx.numpy_helper.from_array(values.detach().numpy(), name))
        return name

    def node(self, kind: str, *inputs: str, **attributes) -> str:
        import onnx

        name = f"{kind}{len(self.nodes)}"
        self.nodes.append(onnx.helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def mlp(self, layers: nn.Sequential, x: str) -> str:
        for layer in layers:
            if isinstance(layer, nn.Linear):
                x = self.node("Gemm", x, self.constant(layer.weight), self.constant(layer.bias), transB=1)
            else:
                x = self.node("Relu", x)
        return x

    def session(self, inputs: dict[str, tuple], output: str):
        """For one thread. ``inputs``: an element type and a shape each."""
        import onnx
        import onnxruntime

        value = onnx.helper.make_tensor_value_info
        graph = onnx.helper.make_graph(
            self.nodes,
            "dlrm",
            [value(name, *form) for name, form in inputs.items()],
            [value(output, onnx.TensorProto.FLOAT, None)],
            self.constants,
        )
        made = onnx.helper.make_model(
            graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=IR
        )
        file, options = io.BytesIO(), onnxruntime.SessionOptions()
        onnx.save(made, file)
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        return onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])


def mlps(model: DLRM) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(bottom's inputs, top's inputs) -> both MLPs' outputs."""
    import onnx

    def session(layers: nn.Sequential):
        graph = _Graph()
        output = graph.mlp(layers, "x")
        return graph.session({"x": (onnx.TensorProto.FLOAT, ["batch", layers[0].in_features])}, output)

    bottom, top = session(model.bottom), session(model.top)
    return lambda dense, products: tuple(
        torch.from_numpy(each.run(None, {"x": x.numpy()})[0])
        for each, x in ((bottom, dense), (top, products))
    )


def whole(model: DLRM) -> Callable[[Tensor, Tensor], Tensor]:
    """(dense [B, N], one ID of each table [T, B]) -> click probabilities [B]."""
    import onnx
    import onnxruntime

    graph, tables = _Graph(), [table.weight.detach() for table in model.embeddings.tables.values()]
    float_type, ids_type = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    count = 1 + len(tables)
    first = graph.mlp(model.bottom, "dense")
    axis = graph.constant(torch.tensor([1]))
    vectors = [graph.node("Unsqueeze", first, axis)]
    column = graph.constant(torch.tensor([-1, 1]))
    for t in range(len(tables)):
        ids = graph.node("Gather", "ids", graph.constant(torch.tensor(t)))
        vectors.append(graph.node("Gather", f"table{t}", graph.node("Reshape", ids, column)))
    stacked = graph.node("Concat", *vectors, axis=1)
    products = graph.node("MatMul", stacked, graph.node("Transpose", stacked, perm=[0, 2, 1]))
    flat = graph.node("Reshape", products, graph.constant(torch.tensor([-1, count * count])))
    rows, columns = torch.tril_indices(count, count, offset=-1)
    pairs = graph.node("Gather", flat, graph.constant(rows * count + columns), axis=1)
    logits = graph.mlp(model.top, graph.node("Concat", first, pairs, axis=1))
    scores = graph.node("Sigmoid", logits)
    inputs = {
        "dense": (float_type, ["batch", model.num_dense]),
        "ids": (ids_type, [len(tables), "batch"]),
        **{f"table{t}": (float_type, list(table.shape)) for t, table in enumerate(tables)},
    }
    session = graph.session(inputs, scores)
    binding = session.io_binding()
    kept = [onnxruntime.OrtValue.ortvalue_from_numpy(table.numpy()) for table in tables]
    for t, value in enumerate(kept):
        binding.bind_ortvalue_input(f"table{t}", value)

    def call(dense: Tensor, ids: Tensor) -> Tensor:
        binding.bind_cpu_input("dense", dense.numpy())
        binding.bind_cpu_input("ids", ids.numpy())
        binding.bind_output(scores)
        session.run_with_iobinding(binding)
        return torch.from_numpy(binding.get_outputs()[0].numpy()).squeeze(1)

    call.tables = kept  # which the binding does not keep
    return call
