"""Every module through safetensors: a file of its tensors, read into another module."""

import pytest
import torch
from test_lifecycles import every, make

pytestmark = pytest.mark.slow
safetensors = pytest.importorskip("safetensors.torch", exc_type=ImportError)


@every
@torch.no_grad()
def test_saved_and_loaded(name, tmp_path):
    module, example, _, other = make(name)
    safetensors.save_model(module, tmp_path / "model.safetensors")
    fresh = make(name)[0]
    for parameter in fresh.parameters():
        parameter.add_(1.0)
    fresh(*example)  # decoders packed, rows cached
    safetensors.load_model(fresh, tmp_path / "model.safetensors")
    for arguments in (example, other):
        torch.testing.assert_close(fresh(*arguments), module(*arguments))
