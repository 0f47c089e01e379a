"""The vectors of a run as NumPy arrays, each with where and on which model it acts."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Float32, Int
from numpy.typing import DTypeLike

from melbo_ray.errors import UserError
from melbo_ray.runs.manifest import Manifest
from melbo_ray.runs.schema import Certificate


@dataclass(frozen=True)
class Site:
    """Where vectors act, and on which model.

    Attributes:
        layer: source layer, to whose output θ is added; counted from 0.
        model: name of the model that they were found on.
        fingerprint: its fingerprint; None before a worker has registered it.
    """

    layer: int
    model: str
    fingerprint: str | None = None


@dataclass(frozen=True)
class RunVector(Certificate):
    """A vector of a run: the base at index 0, the chain from 1; of the base's certificate only the norm is known.

    Attributes:
        index: position in the chain.
        theta: (d_model,) float32.
        site: layer and model.
    """

    index: int
    theta: Float32[np.ndarray, " d_model"]
    site: Site

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.theta, dtype=dtype, copy=copy)

    def __repr__(self) -> str:
        return (
            f"RunVector(index={self.index}, norm={self.norm:.4g}, layer={self.site.layer}, model={self.site.model!r})"
        )


class RunVectors:
    """The base and the chain of a concept, in order: item n is vector n, and a slice has the same columns.

    Args:
        rows: rows of the table `vectors` of kinds `base` and `chain`, by index.
        site: layer and model.
    """

    def __init__(self, rows: pa.Table, site: Site) -> None:
        self._rows, self.site = rows, site

    @property
    def theta(self) -> Float32[np.ndarray, "n d_model"]:
        """The vectors, a row each."""
        # Copied: Arrow's buffers are read-only.
        values = self._rows["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float32)
        return values.reshape(len(self), -1)

    @property
    def index(self) -> Int[np.ndarray, " n"]:
        """Positions in the chain; the base is 0."""
        return self._rows["index"].to_numpy()

    @property
    def norm(self) -> Float[np.ndarray, " n"]:
        """‖θ‖ (residual-stream units)."""
        return self._rows["norm"].to_numpy()

    @property
    def loss(self) -> Float[np.ndarray, " n"]:
        """‖z(θ) − z(θ₀)‖ (residual-stream units); NaN of the base."""
        return self._rows["loss"].to_numpy()

    @property
    def relative_loss(self) -> Float[np.ndarray, " n"]:
        """Loss relative to that of the unsteered model; NaN of the base."""
        return self._rows["relative_loss"].to_numpy()

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[RunVector]:
        return map(self.__getitem__, range(len(self)))

    @overload
    def __getitem__(self, at: int) -> RunVector: ...
    @overload
    def __getitem__(self, at: slice) -> "RunVectors": ...
    def __getitem__(self, at: int | slice) -> "RunVector | RunVectors":
        """Vector `at`, or those of a slice.

        Raises:
            UserError: no such vector; it is an IndexError too.
        """
        if isinstance(at, slice):
            return RunVectors(self._rows.take(pa.array(range(len(self))[at], pa.int64())), self.site)
        if not -len(self) <= at < len(self):
            raise NoSuchVectorError(f"no vector {at}: expected 0 (the base) to {len(self) - 1}")
        (row,) = self._rows.slice(at % len(self), 1).to_pylist()
        certificate: dict[str, Any] = {field.name: row[field.name] for field in fields(Certificate)}
        theta = np.array(row["vector"], dtype=np.float32)
        return RunVector(index=row["index"], theta=theta, site=self.site, **certificate)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.theta, dtype=dtype, copy=copy)

    def __repr__(self) -> str:
        return f"RunVectors({len(self)} vectors, layer={self.site.layer}, model={self.site.model!r})"


def named_concept(manifest: Manifest, concept: str, url: str) -> str:
    """The concept; if it is empty, the run's only one.

    Raises:
        UserError: no such concept, or no name where there are several.
    """
    known = list(manifest.definitions or manifest.concepts)
    if not concept and len(known) != 1:
        raise UserError(f"{url} has several concepts: give one of {', '.join(known)}")
    if concept and concept not in known:
        raise UserError(f"{url} has no concept {concept!r}: expected one of {', '.join(known)}")
    return concept or known[0]


def run_vectors(manifest: Manifest, concept: str, rows: pa.Table, url: str) -> RunVectors:
    """Base and chain among the rows of the table `vectors` of a concept.

    Raises:
        UserError: no base yet, or a manifest without source layer or model.
    """
    rows = rows.filter(pc.field("kind").isin(["base", "chain"]))
    if rows["index"].to_pylist() != list(range(len(rows))) or not len(rows):
        raise UserError(f"{url} has no base vector of {concept} yet: resume the run")
    layer, model = manifest.config.get("source_layer"), manifest.config.get("model")
    if layer is None or model is None:
        raise UserError(f"{url}/run.json names no source layer or model: it is no whole manifest")
    return RunVectors(rows, Site(int(layer), str(model), manifest.fingerprint))


class NoSuchVectorError(UserError, IndexError):
    """An index beyond the chain; an IndexError, as sequences raise."""
