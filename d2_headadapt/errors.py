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


def visible(text: str) -> str:
    """``text`` in one line that shows what is in it: whatever is not printable, a line's end too, as its escape.

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
        super().__init__(visible(f"{where}: expected {expected}, found {found}. {fix}"))

    def __reduce__(self) -> tuple[object, ...]:
        # Worker processes hand exceptions to their parent by pickling, and keyword-only arguments need this.
        return (_rebuild, (type(self), self.where, self.expected, self.found, self.fix))


def _rebuild(cls: type[HeadAdaptError], where: str, expected: str, found: str, fix: str) -> HeadAdaptError:
    return cls(where, expected=expected, found=found, fix=fix)


class UsageError(HeadAdaptError):
    exit_code: ClassVar[int] = 2


class ConfigError(HeadAdaptError):
    pass


class ClassTableError(HeadAdaptError):
    pass


class DatasetError(HeadAdaptError):
    pass


class LayoutError(HeadAdaptError):
    pass


class CheckpointFileError(HeadAdaptError):
    pass


class NotFetchedError(CheckpointFileError):
    pass


class PlanRefused(HeadAdaptError):
    pass


class ResumeError(HeadAdaptError):
    pass


class ExportError(HeadAdaptError):
    pass


class TextError(HeadAdaptError):
    exit_code: ClassVar[int] = 3


class RankError(HeadAdaptError):
    pass
