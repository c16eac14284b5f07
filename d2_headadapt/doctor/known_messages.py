"""Known errors about names, datasets, fields and training."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from ..adapt.classes import did_you_mean
from ..key import DATALOADER, DATASETS, HEAD_ADAPT, INPUT, MODEL, SOLVER, TASKS, TEST, YAML, pairs
from .known_errors import Answer, known

ENCODER_RULE = r"^encoder\.=backbone.bottom_up."
DOCTOR = "d2-headadapt doctor --config-file YAML"


def registered_names(registry: str) -> list[str]:
    """List what detectron2's modeling code and this package's register, by their source: nothing is imported.

    Args:
        registry: its name in messages, such as ``ROI_HEADS``.
    """
    entry = re.compile(rf"^@{re.escape(registry)}_REGISTRY\.register\(\)\n(?:@.*\n)*(?:class|def) (\w+)", re.MULTILINE)
    found: list[str] = []
    for package in ("detectron2", "d2_headadapt"):
        spec = find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            for path in sorted(Path(folder, "modeling").rglob("*.py")):
                found += entry.findall(path.read_text(encoding="utf-8"))
    return found


@known("unregistered component", r"No object named '(?P<name>[^']*)' found in '(?P<registry>[^']*)' registry", "HA128")
def _component(m: re.Match[str], before: str) -> Answer:
    near = registered_names(m["registry"])
    return (
        f"The config names {m['name']}, and nothing of that name is in the registry {m['registry']} of this process:\n"
        "the module that defines it was never imported here, or the name is misspelt.",
        f"Add --import YOUR_MODULE.py to the command, or import it at the top of your script, not below `if __name__ "
        f"== '__main__'`, so that spawned workers do too.{did_you_mean(m['name'], near)}",
    )


def _entry(name: str) -> str:
    return f"[{pairs({'name': name, 'json': 'FILE', 'images': 'FOLDER'})}]"


@known("unregistered dataset", r"Dataset '(?P<name>[^']*)' is not registered! Available datasets are:", "HA103")
def _dataset(m: re.Match[str], before: str) -> Answer:
    if len(m["name"]) == 1:
        return (
            f"{m['name']!r} is one letter of a name: {DATASETS.TRAIN} or {DATASETS.TEST} is a string, and detectron2 "
            "goes\nthrough its letters. A comma is missing.",
            f"Write a tuple: {DATASETS.TEST.set(('my_val',))}, or in yaml: {DATASETS.TEST.write(['my_val'])}.",
        )
    listed = re.split(r",\s*", (m.string[m.end() :].split("\n\n")[0])[:20000])
    near = did_you_mean(m["name"], [name.strip(" \n\"'") for name in listed])
    return (
        f"This process never registered {m['name']}: registering in main() of the parent does not reach spawned "
        "workers,\nor the name is misspelt.",
        f"Put it into the {YAML}: {DATASETS.REGISTER.write(_entry(m['name']))}, which every process reads.{near}",
    )


@known("dataset registered twice", r"Dataset '(?P<name>[^']*)' is already registered!")
def _registered_twice(m: re.Match[str], before: str) -> Answer:
    return (
        f"The name {m['name']} is taken: a notebook cell or module that registers it ran twice, or it is one of\n"
        "detectron2's own names.",
        f"Register under your own name, or first: DatasetCatalog.remove({m['name']!r}); "
        f"MetadataCatalog.remove({m['name']!r}).",
    )


@known(
    "metadata conflict",
    r"Attribute '(?P<key>[^']*)' in the metadata of '(?P<name>[^']*)' cannot be set to a different value!",
    "HA212",
)
def _metadata(m: re.Match[str], before: str) -> Answer:
    if m["name"].startswith(("coco_", "lvis_", "cityscapes_", "ade20k_", "voc_", "keypoints_coco_")):
        return (
            f"{m['name']} is a name that detectron2 itself registers, with its own {m['key']}:\n"
            "your JSON lies at the builtin path or is registered under the builtin name.",
            f"Register under your own name, in the {YAML}: {DATASETS.REGISTER.write(_entry('my_train'))} and "
            f"{DATASETS.TRAIN.set(('my_train',))}.",
        )
    return (
        f"{m['key']} of {m['name']} is set by hand to one list, and the JSON's categories give another,\nor two "
        "pieces of code set it.",
        f"Remove the line that sets MetadataCatalog.get({m['name']!r}).{m['key']}: it is read from the JSON. Or remove "
        f"the old entry first: MetadataCatalog.remove({m['name']!r}).",
    )


@known("different metadata", r"Datasets have different metadata '(?P<key>[^']*)'!", "HA105")
def _different(m: re.Match[str], before: str) -> Answer:
    return (
        f"The datasets of one list have different {m['key']}: class 3 of one is not class 3 of the other.",
        f"Give their JSON files the same categories, ids and names. {DOCTOR} says where they differ.",
    )


@known("no such metadata", r"Attribute '(?P<key>[^']*)' does not exist in the metadata of dataset '(?P<name>[^']*)'")
def _no_metadata(m: re.Match[str], before: str) -> Answer:
    return (
        f"{m['name']} has no {m['key']} in this process: for a COCO JSON it appears when the dataset is loaded for\n"
        "the first time, and a name that was never registered has none.",
        f"Load it once, DatasetCatalog.get({m['name']!r}), or set MetadataCatalog.get({m['name']!r}).{m['key']}.",
    )


@known(
    "prediction beyond the dataset",
    r"A prediction has class=(?P<k>\d+), but the dataset only has (?P<n>\d+) classes",
    "HA106",
)
def _prediction(m: re.Match[str], before: str) -> Answer:
    return (
        f"The model predicts class {m['k']} and the test set has {m['n']} classes: it was built with a greater "
        "NUM_CLASSES\n(the default is 80), under the key that this architecture reads.",
        f"Set {MODEL.ROI_HEADS.NUM_CLASSES.set(m['n'])} (RetinaNet: {MODEL.RETINANET.NUM_CLASSES}, FCOS: "
        f"{MODEL.FCOS.NUM_CLASSES}) and train again, or compare {DATASETS.TEST} with {DATASETS.TRAIN} if those differ.",
    )


@known(
    "keypoint counts", r"operands could not be broadcast together with shapes \((?P<a>\d+),\) \((?P<b>\d+),\)", "HA217"
)
def _sigmas(m: re.Match[str], before: str) -> Answer:
    one, other = int(m["a"]), int(m["b"])
    if 17 not in (one, other) and not re.search(r"oks|keypoint|sigmas|vars", before, re.IGNORECASE):
        return (
            f"numpy was given arrays of {one} and {other} entries.",
            "In COCO's keypoint evaluation the first is the number of sigmas, the second that of keypoints; if this is "
            f"that, set {TEST.KEYPOINT_OKS_SIGMAS} with {other} values. Otherwise paste the whole traceback.",
        )
    count = other if one == 17 else one
    return (
        f"COCO's keypoint evaluation has {one} sigmas (17 is COCO's human body) and your annotations have {other} "
        f"keypoints.\n{TEST.KEYPOINT_OKS_SIGMAS} is read only where the evaluator is given it.",
        f"Set {TEST.KEYPOINT_OKS_SIGMAS} with {count} values and {MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS.set(count)}, "
        f"and build COCOEvaluator(name, kpt_oks_sigmas=cfg.{TEST.KEYPOINT_OKS_SIGMAS.yaml}), as this package's Trainer "
        "does.",
    )


@known("missing masks", r"Cannot find field '(?P<field>gt_masks)' in the given Instances!", "HA213")
@known("missing keypoints", r"Cannot find field '(?P<field>gt_keypoints)' in the given Instances!", "HA216")
@known("missing field", r"Cannot find field '(?P<field>(?!gt_masks'|gt_keypoints')[^']*)' in the given Instances!")
def _field(m: re.Match[str], before: str) -> Answer:
    switch = {"gt_masks": MODEL.MASK_ON, "gt_keypoints": MODEL.KEYPOINT_ON}.get(m["field"])
    what = m["field"].removeprefix("gt_")
    if switch is not None:
        return (
            f"The model has a head that trains on {what}, and the annotations have none: {switch} is True while the\n"
            f"JSON holds no {'segmentation' if what == 'masks' else 'keypoints'}.",
            f"Set {switch} False, or add {what} to the annotations (polygons or RLE under 'segmentation')."
            if what == "masks"
            else f"Set {switch} False, or add 'keypoints' to the annotations and keypoint names to the metadata.",
        )
    return (
        f"A head asks for {m['field']}, and the dataset mapper did not make it: register_coco_instances and\n"
        "annotations_to_instances carry only detectron2's own fields.",
        f"Declare it as a task ({TASKS}) and register with {DATASETS.REGISTER}, which carries it through; or write a "
        "mapper that sets it.",
    )


@known("weights only", r"Weights only load failed", "HA301")
def _weights_only(m: re.Match[str], before: str) -> Answer:
    after = m.string[m.start() :]
    which = re.search(r"(?:GLOBAL|global) (\S+)", after)
    what = f"an object of {which[1]}" if which else "objects beside tensors and plain values"
    return (
        f"The file holds {what} (numpy scalars, a config...), and torch since 2.6 refuses them:\n"
        "unpickling them could run any code.",
        f"If you trust who made it: {HEAD_ADAPT.TRUST_FILE.set(True)}, once, with d2-headadapt adapt --output new.pth, "
        "which writes plain values. In your own code: torch.load(FILE, weights_only=False).",
    )


@known(
    "nan loss", r"Loss became infinite or NaN at iteration=(?P<i>\d+)!(?: loss_dict = (?P<losses>\{[^}]*\}))?", "HA121"
)
def _nan(m: re.Match[str], before: str) -> Answer:
    # numpy 2 writes np.float64(nan), torch tensor(nan).
    bad = re.findall(r"'(\w+)': (?:[\w.]+\()?-?(?:nan|inf)", m["losses"] or "")
    which = f" ({', '.join(bad)} first)" if bad else ""
    return (
        f"Training diverged at iteration {m['i']}{which}. Nearly always the learning rate is too high for the batch:\n"
        "zoo configs are made for 16 images; degenerate boxes and a lost warm-up do it too.",
        f"Scale it: {SOLVER.BASE_LR} = 0.02 x IMS_PER_BATCH / 16 (RetinaNet 0.01), written under {SOLVER}; keep "
        f"{SOLVER.WARMUP_ITERS.set(1000)}, or {SOLVER.CLIP_GRADIENTS.ENABLED.set(True)}. {DOCTOR} finds bad boxes and "
        "keys without effect.",
    )


@known("unused parameters in ddp", r"Expected to have finished reduction in the prior iteration", "HA504")
def _ddp(m: re.Match[str], before: str) -> Answer:
    found = re.search(r"Parameter indices which did not receive grad for rank (\d+): ([\d ]+)", m.string[m.end() :])
    extra = f" On rank {found[1]} these had none: {found[2].strip()}." if found else ""
    return (
        f"Some parameters got no gradient on some process.{extra} Either a head is never called,\n"
        "or it returns no loss for a batch without labels for it.",
        "Let the head always return a loss that touches its parameters (0 * output.sum()), as this package's task "
        "heads do. To see which: TORCH_DISTRIBUTED_DEBUG=DETAIL. Otherwise wrap the model with "
        "find_unused_parameters=True.",
    )


@known("cuda memory", r"CUDA out of memory|OutOfMemoryError")
def _memory(m: re.Match[str], before: str) -> Answer:
    asked = re.search(r"Tried to allocate ([\d.]+ \w+)", m.string[m.start() :])
    return (
        f"The GPU is full{f' ({asked[1]} more was asked for)' if asked else ''}. Batch, image size and the number of "
        "boxes with masks decide;\nthe class count hardly does, unless it is in the thousands.",
        f"Lower {SOLVER.IMS_PER_BATCH} and, in proportion, {SOLVER.BASE_LR}; or {INPUT.MIN_SIZE_TRAIN} and "
        f"{INPUT.MAX_SIZE_TRAIN}; or set {SOLVER.AMP.ENABLED.set(True)}.",
    )


@known("unknown key", r"Non-existent (?:config )?key: (?P<key>[\w.]+)", "HA101")
def _key(m: re.Match[str], before: str) -> Answer:
    return (
        f"The config has no key {m['key']}: it is misspelt, or it belongs to a project whose add_..._config(cfg) was "
        "not called.",
        f"{DOCTOR} names the nearest key. For a project: --import its module, or call its add_..._config(cfg) before "
        "merge_from_file. Keys of this package: d2_headadapt.add_headadapt_config(cfg).",
    )


@known("not in the file", r"Some model parameters or buffers are not found in the checkpoint:", "HA302", rank=0)
def _not_found(m: re.Match[str], before: str) -> Answer:
    return (
        "The model has tensors that the file lacks; they keep their random values. A few head tensors are normal when\n"
        "fine-tuning; a backbone in that list means that the file was made for another architecture.",
        "See it per submodule: d2-headadapt plan --config-file YAML --weights FILE. Names that differ by a prefix: "
        f"{HEAD_ADAPT.RENAME.set([ENCODER_RULE])}.",
    )


@known("no data", r"(?:No valid data found in (?P<some>\S+)\.|Dataset '(?P<one>[^']*)' is empty!)", "HA208")
def _no_data(m: re.Match[str], before: str) -> Answer:
    return (
        f"{m['some'] or m['one']} gave no image: the JSON is empty, or {DATALOADER.FILTER_EMPTY_ANNOTATIONS} removed\n"
        "every image, because none has a box that is not a crowd.",
        f"{DOCTOR} counts images and boxes. For a set without boxes: {DATALOADER.FILTER_EMPTY_ANNOTATIONS.set(False)}.",
    )
