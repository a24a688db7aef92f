"""Feature sets known by name: the vocabularies of the public Criteo logs as MP-Rec counts them."""

from __future__ import annotations

from mprec.nn import FeatureConfig

__all__ = ["FEATURE_SETS", "feature_set"]

# Sorted by size. Embedding dimension and rows per feature; 2.16 GB and 12.6 GB of float32.
FEATURE_SETS: dict[str, tuple[int, tuple[int, ...]]] = {
    "kaggle": (
        16,
        (
            *(3, 4, 10, 15, 18, 24, 27, 105, 305, 583, 633, 1460, 2173, 3194, 5652, 5683, 12517, 14992),
            *(93145, 142572, 286181, 2202608, 5461306, 7046547, 8351593, 10131227),
        ),
    ),
    "terabyte": (
        64,
        (
            *(3, 4, 10, 14, 36, 61, 101, 122, 970, 1442, 2208, 7112, 7378, 11156, 12420, 17217, 20134, 36084),
            *(313829, 415421, 1333352, 7267859, 9758201, 9946608, 9980333, 9994222),
        ),
    ),
}


def feature_set(name: str) -> list[FeatureConfig]:
    """``KeyError`` for an unknown name."""
    if name not in FEATURE_SETS:
        raise KeyError(f"features: {name!r} is none of {', '.join(FEATURE_SETS)}")
    dim, sizes = FEATURE_SETS[name]
    return [FeatureConfig(f"C{i + 1}", rows, dim) for i, rows in enumerate(sizes)]
