"""From a file's numbers to the model's: the value that the model gets is the file's, rounded at most, or is refused."""

from __future__ import annotations

import re

import pytest
import torch

from d2_headadapt.adapt.classes import ClassTable
from d2_headadapt.adapt.layouts import HeadLayout
from d2_headadapt.adapt.plan import AdaptPlan
from d2_headadapt.adapt.planner import plan_adaptation
from d2_headadapt.errors import PlanRefused

SOURCE, TARGET = ClassTable(["cat", "dog", "cow"], "the old list"), ClassTable(["cow", "owl"], "the new list")
ROWS, WHOLE = "heads.cls_score.bias", "backbone.conv"
LAYOUTS = (HeadLayout(ROWS, "thing", "heads", "box", extra=1),)
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
FP8 = [getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2") if hasattr(torch, name)]
WHOLE_NUMBERS = [torch.int64, torch.int32, torch.uint8, torch.bool]
COMPLEX = [torch.complex64, torch.complex128]


def apply(value: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """What the model of ``dtype`` gets from a file that has ``value`` in the row of cow, or in a whole tensor."""
    source = {ROWS: torch.ones(4, dtype=value.dtype), WHOLE: torch.ones(3, dtype=value.dtype)}
    source[name][2] = value
    model = {ROWS: torch.zeros(3, dtype=dtype), WHOLE: torch.zeros(3, dtype=dtype)}
    # Every tensor of the other name agrees in kind, so that the one that is asked about decides.
    other = WHOLE if name == ROWS else ROWS
    source[other] = torch.ones_like(source[other], dtype=dtype)
    plan: AdaptPlan = plan_adaptation(
        {key: tuple(tensor.shape) for key, tensor in source.items()},
        {key: tuple(tensor.shape) for key, tensor in model.items()},
        LAYOUTS,
        source_tables={"thing": SOURCE},
        target_tables={"thing": TARGET},
    )
    before = {key: tensor.clone() for key, tensor in model.items()}
    try:
        out = plan.apply(source, model)[name]
    finally:
        assert all(torch.equal(model[key].float(), before[key].float()) for key in model if not dtype.is_complex)
    return out[0] if name == ROWS else out[2]


@pytest.mark.parametrize("name", [ROWS, WHOLE])
@pytest.mark.parametrize("there", [*FLOATS, *FP8, *WHOLE_NUMBERS, *COMPLEX], ids=str)
@pytest.mark.parametrize("here", [*FLOATS, *FP8, *WHOLE_NUMBERS, *COMPLEX], ids=str)
def test_one_goes_into_every_type_of_its_kind_and_no_other(there: torch.dtype, here: torch.dtype, name: str) -> None:
    value = torch.ones((), dtype=there)
    same_kind = (there.is_complex, there.is_floating_point) == (here.is_complex, here.is_floating_point)
    if there == here or (same_kind and here not in FP8):
        assert apply(value, here, name).to(torch.complex64) == 1
        return
    with pytest.raises(PlanRefused, match=rf"found {re.escape(str(there))}.*EXCLUDE .*{re.escape(name)}") as caught:
        apply(value, here, name)
    assert caught.value.where == name and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [ROWS, WHOLE])
@pytest.mark.parametrize(
    ("value", "there", "here", "found"),
    [
        (1e300, torch.float64, torch.float32, "1 NaN or infinite values"),
        (-1e39, torch.float64, torch.float32, "1 NaN or infinite values"),
        (70000.0, torch.float32, torch.float16, "1 NaN or infinite values"),
        (1e300, torch.float64, torch.bfloat16, "1 NaN or infinite values"),
        (complex(0, 1e300), torch.complex128, torch.complex64, "1 NaN or infinite values"),
        (complex(float("nan"), 0), torch.complex64, torch.complex64, "1 NaN or infinite values"),
        (2**40, torch.int64, torch.int32, "others, as torch.int64"),
        (-1, torch.int64, torch.uint8, "others, as torch.int64"),
        (2, torch.uint8, torch.bool, "others, as torch.uint8"),
        (float("nan"), torch.float8_e5m2, torch.float32, "1 NaN or infinite values"),
        (float("inf"), torch.float8_e5m2, torch.float8_e5m2, "1 NaN or infinite values"),
    ],
    ids=str,
)
def test_a_number_that_the_models_type_cannot_hold_is_refused(
    value: float, there: torch.dtype, here: torch.dtype, found: str, name: str
) -> None:
    with pytest.raises(PlanRefused, match=found) as caught:
        apply(torch.tensor(value, dtype=there), here, name)
    assert caught.value.where == name and "Nothing was loaded" in str(caught.value)


@pytest.mark.parametrize(
    ("value", "there", "here"),
    [
        (3.4e38, torch.float64, torch.float32),
        (65504.0, torch.float32, torch.float16),
        (2**31 - 1, torch.int64, torch.int32),
        (1, torch.uint8, torch.bool),
        (65535, torch.int64, torch.uint16),
        (65535, torch.uint16, torch.int32),
        (complex(3e38, 3e38), torch.complex128, torch.complex64),
        (448.0, torch.float8_e4m3fn, torch.float32),
    ],
    ids=str,
)
def test_the_largest_that_it_holds_is_moved(value: float, there: torch.dtype, here: torch.dtype) -> None:
    given = torch.tensor(value, dtype=there)
    for name in (ROWS, WHOLE):
        assert apply(given, here, name).to(here).item() == given.to(here).item()


def test_a_number_too_large_in_a_row_that_nobody_takes_harms_nobody() -> None:
    plan = plan_adaptation(
        {ROWS: (4,)}, {ROWS: (3,)}, LAYOUTS, source_tables={"thing": SOURCE}, target_tables={"thing": TARGET}
    )
    source = torch.tensor([1e300, 2.0, 3.0, 4.0], dtype=torch.float64)  # cat is no class of the new list
    assert plan.apply({ROWS: source}, {ROWS: torch.zeros(3)})[ROWS].tolist() == [3, 0, 4]


def test_mutation_a_check_before_the_conversion_misses_the_double(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2_headadapt.adapt.plan.converted", lambda name, value, dtype: value)
    assert apply(torch.tensor(1e300, dtype=torch.float64), torch.float32, ROWS) == float("inf")
