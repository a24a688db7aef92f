"""The python backend of NVIDIA Triton Inference Server around an engine; ``config.pbtxt`` says what goes in
and out.

The backend needs mprec installed for its Python. Paths in ``checkpoints`` are relative to this folder.
"""

import json
from pathlib import Path

import numpy as np
import torch
import triton_python_backend_utils as pb_utils

from mprec.bags import Bags
from mprec.data import Batch
from mprec.serving.build import ModelInputs, engine_from_checkpoints, model_inputs


class TritonPythonModel:
    def initialize(self, args: dict) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        folder = Path(args["model_repository"]) / args["model_version"]
        files = [folder / name for name in parameters["checkpoints"]["string_value"].split()]
        sla_s = float(parameters["sla_ms"]["string_value"]) / 1e3
        self.inputs = model_inputs(files)
        self.engine = engine_from_checkpoints(files, sla_s=sla_s).start()

    def execute(self, requests: list) -> list:
        arrived_s = self.engine.clock()
        futures = [self._submit(request, arrived_s) for request in requests]
        return [_response(future) for future in futures]

    def finalize(self) -> None:
        self.engine.close()

    def _submit(self, request, arrived_s: float):
        """A future, or the error of a request that is none of the model's."""
        ids = pb_utils.get_input_tensor_by_name(request, "IDS").as_numpy()
        dense = pb_utils.get_input_tensor_by_name(request, "DENSE")
        try:
            batch = to_batch(ids, None if dense is None else dense.as_numpy(), self.inputs)
            return self.engine.submit(batch, arrived_s=arrived_s)
        except ValueError as error:
            return error


def to_batch(ids: np.ndarray, dense: np.ndarray | None, inputs: ModelInputs) -> Batch:
    """IDs int64 [B, features, longest bag], -1 where a bag is shorter, and dense float32 [B, numbers].

    ``ValueError`` names what is wrong.
    """
    features = len(inputs.vocabularies)
    if ids.ndim != 3 or ids.shape[1] != features:
        raise ValueError(f"IDS: expected [samples, {features}, longest bag], got {list(ids.shape)}")
    samples = len(ids)
    dense = np.zeros((samples, 0), np.float32) if dense is None else dense
    if dense.shape != (samples, inputs.num_dense):
        raise ValueError(f"DENSE: expected [{samples}, {inputs.num_dense}], got {list(dense.shape)}")
    by_feature = ids.transpose(1, 0, 2)
    too_large = by_feature >= np.array(inputs.vocabularies).reshape(-1, 1, 1)
    if (wrong := too_large | (by_feature < -1)).any():
        t, b, _ = np.argwhere(wrong)[0]
        size = inputs.vocabularies[t]
        raise ValueError(f"IDS[{b}, {t}]: expected IDs in [0, {size}), got {by_feature[wrong][0]}")
    there = by_feature >= 0
    offsets = np.zeros(features * samples + 1, np.int64)
    np.cumsum(there.sum(2).reshape(-1), out=offsets[1:])
    indices = torch.tensor(by_feature[there], dtype=torch.int64)
    return Batch(
        torch.tensor(dense, dtype=torch.float32),  # a copy: the server takes its memory back
        Bags(indices, torch.from_numpy(offsets), num_features=features),
        torch.zeros(samples),
    )


def _response(future) -> "pb_utils.InferenceResponse":
    try:
        if isinstance(future, Exception):
            raise future
        scores = future.result().scores.numpy().astype(np.float32)
    except Exception as error:  # refused, or of the models: the answer to this request alone
        message = f"{type(error).__name__}: {error}"
        return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(message))
    return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("SCORES", scores)])
