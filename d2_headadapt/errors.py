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

from dataclasses import dataclass
from typing import ClassVar, Literal

from .key import Either, Form, Words, form_in_use, shown, speaking

Severity = Literal["error", "warning", "note"]
INTERRUPTED = 130
"""The exit code of a command that Ctrl-C ended, as shells have it."""

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


def visible(text: str) -> str:
    """Show ``text`` in one line: whatever is not printable, a line's end too, as its escape.

    Names of classes and tensors come from files. Raw, ``\\x1b[2J`` in one clears a terminal, a newline forges a line of
    a log, and a zero-width space makes two names look alike.

    Example:
        >>> from d2_headadapt.errors import visible
        >>> visible("cat\\n"), visible("ca\\u200bt"), visible("straße")
        ('cat\\\\n', 'ca\\\\u200bt', 'straße')
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class HeadAdaptError(ValueError):
    """Base of everything that this package raises for a mistake a user can mend.

    Args:
        where: the file, config key, tensor or command line flag that is wrong.
        expected: what would have been accepted.
        found: what was there instead.
        fix: what to type; a complete sentence.

    Attributes:
        form: the config form that the message names keys in, that of the command which met the mistake.

    Example:
        >>> from d2_headadapt import ClassTable, HeadAdaptError
        >>> try:
        ...     ClassTable([])
        ... except HeadAdaptError as error:
        ...     print(error.found, "-", error.fix)
        none - List the classes in their order.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, where: Words, *, expected: Words, found: Words, fix: Words) -> None:
        self._said = (f"{where}", f"{expected}", f"{found}", f"{fix}")
        self.form = form_in_use()
        super().__init__(visible(f"{self.where}: expected {self.expected}, found {self.found}. {self.fix}"))

    @property
    def where(self) -> str:
        """Name what is wrong: the file, config key, tensor or command line flag."""
        return shown(self._said[0], self.form)

    @property
    def expected(self) -> str:
        """Say what would have been accepted."""
        return shown(self._said[1], self.form)

    @property
    def found(self) -> str:
        """Say what was there instead."""
        return shown(self._said[2], self.form)

    @property
    def fix(self) -> str:
        """Say what to type, in a complete sentence."""
        return shown(self._said[3], self.form)

    def is_at(self, *keys: Either) -> bool:
        """Tell whether one of some config keys, or an entry of it, is what is wrong."""
        return shown(self._said[0], Form.YAML).startswith(tuple(key.yaml for key in keys))

    def __reduce__(self) -> tuple[object, ...]:
        # Worker processes hand exceptions to their parent by pickling, and keyword-only arguments need this.
        return (_rebuild, (type(self), *self._said, self.form))


def _rebuild(cls: type[HeadAdaptError], where: str, expected: str, found: str, fix: str, form: Form) -> HeadAdaptError:
    with speaking(form):
        return cls(where, expected=expected, found=found, fix=fix)


@dataclass(frozen=True, eq=False)
class Finding:
    """One thing that is wrong, or worth knowing.

    Args:
        code: what kind of thing, such as ``HA101``, the code of the doctor's check.
        severity: ``error`` is certain to fail or to train something wrong, ``warning`` very likely is a mistake,
            ``note`` is worth knowing and needs no mending.
        error: where, what was expected, what was found and what to type; it can be raised as it is.
    """

    code: str
    severity: Severity
    error: HeadAdaptError

    @property
    def where(self) -> str:
        return self.error.where

    @property
    def expected(self) -> str:
        return self.error.expected

    @property
    def found(self) -> str:
        return self.error.found

    @property
    def fix(self) -> str:
        return self.error.fix

    def __eq__(self, other: object) -> bool:
        # Two exceptions are equal only where they are one; two findings, where they say the same.
        return type(other) is type(self) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(tuple(self.to_json().values()))

    def __str__(self) -> str:
        return f"{self.severity} {self.code}: {self.error}"

    def to_json(self) -> dict[str, str]:
        """Write plain types: ``code``, ``severity``, ``where``, ``found``, ``expected`` and ``fix``."""
        fields = ("code", "severity", "where", "found", "expected", "fix")
        return {name: getattr(self, name) for name in fields}


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
