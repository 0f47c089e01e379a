"""The tables of a base that a worker has found."""

import pyarrow as pa

from melbo_ray.runs import schema
from melbo_ray.search.base_vectors import Base
from melbo_ray.search.vectors import BaseVector, row


def base_tables(run_id: str, found: Base) -> dict[str, pa.Table]:
    """The rows of a base: itself and what its chain avoids, its `candidates`, the curve of its `radius`, its statistics
    for `summary`."""
    candidates = [{"run_id": run_id, "kind": "candidate"} | candidate.row() for candidate in found.candidates]
    curve = zip(found.calibration.radii, found.calibration.nonlinearity, strict=True) if found.calibration else ()
    drawn, facts = {"run_id": run_id, "kind": "random"}, {"run_id": run_id, "kind": "base", "index": 0}
    radii = [drawn | {"index": i, "radius": r, "nonlinearity": share} for i, (r, share) in enumerate(curve)]
    avoided = [row(run_id, "avoided", BaseVector(theta), index) for index, theta in enumerate(found.avoided, 1)]
    figures = {"radius": float(found.theta.norm()), **found.shares}
    return {
        "vectors": schema.table("vectors", [row(run_id, "base", BaseVector(found.theta)), *avoided]),
        "candidates": schema.table("candidates", candidates),
        "radius": schema.table("radius", radii),
        "summary": schema.table("summary", [facts | {"figure": k, "value": v} for k, v in figures.items()]),
    }
