"""The representation of each feature, out of a file: a plan of ``mprec plan``, or one's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["read_features", "read_plan"]


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected an object, got {type(content).__name__}")
    return content


def read_features(file: Path) -> dict[str, Any]:
    """``{"item": {"representation": "dhe", "dhe": {"k": 64, "hidden": [32]}}, "*": "table"}``, as
    :func:`mprec.training.chosen_features` takes it."""
    content = _json(file)
    for name, told in content.items():
        if not isinstance(told, str | dict):
            raise ValueError(
                f"{file}: feature {name!r}: expected a representation or an object, got {told!r}"
            )
    return content


def read_plan(file: Path, name: str | None) -> tuple[dict[str, Any], dict[str, str]]:
    """(the choice of each feature, the precision of rows by feature where it is not float32) of the plan
    called ``name`` (``DEVICE/NAME`` where it is for several devices), or the only one, of a file that
    ``mprec plan --output`` wrote.
    """
    try:
        found = _json(file)["plans"]
        plans = {
            plan["name"] if len(found) == 1 else f"{device}/{plan['name']}": plan["rows"]
            for device, each in found.items()
            for plan in each
        }
        if name is None and len(plans) > 1:
            raise ValueError(f"{file} has several plans, {', '.join(plans)}: say which, --plan-name NAME")
        if name is not None and name not in plans:
            raise ValueError(f"{file} has no plan {name!r}; it has {', '.join(plans)}")
        rows = plans[name] if name is not None else next(iter(plans.values()))
        chosen = {row["feature"]: row["config"] for row in rows}
        precisions = {row["feature"]: row["precision"] for row in rows}
    except (KeyError, TypeError, AttributeError, StopIteration) as error:
        raise ValueError(f"{file} is no plan of mprec plan --output: {error!r}") from error
    return chosen, {feature: each for feature, each in precisions.items() if each not in (None, "float32")}
