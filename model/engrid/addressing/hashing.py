"""From canonical ids to keys and row ids: the addresses of Engram's rows (docs/engram.md, sections 2 to 5).

The n-gram that ends at position t is mixed into one key per order, newest token first; K primes per order fold the
key into K rows:

    position      t-2    t-1    t            x_i: canonical id i positions back (the pad id before the start)
    canonical     x_2    x_1    x_0          m_i: odd multiplier of distance i, below 2^63 / V' so that no
    multiplier    m_2    m_1    m_0               product overflows

    key_2 = x_0 m_0 ^ x_1 m_1                          row(2, k) = offset(2, k) + key_2 mod prime(2, k)
    key_3 = key_2   ^ x_2 m_2                          row(3, k) = offset(3, k) + key_3 mod prime(3, k)

    one table:  | order 2: head 0 | head 1 | .. | head K-1 | order 3: head 0 | .. | head K-1 |    each prime-sized

The key depends on the layer's multipliers and the n-gram alone, so equal keys have equal rows in all K heads: the
client deduplicates and caches by key. No prime is used twice in a model, so two heads never collide in step.

A dead token (negative id) blocks: it and everything before it read as pad for the positions after it, and the
position itself has no rows (-1). The state a decoder carries is the last N-1 canonical ids, dead ones included, so a
chunk's first positions see exactly what they would have seen in one piece.

Rejected: a rolling hash (one multiply per step, but the reference mixes by XOR and released weights follow it);
hashing on the accelerator by default (the ids must reach the host anyway to be fetched, and the prefetch leaves
earlier without the copy). `row_ids` of kernels/ gives the same integers for where that changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from .lookup import DEAD, Ids, Lookup
from .spec import EngramSpec

if TYPE_CHECKING:  # it needs the tokenizers package, and hashing numpy alone
    from .canonical import CanonicalVocabulary

LAYER_STRIDE = 10_007
"""Between the generator seeds of two layers (docs/engram.md, 2)."""


def multipliers(spec: EngramSpec, layer: int, canonical_size: int) -> Ids:
    """Odd multipliers m_0..m_{N-1}, int64 [N]; the layer id as configured seeds them."""
    bound = max(1, ((2**63 - 1) // canonical_size) // 2)
    drawn = np.random.default_rng(spec.seed + LAYER_STRIDE * layer).integers(
        0, bound, size=spec.max_ngram, dtype=np.int64
    )
    return 2 * drawn + 1


def bucket_primes(spec: EngramSpec) -> dict[int, Ids]:
    """Bucket sizes of each layer, int64 [N-1, K]: per order the next primes from its vocab_size that no head,
    order or layer has used yet."""
    used: set[int] = set()
    primes: dict[int, Ids] = {}
    for layer in spec.layers:
        sizes = np.empty((spec.max_ngram - 1, spec.heads), np.int64)
        for row, vocab_size in enumerate(spec.vocab_size):
            fresh = (prime for prime in primes_above(vocab_size - 1) if prime not in used)
            for head in range(spec.heads):
                sizes[row, head] = next(fresh)
                used.add(int(sizes[row, head]))
        primes[layer] = sizes
    return primes


def primes_above(start: int) -> Iterator[int]:
    """Primes greater than start, rising, found by sieving a window at a time."""
    width = 1 << 14
    low = start + 1
    while True:
        high = low + width
        composite = np.zeros(width, bool)
        for prime in _small_primes(int(high**0.5) + 1):
            first = max(prime * prime, (low + prime - 1) // prime * prime)
            composite[first - low :: prime] = True
        composite[: max(0, 2 - low)] = True
        yield from (low + np.flatnonzero(~composite)).tolist()
        low = high


def _small_primes(limit: int) -> list[int]:
    is_prime = np.ones(limit + 1, bool)
    is_prime[:2] = False
    for number in range(2, int(limit**0.5) + 1):
        if is_prime[number]:
            is_prime[number * number :: number] = False
    return list(map(int, np.flatnonzero(is_prime)))


@dataclass(frozen=True)
class LayerHash:
    """What addresses the rows of one layer."""

    layer: int
    multipliers: Ids
    """int64 [N]."""
    primes: Ids
    """int64 [N-1, K]."""
    offsets: Ids
    """First row of each bucket, int64 [N-1, K]."""

    @property
    def rows(self) -> int:
        """Rows of the layer's table."""
        return int(self.primes.sum())


class NgramHasher:
    """Keys and row ids of every Engram layer. The NumPy reference."""

    def __init__(self, spec: EngramSpec, canonical_size: int, canonical_pad: int) -> None:
        """canonical_size: V'. canonical_pad: canonical id of the raw pad token."""
        if canonical_size < 1 or not 0 <= canonical_pad < canonical_size:
            raise ValueError(f"canonical pad id {canonical_pad} must lie in 0..{canonical_size - 1}")
        self.spec = spec
        self.canonical_size = canonical_size
        self.pad = canonical_pad
        self.layers: dict[int, LayerHash] = {}
        for layer, primes in bucket_primes(spec).items():
            offsets = np.concatenate([[0], np.cumsum(primes.reshape(-1))[:-1]]).reshape(primes.shape)
            self.layers[layer] = LayerHash(layer, multipliers(spec, layer, canonical_size), primes, offsets)

    @classmethod
    def over(cls, spec: EngramSpec, vocabulary: CanonicalVocabulary) -> Self:
        """Of a tokenizer's canonical vocabulary; raises ValueError where the pad id lies beyond it."""
        if not 0 <= spec.pad_token_id < len(vocabulary.of):
            raise ValueError(f"pad_token_id {spec.pad_token_id}: the tokenizer has ids 0..{len(vocabulary.of) - 1}")
        return cls(spec, vocabulary.size, int(vocabulary.of[spec.pad_token_id]))

    def start(self, batch: int) -> Ids:
        """The state before any token: int64 [batch, N-1] of pad ids."""
        return np.full((batch, self.spec.max_ngram - 1), self.pad, np.int64)

    def lookups(self, canonical_ids: Ids, state: Ids) -> tuple[list[Lookup], Ids]:
        """Lookups of a chunk [B, T] that follows `state` [B, N-1], positions flattened to B*T; and the new state.

        Canonical ids are int64; DEAD where the token is dead. Raises ValueError for another type or shape.
        """
        grams, alive = self._grams(canonical_ids, state)
        out = []
        for layer in self.layers.values():
            for order, keys in zip(self.spec.orders, _mixes(layer, grams), strict=True):
                flat = keys.reshape(-1)
                rows = layer.offsets[order - 2] + flat[:, None] % layer.primes[order - 2]
                rows[~alive.reshape(-1)] = DEAD
                out.append(Lookup(layer=layer.layer, order=order, keys=flat, row_ids=rows))
        return out, np.concatenate([state, canonical_ids], axis=1)[:, -state.shape[1] :]

    def row_ids(self, canonical_ids: Ids, layer: int) -> Ids:
        """Row ids [B, T, (N-1)*K] of whole sequences [B, T] in one layer, bucket offsets included."""
        lookups, _ = self.lookups(canonical_ids, self.start(len(canonical_ids)))
        rows = [lookup.row_ids for lookup in lookups if lookup.layer == layer]
        return np.concatenate(rows, axis=1).reshape(*canonical_ids.shape, self.spec.heads_per_token)

    def _grams(self, canonical_ids: Ids, state: Ids) -> tuple[Ids, npt.NDArray[np.bool_]]:
        """x_0..x_{N-1} at each position, int64 [N, B, T], pad beyond a dead token; and which positions live."""
        self._check(canonical_ids, state)
        past = self.spec.max_ngram - 1
        length = canonical_ids.shape[1]
        whole = np.concatenate([state, canonical_ids], axis=1)
        grams = np.stack([whole[:, past - back : past - back + length] for back in range(past + 1)])
        blocked = np.logical_or.accumulate(grams == DEAD, axis=0)
        return np.where(blocked, self.pad, grams), canonical_ids != DEAD

    def _check(self, canonical_ids: Ids, state: Ids) -> None:
        if canonical_ids.dtype != np.int64 or canonical_ids.ndim != 2:
            raise ValueError(
                f"canonical ids must be int64 [batch, tokens], not {canonical_ids.dtype} {list(canonical_ids.shape)}"
            )
        expected = (len(canonical_ids), self.spec.max_ngram - 1)
        if state.dtype != np.int64 or state.shape != expected:
            raise ValueError(f"state must be int64 {list(expected)}, not {state.dtype} {list(state.shape)}")
        for ids in (canonical_ids, state):
            if ids.size and not DEAD <= int(ids.min()) <= int(ids.max()) < self.canonical_size:
                bad = int(ids.min()) if ids.min() < DEAD else int(ids.max())
                raise ValueError(f"canonical id {bad}: give {DEAD} (dead) to {self.canonical_size - 1}")


def _mixes(layer: LayerHash, grams: Ids) -> Sequence[Ids]:
    """Keys of the orders 2..N: products of ids and multipliers, folded by XOR from the newest token back."""
    products = grams * layer.multipliers.reshape(-1, *[1] * (grams.ndim - 1))
    return list(np.bitwise_xor.accumulate(products, axis=0)[1:])
