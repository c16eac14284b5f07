"""Checkpoint files: what is read, what is refused and how it is said, checksums, writes that are whole or nothing."""

from __future__ import annotations

import argparse
import collections
import errno
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import types
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import corruption
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2_headadapt.errors import CheckpointFileError
from d2_headadapt.files import (
    existing_output,
    named_tensors,
    read_checkpoint,
    safetensor_files,
    saving,
    shapes_of,
    torchfile,
    unpickling,
    verify_tensors,
    write_checkpoint,
    write_text,
)
from d2_headadapt.files.unpickling import Builder

ROOT = Path(__file__).resolve().parents[2]


def put(folder: Path, name: str, data: bytes) -> str:
    path = folder / name
    path.write_bytes(data)
    return str(path)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(found: Any, wanted: Any) -> None:
    """Equal in every part, tensors bit for bit."""
    if isinstance(wanted, torch.Tensor):
        assert isinstance(found, torch.Tensor)
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert raw(found) == raw(wanted)
    elif isinstance(wanted, np.ndarray):
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found, wanted)
    elif isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for key in wanted:
            assert_same(found[key], wanted[key])
    elif isinstance(wanted, (list, tuple)):
        assert type(found) is type(wanted) and len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)
    else:
        assert type(found) is type(wanted) and found == wanted


def training_checkpoint() -> dict[str, Any]:
    """What a training loop saves, with an Adam that has stepped and the odds and ends that people add."""
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.LSTM(3, 3))
    optimizer = torch.optim.AdamW(net.parameters())
    for parameter in net.parameters():
        parameter.sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 1, 2])
    return {
        "model": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": schedule.state_dict(),
        "iteration": 5,
        "best": np.float64(0.25),
        "history": np.arange(6, dtype=">f4").reshape(2, 3),
        "device": torch.device("cpu"),
        "dtype": torch.float16,
        "size": torch.Size([1, 2]),
        "parameter": torch.nn.Parameter(torch.ones(2).half()).detach(),
        "complex": torch.ones(2, dtype=torch.complex64),
        "bfloat16": torch.ones(3, dtype=torch.bfloat16),
        "view": torch.arange(12).view(3, 4).t()[1:],
        "plain": [1, -5, 2**70, 0.5, None, True, "text \u00e9", b"\x00\xff", b"", 2j, (1, (2,)), {3, "x"}],
        "bytes": bytearray(b"1"),
        "empty": torch.empty(0, 3),
    }


# --- reading what torch writes


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_reads_what_torch_reads(tmp_path: Path, legacy: bool, trust: bool, mmap: bool) -> None:
    path = put(tmp_path, "run.pth", corruption.saved(training_checkpoint(), legacy=legacy))
    found = read_checkpoint(path, trust=trust, mmap=mmap)
    wanted = torch.load(path, weights_only=False)
    assert_same(found, wanted)
    assert found["model"]._metadata == wanted["model"]._metadata


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]),
            st.lists(st.integers(0, 5), max_size=4),
            st.integers(0, 3),
        ),
        min_size=1,
        max_size=5,
    ),
    st.booleans(),
    st.booleans(),
)
def test_any_view_of_any_tensor_reads_as_torch_reads_it(
    tensors: list[tuple[torch.dtype, list[int], int]], legacy: bool, mmap: bool
) -> None:
    state: dict[str, torch.Tensor] = {}
    for index, (dtype, shape, kind) in enumerate(tensors):
        whole = (torch.rand(shape) * 7).to(dtype)
        views = [whole, whole.mT if len(shape) > 1 else whole, whole[1:] if shape else whole, whole.expand(2, *shape)]
        state[str(index)] = views[kind]
        state[f"{index}.again"] = whole
    data = corruption.saved({"model": state}, legacy=legacy)
    with tempfile.TemporaryDirectory() as folder:
        path = put(Path(folder), "x.pth", data)
        found = read_checkpoint(path, mmap=mmap)["model"]
        wanted = torch.load(path, weights_only=True)["model"]
    assert_same(found, wanted)
    assert all(found[name].stride() == wanted[name].stride() for name in wanted)


def test_names_of_one_tensor_share_memory_after_reading(tmp_path: Path) -> None:
    for name in ("x.pth", "x.safetensors"):
        path = str(tmp_path / name)
        write_checkpoint(path, {"model": corruption.model()})
        state = read_checkpoint(path)["model"]
        assert state["alias"].data_ptr() == state["layer0.weight"].data_ptr()


def test_weights_alone_are_taken_as_the_model(tmp_path: Path) -> None:
    path = put(tmp_path, "weights.pth", corruption.saved(corruption.model()))
    assert_same(read_checkpoint(path), {"model": corruption.model()})


def test_parameters_become_plain_tensors(tmp_path: Path) -> None:
    path = put(tmp_path, "x.pth", corruption.saved({"model": dict(torch.nn.Linear(2, 3).named_parameters())}))
    for tensor in read_checkpoint(path)["model"].values():
        assert type(tensor) is torch.Tensor and not tensor.requires_grad


def test_reading_under_a_meta_device_still_reads_values(tmp_path: Path) -> None:
    paths = [put(tmp_path, f"{legacy}.pth", corruption.saved(corruption.model(), legacy=legacy)) for legacy in (0, 1)]
    with torch.device("meta"):
        found = [read_checkpoint(path)["model"] for path in paths]
    for state in found:
        assert_same(state, corruption.model())


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    path = put(tmp_path, "x.pth", corruption.saved(corruption.model()))
    read_checkpoint(path)["model"]["layer1.weight"].zero_()
    assert_same(read_checkpoint(path)["model"], corruption.model())


def test_tensors_outlive_a_replaced_file(tmp_path: Path) -> None:
    path = str(tmp_path / "x.pth")
    write_checkpoint(path, {"model": corruption.model()})
    state = read_checkpoint(path, verify=False)["model"]
    write_checkpoint(path, {"model": corruption.model(seed=1)})
    assert_same(state, corruption.model())
    assert verify_tensors(path, state) == []


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="needs Linux's /proc")
def test_planning_reads_less_than_a_twentieth_of_the_file(tmp_path: Path) -> None:
    path = str(tmp_path / "big.pth")
    write_checkpoint(path, {"model": {f"layer{index}": torch.rand(512, 512) for index in range(24)}})

    def count() -> int:
        with open("/proc/self/io") as file:
            return int(file.read().split("rchar: ")[1].split()[0])

    before = count()
    checkpoint = read_checkpoint(path, verify=False)
    assert shapes_of(checkpoint["model"])["layer3"] == (512, 512)
    used = count() - before
    with open("/proc/self/smaps") as file:
        maps = file.read().split(path)[1:]
    used += sum(int(part.split("Rss:")[1].split()[0]) * 1024 for part in maps)
    assert len(maps) == 1 and used < os.path.getsize(path) / 20


@pytest.mark.real
def test_a_real_detectron2_model_reads_as_torch_reads_it(real: Path) -> None:
    path = str(real / "models" / "fbnet_c4_coco.pth")
    wanted = torch.load(path, weights_only=True)
    assert_same(read_checkpoint(path)["model"], wanted.get("model", wanted))


# --- pickles of the model zoo


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])
def test_model_zoo_pickle_of_every_protocol_and_numpy(tmp_path: Path, protocol: int, core: bytes) -> None:
    model = {
        "conv": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        "fortran": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
        "bool": np.array([True, False]),
        "number": np.float32(3),
        "empty": np.zeros((0, 4), np.int64),
    }
    zoo = {"model": model, "__author__": "someone", "matching_heuristics": True}
    data = pickle.dumps(zoo, protocol=protocol)
    if protocol < 4:  # the names are lines; later protocols store their length
        data = data.replace(b"cnumpy._core", b"cnumpy.core").replace(b"cnumpy.core", b"c" + core)
    elif core == b"numpy._core":
        data = data.replace(b"\x8c\x15numpy.core.multiarray", b"\x8c\x16numpy._core.multiarray")
        data = data.replace(b"\x8c\x12numpy.core.numeric", b"\x8c\x13numpy._core.numeric")
    found = read_checkpoint(put(tmp_path, "zoo.pkl", data))
    assert {key: found[key] for key in found if key != "model"} == {
        "__author__": "someone",
        "matching_heuristics": True,
    }
    assert_same(found["model"], {**model, "number": np.array(3, np.float32)})


def test_big_endian_arrays_become_native(tmp_path: Path) -> None:
    path = put(tmp_path, "zoo.pkl", pickle.dumps({"a": np.arange(3, dtype=">f4")}))
    found = read_checkpoint(path)["model"]["a"]
    assert found.dtype.isnative and torch.from_numpy(found).tolist() == [0, 1, 2]


def test_python_2_bytes_are_read_as_latin1(tmp_path: Path) -> None:
    values = np.arange(256, dtype=np.uint8)
    # As Python 2 wrote it: the bytes of an array are a byte string, and so are names and dtypes.
    data = (
        b"\x80\x02}U\x07conv1_wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01M\x00\x01"
        b"\x85cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T\x00\x01\x00\x00"
        + bytes(range(256))
        + b"tbs."
    )
    assert_same(read_checkpoint(put(tmp_path, "R-50.pkl", data))["model"], {"conv1_w": values})


def test_caffe2_pickles_have_their_blobs_and_no_momentum(tmp_path: Path) -> None:
    arrays = {"conv1_w": np.ones(3, np.float32), "conv1_w_momentum": np.zeros(3, np.float32)}
    wanted = {"model": {"conv1_w": arrays["conv1_w"]}, "__author__": "Caffe2", "matching_heuristics": True}
    detection = put(tmp_path, "detection.pkl", pickle.dumps({"blobs": arrays, "cfg": "a: 1"}, protocol=2))
    imagenet = put(tmp_path, "imagenet.pkl", pickle.dumps(arrays, protocol=2))
    assert_same(read_checkpoint(detection), wanted)
    assert_same(read_checkpoint(imagenet), wanted)


def test_pycls_files_lose_their_batch_counts(tmp_path: Path) -> None:
    state = {"stem.weight": torch.ones(2), "stem.num_batches_tracked": torch.tensor(3)}
    path = put(tmp_path, "net.pyth", corruption.saved({"model_state": state, "epoch": 1}))
    wanted = {"model": {"stem.weight": torch.ones(2)}, "__author__": "pycls", "matching_heuristics": True}
    assert_same(read_checkpoint(path), wanted)


def test_content_decides_over_the_name(tmp_path: Path) -> None:
    torch_file = put(tmp_path, "torch.pkl", corruption.saved({"model": corruption.model()}))
    assert_same(read_checkpoint(torch_file)["model"], corruption.model())
    zoo = put(tmp_path, "zoo.pth", corruption.originals()["pickle"][1])
    assert read_checkpoint(zoo)["__author__"] == "corruption.py"
    safe = put(tmp_path, "safe.pth", corruption.originals()["safetensors"][1])
    assert_same(dict(sorted(read_checkpoint(safe)["model"].items())), dict(sorted(corruption.model().items())))


# --- files that are no checkpoint

FOUND = {
    "text": "text that begins 'epoch 1 loss",
    "json": r"text that begins '\{\"images\"",
    "json as pkl": r"text that begins '\{\"images\"",
    "png": "a PNG image",
    "web page": "a web page",
    "git-lfs": "git lfs pull",
    "empty": "an empty file",
    "empty pkl": "an empty file",
    "empty safetensors": "an empty file",
    "one byte": "before byte 1 of 1: IndexError",
    "random": "bytes of no known format",
    "other zip": r"a zip archive that torch.save did not write \(photos/readme.txt\)",
    "one tensor": r"one tensor of shape \(3,\)",
    "one tensor, legacy": r"one tensor of shape \(3,\)",
    "list": "found a list",
    "list pkl": "found a list",
    "number pkl": "found an int",
    "keys are numbers": "the key 1 in 'model'",
    "keys are numbers, pkl": "the key 1 where text belongs",
    "values are text": "a str under 'b'",
    "values are dicts": "a dict under 'a'",
    "values are None": "a NoneType under 'a'",
    "model is a list": "a list under 'model'",
    "no model": r"keys 'state_dict', 'epoch' without 'model'.*loaded\['state_dict'\]",
    "nothing": "a model without one tensor",
    "empty dict": r"keys \(none\) without 'model'",
    "pycls without its key": "keys 'epoch' without 'model_state'",
    "sparse": "torch._utils._rebuild_sparse_tensor",
    "text array": "a ndarray under 'a'",
    "safetensors header of 2\\*\\*60 bytes": "SafetensorError",
    "safetensors list": "SafetensorError",
}


@pytest.mark.parametrize("name", corruption.wrong_files())
def test_wrong_file_gets_one_message(tmp_path: Path, name: str) -> None:
    path = put(tmp_path, *corruption.wrong_files()[name])
    found = FOUND.get(name, FOUND.get(name.replace("*", "\\*")))
    for trust in (False, True) if name != "sparse" else (False,):
        with pytest.raises(CheckpointFileError, match=found) as caught:
            read_checkpoint(path, trust=trust)
        assert caught.value.where == path and caught.value.fix and caught.value.exit_code == 1


def test_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "model_final.pth").touch()
    with pytest.raises(CheckpointFileError, match=r"found nothing there. The folder has model_final.pth"):
        read_checkpoint(str(tmp_path / "model_fnal.pth"))
    with pytest.raises(CheckpointFileError, match="is empty or not there"):
        read_checkpoint(str(tmp_path / "nowhere" / "model.pth"))


def test_folders_pipes_and_broken_links_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    (tmp_path / "link.pth").symlink_to(tmp_path / "gone.pth")
    with pytest.raises(CheckpointFileError, match=r"found a folder. Name the file inside it"):
        read_checkpoint(str(tmp_path))
    for name in ("pipe.pth", "link.pth"):
        with pytest.raises(CheckpointFileError, match="a broken link or a device"):
            read_checkpoint(str(tmp_path / name))


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "safetensors"])
def test_truncated_file_says_so(tmp_path: Path, form: str) -> None:
    name, data = corruption.originals()[form]
    for length in (20, len(data) // 2, len(data) - 1):
        with pytest.raises(CheckpointFileError, match="copy or download it again"):
            read_checkpoint(put(tmp_path, name, data[:length]))


def test_torchscript_is_named(tmp_path: Path) -> None:
    data = corruption.originals()["zip"][1]
    out = io.BytesIO(data)
    with zipfile.ZipFile(out, "a") as archive:
        archive.writestr("archive/constants.pkl", b"")
    with pytest.raises(CheckpointFileError, match="a TorchScript program"):
        read_checkpoint(put(tmp_path, "script.pth", out.getvalue()))


def test_a_disk_that_fails_gets_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path, "x.pth", corruption.saved(corruption.model()))

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(torchfile, "_open_buffer", fail)
    with pytest.raises(CheckpointFileError, match="Input/output error"):
        read_checkpoint(path)


def test_without_memory_maps_the_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoMap(torchfile.Buffer):
        def __new__(cls, descriptor: int, *args: Any, **kwargs: Any) -> Any:
            if descriptor != -1:
                raise OSError(errno.ENODEV, "No such device")
            return super().__new__(cls, descriptor, *args, **kwargs)

    monkeypatch.setattr(torchfile, "Buffer", NoMap)
    path = put(tmp_path, "x.pth", corruption.saved(corruption.model()))
    found = read_checkpoint(path)["model"]
    assert_same(found, corruption.model())
    assert verify_tensors(path, found) == []


# --- files that want to run something


@pytest.mark.parametrize("name", corruption.hostile_files("canary"))
def test_hostile_file_is_refused_and_runs_nothing(tmp_path: Path, name: str) -> None:
    canary = str(tmp_path / "canary")
    file_name, data = corruption.hostile_files(canary)[name]
    case = corruption.Case(name, "none", file_name, data, must_refuse=True)
    for late in (False, True):
        assert corruption.judge(case, str(tmp_path), canary, late=late) == "refused"


@pytest.mark.parametrize("name", ["os.system", "os.system, protocol 0", "INST", "builtins.eval", "nested reduce"])
def test_the_hostile_files_would_run_where_pickle_reads_them(tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    pickle.loads(corruption.hostile_files(str(canary))[name][1])
    assert canary.exists()


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("os.system", "posix.system"),
        ("os.system, protocol 0", "posix.system"),
        ("builtins.eval", "builtins.eval"),
        ("nested reduce", "builtins.getattr"),
        ("torch zip, os.system", "posix.system"),
        ("torch legacy, os.system", "posix.system"),
        ("torch zip, a module", "torch.nn.modules.linear.Linear"),
    ],
)
def test_refusal_names_the_global_and_the_key(tmp_path: Path, name: str, wanted: str) -> None:
    path = put(tmp_path, *corruption.hostile_files("canary")[name])
    with pytest.raises(CheckpointFileError, match=rf"asks for '{wanted}'.*MODEL\.HEAD_ADAPT\.TRUST_FILE True"):
        read_checkpoint(path)


def test_mutation_a_reader_that_knows_system_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(unpickling.PLAIN, "posix.system", Builder(os.system))
    canary = str(tmp_path / "canary")
    case = corruption.Case("os.system", "none", *corruption.hostile_files(canary)["os.system"], must_refuse=True)
    with pytest.raises(corruption.Violation, match="something ran"):
        corruption.judge(case, str(tmp_path), canary)


def test_trusted_file_loads_with_its_objects_and_its_checksums(tmp_path: Path) -> None:
    content = {"model": corruption.model(), "args": argparse.Namespace(lr=0.1)}
    for legacy in (False, True):
        path = put(tmp_path, "x.pth", corruption.saved(content, legacy=legacy))
        with pytest.raises(CheckpointFileError, match=r"argparse\.Namespace"):
            read_checkpoint(path)
        found = read_checkpoint(path, trust=True)
        assert found["args"].lr == 0.1
        assert_same(found["model"], content["model"])
    path = put(tmp_path, "damaged.pth", damaged(corruption.saved(content), "layer2.weight"))
    with pytest.raises(CheckpointFileError, match=r"damaged values in layer2\.weight"):
        read_checkpoint(path, trust=True)
    zoo = put(tmp_path, "x.pkl", pickle.dumps({"model": {"a": np.ones(2)}, "args": argparse.Namespace(lr=0.1)}))
    assert read_checkpoint(zoo, trust=True)["args"].lr == 0.1


def test_trusted_file_without_its_code_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("their_code")
    exec("class Setting: pass", module.__dict__)
    monkeypatch.setitem(sys.modules, "their_code", module)
    data = corruption.saved({"model": corruption.model(), "setting": module.Setting()})
    monkeypatch.delitem(sys.modules, "their_code")
    with pytest.raises(CheckpointFileError, match=r"No module named 'their_code'.*not installed here"):
        read_checkpoint(put(tmp_path, "x.pth", data), trust=True)


# --- checksums


def damaged(data: bytes, *names: str) -> bytes:
    """``data`` with the lowest bit of the first value of each named tensor flipped."""
    changed = bytearray(data)
    state = torch.load(io.BytesIO(data), weights_only=False)["model"]
    for name in names:
        changed[data.index(raw(state[name]))] ^= 1
    return bytes(changed)


def test_torch_loads_a_flipped_bit_in_silence(tmp_path: Path) -> None:
    path = put(tmp_path, "x.pth", damaged(corruption.saved({"model": corruption.model()}), "layer2.weight"))
    assert not torch.equal(torch.load(path)["model"]["layer2.weight"], corruption.model()["layer2.weight"])


@pytest.mark.parametrize("mmap", [True, False])
def test_flipped_bit_names_its_tensors(tmp_path: Path, mmap: bool) -> None:
    data = damaged(corruption.saved({"model": corruption.model()}), "layer0.weight", "layer2.weight")
    path = put(tmp_path, "x.pth", data)
    with pytest.raises(CheckpointFileError, match=r"damaged values in layer0\.weight, alias, layer2\.weight \(the"):
        read_checkpoint(path, mmap=mmap)
    state = read_checkpoint(path, verify=False, mmap=mmap)["model"]
    assert verify_tensors(path, {"layer1.weight": state["layer1.weight"], "half": state["half"]}) == []
    with pytest.raises(CheckpointFileError, match=r"damaged values in mine \("):
        verify_tensors(path, {"mine": state["layer2.weight"][1:, :2].t()})


def test_damage_in_an_optimizer_is_named_by_its_place(tmp_path: Path) -> None:
    content = {"model": corruption.model(), "optimizer": {"state": {0: {"exp_avg": torch.rand(4, 4)}}}}
    data = bytearray(corruption.saved(content))
    data[data.index(content["optimizer"]["state"][0]["exp_avg"].numpy().tobytes())] ^= 1
    path = put(tmp_path, "x.pth", bytes(data))
    with pytest.raises(CheckpointFileError, match="damaged values in optimizer/state/0/exp_avg"):
        read_checkpoint(path)
    found = read_checkpoint(path, verify=False)
    assert verify_tensors(path, found["model"]) == []
    with pytest.raises(CheckpointFileError, match="damaged values in state/0/exp_avg"):
        verify_tensors(path, found["optimizer"])


def test_every_bit_of_a_torch_file_is_checked_or_meaningless(tmp_path: Path) -> None:
    data = corruption.saved({"model": {"a": torch.arange(3.0), "b": torch.ones(2)}})
    wanted = {"a": torch.arange(3.0), "b": torch.ones(2)}
    for bit in range(0, len(data) * 8, 29):
        path = put(tmp_path, "x.pth", corruption._flip(data, [bit]))
        try:
            assert_same(read_checkpoint(path)["model"], wanted)
        except CheckpointFileError as error:
            assert error.fix


def test_file_without_checksums_is_listed_not_refused(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        data = corruption.saved({"model": corruption.model()})
    finally:
        torch.serialization.set_crc32_options(True)
    path = put(tmp_path, "x.pth", data)
    state = read_checkpoint(path)["model"]
    assert_same(state, corruption.model())
    assert set(verify_tensors(path, state)) == set(state) - {"empty"}


@pytest.mark.parametrize("form", ["legacy", "pickle", "safetensors"])
def test_formats_without_checksums_are_listed(tmp_path: Path, form: str) -> None:
    path = put(tmp_path, *corruption.originals()[form])
    state = {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in read_checkpoint(path)["model"].items()
    }
    assert set(verify_tensors(path, state)) == set(state) - {"empty"}


def test_copies_and_new_tensors_have_no_checksum(tmp_path: Path) -> None:
    path = put(tmp_path, "x.pth", corruption.saved(corruption.model()))
    state = read_checkpoint(path)["model"]
    given = {"copy": state["half"].clone(), "own": torch.ones(3), "file": state["half"]}
    given["meta"] = torch.ones(3, device="meta")
    assert verify_tensors(path, given) == ["copy", "own", "meta"]


def test_misaligned_records_are_copied_and_still_checked(tmp_path: Path) -> None:
    whole = corruption.saved({"model": corruption.model()})
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        inner = archive.read("archive/data.pkl")
    data = corruption.repacked(whole, inner)  # Python's zipfile aligns nothing
    path = put(tmp_path, "x.pth", data)
    state = read_checkpoint(path)["model"]
    assert_same(state, corruption.model())
    assert verify_tensors(path, state) == []
    path = put(tmp_path, "damaged.pth", damaged(data, "layer2.weight"))
    with pytest.raises(CheckpointFileError, match=r"damaged values in layer2\.weight"):
        read_checkpoint(path)


def test_model_with_other_state_is_saved_like_stock_saves_it(tmp_path: Path) -> None:
    path = str(tmp_path / "x.pth")
    write_checkpoint(path, {"model": {"a": torch.ones(1), "b._extra_state": {"step": 3}}})
    assert torch.load(path, weights_only=True)["model"]["b._extra_state"] == {"step": 3}


def test_threads_may_save_to_one_name(tmp_path: Path) -> None:
    path = str(tmp_path / "x.pth")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: write_checkpoint(path, {"model": corruption.model(seed)}), range(16)))
    found = read_checkpoint(path)["model"]
    assert any(torch.equal(found["half"], corruption.model(seed)["half"]) for seed in range(16))
    assert os.listdir(tmp_path) == ["x.pth"]


def test_an_address_is_forgotten_with_its_file(tmp_path: Path) -> None:
    path = put(tmp_path, "x.pth", corruption.saved(corruption.model()))
    before = len(torchfile._open_buffers)
    state = read_checkpoint(path)["model"]
    assert len(torchfile._open_buffers) == before + 1
    kept = state["layer3.weight"][1:]
    del state
    assert len(torchfile._open_buffers) == before + 1
    assert verify_tensors(path, {"kept": kept}) == []
    del kept
    assert len(torchfile._open_buffers) == before


def test_mutation_without_checksums_wrong_values_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchfile, "is_intact", lambda buffer, record: True)
    name, data = corruption.originals()["zip"]
    case = corruption.Case("one bit", "zip", name, damaged(data, "layer2.weight"), must_refuse=False)
    with pytest.raises(corruption.Violation, match="other values were loaded"):
        corruption.judge(case, str(tmp_path), str(tmp_path / "canary"))


@pytest.mark.parametrize("block", range(10))
def test_corrupted_files_are_refused_or_whole(tmp_path: Path, block: int) -> None:
    for seed in range(block * 10, block * 10 + 10):
        corruption.judge_seed(seed, str(tmp_path))


# --- writing


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_written_file_reads_back_and_leaves_nothing_beside_it(tmp_path: Path, name: str) -> None:
    provenance = {"version": 1, "tables": {"thing": ["caf\u00e9", "cat"]}, "extra": {}}
    path = str(tmp_path / name)
    left = write_checkpoint(path, {"model": corruption.model(), "d2_headadapt": provenance})
    found = read_checkpoint(path)
    assert left == [] and os.listdir(tmp_path) == [name]
    assert found["d2_headadapt"] == provenance
    assert found["model"].keys() == corruption.model().keys()
    for key, tensor in corruption.model().items():
        assert_same(found["model"][key], tensor)


def test_pth_keeps_everything_and_torch_reads_it(tmp_path: Path) -> None:
    content = training_checkpoint()
    path = str(tmp_path / "x.pth")
    assert write_checkpoint(path, content) == []
    assert_same(read_checkpoint(path), torch.load(path, weights_only=False))
    assert read_checkpoint(path)["model"]._metadata == content["model"]._metadata


def test_numpy_models_are_written_as_tensors(tmp_path: Path) -> None:
    path = str(tmp_path / "x.pth")
    write_checkpoint(path, {"model": {"a": np.arange(3, dtype=">f4")}, "__author__": "x"})
    assert torch.load(path, weights_only=True)["model"]["a"].tolist() == [0, 1, 2]


def test_safetensors_leaves_the_optimizer_out_and_says_so(tmp_path: Path) -> None:
    path = str(tmp_path / "x.safetensors")
    content = {"model": corruption.model(), "optimizer": {}, "iteration": 3, "d2_headadapt": {"version": 1}}
    assert write_checkpoint(path, content) == ["optimizer", "iteration"]
    assert set(read_checkpoint(path)) == {"model", "d2_headadapt"}


def test_safetensors_metadata_is_one_json_text_and_aliases_are_written_once(tmp_path: Path) -> None:
    import safetensors

    path = str(tmp_path / "x.safetensors")
    write_checkpoint(path, {"model": corruption.model(), "d2_headadapt": {"tables": {"thing": ["a"]}}})
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        assert "alias" not in file.keys()  # noqa: SIM118
    assert set(metadata) == {"format", "d2_headadapt"}
    assert json.loads(metadata["d2_headadapt"]) == {"tables": {"thing": ["a"]}, "aliases": {"alias": "layer0.weight"}}


@pytest.mark.parametrize(
    ("note", "found"),
    [
        ("{", "that is no JSON"),
        ("[" * 100_000, "that is no JSON"),
        ("[]", "no JSON object"),
        ('{"aliases": 3}', "no JSON object"),
        ('{"aliases": {"b": "nowhere"}}', "a second name 'b' for 'nowhere'"),
        ('{"aliases": {"b": ["a"]}}', "a second name 'b'"),
        ('{"aliases": {"a": "a"}}', "a second name 'a'"),
    ],
)
def test_safetensors_metadata_that_makes_no_sense(tmp_path: Path, note: str, found: str) -> None:
    import safetensors.torch

    path = str(tmp_path / "x.safetensors")
    safetensors.torch.save_file({"a": torch.ones(1)}, path, metadata={"d2_headadapt": note})
    with pytest.raises(CheckpointFileError, match=found):
        read_checkpoint(path)


def test_safetensors_missing_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path, "x.safetensors", corruption.originals()["safetensors"][1])
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(CheckpointFileError, match=r"pip install 'd2_headadapt\[files\]'"):
        read_checkpoint(path)
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_safetensors_of_every_type_and_view_are_what_the_library_reads(tmp_path: Path) -> None:
    import safetensors.torch

    state = {str(dtype): (torch.arange(3) % 2).to(dtype) for dtype in safetensor_files.TYPES}
    whole = torch.arange(24.0).view(4, 6)
    state.update({"rows": whole[1:3], "t": whole.t(), "whole": whole, "scalar": torch.tensor(2.0), "none": whole[:0]})
    state['caf\u00e9 "quoted"'] = whole[::2, ::3]
    path = str(tmp_path / "x.safetensors")
    write_checkpoint(path, {"model": state})
    for found in (safetensors.torch.load_file(path), read_checkpoint(path)["model"]):
        assert found.keys() == state.keys()
        for name, tensor in state.items():
            assert_same(found[name], tensor)


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("a", torch.ones(2, dtype=torch.complex128), "found torch.complex128 under 'a'. Save it as .pth"),
        ("__metadata__", torch.ones(2), "'__metadata__' of torch.float32, which a .safetensors file cannot hold"),
    ],
)
def test_what_safetensors_cannot_hold_is_refused(tmp_path: Path, name: str, value: torch.Tensor, found: str) -> None:
    with pytest.raises(CheckpointFileError, match=found):
        write_checkpoint(str(tmp_path / "x.safetensors"), {"model": {name: value}})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_every_file_is_written_with_the_mode_that_the_umask_gives(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        for name in ("x.pth", "x.safetensors"):
            write_checkpoint(str(tmp_path / name), {"model": corruption.model()})
        write_text(str(tmp_path / "x.json"), "{}")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~mask}


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
@pytest.mark.parametrize("unnamed", [True, False])
def test_a_killed_process_leaves_nothing_or_what_the_next_write_removes(
    tmp_path: Path, name: str, unnamed: bool
) -> None:
    program = (
        "import os, sys, torch; from d2_headadapt.files import write_checkpoint\n"
        "os.fsync = lambda file: os.kill(os.getpid(), 9)\n"
        f"if not {unnamed}: del os.O_TMPFILE\n"
        "write_checkpoint(sys.argv[1], {'model': {'a': torch.ones(100_000)}})\n"
    )
    path = str(tmp_path / name)
    done = subprocess.run([sys.executable, "-c", program, path], cwd=ROOT, env=environment(), check=False)
    left = os.listdir(tmp_path)
    assert done.returncode == -signal.SIGKILL
    assert (len(left) == 1 and left[0].endswith(".tmp")) if not unnamed or not has_unnamed(tmp_path) else not left
    write_text(str(tmp_path / "last_checkpoint"), name)
    assert os.listdir(tmp_path) == ["last_checkpoint"]


def has_unnamed(folder: Path) -> bool:
    """Whether the system and its file system have files without names."""
    if not hasattr(os, "O_TMPFILE"):
        return False
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_RDWR))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "x.json"])
@pytest.mark.parametrize("links", [True, False])
def test_an_exclusive_write_never_replaces_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, links: bool
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / name

    def write(seed: int) -> None:
        if name == "x.json":
            write_text(str(path), str(seed), exclusive=True)
        else:
            write_checkpoint(str(path), {"model": corruption.model(seed)}, exclusive=True)

    write(0)
    first = path.read_bytes()
    assert first and os.listdir(tmp_path) == [name]
    with pytest.raises(CheckpointFileError, match=r"does not exist yet, found a file, written since .*--force"):
        write(1)
    assert path.read_bytes() == first and os.listdir(tmp_path) == [name]


def test_of_two_exclusive_writes_at_one_time_one_is_refused(tmp_path: Path) -> None:
    path, meeting = str(tmp_path / "x.json"), threading.Barrier(4)

    def write(number: int) -> bool:
        def content(file: Any) -> None:
            file.write(str(number).encode())
            meeting.wait()

        try:
            saving.replace_file(path, content, exclusive=True)
        except CheckpointFileError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(write, range(4)))
    assert sum(won) == 1 and Path(path).read_text() == str(won.index(True)) and os.listdir(tmp_path) == ["x.json"]


def test_a_device_or_pipe_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointFileError, match="found a device or a pipe"):
        write_text(str(tmp_path / "pipe"), "text")
    assert os.listdir(tmp_path) == ["pipe"]


def no_space(*args: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupted(*args: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "last_checkpoint"])
@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("failure", [no_space, interrupted])
@pytest.mark.parametrize("unnamed", [True, False])
def test_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: str, failure: Callable[..., None], unnamed: bool
) -> None:
    path = put(tmp_path, name, b"old")
    if not unnamed:
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)

    def write() -> None:
        if name == "last_checkpoint":
            write_text(path, "new")
        else:
            write_checkpoint(path, {"model": corruption.model()})

    monkeypatch.setattr(os, call, failure)
    kind = KeyboardInterrupt if failure is interrupted else CheckpointFileError
    with pytest.raises(kind, match=None if failure is interrupted else r"No space left.*Nothing was changed.*MiB free"):
        write()
    assert os.listdir(tmp_path) == [name] and Path(path).read_bytes() == b"old"
    monkeypatch.undo()
    write()
    assert Path(path).read_bytes() != b"old"


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_disk_that_fills_while_writing_leaves_the_old_file(tmp_path: Path, name: str) -> None:
    path = put(tmp_path, name, b"old")
    # A limit on file size fails inside the writer, as a full disk does.
    program = (
        "import resource, sys, torch; from d2_headadapt.files import write_checkpoint\n"
        "from d2_headadapt.errors import CheckpointFileError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: write_checkpoint(sys.argv[1], {'model': {'a': torch.ones(1_000_000)}})\n"
        "except CheckpointFileError as error: print('REFUSED', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, path], capture_output=True, text=True, cwd=ROOT, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr
    assert "REFUSED" in done.stdout and "Nothing was changed" in done.stdout
    assert os.listdir(tmp_path) == [name] and Path(path).read_bytes() == b"old"


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}


def test_value_that_cannot_be_saved_changes_nothing(tmp_path: Path) -> None:
    path = put(tmp_path, "x.pth", b"old")
    with pytest.raises(CheckpointFileError, match="Save tensors, numbers, text, lists and dicts only"):
        write_checkpoint(path, {"model": corruption.model(), "hook": lambda: 0})
    with pytest.raises(CheckpointFileError, match=r"found str under 'b'\. Save it as \.pth"):
        write_checkpoint(str(tmp_path / "x.safetensors"), {"model": {"b": "text"}})
    with pytest.raises(CheckpointFileError, match="expected a checkpoint with 'model', found NoneType"):
        write_checkpoint(path, {})
    assert os.listdir(tmp_path) == ["x.pth"] and Path(path).read_bytes() == b"old"


def test_writing_into_no_folder_or_onto_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointFileError, match=r"Make the folder first: mkdir -p .*nowhere"):
        write_checkpoint(str(tmp_path / "nowhere" / "x.pth"), {"model": corruption.model()})
    (tmp_path / "x.pth").mkdir()
    with pytest.raises(CheckpointFileError, match="expected a file that can be written"):
        write_text(str(tmp_path / "x.pth"), "text")
    assert os.listdir(tmp_path) == ["x.pth"]


def test_links_and_rights_stay(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    target = tmp_path / "store" / "real.pth"
    target.write_bytes(b"old")
    target.chmod(0o640)
    link = tmp_path / "model.pth"
    link.symlink_to(target)
    write_checkpoint(str(link), {"model": corruption.model()})
    assert link.is_symlink() and target.stat().st_mode & 0o777 == 0o640
    assert_same(read_checkpoint(str(target))["model"], corruption.model())


def test_leftovers_of_dead_processes_go_with_the_next_write(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    host = saving._HOST
    names = {
        "dead": f".model.pth.{host}.{int(dead.stdout)}-0.tmp",
        "own": f".older.pth.{host}.{os.getpid()}-7.tmp",
        "alive": f".model.pth.{host}.{child.pid}-3.tmp",
        "elsewhere": ".model.pth.another-host.1-0.tmp",
        "elsewhere, old": ".model.pth.another-host.2-0.tmp",
        "not ours": ".notes.tmp",
    }
    for name in names.values():
        (tmp_path / name).write_bytes(b"half")
    os.utime(tmp_path / names["elsewhere, old"], (0, 0))
    write_text(str(tmp_path / "last_checkpoint"), "model.pth")
    left = sorted(os.listdir(tmp_path))
    child.communicate(b"\n")
    assert left == sorted([names["alive"], names["elsewhere"], names["not ours"], "last_checkpoint"])


# --- where an output may go


def test_output_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = put(tmp_path, "source.pth", b"x")
    other = put(tmp_path, "other.pth", b"x")
    (tmp_path / "link.pth").symlink_to("source.pth")
    os.link(source, tmp_path / "hard.pth")
    (tmp_path / "folder.pth").mkdir()
    monkeypatch.chdir(tmp_path)
    for path in (source, "source.pth", "./source.pth", "folder.pth/../source.pth", "link.pth", "hard.pth"):
        with pytest.raises(CheckpointFileError, match="the same file as"):
            existing_output(path, force=True, inputs=["nowhere.pth", source])
    with pytest.raises(CheckpointFileError, match="add --force") as caught:
        existing_output(other, force=False, inputs=[source])
    assert caught.value.exit_code == 1
    existing_output(other, force=True, inputs=[source])
    existing_output("new.pth", force=False, inputs=[source])
    existing_output("new.safetensors", force=False, inputs=["detectron2://x.pkl"])
    with pytest.raises(CheckpointFileError, match=r"ends in \.pth or \.safetensors"):
        existing_output("new.pkl", force=True, inputs=[])
    with pytest.raises(CheckpointFileError, match="mkdir -p nowhere"):
        existing_output("nowhere/new.pth", force=True, inputs=[])
    with pytest.raises(CheckpointFileError, match="Name a file inside it"):
        existing_output("folder.pth", force=True, inputs=[])


# --- small parts


def test_named_tensors_of_a_tree_that_holds_itself() -> None:
    tree: dict[str, Any] = {"a": torch.ones(1), "b": [torch.ones(2), (torch.ones(3),)], "c": 5}
    tree["b"].append(tree)
    assert list(named_tensors(tree)) == ["a", "b/0", "b/1/0"]


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(("depth", "refused"), [(98, False), (101, True)])
def test_values_may_lie_a_hundred_levels_deep(tmp_path: Path, depth: int, refused: bool, legacy: bool) -> None:
    deep: Any = [1]
    for _ in range(depth - 1):
        deep = {"a": deep}
    path = put(tmp_path, "x.pth", corruption.saved({"model": {"a": torch.ones(1)}, "trainer": deep}, legacy=legacy))
    for trust in (False, True):
        if refused:
            with pytest.raises(CheckpointFileError, match=r"nested more than 100 deep, under 'trainer'\. Save tensors"):
                read_checkpoint(path, trust=trust)
        else:
            assert read_checkpoint(path, trust=trust)["trainer"] == deep


@pytest.mark.parametrize("dtype", ["bits8", "float4_e2m1fn_x2"])
def test_numbers_that_torch_cannot_convert_are_refused(tmp_path: Path, dtype: str) -> None:
    if not hasattr(torch, dtype):
        pytest.skip(f"this torch has no {dtype}")
    value = torch.ones(4, dtype=torch.uint8).view(getattr(torch, dtype))
    with pytest.raises(CheckpointFileError, match=rf"torch\.{dtype} in 'a'"):
        read_checkpoint(put(tmp_path, "x.pth", corruption.saved({"model": {"a": value}})))


def test_arrays_that_torch_has_no_type_for_are_refused(tmp_path: Path) -> None:
    data = pickle.dumps({"a": np.ones(2, np.longdouble)}, protocol=2)
    with pytest.raises(CheckpointFileError, match=r"an array of float128 under 'a'.*float32"):
        read_checkpoint(put(tmp_path, "x.pkl", data))


def test_shapes_of_tensors_and_arrays() -> None:
    shapes = shapes_of({"a": torch.ones(2, 3), "b": np.ones(4), "c": torch.tensor(1.0)})
    assert shapes == {"a": (2, 3), "b": (4,), "c": ()}


# --- killed while saving


def kill_while_saving(folder: Path, kills: int, saver: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tests" / "save_kill.py"), str(kills), "0", str(folder), saver],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )


def test_a_killed_run_resumes_from_a_whole_checkpoint(tmp_path: Path) -> None:
    done = kill_while_saving(tmp_path, 10, "files")
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["kills"] == 10 and counts["while_writing"] > 0


def test_mutation_writing_in_place_is_caught(tmp_path: Path) -> None:
    done = kill_while_saving(tmp_path, 30, "in_place")
    assert done.returncode not in (0, -signal.SIGKILL) and "CheckpointFileError" in done.stderr


def test_counters_and_ordered_dicts_keep_their_kind(tmp_path: Path) -> None:
    content = {
        "model": {"a": torch.ones(1)},
        "counter": collections.Counter({3: 2}),
        "ordered": collections.OrderedDict(b=1),
    }
    found = read_checkpoint(put(tmp_path, "x.pth", corruption.saved(content)))
    assert type(found["counter"]) is collections.Counter and found["counter"] == content["counter"]
    assert type(found["ordered"]) is collections.OrderedDict and found["ordered"] == content["ordered"]
