"""The guarantee of ``KEEP: exact`` in a file: a digest of every tensor that may not change, and what was added.

``extra["keep"]`` of a file's provenance is ``{"base": {"classes", "digest", "tensors"}, "packs": [...]}``, each pack
with ``classes``, ``head``, ``digest`` and ``tensors``: SHA-256 by tensor name, over data type, shape and bytes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..adapt.classes import ClassTable, shorten
from ..adapt.plan import AdaptPlan
from ..config.keep import PackSpec
from ..config.settings import AdaptSettings
from ..errors import CheckpointFileError, PlanRefused, ResumeError
from ..key import HEAD_ADAPT
from ..modeling.keep import Keep, keep_of, pack_space
from .provenance import Provenance

KEEP = "keep"
"""Key of provenance's ``extra``."""
BRANCH = re.compile(r"(?:^|\.)keep\.packs\.(?P<number>\d+)\.")
"""In the name of a tensor of a pack; all others are the base's."""


@dataclass(frozen=True)
class KeptFile:
    """What a file says about its base and its packs.

    Args:
        classes: of the base.
        base: digest of each of its tensors, by name.
        packs: what was added.
        branches: digest of each tensor of each pack.
    """

    classes: tuple[str, ...]
    base: Mapping[str, str]
    packs: tuple[PackSpec, ...]
    branches: tuple[Mapping[str, str], ...]

    def to_plain(self) -> dict[str, Any]:
        """Write the form that goes into a file."""
        base = {"classes": list(self.classes), "digest": one_digest(self.base), "tensors": dict(self.base)}
        packs = [
            {**pack.to_plain(), "digest": one_digest(tensors), "tensors": dict(tensors)}
            for pack, tensors in zip(self.packs, self.branches, strict=True)
        ]
        return {"base": base, "packs": packs}

    @classmethod
    def from_plain(cls, data: Any, path: str) -> KeptFile:
        """Read :meth:`to_plain`'s form.

        Raises:
            CheckpointFileError: it is damaged.
        """
        try:
            base, packs = data["base"], data["packs"]
            return cls(
                tuple(map(str, base["classes"])),
                {str(name): str(value) for name, value in base["tensors"].items()},
                tuple(PackSpec.from_plain(pack, path) for pack in packs),
                tuple({str(name): str(value) for name, value in pack["tensors"].items()} for pack in packs),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as exc:
            raise CheckpointFileError(
                f"{path}, entry {KEEP!r}",
                expected="the digests of a base and its packs",
                found=f"{type(exc).__name__}: {exc}",
                fix="The entry is damaged; use another checkpoint of this run.",
            ) from exc


def kept_in(known: Provenance, path: str) -> KeptFile | None:
    """Read what a file's provenance says of a base and its packs; ``None`` where it has none."""
    stored = known.extra.get(KEEP)
    return None if stored is None else KeptFile.from_plain(stored, path)


def tensor_digest(value: torch.Tensor) -> str:
    """Hash a tensor's data type, shape and bytes by SHA-256."""
    found = hashlib.sha256(f"{value.dtype} {tuple(value.shape)} ".encode())
    # Not numpy(), which has no bfloat16.
    found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def one_digest(tensors: Mapping[str, str]) -> str:
    """Hash all of some tensors, whatever their order."""
    return hashlib.sha256("".join(f"{name} {tensors[name]}\n" for name in sorted(tensors)).encode()).hexdigest()


def branch_of(name: str) -> int | None:
    """Find the pack that a tensor belongs to; ``None`` for the base's."""
    found = BRANCH.search(name)
    return int(found["number"]) if found else None


def digests(state: Mapping[str, Any], pack: int | None = None) -> dict[str, str]:
    """Hash each tensor of the base, or of a pack, by name."""
    return {
        name: tensor_digest(value)
        for name, value in state.items()
        if torch.is_tensor(value) and branch_of(name) == pack
    }


def with_packs(settings: AdaptSettings, model: nn.Module) -> AdaptSettings:
    """Return settings whose target tables are the base's, and one for each pack of a model."""
    keep = keep_of(model)
    if keep is None:
        return settings
    packs = {
        pack_space(i): ClassTable(pack.classes, f"what was added ({i + 1})")
        for i, pack in enumerate(keep.settings.packs)
    }
    return replace(settings, target={**settings.target, "thing": keep.settings.old, **packs})


class KeptGuard:
    """Watches that nothing changes that ``KEEP: exact`` promises to keep.

    Args:
        model: whose packs it knows; a model without packs is not watched.
    """

    def __init__(self, model: nn.Module) -> None:
        self._keep: Keep | None = keep_of(model)
        self._promised: dict[int | None, Mapping[str, str]] = {}

    def check_resume(self, known: Provenance, origin: str) -> None:
        """Refuse to go on with a run that was begun under another ``KEEP``.

        Raises:
            ResumeError: says which.
        """
        kept = KEEP in known.extra
        if kept != (self._keep is not None):
            raise ResumeError(
                origin,
                expected=f"a run that was begun under the same {HEAD_ADAPT.KEEP}",
                found="one under KEEP exact" if kept else "one without KEEP",
                fix=f"Set {HEAD_ADAPT.KEEP} {'exact' if kept else repr('')}, or start without --resume.",
            )

    def check_load(
        self, state: Mapping[str, Any], plan: AdaptPlan, known: Provenance, origin: str, *, resumes: bool
    ) -> None:
        """Look at what is about to be loaded, and remember it as what may not change.

        Args:
            state: all tensors of the model as they will be.
            plan: how they came about.
            known: what the file says of itself.
            origin: the file, for messages.
            resumes: a run goes on from its own file.

        Raises:
            ResumeError: a run with other packs.
            PlanRefused: tensors that the file does not have, or that are not those it was saved with.
        """
        stored = kept_in(known, origin)
        if self._keep is None:
            return
        settings = self._keep.settings
        self._promised = {None: digests(state)}
        if stored is None:
            learnt = ("weight", "bias", "running_mean", "running_var")
            drawn = [
                t.name
                for t in plan.by_action("kept", "initialised")
                if branch_of(t.name) is None and t.name.endswith(learnt)
            ]
            if drawn:
                raise PlanRefused(
                    origin,
                    expected="every tensor of the base in the file, because KEEP leaves them as they are",
                    found=f"none of its shape for {shorten(drawn, 3)}",
                    fix="Use the config that the file was made with.",
                )
            return
        count = len(stored.packs)
        if settings.packs[:count] != stored.packs or (resumes and len(settings.packs) != count):
            error = ResumeError if resumes else PlanRefused
            raise error(
                origin,
                expected=f"the added classes of the file: {_packs(stored.packs)}",
                found=_packs(settings.packs),
                fix="Train on the same classes, or start without --resume." if resumes else "Leave KEEP_PACKS out.",
            )
        self._compare(stored.base, self._promised[None], origin, "the base model")
        for i, promised in enumerate(stored.branches):
            self._promised[i] = digests(state, i)
            self._compare(promised, self._promised[i], origin, f"the added classes {_packs(stored.packs[i : i + 1])}")

    def after_load(self, model: Any, known: Provenance, origin: str) -> None:
        """Start what the file does not have, such as a copied box head, from what was loaded."""
        if self._keep is None:
            return
        stored = kept_in(known, origin)
        owner = model.roi_heads if hasattr(model, "roi_heads") else model
        for i, pack in enumerate(self._keep.packs):
            if stored is None or i >= len(stored.packs):
                begun: Any = pack
                begun.begin(owner)

    def facts(self, state: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Write the entry of a file's provenance, once nothing is found to have changed; empty without packs.

        Raises:
            PlanRefused: names the tensors that changed.
        """
        if self._keep is None:
            return {}
        settings, now = self._keep.settings, digests(state)
        if None in self._promised:
            self._compare(self._promised[None], now, where, "the base model")
        branches = []
        for i in range(len(settings.packs)):
            branches.append(digests(state, i))
            if i in self._promised and i not in settings.trained:
                self._compare(
                    self._promised[i], branches[-1], where, f"the added classes {_packs([settings.packs[i]])}"
                )
        return {KEEP: KeptFile(settings.old.names, now, settings.packs, tuple(branches)).to_plain()}

    @staticmethod
    def _compare(promised: Mapping[str, str], found: Mapping[str, str], where: str, what: str) -> None:
        changed = sorted(name for name in promised.keys() | found.keys() if promised.get(name) != found.get(name))
        if changed:
            raise PlanRefused(
                where,
                expected=f"{what} bit for bit, as {HEAD_ADAPT.KEEP.set('exact')} promises",
                found=f"{len(changed)} of {len(promised)} tensors changed: {shorten(changed, 5)}",
                fix=f"Use a file that nothing was trained or edited in, or set {HEAD_ADAPT.KEEP} ''.",
            )


def _packs(packs: Sequence[PackSpec]) -> str:
    return "; ".join(", ".join(pack.classes) for pack in packs) or "none"
