"""Write class counts under the keys that a yaml's architecture reads: known from a table, others found by building.

FCOS, YOLOF, CenterNet or MaskFormer read a key of their own; ``MODEL.ROI_HEADS.NUM_CLASSES`` beside it sizes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from detectron2.config import CfgNode
from omegaconf import DictConfig

from ..adapt.classes import ClassTable
from ..adapt.discovery import CountFamily, Discovery
from ..adapt.unknown_heads import other_space
from ..config.settings import NUM_CLASSES_KEYS, apply_num_classes
from ..errors import HeadAdaptError
from ..key import Key
from .count_keys import count_keys, discover_lazy, discover_yaml, write_values

logger = logging.getLogger(__name__)


def settle_counts(cfg: CfgNode, target: Mapping[str, ClassTable]) -> list[str]:
    """Write the length of each target table under every key that this architecture reads, in place.

    Args:
        cfg: not frozen, with everything that its model needs registered.
        target: class tables by label space.

    Returns:
        One line per key that changed, such as ``MODEL.FCOS.NUM_CLASSES was 80, is 5, the classes of my_train``.
    """
    if not target or cfg.MODEL.META_ARCHITECTURE in NUM_CLASSES_KEYS:
        return apply_num_classes(cfg, target)
    try:
        found = discover_yaml(cfg)
    except HeadAdaptError as exc:  # Whoever builds the model says it where it matters.
        logger.info("Which keys count the classes of this model was not found out by building: %s", exc)
        found = Discovery()
    families = _families_of(found, target)
    if not families:
        return apply_num_classes(cfg, target)
    lines: list[str] = []
    counts = count_keys(cfg)
    for space, mine in families.items():
        table = target[space]
        for name in (name for family in mine for name in family.keys):
            if counts[name] != len(table):
                key = Key(name)
                lines.append(f"{key!s} was {counts[name]}, is {len(table)}, the classes of {table.origin}")
                key.put(cfg, len(table))
    return lines


def settle_foreign_counts(model: DictConfig, free: DictConfig, target: Mapping[str, ClassTable]) -> list[str]:
    """Write the counts of a LazyConfig's model that no layout tells of, in place; the same as :func:`settle_counts`.

    Args:
        model: its ``model`` node.
        free: a copy that can be built at other counts.
        target: class tables by label space, none of which has a count that a layout tells of.
    """
    if not target:
        return []
    try:
        found = discover_lazy(free)
    except HeadAdaptError as exc:  # Whoever builds the model says it where it matters.
        logger.info("Which arguments count the classes of this model was not found out by building: %s", exc)
        return []
    lines: list[str] = []
    for space, mine in _families_of(found, target).items():
        table = target[space]
        for family in mine:
            if family.value != len(table):
                words = f"was {family.value}, is {len(table)}, the classes of {table.origin}"
                lines += [f"{key} {words}" for key in family.keys]
                write_values(model, dict.fromkeys(family.keys, len(table)))
    return lines


def _families_of(found: Discovery, target: Mapping[str, ClassTable]) -> dict[str, list[CountFamily]]:
    """Return the count keys of each label space with a table; none where a space's keys hold several numbers."""
    spaces = [family.space for family in found.families]
    renamed = other_space(set(spaces), spaces, target)
    by_space: dict[str, list[CountFamily]] = {}
    for family in found.families:
        by_space.setdefault(renamed.get(family.space, family.space), []).append(family)
    return {
        space: families
        for space, families in by_space.items()
        if space in target and len({family.value for family in families}) == 1
    }
