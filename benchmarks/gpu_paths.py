"""Rows of ``gpu.py``: whole paths of a DLRM, from a batch to click probabilities.

*mprec* is the model called operator by operator, *compile_path* the same model's captured graphs, inputs
copied to where these read; *torch* the same numbers by plain torch.
"""

import torch
from mprec.triton_kernels import catalogue
from mprec.triton_kernels.catalogue import Call, Case
from torch.nn.functional import embedding_bag

import mprec
from mprec import reference
from mprec.models import DLRM
from mprec.nn import DheConfig, FeatureConfig

#: Vocabularies of Criteo Kaggle, sorted; tables have a million rows at most.
SIZES = [
    *(3, 4, 10, 15, 18, 24, 27, 105, 305, 583, 633, 1460, 2173, 3194, 5652, 5683, 12517, 14992, 93145),
    *(142572, 286181, 2202608, 5461306, 7046547, 8351593, 10131227),
]
DIM, NUM_DENSE = 16, 13


def path_case(representation: str) -> Case:
    def make(device: torch.device, samples: int) -> Call:
        torch.manual_seed(0)
        most = 1000 if device.type == "cpu" else 1_000_000
        sizes = [min(size, most) for size in SIZES[-catalogue.FEATURES :]]
        dhe = DheConfig(k=1024 // catalogue.SHRINK, hidden=(128 // catalogue.SHRINK,))
        features = [
            FeatureConfig(f"f{t}", size, DIM, representation, dhe=dhe) for t, size in enumerate(sizes)
        ]
        model = DLRM(features, NUM_DENSE, DIM).to(device).eval().requires_grad_(False)
        dense = torch.randn(samples, NUM_DENSE).to(device)
        indices = torch.cat([torch.randint(0, size, (samples,)) for size in sizes]).to(device)
        offsets = torch.arange(len(sizes) * samples + 1, device=device)
        path = mprec.compile_path(model)

        def embed(t: int) -> torch.Tensor:
            ids, name = indices[t * samples : (t + 1) * samples], features[t].name
            if representation == "table":
                weight = model.embeddings.tables[name].weight
                return embedding_bag(
                    ids, weight, offsets[: samples + 1], mode="sum", include_last_offset=True
                )
            config = features[t].dhe
            kind = config.family, config.activation, config.last_activation
            return reference.dhe(ids, *model.embeddings.dhe[name].stack(), *kind, dtype=torch.float32)

        def plain() -> torch.Tensor:
            embedded = torch.cat([embed(t) for t in range(len(features))], dim=1)
            return model.score(dense, embedded).sigmoid()

        products = sum(
            layer.weight.numel() for layer in (*model.bottom, *model.top) if hasattr(layer, "weight")
        )
        weights = sum(p.nbytes for part in (model.bottom, model.top) for p in part.parameters())
        if representation == "dhe":
            stacks = [model.embeddings.dhe[f.name].weights for f in features]
            products += sum(weight.numel() for stack in stacks for weight in stack)
            weights += sum(weight.nbytes for stack in stacks for weight in stack)
        vectors = 1 + len(features)
        flops = 2.0 * samples * (products + vectors * (vectors - 1) // 2 * DIM)
        read = len(indices) * (8 + (DIM * 4 if representation == "table" else 0)) + dense.nbytes
        return Call(
            lambda: model(dense, indices, offsets).sigmoid(),
            flops,
            weights + read + samples * 4,
            plain,
            calls={"compile_path": lambda: path(dense, indices, offsets)},
        )

    return Case(f"whole path kaggle d16 {representation}", make)


CASES = [path_case("table"), path_case("dhe")]
