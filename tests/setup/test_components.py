"""``--import``: a user's own modules, once in every process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from d2_headadapt.errors import UsageError
from d2_headadapt.setup.components import add_component_keys, builder_of, import_components
from d2_headadapt.setup.recipe import read_recipe


@pytest.fixture(autouse=True)
def _modules_as_before() -> Iterator[None]:
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("d2ha_part"):
            del sys.modules[name]


def write(folder: Path, text: str, name: str = "d2ha_part") -> Path:
    path = folder / f"{name}.py"
    path.write_text(text)
    return path


def test_a_file_is_entered_under_its_stem_and_runs_once(tmp_path: Path) -> None:
    """Registries refuse a second registration, so a second run would be a crash."""
    path = write(tmp_path, "import sys\nsys.d2ha_runs = getattr(sys, 'd2ha_runs', 0) + 1\n")
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    try:
        modules = import_components([str(path), str(path), str(link / path.name)])
        assert modules[0] is modules[1] is modules[2] is sys.modules["d2ha_part"]
        assert sys.d2ha_runs == 1  # type: ignore[attr-defined]
    finally:
        del sys.d2ha_runs  # type: ignore[attr-defined]


def test_a_module_is_imported_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "X = 3\n", "d2ha_part_named")
    monkeypatch.syspath_prepend(tmp_path)
    assert import_components(["d2ha_part_named"])[0].X == 3


def test_a_file_finds_itself_while_it_runs(tmp_path: Path) -> None:
    """Dataclasses and pickled classes look their module up by name."""
    text = "import sys\nassert sys.modules[__name__].__file__ == __file__\n"
    assert import_components([str(write(tmp_path, text))])[0].__name__ == "d2ha_part"


def test_a_file_that_fails_is_not_left_behind(tmp_path: Path) -> None:
    path = write(tmp_path, "1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        import_components([str(path)])
    assert "d2ha_part" not in sys.modules
    path.write_text("X = 1\n")
    assert import_components([str(path)])[0].X == 1


def test_a_file_with_the_name_of_an_imported_module_is_refused(tmp_path: Path) -> None:
    """It would replace torch for everybody."""
    with pytest.raises(UsageError, match=r"found module 'torch' of .*Rename the file"):
        import_components([str(write(tmp_path, "", "torch"))])


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    one, other = write(tmp_path, ""), write(tmp_path / "other", "")
    with pytest.raises(UsageError, match=r"expected a file whose name no imported module has"):
        import_components([str(one), str(other)])


@pytest.mark.parametrize("spec", ["nowhere.py", "/nowhere/at/all.py"])
def test_a_missing_file_is_a_usage_error(spec: str) -> None:
    with pytest.raises(UsageError, match=rf"--import {spec}: expected a .py file, found no such file"):
        import_components([spec])


@pytest.mark.parametrize(("name", "missing"), [("d2ha_nothing", "d2ha_nothing"), ("json.d2ha", "json.d2ha")])
def test_a_missing_module_is_a_usage_error(name: str, missing: str) -> None:
    with pytest.raises(UsageError, match=rf"found no module '{missing}'.*give the path of the file") as error:
        import_components([name])
    assert error.value.exit_code == 2


def test_what_is_missing_inside_a_users_module_is_not_blamed_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "import d2ha_part_of_another_project\n", "d2ha_part_broken")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="d2ha_part_of_another_project"):
        import_components(["d2ha_part_broken"])


def test_its_config_functions_add_their_keys(tmp_path: Path) -> None:
    """The convention of every detectron2 project: ``add_*_config(cfg)``."""
    text = "def add_b_config(cfg):\n    cfg.MODEL.B = cfg.MODEL.A\ndef add_a_config(cfg):\n    cfg.MODEL.A = 5\n"
    cfg = get_cfg()
    add_component_keys(cfg, import_components([str(write(tmp_path, text + "add_c_config = None\n"))]))
    assert (cfg.MODEL.A, cfg.MODEL.B) == (5, 5)


OWN = "def build_model(cfg):\n    return cfg\n"


def test_a_project_s_own_builder_is_the_one_that_an_import_brings(tmp_path: Path) -> None:
    theirs = "from detectron2.modeling import build_model\n"
    first, stock = import_components([str(write(tmp_path, OWN, "d2ha_part_a")), str(write(tmp_path, theirs))])
    assert builder_of([stock]) is builder_of([]) is build_model
    assert builder_of([stock, first]) is first.build_model
    (second,) = import_components([str(write(tmp_path, OWN, "d2ha_part_b"))])
    with pytest.raises(
        UsageError, match=r"expected one build_model, found several: of d2ha_part_a, d2ha_part_b\. Import"
    ):
        builder_of([first, second])


def test_plan_builds_with_it(tmp_path: Path) -> None:
    path = write(tmp_path, "from torch import nn\n\n\ndef build_model(cfg):\n    return nn.Linear(2, 3)\n")
    recipe = read_recipe("", imports=[str(path)])
    assert list(recipe.build().state_dict()) == list(recipe.build_on_meta().state_dict()) == ["weight", "bias"]
