"""Checks HA401 to HA407: class embeddings, as the model's constructor would refuse them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from weakref import WeakKeyDictionary

from ..key import HEAD_ADAPT
from ..modeling.text.preflight import preflight
from .finding import DoctorContext, Finding, check

TITLES = {
    "HA401": "the file of class embeddings can be read, and its rows have names",
    "HA402": "class embeddings are as wide as the model, and as their encoder",
    "HA403": "every class of the model has an embedding",
    "HA404": "class embeddings are finite and not zero",
    "HA405": "no two classes have the same embedding",
    "HA406": "class embeddings are all normalised, or none is",
    "HA407": f"the keys under {HEAD_ADAPT.TEXT} can be used, and are read",
}
_found: WeakKeyDictionary[DoctorContext, list[Finding]] = WeakKeyDictionary()


def _problems(context: DoctorContext) -> list[Finding]:
    if context not in _found:
        _found[context] = preflight(context.cfg, context.tables.get("thing"))
    return _found[context]


def _check_of(code: str) -> Callable[[DoctorContext], Iterator[Finding]]:
    def find(context: DoctorContext) -> Iterator[Finding]:
        for problem in _problems(context):
            if problem.code == code:
                yield problem

    return find


for _code, _title in TITLES.items():
    check(_code, _title, needs=("settings",))(_check_of(_code))
