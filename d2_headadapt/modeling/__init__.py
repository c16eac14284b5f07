"""Modules: box predictors, ROI heads, the image classifier, and the heads of tasks."""

# First, because its import ends with that of every module here that registers something (..deferred): were it
# begun by one of them, that one would be half imported when the others want it.
import detectron2.modeling as _modeling  # noqa: F401
