"""Class packs: the classes that a session added, alone in a small file, and put behind the same base again.

Packs do not see each other: their order changes the numbers of the added classes and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..adapt.classes import ClassTable, did_you_mean, shorten
from ..config.keep import KeepSettings, PackSpec
from ..errors import CheckpointFileError, ClassTableError
from ..files import read_checkpoint
from ..modeling.keep import pack_space
from .kept import BRANCH, KEEP, KeptFile, branch_of, digests, kept_in, one_digest
from .provenance import KEY, Provenance

PACK = "pack"
"""Key of provenance's ``extra`` in the file of a pack: its classes, and the digest and classes of its base."""


@dataclass(frozen=True)
class BaseFile:
    """A checkpoint taken apart.

    Args:
        path: where it was read.
        base: the base's tensors by name.
        known: what it says of itself.
        packs: what was added.
        branches: the tensors of each pack, by their names in the file.
    """

    path: str
    base: Mapping[str, torch.Tensor]
    known: Provenance
    packs: tuple[PackSpec, ...]
    branches: tuple[Mapping[str, torch.Tensor], ...]


def read_base(path: str, *, trust: bool = False) -> BaseFile:
    """Read a checkpoint, and check what it promises to keep.

    Args:
        path: a local file.
        trust: allow full pickle.

    Raises:
        CheckpointFileError: it cannot be read, or a tensor is not the one that it was saved with.
    """
    checkpoint = read_checkpoint(path, trust=trust)
    stored = checkpoint.get(KEY)
    known = Provenance() if stored is None else Provenance.from_plain(stored, path)
    state = {
        name: value if torch.is_tensor(value) else torch.from_numpy(value)
        for name, value in checkpoint["model"].items()
    }
    kept = kept_in(known, path)
    packs = kept.packs if kept is not None else ()
    base = {name: value for name, value in state.items() if branch_of(name) is None}
    if kept is not None:
        promised: dict[str, str] = {**kept.base}
        now = digests(state)
        for i, branch in enumerate(kept.branches):
            promised.update(branch)
            now.update(digests(state, i))
        changed = sorted(name for name in promised.keys() | now.keys() if promised.get(name) != now.get(name))
        if changed:
            raise CheckpointFileError(
                path,
                expected="the tensors that it was saved with",
                found=f"{len(changed)} others: {shorten(changed, 5)}",
                fix="Use a file that nothing was edited in.",
            )
    branches = tuple({name: v for name, v in state.items() if branch_of(name) == i} for i in range(len(packs)))
    return BaseFile(path, base, known, packs, branches)


def pack_of(file: BaseFile, name: str = "") -> dict[str, Any]:
    """Take one pack out of a checkpoint, as the content of a file of its own.

    Args:
        file: of :func:`read_base`.
        name: one of the pack's classes; may be empty where there is one pack.

    Raises:
        ClassTableError: no pack, or no such class, or several packs and no name, or classes that nobody trained.
    """
    i = _number(file, name)
    open_classes = file.known.untrained.get(pack_space(i), ())
    if open_classes:
        raise ClassTableError(
            file.path,
            expected="classes that were fitted or trained",
            found=f"random rows for {shorten(open_classes)}",
            fix="Type d2-headadapt extend with images of them first.",
        )
    tensors = {BRANCH.sub(_renumbered(0), key): value.clone() for key, value in file.branches[i].items()}
    base = kept_in(file.known, file.path)
    facts = {
        **file.packs[i].to_plain(),
        "digest": one_digest(digests(tensors, 0)),
        "base": {"digest": one_digest(digests(file.base)), "classes": list(base.classes if base else ())},
    }
    return {"model": tensors, KEY: Provenance(extra={PACK: facts}).to_plain()}


def _number(file: BaseFile, name: str) -> int:
    classes = [entry for pack in file.packs for entry in pack.classes]
    if name in classes:
        return next(i for i, pack in enumerate(file.packs) if name in pack.classes)
    if not name and len(file.packs) == 1:
        return 0
    raise ClassTableError(
        f"{file.path}, --class",
        expected=f"one of the added classes: {shorten(classes)}" if classes else "a model with added classes",
        found=repr(name) if name else f"none, and {len(file.packs)} sessions that added classes",
        fix=(f"Add --class NAME.{did_you_mean(name, classes)}" if classes else "Type d2-headadapt extend to add some."),
    )


def added(file: BaseFile, paths: Sequence[str]) -> dict[str, Any]:
    """Put more packs behind a checkpoint.

    Args:
        file: the base, with or without packs.
        paths: files of packs.

    Returns:
        The content of the new file: ``model`` and the provenance.

    Raises:
        CheckpointFileError: a file that is no pack, is damaged, or belongs to another base, which is named.
        ClassTableError: two classes of one name.
    """
    mine = one_digest(digests(file.base))
    packs, branches = list(file.packs), list(file.branches)
    stored = kept_in(file.known, file.path)
    old = stored.classes if stored else ()
    for path in paths:
        checkpoint = read_checkpoint(path)
        facts = Provenance.from_plain(checkpoint.get(KEY), path).extra.get(PACK) if KEY in checkpoint else None
        if not isinstance(facts, Mapping) or not isinstance(facts.get("base"), Mapping):
            raise CheckpointFileError(
                path,
                expected="a class pack",
                found="a file of another kind",
                fix="Write one: d2-headadapt pack more.pth --output a.pack",
            )
        tensors = dict(checkpoint["model"])
        if one_digest(digests(tensors, 0)) != facts.get("digest"):
            raise CheckpointFileError(
                path, expected="the tensors that it was saved with", found="others", fix="Copy the file again."
            )
        wanted = facts["base"]
        if wanted.get("digest") != mine:
            names = [str(name) for name in wanted.get("classes", ())]
            raise CheckpointFileError(
                path,
                expected=f"its own base: {len(names)} classes ({shorten(names, 4)}), digest {wanted.get('digest'):.12}",
                found=f"{file.path}, digest {mine:.12}",
                fix="Use the very file that the classes were added to; another training of it is another base.",
            )
        old = tuple(map(str, wanted["classes"]))
        number = len(packs)
        packs.append(PackSpec.from_plain(facts, path))
        branches.append({BRANCH.sub(_renumbered(number), key): value for key, value in tensors.items()})
    return _content(file, old, packs, branches, range(len(file.packs)))


def removed(file: BaseFile, name: str) -> tuple[dict[str, Any], PackSpec]:
    """Split a checkpoint into the rest and one of its packs.

    Args:
        file: of :func:`read_base`.
        name: a class of the pack.

    Raises:
        ClassTableError: no such class was added.
    """
    i = _number(file, name)
    stored = kept_in(file.known, file.path)
    packs = [pack for k, pack in enumerate(file.packs) if k != i]
    rest = [branch for k, branch in enumerate(file.branches) if k != i]
    branches = [{BRANCH.sub(_renumbered(k), key): v for key, v in branch.items()} for k, branch in enumerate(rest)]
    left = [k for k in range(len(file.packs)) if k != i]
    return _content(file, stored.classes if stored else (), packs, branches, left), file.packs[i]


def _renumbered(number: int) -> Any:
    return lambda found: found[0].replace(f"packs.{found['number']}.", f"packs.{number}.")


def _content(
    file: BaseFile, old: Sequence[str], packs: Sequence[PackSpec], branches: Sequence[Mapping[str, torch.Tensor]],
    numbers: Sequence[int],
) -> dict[str, Any]:  # fmt: skip
    """Make the new file's content; ``numbers`` are the places in the old file of the packs that were there."""
    if packs:
        KeepSettings(ClassTable(old, file.path), tuple(packs))  # Two classes of one name are refused here.
    state = {**file.base, **{name: value for branch in branches for name, value in branch.items()}}
    tables = {s: t for s, t in file.known.tables.items() if not s.startswith(pack_space(0)[:-1])}
    if old:
        tables["thing"] = ClassTable(old, file.path)
    tables.update({pack_space(i): ClassTable(pack.classes, file.path) for i, pack in enumerate(packs)})
    extra = {key: value for key, value in file.known.extra.items() if key not in (KEEP, "untrained_rows")}
    if packs:
        facts = KeptFile(tuple(old), digests(state), tuple(packs), tuple(digests(state, i) for i in range(len(packs))))
        extra[KEEP] = facts.to_plain()
    layouts = tuple(layout for layout in file.known.layouts if branch_of(layout.tensor) is None)
    # What nobody trained stays untrained under its new number.
    renamed = {pack_space(old_number): pack_space(i) for i, old_number in enumerate(numbers)}
    spaces = {s: renamed.get(s, s) for s in file.known.untrained if s in renamed or s in file.known.tables}
    spaces = {s: new for s, new in spaces.items() if s in renamed or not s.startswith(pack_space(0)[:-1])}
    untrained = {new: file.known.untrained[s] for s, new in spaces.items()}
    return {"model": state, KEY: Provenance(tables, layouts, untrained=untrained, extra=extra).to_plain()}
