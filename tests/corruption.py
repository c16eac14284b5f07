"""Damaged, wrong and hostile checkpoint files, the same for a seed, and the judge of what becomes of each.

(But for the torch format before zip, in which storages are named by their address in the process that saved them.)

The suite judges the first hundred of them and ``tools/soak.py`` a thousand. As a program it judges a range of seeds and
prints one JSON line for each: ``python tests/corruption.py FIRST COUNT FOLDER``.
"""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import random
import struct
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from d2_headadapt.errors import CheckpointFileError
from d2_headadapt.files import read_checkpoint, verify_tensors, write_checkpoint

CHECKED = ("zip",)
"""Formats with a checksum for each tensor: a change of a value must be noticed."""


class Violation(AssertionError):
    """What must never happen: another exception, code that ran, wrong values."""


@dataclass(frozen=True)
class Case:
    """One file; ``must_refuse`` where no reading of it can be right."""

    kind: str
    form: str
    name: str
    data: bytes
    must_refuse: bool


class Runs:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


def model(seed: int = 0) -> collections.OrderedDict[str, torch.Tensor]:
    """A state dict of several dtypes, with an alias and a transposed view."""
    generator = torch.Generator().manual_seed(seed)
    state = collections.OrderedDict(
        (f"layer{index}.weight", torch.randn(5, 3 + index, generator=generator)) for index in range(6)
    )
    state["norm.num_batches_tracked"] = torch.tensor(7)
    state["half"] = torch.randn(9, generator=generator).half()
    state["transposed"] = state["layer1.weight"].t()
    state["alias"] = state["layer0.weight"]
    state["empty"] = torch.zeros(0, 4)
    return state


def saved(value: Any, *, legacy: bool = False) -> bytes:
    """``value`` as ``torch.save`` writes it."""
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


@cache
def originals() -> dict[str, tuple[str, bytes]]:
    """Format -> (file name, a whole file)."""
    state = model()
    checkpoint = {
        "model": state,
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(5, 3)}}, "param_groups": [{"lr": 0.1}]},
        "iteration": 9,
    }
    arrays = {name: tensor.numpy().copy() for name, tensor in state.items()}
    zoo = {"model": arrays, "__author__": "corruption.py", "matching_heuristics": True}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "x.safetensors")
        write_checkpoint(path, checkpoint)
        with open(path, "rb") as file:
            safe = _sorted_header(file.read())
    return {
        "zip": ("model.pth", saved(checkpoint)),
        "legacy": ("legacy.pth", saved(checkpoint, legacy=True)),
        "pickle": ("zoo.pkl", pickle.dumps(zoo, protocol=2)),
        "safetensors": ("model.safetensors", safe),
    }


def _sorted_header(data: bytes) -> bytes:
    """A safetensors file with its metadata in order: the library writes it in another one in every process."""
    size = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:size]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data[size:]


def repacked(data: bytes, pickle_bytes: bytes, replace: dict[str, bytes] | None = None) -> bytes:
    """A torch zip with another pickle (and other records), whole and with right checksums."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            name = entry.filename.partition("/")[2]
            content = pickle_bytes if name == "data.pkl" else (replace or {}).get(name, old.read(entry))
            new.writestr(f"archive/{name}", content)
    return out.getvalue()


# --- damage


def _truncated(rng: random.Random, data: bytes, form: str) -> bytes:
    return data[: rng.randrange(1, len(data))]


def _one_bit(rng: random.Random, data: bytes, form: str) -> bytes:
    return _flip(data, [rng.randrange(len(data) * 8)])


def _some_bits(rng: random.Random, data: bytes, form: str) -> bytes:
    return _flip(data, [rng.randrange(len(data) * 8) for _ in range(rng.randrange(2, 40))])


def _head_bits(rng: random.Random, data: bytes, form: str) -> bytes:
    # The pickle, or the header: where structure lies, and damage does most.
    return _flip(data, [rng.randrange(min(len(data), 1500) * 8) for _ in range(rng.randrange(1, 4))])


def _tail_bits(rng: random.Random, data: bytes, form: str) -> bytes:
    # The index of a zip.
    start = max(0, len(data) - 1500)
    return _flip(data, [rng.randrange(start * 8, len(data) * 8) for _ in range(rng.randrange(1, 4))])


def _zeroed(rng: random.Random, data: bytes, form: str) -> bytes:
    start = rng.randrange(len(data))
    count = rng.choice((1, 64, 512, 4096))
    return data[:start] + bytes(len(data[start : start + count])) + data[start + count :]


def _swapped(rng: random.Random, data: bytes, form: str) -> bytes:
    size = min(512, len(data) // 2)
    one, two = sorted(rng.sample(range(len(data) // size), 2))
    blocks = [data[i : i + size] for i in range(0, len(data), size)]
    blocks[one], blocks[two] = blocks[two], blocks[one]
    return b"".join(blocks)


def _inserted(rng: random.Random, data: bytes, form: str) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + rng.randbytes(rng.randrange(1, 200)) + data[at:]


def _deleted(rng: random.Random, data: bytes, form: str) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.randrange(1, 200) :]


def _appended(rng: random.Random, data: bytes, form: str) -> bytes:
    return data + rng.randbytes(rng.randrange(1, 3000))


def _damaged_pickle(rng: random.Random, data: bytes, form: str) -> bytes:
    # Damage behind a right checksum, which only the reader of the pickle can notice.
    if form != "zip":
        return _head_bits(rng, data, form)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        inner = next(archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl"))
    change = rng.choice((_one_bit, _some_bits, _truncated, _inserted, _deleted, _zeroed))
    return repacked(data, change(rng, inner, form))


def _flip(data: bytes, bits: list[int]) -> bytes:
    changed = bytearray(data)
    for bit in bits:
        changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


DAMAGE = (
    _truncated,
    _one_bit,
    _some_bits,
    _head_bits,
    _tail_bits,
    _zeroed,
    _swapped,
    _inserted,
    _deleted,
    _appended,
    _damaged_pickle,
)


# --- files that are something else


def wrong_files() -> dict[str, tuple[str, bytes]]:
    """What people give instead of a checkpoint: name -> (file name, content)."""
    state = model()
    return {
        "text": ("notes.pth", b"epoch 1 loss 0.5\n" * 20),
        "json": ("instances.pth", json.dumps({"images": [], "categories": []}).encode()),
        "json as pkl": ("instances.pkl", json.dumps({"images": [1]}).encode()),
        "png": ("image.pth", b"\x89PNG\r\n\x1a\n" + bytes(200)),
        "web page": ("model.pth", b"<!DOCTYPE html><html><body>404</body></html>"),
        "git-lfs": ("model.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "empty": ("empty.pth", b""),
        "empty pkl": ("empty.pkl", b""),
        "empty safetensors": ("empty.safetensors", b""),
        "one byte": ("one.pth", b"\x80"),
        "random": ("random.pth", random.Random(0).randbytes(5000)),
        "other zip": ("photos.pth", _plain_zip()),
        "one tensor": ("one.pth", saved(torch.ones(3))),
        "one tensor, legacy": ("one.pth", saved(torch.ones(3), legacy=True)),
        "list": ("list.pth", saved([torch.ones(3)])),
        "list pkl": ("list.pkl", pickle.dumps([1, 2, 3])),
        "number pkl": ("number.pkl", pickle.dumps(3)),
        "keys are numbers": ("keys.pth", saved({"model": {1: torch.ones(3)}})),
        "keys are numbers, pkl": ("keys.pkl", pickle.dumps({1: np.ones(3)})),
        "values are text": ("text.pth", saved({"model": {"a": torch.ones(3), "b": "text"}})),
        "values are dicts": ("nested.pth", saved({"model": {"a": {"b": torch.ones(3)}}})),
        "values are None": ("none.pkl", pickle.dumps({"model": {"a": None}, "__author__": "x"})),
        "model is a list": ("model.pth", saved({"model": [1]})),
        "no model": ("run.pth", saved({"state_dict": dict(state), "epoch": 3})),
        "nothing": ("none.pth", saved({"model": {}})),
        "empty dict": ("none.pth", saved({})),
        "pycls without its key": ("x.pyth", saved({"epoch": 3})),
        "sparse": ("sparse.pth", saved({"model": {"a": torch.eye(3).to_sparse()}})),
        "text array": ("text.pkl", pickle.dumps({"a": np.array(["x", "y"])})),
        "safetensors header of 2**60 bytes": ("x.safetensors", struct.pack("<Q", 2**60) + b"{}" + bytes(50)),
        "safetensors list": ("x.safetensors", struct.pack("<Q", 8) + b"[1,2,3] " + bytes(50)),
    }


def _plain_zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("photos/readme.txt", "no weights here")
    return out.getvalue()


# --- files that want to run something, or to take everything


def hostile_files(canary: str) -> dict[str, tuple[str, bytes]]:
    """Files that make ``canary`` when anything in them runs, or that crash or fill the process."""
    command = f"touch {canary}"
    python = f"open({canary!r}, 'w').close()"
    run = Runs(os.system, command)
    arrays = {"a": np.ones(3, np.float32)}
    whole = originals()["zip"][1]
    name = canary.encode()
    touch = b"touch " + name
    text = b"X" + struct.pack("<I", len(touch)) + touch
    system = b"cposix\nsystem\n"
    get = b"cbuiltins\ngetattr\n(cbuiltins\n__import__\nX\x02\x00\x00\x00os\x85RX\x06\x00\x00\x00systemtR"
    files = {
        "os.system": ("a.pkl", pickle.dumps(run)),
        "os.system, protocol 0": ("a.pkl", pickle.dumps(run, protocol=0)),
        "os.system beside arrays": ("a.pkl", pickle.dumps({"model": {**arrays, "b": run}, "__author__": "x"})),
        "os.system beside blobs": ("a.pkl", pickle.dumps({"blobs": arrays, "cfg": run}, protocol=2)),
        "os.system as a key": ("a.pkl", b"\x80\x02}" + system + text + b"\x85RK\x01s."),
        "os.system in an array's bytes": ("a.pkl", pickle.dumps({"a": np.array([run], dtype=object)})),
        "builtins.eval": ("a.pkl", pickle.dumps({"a": Runs(eval, python)})),
        "builtins.exec": ("a.pkl", pickle.dumps({"a": Runs(exec, python)})),
        "nested reduce": ("a.pkl", b"\x80\x02}X\x01\x00\x00\x00a" + get + text + b"\x85Rs."),
        "INST": ("a.pkl", b"(S'" + touch + b"'\nios\nsystem\n."),
        "OBJ": ("a.pkl", b"\x80\x02(" + system + text + b"o."),
        "NEWOBJ": ("a.pkl", b"\x80\x02" + system + text + b"\x85\x81."),
        "NEWOBJ_EX": ("a.pkl", b"\x80\x04" + system + text + b"\x85}\x92."),
        "EXT1": ("a.pkl", b"\x80\x02\x82\x01."),
        "BUILD on a class": ("a.pkl", b"\x80\x02ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb."),
        "a call of a dict": ("a.pkl", b"\x80\x02})R."),
        "a call of an array": ("a.pkl", b"\x80\x02cnumpy\nndarray\n" + text + b"\x85R."),
        "torch zip, os.system": ("a.pth", saved({"model": {"a": run}})),
        "torch zip, eval": ("a.pth", saved({"model": {"a": torch.ones(2)}, "trainer": Runs(eval, python)})),
        "torch zip, bare pickle": ("a.pth", repacked(whole, pickle.dumps(run, protocol=2))),
        "torch zip, a module": ("a.pth", saved({"model": torch.nn.Linear(2, 2)})),
        "torch legacy, os.system": ("a.pth", saved({"model": {"a": run}}, legacy=True)),
        "torch rebuild of os.system": (
            "a.pth",
            repacked(
                whole,
                b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(" + system + b"ctorch\nTensor\n" + text + b"\x85NtR.",
            ),
        ),
        "persistent id": ("a.pkl", b"\x80\x02" + text + b"Q."),
        "pickle, then os.system": ("a.pkl", pickle.dumps([1]) + pickle.dumps(run)),
        # Nothing runs here; the process would grow or crash.
        "memo of 64 GB": ("a.pkl", b"\x80\x02}r\xff\xff\xff\xff."),
        "bytearray of a terabyte": ("a.pth", repacked(whole, pickle.dumps(Runs(bytearray, 10**12), protocol=2))),
        "BYTEARRAY8 of 2**40 bytes": ("a.pkl", b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"."),
        "bytes of 2**60": ("a.pkl", b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"."),
        "text of 4 GB": ("a.pkl", b"\x80\x02X\xff\xff\xff\xff."),
        "tuple nested 300,000 deep as a key": ("a.pkl", b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s."),
        "tuple nested 300,000 deep in a set": ("a.pkl", b"\x80\x04\x8f()" + b"\x85" * 300_000 + b"\x90."),
        "copies of copies": ("a.pkl", _copies()),
        "list nested 200,000 deep": ("a.pkl", b"\x80\x02}X\x01\x00\x00\x00a" + _nest(b"]", b"a") + b"s."),
        "dict nested 200,000 deep": ("a.pkl", b"\x80\x02}X\x01\x00\x00\x00a" + _nest(b"}K\x01", b"s") + b"s."),
        "tuple nested 200,000 deep": ("a.pkl", b"\x80\x02}X\x01\x00\x00\x00a)" + b"\x85" * 200_000 + b"s."),
        "an integer of 24,000 digits as a key": ("a.pkl", b"\x80\x02}" + _integer(10_000) + b"K\x01s."),
        "torch zip, an integer of 24,000 digits as a key": (
            "a.pth",
            repacked(whole, _beside_model(b"}" + _integer(10_000) + b"K\x01s")),
        ),
        "torch legacy, storages named by a nest": ("a.pth", _legacy_keys(_nest(b"]", b"a"))),
        "torch legacy, storages named by numbers": ("a.pth", _legacy_keys(b"]K\x01a")),
        "torch zip, list nested 200,000 deep": ("a.pth", repacked(whole, _beside_model(_nest(b"]", b"a")))),
        "torch zip, tuple nested 200,000 deep": ("a.pth", repacked(whole, _beside_model(b")" + b"\x85" * 200_000))),
        "torch zip, tuple nested 300,000 deep as a key": (
            "a.pth",
            repacked(whole, _beside_model(b"})" + b"\x85" * 300_000 + b"K\x01s")),
        ),
        "list inside itself": ("a.pkl", b"\x80\x02}X\x05\x00\x00\x00modelq\x00]q\x01h\x01as."),
        "array larger than its bytes": ("a.pkl", _array((10**9, 10**3), b"1234")),
        "array of a negative size": ("a.pkl", _array((-1,), b"1234")),
        "array of objects": ("a.pkl", pickle.dumps({"a": np.array([{}], dtype=object)})),
        "tensor beyond its storage": ("a.pth", _tensor((0, (10**6,), (1,)))),
        "tensor at a negative offset": ("a.pth", _tensor((-1, (1,), (1,)))),
        "tensor of a terabyte by stride 0": ("a.pth", _tensor((0, (10**12,), (0,)))),
        "tensor whose size overflows": ("a.pth", _tensor((0, (2**62, 2**62), (0, 0)))),
        "tensor of another storage size": ("a.pth", repacked(whole, _inner(whole), {"data/0": b"1234"})),
    }
    return files


def _inner(data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return next(archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl"))


def _copies() -> bytes:
    """One text of 4 MB, encoded ten thousand times."""
    text = b"X" + struct.pack("<I", 2**22) + b"a" * 2**22 + b"q\x00"
    once = b"h\x01h\x00X\x06\x00\x00\x00latin1\x86R"
    return b"\x80\x02c_codecs\nencode\nq\x01" + text + once * 10_000 + b"."


def _nest(begin: bytes, end: bytes, depth: int = 200_000) -> bytes:
    """A container that holds a container, and so on; ``begin`` makes one and ``end`` puts the last into it."""
    return begin * depth + begin[:1] + end * depth


def _integer(size: int) -> bytes:
    return b"\x8b" + struct.pack("<i", size) + b"\x01" * size


def _legacy_keys(keys: bytes) -> bytes:
    """A torch file of the format before zip whose list of storages is another one."""
    whole = saved({"model": {"a": torch.ones(2)}}, legacy=True)
    at = whole.rindex(b"\x80\x02]")
    return whole[:at] + b"\x80\x02" + keys + b"." + whole[at:]


def _beside_model(value: bytes) -> bytes:
    """The pickle of ``{"model": {"a": 1.0}, "optimizer": value}``."""
    model = b"X\x05\x00\x00\x00model}X\x01\x00\x00\x00aG?\xf0\x00\x00\x00\x00\x00\x00s"
    return b"\x80\x02}(" + model + b"X\x09\x00\x00\x00optimizer" + value + b"u."


def _array(shape: tuple[int, ...], raw: bytes) -> bytes:
    class Array:
        def __reduce__(self) -> Any:
            make = np.empty(0).__reduce__()[0]
            return make, (np.ndarray, (0,), b"b"), (1, shape, np.dtype("f4"), False, raw)

    return pickle.dumps({"a": Array()}, protocol=2)


def _tensor(where: tuple[int, tuple[int, ...], tuple[int, ...]]) -> bytes:
    """A torch file whose one tensor claims another offset, size and stride."""

    class Tensor:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

        def __reduce__(self) -> Any:
            storage = torch.storage.TypedStorage(
                wrap_storage=self.tensor.untyped_storage(), dtype=torch.float32, _internal=True
            )
            return torch._utils._rebuild_tensor_v2, (storage, *where, False, collections.OrderedDict())

    return saved({"model": {"a": Tensor(torch.ones(4))}})


# --- the judge


def case(seed: int, canary: str) -> Case:
    """The file of ``seed``: damage in three of four, then wrong and hostile files by turns."""
    rng = random.Random(seed)
    if seed % 4 != 3:
        form = list(originals())[0 if seed % 2 else rng.randrange(len(originals()))]
        damage = rng.choice(DAMAGE)
        name, data = originals()[form]
        return Case(damage.__name__.strip("_").replace("_", " "), form, name, damage(rng, data, form), False)
    wrong, hostile = wrong_files(), hostile_files(canary)
    files = [("wrong: ", key, file) for key, file in wrong.items()]
    files += [("hostile: ", key, file) for key, file in hostile.items()]
    group, kind, (name, data) = files[seed // 4 % len(files)]
    return Case(group + kind, "none", name, data, True)


def judge(it: Case, folder: str, canary: str, *, mmap: bool = True, late: bool = False) -> str:
    """``refused``, ``identical`` or ``unnoticed`` (another value in a format without checksums).

    Args:
        it: the file.
        folder: where to put it.
        canary: the file that appears when something runs.
        mmap: as in ``read_checkpoint``.
        late: verify the values after reading, as the checkpointer does, instead of while reading.

    Raises:
        Violation: what must never happen.
    """
    path = os.path.join(folder, it.name)
    with open(path, "wb") as file:
        file.write(it.data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = _read(it, path, mmap, late)
    except CheckpointFileError as error:
        if not (error.where and error.expected and error.found and error.fix) or "\n" in str(error):
            raise Violation(f"{it.kind}: a message without where, expected, found or fix: {error}") from error
        result = "refused"
    except Exception as error:
        raise Violation(f"{it.kind} of {it.form}: {type(error).__name__}: {error}") from error
    if os.path.exists(canary):
        raise Violation(f"{it.kind}: something ran")
    with open(path, "rb") as file:
        if file.read() != it.data:
            raise Violation(f"{it.kind}: the file was changed")
    if it.must_refuse and result != "refused":
        raise Violation(f"{it.kind}: it was loaded")
    os.unlink(path)
    return result


def _read(it: Case, path: str, mmap: bool, late: bool) -> str:
    checkpoint = read_checkpoint(path, verify=not late, mmap=mmap)
    found = checkpoint["model"]
    if late:
        verify_tensors(path, found)
    wanted = model()
    same = found.keys() == wanted.keys() and all(_equal(found[name], wanted[name]) for name in wanted)
    if not same and it.form in CHECKED and it.kind != "damaged pickle":
        raise Violation(f"{it.kind} of {it.form}: other values were loaded")
    return "identical" if same else "unnoticed"


def _equal(found: Any, wanted: torch.Tensor) -> bool:
    tensor = torch.from_numpy(found) if isinstance(found, np.ndarray) else found
    return tensor.dtype == wanted.dtype and torch.equal(tensor, wanted)


def judge_seed(seed: int, folder: str) -> tuple[Case, str]:
    """The case of ``seed`` and its outcome, with the ways of reading by turns."""
    canary = os.path.join(folder, "canary")
    it = case(seed, canary)
    return it, judge(it, folder, canary, mmap=seed % 5 != 0, late=seed % 3 == 0)


def main() -> None:
    """Judge seeds FIRST to FIRST + COUNT - 1 in FOLDER, in a process that may not grow beyond 8 GB."""
    import resource

    first, count, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
    for seed in range(first, first + count):
        print(json.dumps({"seed": seed}), flush=True)
        try:
            it, result = judge_seed(seed, folder)
            line = {"seed": seed, "kind": it.kind, "form": it.form, "result": result}
        except Violation as error:
            line = {"seed": seed, "violation": str(error)}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
