"""Every config key of this package, once, with its meaning."""

from __future__ import annotations

from detectron2.config import CfgNode


def add_headadapt_config(cfg: CfgNode) -> None:
    """Add this package's keys, with defaults that change nothing, to a detectron2 config.

    Calling it twice is harmless: values that are already set stay.

    Example:
        >>> from detectron2.config import get_cfg
        >>> from d2_headadapt import add_headadapt_config
        >>> cfg = get_cfg()
        >>> add_headadapt_config(cfg)
        >>> cfg.MODEL.HEAD_ADAPT.ALIASES = ["lorry=truck"]
        >>> cfg.MODEL.HEAD_ADAPT.RESUME
        'refuse'
    """
    if "HEAD_ADAPT" in cfg.MODEL:
        return
    node = cfg.MODEL.HEAD_ADAPT = CfgNode()

    # Classes that the file MODEL.WEIGHTS was trained on: a registered dataset, a built-in vocabulary, a .json or .txt
    # file (looked for in this order), or the names themselves as a list. None asks the file, then the model zoo path.
    # "none" says that nothing of the head is to be taken.
    node.SOURCE_CLASSES = None
    node.SOURCE_CLASSES_STUFF = None
    node.SOURCE_CLASSES_KEYPOINT = None

    # Classes that the model shall predict, in the same forms. None takes those of DATASETS.TRAIN.
    node.TARGET_CLASSES = None
    node.TARGET_CLASSES_STUFF = None
    node.TARGET_CLASSES_KEYPOINT = None

    # "target=source" pairs for classes whose names differ.
    node.ALIASES = []

    # "name", or "position": class i takes the weights of class i. Position is refused where the file names its own
    # classes and they differ; "position_over_names" says that those names are wrong.
    node.MATCH = "name"

    # Least share (0 to 1) of the file's tensors that must find a place in the model.
    node.MIN_COVERAGE = 0.5

    # What --resume does when the class list changed: "refuse", or "adapt" (carried rows keep their optimizer moments).
    node.RESUME = "refuse"

    # Glob patterns on tensor names. INCLUDE: take only these from the file; EXCLUDE: take everything but these.
    node.INCLUDE = []
    node.EXCLUDE = []

    # "regex=replacement" rules on the file's tensor names, applied in their order before anything is matched.
    node.RENAME = []

    # Glob patterns on parameter names that Trainer does not train.
    node.FREEZE = []

    # Evaluate, predict or export although rows or parameters were neither carried, fitted nor trained.
    node.ALLOW_NEW_ROWS_AT_EVAL = False

    # Trainer looks at config and small annotation files before it builds (see docs/doctor.md); an error stops it.
    node.DOCTOR = True

    # Load a file that needs full pickle, or on the command line a yaml with python tags: either can run any code
    # its author put there.
    node.TRUST_FILE = False

    # Check the CRC-32 of every record that is taken from a .pth file: torch itself loads a flipped bit silently.
    node.VERIFY_FILE = True

    # Solve the rows of new classes in closed form before iteration 1 (see d2_headadapt/fit); nothing where none is new.
    fit = node.FIT = CfgNode()
    fit.ENABLED = True
    # At most so many training images are looked at, rare classes first; each also mirrored where INPUT.RANDOM_FLIP is
    # "horizontal", as in training.
    fit.IMAGES = 300
    fit.MIRROR = True
    # At most so many regions are kept in memory for one solve, and so many of the best proposals of an image are used.
    fit.REGIONS = 60000
    fit.PROPOSALS = 100
    # Heads that may be solved; RPN is "auto" (where held-out recall rises by it), "always" or "never".
    fit.PARTS = ["rpn", "box", "mask", "dense", "task"]
    fit.RPN = "auto"
    # Penalties to choose from by held-out score, strongest first: of classifiers, and of box regressors.
    fit.PENALTIES = [3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4]
    fit.BOX_PENALTIES = [3.0, 1.0, 0.3, 0.1, 0.03, 0.01]
    # Share of the images that choose them.
    fit.HELD_OUT = 0.2
    # A region is background up to the first overlap with its object, the object from the second on.
    fit.SOFT_IOU = [0.4, 0.8]
    # A region that no label explains is left out where a carried class has at least this probability.
    fit.CONFIDENT = 0.5
    # Memory in MB for backbone features between passes, and the fit's own seed.
    fit.CACHE_MB = 1024
    fit.SEED = 0
    # The training that follows: for so many iterations every fifth step goes back half of the way, and after these the
    # new rows are solved again.
    fit.CALM_ITERS = 600
    fit.REFITS = [50, 100, 200]

    # Add the training set's new classes behind an unmodified model: "exact" leaves every old detection as it is, bit
    # for bit, and trains nothing but the branch of the new classes (see docs/guides/keep.md). Empty: one head for all
    # classes. The training set may list the new classes alone; old objects in its images need no labels.
    node.KEEP = ""
    # The new classes read the old box head's features ("shared"), or those of a copy of it that is trained ("copy").
    node.KEEP_HEAD = "shared"
    # "append": new detections stand behind the old ones. "suppress": a new one whose score is KEEP_SUPPRESS_SCORE or
    # more hides the old ones that it overlaps by half (IoU); images without such a one stay as they were.
    node.KEEP_DETECTIONS = "append"
    node.KEEP_SUPPRESS_SCORE = 0.5
    # Second proposals, at most 100 an image, seen by the new classes alone: "auto" (where held-out recall rises by
    # 0.02), "on" or "off".
    node.KEEP_PROPOSALS = "auto"
    # A folder of photos, or a registered dataset, without an object of a new class. Labels are not read.
    node.KEEP_NEGATIVES = ""
    # Written by this package when the classes are settled: what was added, a mapping for each session.
    node.KEEP_PACKS = []

    # What a new row starts from before any fit: "recipe" (what the model's constructor drew) or "nearest" (the carried
    # classes whose text embeddings in TEXT.FILE are nearest).
    node.NEW_ROWS = "recipe"

    # A classifier of text embeddings (see docs/text.md): PREDICTOR "HeadAdaptTextOutputLayers".
    text = node.TEXT = CfgNode()
    # Embeddings, one row per class: .npy, .pth or .safetensors.
    text.FILE = ""
    # Names of its rows, as SOURCE_CLASSES. None reads the file beside it that ends in .json:
    # {"names": [...], "encoder": "ViT-B/32", "normalised": false}.
    text.NAMES = None
    # The text encoder that wrote it, such as "RN50x4"; checked against the width.
    text.ENCODER = ""
    # "learned", "zero" (its logit is 0), or "file" (an entry of its own, or the last of K + 1 rows).
    text.BACKGROUND = "learned"
    # Logits are this number times the cosine of region and class.
    text.TEMPERATURE = 50.0
    # Train the class rows too; a linear layer from region features to text space is always trained.
    text.TRAINABLE = False
    # That linear layer: "auto" (where the widths differ), "always" or "never".
    text.PROJECTION = "auto"
    # Whose rows count where a checkpoint has them too: "file", "checkpoint" (new classes still from the file), or
    # "error" where they differ.
    text.PRECEDENCE = "file"

    # The box predictor's name in d2_headadapt.PREDICTOR_REGISTRY.
    node.PREDICTOR = "HeadAdaptOutputLayers"

    # Classification tasks beside detection: task name -> its keys (see docs/tasks.md).
    cfg.MODEL.TASKS = CfgNode(new_allowed=True)

    # MultiTaskClassifier: the backbone's feature (empty: its last one), "avg" or "flatten", and the (height, width) of
    # its images, from which the width of flattened features is inferred.
    cfg.MODEL.CLASSIFIER = CfgNode()
    cfg.MODEL.CLASSIFIER.IN_FEATURE = ""
    cfg.MODEL.CLASSIFIER.POOLING = "avg"
    cfg.MODEL.CLASSIFIER.INPUT_SIZE = [224, 224]

    # build_conv_net_backbone: the channels of its 3x3 convolutions, each followed by ReLU and 2x2 max pooling.
    cfg.MODEL.CONV_NET = CfgNode()
    cfg.MODEL.CONV_NET.CHANNELS = [64, 128, 256]

    # Datasets to register: mappings with name, json (COCO format) and images. Paths are relative to the yaml that
    # holds the entry; on the command line, to the working directory. A child yaml's list replaces its base's.
    cfg.DATASETS.REGISTER = []
