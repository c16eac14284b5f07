"""Look up what a config names by the name it was registered under."""

from __future__ import annotations

from typing import Any

from ..adapt.classes import did_you_mean
from ..errors import ConfigError
from ..key import Key

MOST_NAMES = 6
"""Names of a registry that a message lists."""


def registered(registry: Any, key: Key, name: str) -> Any:
    """Return the entry of a registry that a config names.

    Args:
        registry: one of detectron2's ``Registry``.
        key: the config key that holds the name, for the message.
        name: of the entry.

    Raises:
        ConfigError: nobody registered that name.
    """
    if name not in registry:
        raise not_registered(registry, key, name)
    return registry.get(name)


def not_registered(registry: Any, key: Key, name: Any) -> ConfigError:
    """Make the error for a name that a registry does not have."""
    known = [entry for entry, _ in registry]
    more = ", ..." if len(known) > MOST_NAMES else ""
    return ConfigError(
        key,
        expected=f"one of the registry {registry._name}: {', '.join(known[:MOST_NAMES])}{more}",
        found=f"{name!r}, which nobody registered",
        fix=f"Correct it, or name the module that registers it with --import.{did_you_mean(str(name), known)}",
    )
