"""``NEW_ROWS: nearest``: new rows are mixtures of carried ones, found by name, and nothing else moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.files import HEAD, save_stock
from helpers.models import build_seeded, names, stock_model, tiny_cfg
from torch import nn

from d2_headadapt import ClassTable, HeadAdaptCheckpointer
from d2_headadapt.adapt.layouts import HeadLayout
from d2_headadapt.adapt.report import plan_json
from d2_headadapt.errors import ConfigError, TextError
from d2_headadapt.modeling.text.bundle import TextBundle
from d2_headadapt.modeling.text.nearest import Neighbours, mixed_rows, nearest_classes

FIVE = names(5)
TARGET = ["class 3", "zebra", "class 0", "unknown", "class 4"]
"""``zebra`` is embedded beside classes 4, 0 and 3 in this order; ``unknown`` is not embedded."""

ANGLES = {"class 0": 30.0, "class 1": 2.0, "class 2": 170.0, "class 3": 60.0, "class 4": -10.0, "zebra": 0.0}


def matrix() -> np.ndarray:
    """(6, 2): unit vectors at :data:`ANGLES`."""
    angles = np.deg2rad(list(ANGLES.values()))
    return np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)


def bundle() -> TextBundle:
    return TextBundle(ClassTable(ANGLES), torch.from_numpy(matrix()), None, "", True, "toy.npy")


@pytest.fixture(scope="module")
def stock_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = stock_model(5, seed=21, masks=True)
    generator = torch.Generator().manual_seed(4)
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            value.data.normal_(generator=generator)  # The constructor's are 0, and mix to 0.
    return save_stock(model, tmp_path_factory.mktemp("stock") / "stock.pth")


@pytest.fixture
def text(tmp_path: Path) -> dict[str, Any]:
    """Keys of a config."""
    np.save(tmp_path / "toy.npy", matrix())
    return {"NEW_ROWS": "nearest", "TEXT.FILE": str(tmp_path / "toy.npy"), "TEXT.NAMES": list(ANGLES)}


def built(seed: int, keys: dict[str, Any]) -> nn.Module:
    """A tiny Mask R-CNN for :data:`TARGET`, with more keys under ``MODEL.HEAD_ADAPT``."""
    cfg = tiny_cfg(masks=True)
    all_keys = {"SOURCE_CLASSES": FIVE, "TARGET_CLASSES": TARGET, **keys}
    cfg.merge_from_list([word for key, value in all_keys.items() for word in (f"MODEL.HEAD_ADAPT.{key}", value)])
    return build_seeded(cfg, seed)


def loaded(path: str, *, seed: int = 2, keys: dict[str, Any] | None = None) -> HeadAdaptCheckpointer:
    model = built(seed, keys or {})
    checkpointer = HeadAdaptCheckpointer(model)
    checkpointer.load(path)
    return checkpointer


def test_the_nearest_carried_classes_by_cosine() -> None:
    found = nearest_classes(bundle(), ClassTable(TARGET), new=(1, 3), carried=(0, 2, 4), count=2)
    assert set(found) == {1}, "a class without an embedding starts from nothing"
    assert found[1].classes == (4, 2), "class 1 is nearer, but the file gave no row for it"
    cosines = torch.tensor([10.0, 30.0], dtype=torch.float64).deg2rad().cos()
    assert found[1].shares == pytest.approx(cosines.softmax(0).tolist(), abs=1e-6)


@pytest.mark.parametrize(("new", "carried", "which"), [((3,), (0, 2), "new"), ((1,), (3,), "carried")])
def test_without_an_embedding_on_either_side_the_error_says_what_to_set(
    new: tuple[int, ...], carried: tuple[int, ...], which: str
) -> None:
    with pytest.raises(TextError, match=f"none of the 1 {which}|none of the 2 {which}") as error:
        nearest_classes(bundle(), ClassTable(TARGET), new=new, carried=carried)
    assert "MODEL.HEAD_ADAPT.TEXT.FILE" in error.value.fix
    assert "MODEL.HEAD_ADAPT.TEXT.NAMES" in error.value.fix


def test_equal_neighbours_give_their_row_back_and_nothing_else_moves() -> None:
    layout = HeadLayout("bbox_pred.weight", "thing", "head", rows_per_class=4, extra=1)
    tensor = torch.randn(4 * 5 + 1, 3, generator=torch.Generator().manual_seed(1))
    tensor[8:12] = tensor[0:4]
    kept = tensor.clone()
    out = mixed_rows(tensor, layout, 5, {1: Neighbours((0, 2), (0.3, 0.7))})
    assert torch.equal(tensor, kept), "inputs are not written to"
    # A sum of two products, each rounded.
    assert torch.allclose(out[4:8], tensor[0:4], atol=1e-6)
    rest = [i for i in range(21) if i not in range(4, 8)]
    assert torch.equal(out[rest], tensor[rest])


def test_a_load_mixes_new_rows_and_leaves_every_other_bit(stock_file: str, text: dict[str, Any]) -> None:
    plain, near = loaded(stock_file), loaded(stock_file, keys=text)
    before, after = plain.model.state_dict(), near.model.state_dict()
    shares = torch.tensor([10.0, 30.0, 60.0], dtype=torch.float64).deg2rad().cos().softmax(0)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    per_class = {f"{HEAD}.cls_score": 1, f"{HEAD}.bbox_pred": 4, "roi_heads.mask_head.predictor": 1}
    assert changed == {f"{layer}.{leaf}" for layer in per_class for leaf in ("weight", "bias")}
    for name in changed:
        rows = per_class[name.rpartition(".")[0]]
        old, new = before[name], after[name]
        own = slice(rows, 2 * rows)
        mixture = sum(s * old[rows * k : rows * (k + 1)].double() for s, k in zip(shares, (4, 2, 0), strict=True))
        assert torch.allclose(new[own].double(), mixture, atol=1e-6)
        rest = torch.cat([torch.arange(rows), torch.arange(2 * rows, len(old))])
        assert torch.equal(new[rest], old[rest])


def test_the_rows_do_not_depend_on_a_seed_and_draw_no_number(stock_file: str, text: dict[str, Any]) -> None:
    one = loaded(stock_file, seed=2, keys=text)
    other = loaded(stock_file, seed=3, keys=text)
    for leaf in ("weight", "bias"):
        name = f"{HEAD}.cls_score.{leaf}"
        rows = [k for k, entry in enumerate(TARGET) if entry != "unknown"]
        assert torch.equal(one.model.state_dict()[name][rows], other.model.state_dict()[name][rows])
    model = built(2, text)
    state = torch.get_rng_state()
    HeadAdaptCheckpointer(model).load(stock_file)
    assert torch.equal(torch.get_rng_state(), state)


def test_such_rows_are_still_new_and_the_plan_says_where_they_start(stock_file: str, text: dict[str, Any]) -> None:
    near = loaded(stock_file, keys=text)
    assert near.untrained == {"thing": ("unknown", "zebra")}
    assert near.rows_to_fit()[f"{HEAD}.cls_score.weight"] == (1, 3)
    assert near.plan is not None
    assert "1 of 2 new rows start from the nearest carried classes" in plan_json(near.plan)


def test_without_a_file_nothing_is_loaded(stock_file: str) -> None:
    model = built(2, {"NEW_ROWS": "nearest"})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(TextError, match="FILE: expected a file of text") as error:
        HeadAdaptCheckpointer(model).load(stock_file)
    assert "NEW_ROWS recipe" in error.value.fix
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_an_unknown_choice_is_an_error() -> None:
    with pytest.raises(ConfigError, match="NEW_ROWS"):
        built(0, {"NEW_ROWS": "closest"})
