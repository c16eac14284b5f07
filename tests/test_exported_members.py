"""The public names."""

from __future__ import annotations

import types

import d2_headadapt


def isort_style(names: list[str]) -> list[str]:
    """ruff's order for ``__all__`` (RUF022): CONSTANTS, then Classes, then functions, each alphabetical."""

    def rank(name: str) -> int:
        bare = name.strip("_")
        return 0 if bare.isupper() and len(bare) > 1 else 1 if bare[:1].isupper() else 2

    return sorted(names, key=lambda name: (rank(name), name))


def test_all_is_the_public_names_in_order() -> None:
    public = [
        name
        for name, value in vars(d2_headadapt).items()
        if not isinstance(value, types.ModuleType) and not name.startswith("_") and name != "annotations"
    ]
    assert d2_headadapt.__all__ == isort_style([*public, "__version__"])


def test_every_public_name_says_what_it_is() -> None:
    for name in d2_headadapt.__all__:
        value = getattr(d2_headadapt, name)
        assert isinstance(value, str) or (value.__doc__ or "").strip(), name
