"""The examples in docstrings are run, each with nothing but what it imports itself."""

from __future__ import annotations

import doctest
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import d2_headadapt
from d2_headadapt.adapt import registry as layout_registry
from d2_headadapt.data.task_spec import task_specs
from d2_headadapt.fit import FitSettings

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
# Public names of which an example would be a training run, or says nothing that the parent class does not.
WITHOUT = {
    *("PREDICTOR_REGISTRY", "Trainer", "__version__"),
    *("HeadAdaptROIHeads", "HeadAdaptCascadeROIHeads", "HeadAdaptRes5ROIHeads"),
    *("HeadAdaptOutputLayers", "HeadAdaptTextOutputLayers"),
    *("POOLING_REGISTRY", "TextBundle", "read_bundle", "plan_nearest", "draw_tasks"),
    *(
        "build_on_meta",
        "plan_file",
        "resolve_config",
        "load_lazy_config",
        "prepare_lazy_config",
    ),  # docs/python.md, lazy.md
}
MORE = {"FitSettings": FitSettings, "task_specs": task_specs}
PUBLIC = {name: getattr(d2_headadapt, name) for name in d2_headadapt.__all__ if name not in WITHOUT}


def examples(name: str, value: Any) -> list[doctest.DocTest]:
    """Those of a function, or of a class and its methods."""
    found = doctest.DocTestFinder(recurse=inspect.isclass(value)).find(value, name, sys.modules[value.__module__], {})
    return [test for test in found if test.examples]


@pytest.fixture(autouse=True)
def _no_layout_stays() -> Iterator[None]:
    patterns = dict(layout_registry._BY_PATTERN)
    yield
    layout_registry._BY_PATTERN.clear()
    layout_registry._BY_PATTERN.update(patterns)


@pytest.mark.parametrize("name", [*PUBLIC, *MORE])
def test_the_examples_of_a_public_name_do_what_they_say(name: str) -> None:
    tests = examples(name, {**PUBLIC, **MORE}[name])
    assert tests, f"{name} has no example"
    said: list[str] = []
    for test in tests:
        results = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=said.append)
        assert results.attempted and not results.failed, "".join(said)


def test_there_are_as_many_as_there_were() -> None:
    """So that a docstring that loses its prompt is noticed."""
    tests = [test for name, value in {**PUBLIC, **MORE}.items() for test in examples(name, value)]
    assert len(tests) >= 20
    assert sum(len(test.examples) for test in tests) >= 130
    assert set(d2_headadapt.__all__) >= WITHOUT


def test_mutation_a_wrong_example_fails() -> None:
    def wrong() -> None:
        """
        >>> 1 + 1
        3
        """

    results = doctest.DocTestRunner(optionflags=FLAGS).run(examples("wrong", wrong)[0], out=lambda text: None)
    assert results.failed == 1
