"""The tables of a model's Engram layers, as the store knows them."""

from __future__ import annotations

from dataclasses import replace

from engrid.addressing.hashing import NgramHasher
from engrid.addressing.spec import EngramSpec
from engrid.tables import OptimizerSpec, TableSpec


def table_name(run: str, layer: int) -> str:
    """Name of a layer's table."""
    return f"{run}.engram.{layer}"


def sealed_spec(spec: TableSpec, version: str) -> TableSpec:
    """The table that holds a version of this one."""
    return replace(spec, name=f"{spec.name}@{version}", optimizer=None)


def table_specs(run: str, hasher: NgramHasher, *, trained: bool = True) -> dict[int, TableSpec]:
    """Spec of each Engram layer's table. trained: with Adam (docs/engram.md, 7); else read only."""
    spec: EngramSpec = hasher.spec
    return {
        layer: TableSpec(
            name=table_name(run, layer),
            rows=of.rows,
            row_format=spec.row_format,
            width=spec.row_width,
            seed=spec.seed,
            layer=layer,
            init_std=spec.init_std,
            optimizer=OptimizerSpec(kind="adam") if trained else None,
            buckets=tuple(int(prime) for prime in of.primes.reshape(-1)),
        )
        for layer, of in hasher.layers.items()
    }
