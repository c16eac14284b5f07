"""Sample regions evenly, within a bound, whoever collected them.

Every region has a key drawn by hashing the seed, its image and its number there. The sample keeps the regions of
smallest key in each stratum, so it is the same for any number of processes and any order of images.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping

import numpy as np
import torch

IMAGE_STRIDE = 1 << 24
"""Numbers reserved for the regions of one view of one image."""


def image_key(seed: int, name: str) -> int:
    """Compute the 64 random bits that belong to an image."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "little")


def region_keys(base: int, numbers: torch.Tensor) -> torch.Tensor:
    """Compute keys (n,) int64, >= 0, of the regions ``numbers`` (n,) of an image: splitmix64, Steele et al. 2014."""
    x = np.uint64(base % 2**64) + numbers.cpu().numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((x ^ (x >> np.uint64(31))) >> np.uint64(1)).astype(np.int64))


def sample_view(base: int, count: int, limit: int) -> tuple[torch.Tensor, float]:
    """Sample one view's cells evenly, for what is too large to collect whole.

    Args:
        base: of :func:`image_key`.
        count: how many there are.
        limit: how many to take at most.

    Returns:
        Their numbers, ascending, and how many cells each one stands for.
    """
    if count <= limit:
        return torch.arange(count), 1.0
    numbers = torch.argsort(region_keys(base ^ 0x5DEECE66D, torch.arange(count)), stable=True)[:limit]
    return numbers.sort().values, count / limit


def room(regions: int, width: int) -> int:
    """Count how many regions of ``width`` float32 features may be kept: ``regions``, and at most 1 GiB of them."""
    return max(1, min(regions, 2**30 // (4 * width)))


class Reservoir:
    """A sample of regions: those of smallest key in each stratum are kept, all are counted.

    Args:
        own: how many regions are kept of strata that have room of their own.
        shared: how many of all other strata together. A stratum that needs less than an even share leaves the rest to
            the others; each keeps one at least.
    """

    def __init__(self, own: Mapping[int, int], shared: int) -> None:
        self._own = dict(own)
        self._shared = shared
        self._chunks: list[dict[str, torch.Tensor]] = []
        self._held = 0
        self._bound = 0
        self.seen: dict[int, int] = {}

    def like(self) -> Reservoir:
        """Make an empty one with the same caps."""
        return Reservoir(self._own, self._shared)

    def caps(self) -> dict[int, int]:
        """Compute how many regions of each stratum are kept, of those seen so far.

        Caps only ever fall while more is seen, so what a cap drops early no later cap would have kept.
        """
        level, room = 1, self._shared
        wanted = sorted(count for value, count in self.seen.items() if value not in self._own)
        for i, count in enumerate(wanted):
            level = max(1, room // (len(wanted) - i))
            if count > level:
                break
            room -= count
        return {value: self._own.get(value, level) for value in self.seen}

    def add(self, base: int, order: int, stratum: torch.Tensor, fields: Mapping[str, torch.Tensor]) -> None:
        """Offer the regions of one view of one image.

        Args:
            base: of :func:`image_key`.
            order: the view's place among all views, by which the sample is sorted.
            stratum: (n,).
            fields: (n, ...) each, kept on the CPU.
        """
        n = len(stratum)
        if n == 0:
            return
        numbers = torch.arange(n)
        stratum = stratum.cpu().long()
        for value, count in Counter(stratum.tolist()).items():
            self.seen[value] = self.seen.get(value, 0) + count
        chunk = {name: value.detach().cpu() for name, value in fields.items()}
        chunk["_key"] = region_keys(base, numbers)
        chunk["_order"] = order * IMAGE_STRIDE + numbers
        chunk["_stratum"] = stratum
        self._chunks.append(self._thin(chunk))
        self._held += len(self._chunks[-1]["_key"])
        self._bound = max(self._bound, n)
        if self._held > 2 * (sum(self._own.values()) + max(self._shared, len(self.seen))) + 4 * self._bound:
            self._compact()

    def _thin(self, chunk: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        by_key = torch.argsort(chunk["_key"], stable=True)
        order = by_key[torch.argsort(chunk["_stratum"][by_key], stable=True)]
        # Strata stand in blocks now: a region's place in its block against the block's cap.
        blocks = sorted(Counter(chunk["_stratum"].tolist()).items())
        places = torch.cat([torch.arange(count) for _, count in blocks])
        known = self.caps()
        caps = torch.tensor([known[value] for value, _ in blocks])
        kept = order[places < caps.repeat_interleave(torch.tensor([count for _, count in blocks]))]
        return {name: value[kept] for name, value in chunk.items()}

    def _compact(self) -> None:
        if not self._chunks:
            return
        names = self._chunks[0].keys()
        whole = {name: torch.cat([chunk[name] for chunk in self._chunks]) for name in names}
        self._chunks = [self._thin(whole)]
        self._held = len(self._chunks[0]["_key"])

    def absorb(self, other: Reservoir) -> None:
        """Add what another process collected; which one absorbs which makes no difference."""
        self._chunks += other._chunks
        self._held += other._held
        for value, count in other.seen.items():
            self.seen[value] = self.seen.get(value, 0) + count
        self._compact()

    def result(self) -> dict[str, torch.Tensor]:
        """Return the sample, sorted by image, with ``weight`` (n,): how many regions each one stands for.

        Returns:
            The fields by name, and ``stratum`` and ``view`` (n,); empty without any region.
        """
        self._compact()
        if not self._chunks:
            return {}
        chunk = self._chunks[0]
        order = torch.argsort(chunk["_order"])
        out = {name: value[order] for name, value in chunk.items() if not name.startswith("_")}
        out["stratum"] = chunk["_stratum"][order]
        out["view"] = chunk["_order"][order] // IMAGE_STRIDE
        share = {value: self.seen[value] / count for value, count in Counter(out["stratum"].tolist()).items()}
        out["weight"] = torch.tensor([share[value] for value in out["stratum"].tolist()], dtype=torch.float32)
        return out
