"""Known errors about shapes: checkpoints, optimizers, embeddings, labels and layers."""

from __future__ import annotations

import re
from math import isqrt

from ..key import DATASETS, HEAD_ADAPT, MODEL, OUTPUT_DIR, TASKS
from .known_errors import Answer, known

ENCODERS = {1024: "RN50", 512: "RN101 or ViT-B", 640: "RN50x4", 768: "RN50x16 or ViT-L"}
"""Width of the text embeddings -> the CLIP models that have it."""
SKIPPED = (
    r"(?:Skip loading parameter '(?P<name>\S+)' to the model due to incompatible shapes:"
    r"|'(?P<old>\S+)' has shape) \((?P<file>[\d, ]*)\) in the checkpoint but \((?P<model>[\d, ]*)\) in the model"
)


@known("skipped tensor", SKIPPED, "", rank=1)
def _skipped(m: re.Match[str], before: str) -> Answer:
    name, file, model = m["name"] or m["old"], m["file"], m["model"]
    rows = [shape.split(",")[0].strip() for shape in (file, model)]
    if name.startswith("backbone"):
        return (
            f"{name} is ({file}) in the checkpoint and ({model}) in the model: the two have other backbones.\n"
            "This is not about classes, and the whole tensor keeps its random values.",
            f"Use the config that the checkpoint was made with, or its {MODEL.RESNETS.DEPTH} and backbone keys. See "
            "what fits: d2-headadapt plan --config-file YAML --weights FILE",
        )
    return (
        f"{name} has {rows[0]} rows in the checkpoint and {rows[1]} in the model, and detectron2 drops the whole "
        "tensor.\nExpected when fine-tuning on other classes; at evaluation it means that the head is random.",
        "To keep the rows of the classes that both have: d2-headadapt adapt --config-file YAML --weights FILE "
        f"--output new.pth. When evaluating, use the weights of your own training "
        f"({MODEL.WEIGHTS.set('output/model_final.pth')}) and the NUM_CLASSES that it had.",
    )


@known(
    "state dict size mismatch",
    r"size mismatch for (?P<name>\S+): copying a param with shape torch\.Size\(\[(?P<file>[\d, ]*)\]\) from checkpoint,"
    r" the shape in current model is torch\.Size\(\[(?P<model>[\d, ]*)\]\)",
    "",
)
def _size_mismatch(m: re.Match[str], before: str) -> Answer:
    return (
        f"{m['name']} is [{m['file']}] in the checkpoint and [{m['model']}] in the model: torch's load_state_dict "
        "refuses that,\nwith strict=False too. Where the first number is a class count, the class lists differ.",
        "Load through this package: HeadAdaptCheckpointer(model).load(FILE), or d2-headadapt adapt. A DETR's "
        "class_embed and label_enc need register_head_layout first.",
    )


@known(
    "suffix heuristics",
    r"Shape of (?P<name>\S+) in checkpoint is torch\.Size\(\[(?P<file>[\d, ]*)\]\), while shape of \S+ in model is "
    r"torch\.Size\(\[(?P<model>[\d, ]*)\]\)",
    "",
    rank=1,
)
def _heuristics(m: re.Match[str], before: str) -> Answer:
    return (
        f"The file was matched by name endings, and {m['name']} is [{m['file']}] in it and [{m['model']}] in the "
        "model:\nthe tensor is left out.",
        "To carry the classes that both have: d2-headadapt adapt --config-file YAML --weights FILE --output new.pth",
    )


@known("ambiguous names", r"Cannot match one checkpoint key to multiple keys in the model", "HA301")
def _ambiguous(m: re.Match[str], before: str) -> Answer:
    lines = re.findall(r"Ambiguity found for (\S+) in checkpoint!\s*It matches .*?\((\S+) and (\S+)\)", before)
    what = f"{lines[-1][0]} fits {lines[-1][1]} and {lines[-1][2]}" if lines else "one name fits two tensors"
    return (
        f"The file was matched by name endings, and {what}:\ndetectron2 cannot know which one is meant.",
        f"Say it with a rule: {HEAD_ADAPT.RENAME.set(['^conv=backbone.bottom_up.conv'])}, and load without "
        "?matching_heuristics=True.",
    )


@known(
    "two sizes",
    r"The size of tensor a \((?P<a>\d+)\) must match the size of tensor b \((?P<b>\d+)\) at non-singleton "
    r"dimension (?P<dim>\d+)",
    "",
)
def _two_sizes(m: re.Match[str], before: str) -> Answer:
    a, b, dim = int(m["a"]), int(m["b"]), int(m["dim"])
    if re.search(r"copy_\(|pre_computed_w|TEXT_EMB", before):
        return _embedding(a, b, dim)
    if re.search(r"optim/|\.step\(|exp_avg|momentum|_single_tensor|_multi_tensor|_foreach", before):
        return _optimizer_state(a, b)
    if dim == 1 and a in ENCODERS and b in ENCODERS:
        return _embedding(a, b, dim)
    if dim == 0 and "File " not in before:
        state, embedding = _optimizer_state(a, b), _embedding(a, b, dim)
        return (
            f"Either (in optimizer.step) {state[0]}\nOr (at copy_ in a constructor) {embedding[0]}",
            f"In step(): {state[1]} At copy_: {embedding[1]} The traceback tells which: paste all of it.",
        )
    return (
        f"Two tensors of {a} and {b} entries along dimension {dim} meet in an elementwise operation,\nand this text "
        "does not say in which: neither an optimizer's step nor a copy_ is in it.",
        "Paste the whole traceback. d2-headadapt doctor --config-file YAML names the module that fails.",
    )


def _optimizer_state(a: int, b: int) -> Answer:
    return (
        f"The optimizer state has {a} rows and the head has {b}: a resume loaded that of another class "
        "list.\nThe weights were reset, the optimizer state was loaded by position.",
        f"To go on and keep what is shared: --resume with {HEAD_ADAPT.RESUME.set('adapt')}. To start afresh: no "
        f"--resume and a new {OUTPUT_DIR}.",
        "HA307",
    )


def _embedding(a: int, b: int, dim: int) -> Answer:
    if dim == 0:
        return (
            f"The classifier has {a} rows (classes) and the embedding file has {b}: the file is for another list of "
            "classes.\nThe widths agree, so the encoder is the right one.",
            f"Pick rows by name: {HEAD_ADAPT.PREDICTOR.set('HeadAdaptTextOutputLayers')}, {HEAD_ADAPT.TEXT.FILE} and "
            f"{HEAD_ADAPT.TEXT.NAMES}. In plain RegionCLIP: {MODEL.ROI_HEADS.NUM_CLASSES.set(b)}, or the file of your "
            "classes.",
            "HA403",
        )
    ours = f" ({ENCODERS[a]} in CLIP)" if a in ENCODERS else ""
    theirs = f" ({ENCODERS[b]} in CLIP)" if b in ENCODERS else ""
    regionclip = f"{MODEL.CLIP.TEXT_EMB_DIM.set(b)}"
    if b == 640:
        regionclip += f" {MODEL.RESNETS.DEPTH.set(200)} {MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION.set(18)}"
    return (
        f"The classifier is built for embeddings {a} wide{ours}, and the file holds embeddings {b} wide{theirs}.\n"
        "This is the width of the text encoder: NUM_CLASSES has nothing to do with it.",
        f"Either take the embedding file of the model's own encoder ({a} wide), or the model of the file's encoder; "
        f"in RegionCLIP: {regionclip} and {MODEL.WEIGHTS} of that model.",
        "HA402",
    )


@known("device-side assert", r"[`'\"]?t >= 0 && t < n_classes", "HA202")
def _device_assert(m: re.Match[str], before: str) -> Answer:
    return (
        "A label is not below the classifier's number of classes (or below 0): NUM_CLASSES is smaller than the "
        "dataset's\nlist, or an annotation has a stray category. CUDA reports it late, so the traceback misleads.",
        "d2-headadapt doctor --config-file YAML names image, annotation and id. Set the class count with "
        f"{MODEL.ROI_HEADS.NUM_CLASSES} (RetinaNet: {MODEL.RETINANET.NUM_CLASSES}), or train through this package, "
        f"which takes it from {DATASETS.TRAIN}.",
    )


@known("label out of range", r"Target (?P<label>-?\d+) is out of bounds", "HA202")
def _out_of_bounds(m: re.Match[str], before: str) -> Answer:
    return (
        f"A label is {m['label']} and the classifier has no such row: NUM_CLASSES is too small for the dataset,\n"
        "or an annotation has a stray category.",
        f"Set {MODEL.ROI_HEADS.NUM_CLASSES} (or {MODEL.RETINANET.NUM_CLASSES}) to at least "
        f"{int(m['label']) + 1}, or run d2-headadapt doctor --config-file YAML: it names image, annotation and id.",
    )


@known(
    "device-side assert, text only",
    r"CUDA error: device-side assert triggered",
    "HA202",
    rank=1,
)
def _device_assert_alone(m: re.Match[str], before: str) -> Answer:
    return (
        "A kernel refused an index; in detection it is nearly always a label outside [0, NUM_CLASSES].\n"
        "CUDA reports it late, so the line that the traceback shows is not the one that failed.",
        "d2-headadapt doctor --config-file YAML looks at every label on the CPU. Or run with CUDA_LAUNCH_BLOCKING=1, "
        f"or {MODEL.DEVICE.set('cpu')}, to see the line.",
    )


@known("batch sizes", r"Expected input batch_size \((?P<a>\d+)\) to match target batch_size \((?P<b>\d+)\)", "HA503")
def _batches(m: re.Match[str], before: str) -> Answer:
    a, b = int(m["a"]), int(m["b"])
    written = re.search(r"(?:view|reshape)\(\s*-1\s*,\s*(?P<n>\d+)\s*\)", before)
    width = int(written["n"]) if written else 65536
    mend = "Write x.flatten(1), never x.view(-1, N), and make the linear layer as wide as one image's values"
    cause = f"The head makes {a} rows of a batch of {b}: a view(-1, N) with the wrong N mixes images.\n"
    if a * width % b == 0:
        real = a * width // b
        given = f"N is {width}" if written else f"If N is {width}, as in a common tutorial"
        cause += f"{given}: then an image has {real} values ({a} x {width} / {b}){_as_maps(real)}."
        mend += f": nn.Linear({real}, ...)" if written else f", {real} in that case"
    else:
        cause += f"An image has C x H x W values, {a}/{b} = {a / b:.4g} times N."
    return cause, f"{mend}. Or let this package build the heads ({TASKS}): it finds the width by itself."


def _as_maps(values: int) -> str:
    """List square feature maps with the channels of a ResNet's stages that have so many values."""
    found = [
        f"{channels} x {side} x {side}"
        for channels in (64, 128, 256, 512, 1024, 2048)
        if values % channels == 0 and (side := isqrt(values // channels)) ** 2 * channels == values and side > 1
    ]
    return f", such as {' or '.join(found)}" if found else ""


@known(
    "matrix shapes",
    r"mat1 and mat2 shapes cannot be multiplied \((?P<a>\d+)x(?P<b>\d+) and (?P<c>\d+)x(?P<d>\d+)\)",
    "HA502",
)
def _matrices(m: re.Match[str], before: str) -> Answer:
    return (
        f"A linear layer takes {m['c']} values and gets {m['b']} from the module before it ({m['a']} rows).\nThe "
        "resolution or the channels of its input are not those that it was built for.",
        f"Make it nn.Linear({m['b']}, {m['d']}), or change what feeds it (POOLER_RESOLUTION, FC_DIM, OUT_CHANNELS). "
        "d2-headadapt doctor --config-file YAML names the module.",
    )


@known(
    "channels",
    r"Given groups=(?P<g>\d+), weight of size \[(?P<w>[\d, ]+)\], expected input\[(?P<i>[\d, ]+)\] to have "
    r"(?P<want>\d+) channels, but got (?P<got>\d+) channels",
    "HA502",
)
def _channels(m: re.Match[str], before: str) -> Answer:
    return (
        f"A convolution takes {m['want']} channels and gets {m['got']}: it was built for another input.\n"
        "The usual reason is a head whose input shape was written by hand instead of taken from the backbone.",
        f"Build it for {m['got']} channels (input_shape.channels in from_config), or change what feeds it "
        "(FPN.OUT_CHANNELS, CONV_DIM). d2-headadapt doctor --config-file YAML names the module.",
    )
