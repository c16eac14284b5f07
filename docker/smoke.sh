#!/usr/bin/env bash
# What a finished image must show. The words are the image's CMD; a short part of the tests runs through it.
#
#   docker run --rm --network none d2_headadapt bash docker/smoke.sh make test
set -euo pipefail
fail() {
  printf 'smoke: %s\n' "$*" >&2
  exit 1
}

[ $# -gt 0 ] || fail "the words of the image's CMD are missing"
[ "$(id -u)" != 0 ] || fail "the user is root"
for outside in .git output shared .pytest_cache; do
  [ ! -e "$outside" ] || fail "$outside is in the image"
done
foreign=$(find . ! -user "$(id -un)" -print -quit)
[ -z "$foreign" ] || fail "$foreign does not belong to $(id -un)"
[ "$(command -v d2-headadapt)" = "$PWD/.venv/bin/d2-headadapt" ] || fail "PATH does not lead to the environment"
d2-headadapt --version
python -W ignore -c 'import importlib.util, sys, torch
print("Python", sys.version.split()[0], "torch", torch.__version__, "CUDA device:", torch.cuda.is_available())
print("compiled operators of detectron2:", "yes" if importlib.util.find_spec("detectron2._C") else "no")'

place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
PYTHONPATH=tests python -W ignore - "$place" <<'PYTHON'
import sys
from pathlib import Path

from helpers.files import save_stock
from helpers.models import stock_model, tiny_cfg

place = Path(sys.argv[1])
save_stock(stock_model(5, seed=21), place / "old.pth")
(place / "tiny.yaml").write_text(tiny_cfg(masks=False).dump())
PYTHON
d2-headadapt plan --config-file "$place/tiny.yaml" --weights "$place/old.pth" \
  MODEL.HEAD_ADAPT.SOURCE_CLASSES "['a', 'b', 'c', 'd', 'e']" MODEL.HEAD_ADAPT.TARGET_CLASSES "['c', 'zebra', 'a']" \
  >"$place/plan.txt" 2>"$place/plan.err" || { cat "$place/plan.err" >&2 && fail "plan did not run"; }
grep -q zebra "$place/plan.txt" || fail "plan does not name the new class"

"$@" ARGS="-q -p no:cacheprovider tests/adapt/test_classes.py tests/cli/test_cli.py"
printf 'smoke: fine, as %s (uid %s) in %s\n' "$(id -un)" "$(id -u)" "$PWD"
