"""The exceptions of this package.

    HeadAdaptError              exit code 1
    |-- UsageError              exit code 2: the command line itself is wrong
    |-- ConfigError             a config key holds something that cannot be used
    |-- ClassTableError         class lists, aliases and vocabularies
    |-- DatasetError            a dataset is not registered, not readable, or disagrees with another
    |-- LayoutError             a declared layout does not describe the tensor it names
    |-- CheckpointFileError     a file cannot be read or written safely
    |   `-- NotFetchedError     an address gives no file; the network may be what is missing
    |-- PlanRefused             nothing may be loaded: wrong architecture, damaged values, refused tensors
    |-- ResumeError             a run cannot be continued from this file
    |-- ExportError             a model has no such form, or its exported form gives other numbers
    |-- TextError               exit code 3: text embeddings that do not fit the classes or the model
    `-- RankError               processes of one job disagree

Every message says where, what was expected, what was found, and what to type.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "CheckpointFileError",
    "ClassTableError",
    "ConfigError",
    "DatasetError",
    "ExportError",
    "HeadAdaptError",
    "LayoutError",
    "NotFetchedError",
    "PlanRefused",
    "RankError",
    "ResumeError",
    "TextError",
    "UsageError",
]


class HeadAdaptError(ValueError):
    """Base of everything that this package raises for a mistake a user can mend.

    Args:
        where: the file, config key, tensor or command line flag that is wrong.
        expected: what would have been accepted.
        found: what was there instead.
        fix: what to type; a complete sentence.

    Example:
        >>> from d2_headadapt import ClassTable, HeadAdaptError
        >>> try:
        ...     ClassTable([])
        ... except HeadAdaptError as error:
        ...     print(error.found, "-", error.fix)
        none - List the classes in their order.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, where: str, *, expected: str, found: str, fix: str) -> None:
        self.where = where
        self.expected = expected
        self.found = found
        self.fix = fix
        super().__init__(f"{where}: expected {expected}, found {found}. {fix}")

    def __reduce__(self) -> tuple[object, ...]:
        # Worker processes hand exceptions to their parent by pickling, and keyword-only arguments need this.
        return (_rebuild, (type(self), self.where, self.expected, self.found, self.fix))


def _rebuild(cls: type[HeadAdaptError], where: str, expected: str, found: str, fix: str) -> HeadAdaptError:
    return cls(where, expected=expected, found=found, fix=fix)


class UsageError(HeadAdaptError):
    """A command line that is wrong in itself; exit code 2."""

    exit_code: ClassVar[int] = 2


class ConfigError(HeadAdaptError):
    """A config key that is missing, misspelt, or holds what cannot be used."""


class ClassTableError(HeadAdaptError):
    """A list of classes, an alias or a vocabulary that cannot be used."""


class DatasetError(HeadAdaptError):
    """A dataset that is not registered, cannot be read, or disagrees with another."""


class LayoutError(HeadAdaptError):
    """A declared layout that does not describe the tensor it names."""


class CheckpointFileError(HeadAdaptError):
    """A file that cannot be read or written safely."""


class NotFetchedError(CheckpointFileError):
    """An address that gives no file; the network may be what is missing."""


class PlanRefused(HeadAdaptError):
    """A load that would change nothing or spoil something: wrong architecture, damaged values, refused tensors."""


class ResumeError(HeadAdaptError):
    """A run that cannot be continued from this file."""


class ExportError(HeadAdaptError):
    """A model without this exported form, or whose exported form gives other numbers."""


class TextError(HeadAdaptError):
    """Text embeddings that do not fit the classes or the model; exit code 3."""

    exit_code: ClassVar[int] = 3


class RankError(HeadAdaptError):
    """Processes of one job that disagree."""
