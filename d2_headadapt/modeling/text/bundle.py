"""Read files of class embeddings: which row is whose, whatever the convention they were saved in.

K   number of classes of the file
D   width of an embedding

Read are (K, D) rows; the transposed (D, K + 1) with a zero column of Detic's ``zero_shot_classifier.py``; and a
background embedding beside the classes, as RegionCLIP's ``cls_bg_score``.
"""

from __future__ import annotations

import json
import os
import tokenize
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from detectron2.utils.file_io import PathManager

from ...adapt.classes import ClassTable, did_you_mean, shorten
from ...adapt.matching import parse_aliases
from ...adapt.planner import match_tables
from ...adapt.vocabularies import vocabulary, vocabulary_names
from ...data.datasets import resolve_table
from ...errors import ClassTableError, TextError
from ...key import HEAD_ADAPT, Key

FILE_KEY = HEAD_ADAPT.TEXT.FILE
NAMES_KEY = HEAD_ADAPT.TEXT.NAMES
UNIT = 2e-3
"""How far a norm may be from 1 in a normalised file; rounding to float16 moves it by 5e-4 at most."""

# numpy parses the header of a .npy file as Python.
_NPY_ERRORS = (
    *(ArithmeticError, EOFError, LookupError, MemoryError, OSError, RecursionError),
    *(SyntaxError, TypeError, ValueError, tokenize.TokenError),
)
_MATRICES = ("embeddings", "text_embeddings", "weight", "zs_weight", "matrix")


@dataclass(frozen=True, eq=False)
class TextBundle:
    """Class embeddings with their names.

    Args:
        names: the classes of the rows.
        matrix: (K, D) float32, as in the file: not normalised here.
        background: (D,) float32, where the file has one.
        encoder: the text encoder that wrote it; empty where nobody says.
        normalised: every row has norm 1, as the sidecar says, else as measured.
        path: of the file.
    """

    names: ClassTable
    matrix: torch.Tensor
    background: torch.Tensor | None
    encoder: str
    normalised: bool
    path: str

    @property
    def width(self) -> int:
        """The embeddings' width D."""
        return int(self.matrix.shape[1])

    def rows_for(self, target: ClassTable, aliases: Sequence[str] = ()) -> tuple[torch.Tensor, tuple[str, ...]]:
        """Pick the rows of ``target`` by name.

        Args:
            target: the classes wanted.
            aliases: ``"target=source"``; those whose sides are not in both tables are about another source.

        Returns:
            (K', D) rows in the order of ``target``, without those that the file lacks; and the names of these.

        Raises:
            ClassTableError: two rows of the file that a synonym finds for one class.
        """
        rows = match_tables({"": self.names}, {"": target}, self._own(aliases, target), "name")[""].rows
        found = [row for row in rows if row is not None]
        missing = tuple(name for name, row in zip(target.names, rows, strict=True) if row is None)
        return self.matrix[torch.tensor(found, dtype=torch.int64, device=self.matrix.device)], missing

    def require(self, target: ClassTable, aliases: Sequence[str] = ()) -> torch.Tensor:
        """Pick the (K', D) rows of ``target``; raise where one is missing.

        Args:
            target, aliases: as :meth:`rows_for`.

        Raises:
            TextError: classes that the file lacks, with the nearest names it has.
            ClassTableError: as :meth:`rows_for`.
        """
        rows, missing = self.rows_for(target, aliases)
        if missing:
            raise self.lacks(target, missing)
        return rows

    def lacks(self, target: ClassTable, missing: Sequence[str]) -> TextError:
        """Make the error for the classes of ``target`` that have no row, which ``missing`` names."""
        near = "".join(f" For {name!r}:{did_you_mean(name, self.names.names)}" for name in missing[:5])
        return TextError(
            f"{FILE_KEY}, {self.path}",
            expected=f"a row for each of the {len(target)} classes of {target.origin}",
            found=f"none for {shorten(list(missing))} among its {len(self.names)} rows",
            fix=f"Name the row: {HEAD_ADAPT.ALIASES.set([f'{missing[0]}=its name in the file'])}, or add rows to the "
            f"file.{near}",
        )

    def _own(self, aliases: Sequence[str], target: ClassTable) -> list[str]:
        own = []
        for alias in aliases:
            try:
                parse_aliases([alias], target, self.names)
            except ClassTableError:
                continue
            own.append(alias)
        return own


@dataclass(frozen=True)
class _Raw:
    """The content of a file before its rows have names."""

    matrix: torch.Tensor
    background: torch.Tensor | None
    facts: Mapping[str, Any]


def read_bundle(
    path: str, names: Any = None, *, encoder: str = "", background: bool = False, trust: bool = False
) -> TextBundle:
    """Read class embeddings and say whose they are.

    Args:
        path: ``.npy``, ``.safetensors``, or a torch file: a matrix, or a dict with one and, where wanted,
            ``background``, ``names``, ``encoder`` and ``normalised``. Any float type.
        names: a :class:`ClassTable`, or what ``SOURCE_CLASSES`` takes; ``None`` for what the file or the ``.json``
            beside it says.
        encoder: wins over what they say.
        background: the file must have a background embedding: an entry of that name, or row K of K + 1.
        trust: allow a file that needs full pickle.

    Raises:
        TextError: no such file, no matrix of class rows, no names, or rows that are not those of the names.
        CheckpointFileError: a damaged torch file.
        ClassTableError, DatasetError: names that cannot be used.
    """
    # A model that is built on the meta device still reads the values.
    with torch.device("cpu"):
        raw = _read(path, trust)
        facts = {**raw.facts, **_sidecar(path)}
        table = _names(path, names, facts, raw.matrix)
        matrix, found = _rows(path, raw.matrix, table, wants_background=background and raw.background is None)
        found = raw.background if raw.background is not None else found
        if background and found is None:
            _refuse(
                path,
                "a background embedding, as BACKGROUND is 'file'",
                f"{len(table)} rows for {len(table)} names and no entry 'background'",
                f"Set {HEAD_ADAPT.TEXT.BACKGROUND.set('learned')} or zero, or store it as row K of K + 1.",
            )
        if found is not None and found.shape != matrix.shape[1:]:
            _refuse(
                path,
                f"a background embedding of {matrix.shape[1]} numbers, as the class rows",
                f"one of shape {tuple(found.shape)}",
                "Save the two from one encoder.",
            )
        norms = matrix.norm(dim=1)
        unit = facts.get("normalised")
        unit = bool(((norms - 1).abs() <= UNIT).all()) if unit is None else bool(unit)
        return TextBundle(table, matrix, found, encoder or str(facts.get("encoder") or ""), unit, path)


def _read(path: str, trust: bool) -> _Raw:
    try:
        local = str(PathManager.get_local_path(os.path.expanduser(path)))
    except (OSError, AssertionError) as error:
        _refuse(path, "a file that can be fetched", str(error), f"Correct {FILE_KEY}.", error)
    if not os.path.isfile(local):
        folder, name = os.path.split(local)
        near = did_you_mean(name, os.listdir(folder or ".")) if os.path.isdir(folder or ".") else ""
        _refuse(path, "a file of embeddings", "no such file", f"Correct {FILE_KEY}.{near}")
    if local.endswith(".npy"):
        try:
            # Without pickle: an array of objects could run code. Mapped: a header may promise more than the file has.
            loaded: Any = np.load(local, mmap_mode="r", allow_pickle=False)
        except _NPY_ERRORS as error:
            fix = "Save it with numpy.save as an array of floats."
            found = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            _refuse(path, "an array that numpy.save wrote", found, fix, error)
    else:
        # Here, because every process that builds a model imports this module, and few read embeddings.
        from ...files import read_values

        loaded = read_values(local, trust=trust)
    if isinstance(loaded, Mapping) and "model" in loaded and isinstance(loaded["model"], Mapping):
        loaded = loaded["model"]
    return _from_dict(path, loaded) if isinstance(loaded, Mapping) else _Raw(_floats(path, loaded), None, {})


def _from_dict(path: str, loaded: Mapping[str, Any]) -> _Raw:
    arrays = {key: value for key, value in loaded.items() if isinstance(value, (torch.Tensor, np.ndarray))}
    aside = [key for key in arrays if any(word in str(key).lower() for word in ("background", "bg"))]
    others = [key for key in arrays if key not in aside]
    chosen = next((key for key in _MATRICES if key in others), others[0] if len(others) == 1 else None)
    if chosen is None or len(aside) > 1:
        keys = ", ".join(f"{key} {tuple(value.shape)}" for key, value in list(arrays.items())[:6])
        expected = f"one matrix of class rows, or one under {', '.join(_MATRICES)}; and at most one background"
        _refuse(path, expected, keys or "no tensor", "Save {'embeddings': matrix}, and 'background' where there is.")
    background = _floats(path, arrays[aside[0]]).reshape(-1) if aside else None
    return _Raw(_floats(path, arrays[chosen]), background, {str(k): v for k, v in loaded.items() if k not in arrays})


def _floats(path: str, value: Any) -> torch.Tensor:
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        with np.errstate(over="ignore"):  # what becomes infinite is HA404's
            value = torch.from_numpy(value.astype(np.float32))
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.layout != torch.strided:
        found = f"{type(value).__name__} of {getattr(value, 'dtype', 'no numbers')}"
        _refuse(path, "a matrix of floats, one row per class", found, "Save the text encoder's output.")
    return value.detach().to("cpu", torch.float32, copy=True)  # the file may change under a view


def _sidecar(path: str) -> dict[str, Any]:
    beside = os.path.splitext(os.path.expanduser(path))[0] + ".json"
    if "://" in beside or not os.path.isfile(beside):
        return {}
    try:
        with open(beside, encoding="utf-8") as file:
            facts = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        _refuse(beside, "valid JSON", str(error), "Write the file anew.", error)
    facts = {"names": facts} if isinstance(facts, list) else facts
    if not isinstance(facts, dict) or not isinstance(facts.get("normalised", False), bool):
        fix = "Write that, with normalised true or false."
        _refuse(beside, '{"names": [...], "encoder": "...", "normalised": false}', f"{str(facts)[:80]}", fix)
    return facts


def _names(path: str, names: Any, facts: Mapping[str, Any], matrix: torch.Tensor) -> ClassTable:
    if isinstance(names, ClassTable):
        return names
    table = resolve_table(names, key=NAMES_KEY)
    if table is None and facts.get("names") is not None:
        stored = facts["names"]
        table = (
            resolve_table(stored, key=Key(f"{path}, names")) if isinstance(stored, str) else ClassTable(stored, path)
        )
    if table is None:
        shape = tuple(matrix.shape)
        _refuse(
            path,
            f"names of its rows: in {os.path.splitext(os.path.basename(path))[0]}.json beside it "
            f'({{"names": [...]}}), or under {NAMES_KEY}',
            f"neither, for a matrix {shape}",
            _suggested(shape),
        )
    return table


def _suggested(shape: Sequence[int]) -> str:
    # A file has as many rows as names, one more for background, or Detic's one more column.
    counts = {shape[0]: 0, shape[0] - 1: 1} if shape else {}
    counts.update({shape[1]: 2, shape[1] - 1: 3} if len(shape) == 2 else {})
    sizes = {name: _things(name) for name in vocabulary_names()}
    fitting = sorted((name for name in sizes if sizes[name] in counts), key=lambda name: counts[sizes[name]])
    if not fitting:
        every = ", ".join(f"{name} ({count})" for name, count in sizes.items() if count)
        return f"Name them: {NAMES_KEY.set('names.txt')}. No vocabulary has that many classes: {every}."
    listed = ", ".join(f"{name} ({sizes[name]})" for name in fitting)
    return f"If it holds a vocabulary of that size ({listed}), in its order: {NAMES_KEY.set(fitting[0])}."


def _things(name: str) -> int:
    try:
        return len(vocabulary(name))
    except ClassTableError:  # A vocabulary of stuff alone.
        return 0


def _rows(
    path: str, matrix: torch.Tensor, table: ClassTable, *, wants_background: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Pick the (K, D) rows of K names, and the background where it is a row of the same matrix."""
    shape, count = tuple(matrix.shape), len(table)
    whose = f"{count} names of {table.origin}"
    if matrix.dim() != 2 or shape[1] == 1 or (shape[0] == 1 and count > 1):
        _refuse(
            path,
            f"a matrix of {count} rows, one for each of the {whose}",
            f"shape {shape}, which torch would silently repeat for every class" if matrix.dim() < 3 else f"{shape}",
            "Save one row per class: numpy.stack of the class embeddings.",
        )
    zero_column = shape[1] == count + 1 and bool((matrix[:, -1] == 0).all())
    if shape[0] in (count, count + 1) and shape[1] in (count, count + 1):
        as_columns = f"; as columns, {shape[1]} classes{' with a zero background last' if zero_column else ''}"
        _refuse(
            path,
            f"a matrix that tells rows from columns by the {whose}",
            f"{shape}, which fits both ways: as rows, {shape[0]} classes of width {shape[1]}{as_columns}",
            "Save it as rows, and add a row and its name so that the counts differ.",
        )
    if shape[0] == count:
        return matrix, None
    if shape[0] == count + 1 and (wants_background or bool((matrix[-1] == 0).all())):
        return matrix[:-1], matrix[-1] if wants_background else None
    if zero_column:
        return matrix[:, :-1].t().contiguous(), None
    fix = f"Correct {NAMES_KEY}, or use the file of these classes. {_suggested(shape)}"
    if shape[0] == count + 1:
        fix = f"If the last row is the background, set {HEAD_ADAPT.TEXT.BACKGROUND.set('file')}. {fix}"
    elif shape[1] in (count, count + 1):
        fix = "If the classes are its columns, save the transpose (numpy: matrix.T) without a background column."
    _refuse(
        path,
        f"{count} rows (axis 0), for the {whose}; or as Detic saves them, {count + 1} columns with zeros in the last",
        f"{shape}: as rows, {shape[0]} classes of width {shape[1]}; as columns, {shape[1]} of width {shape[0]}",
        fix,
    )


def _refuse(path: str, expected: str, found: str, fix: str, cause: BaseException | None = None) -> NoReturn:
    raise TextError(f"{FILE_KEY}, {path}", expected=expected, found=found, fix=fix) from cause
