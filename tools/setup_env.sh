#!/usr/bin/env bash
# Makes the environment that every command of this project runs in. `make`, CI and docker all call this one script.
#
#   tools/setup_env.sh [--dry-run]
#
# --dry-run checks this machine, says what would happen and stops.
#
# Environment variables:
#   PYTHON           the interpreter to build on (default python3). When it already imports torch, torchvision, numpy
#                    and detectron2, the environment is made over it: those four stay as they are.
#   DETECTRON2       wheel (default): the checked wheel from PyPI, without compiled operators;
#                    git: build a pinned upstream commit, with compiled operators (needs git and a C++ compiler),
#                    beside a newer numpy.
#   DETECTRON2_REPO  where DETECTRON2=git clones from, for a mirror; a folder (a source tree, or a git directory, of
#                    which HEAD counts) is built as it is, and again when it has another commit
#   VENV             where the environment goes (default .venv in the project)
#   D2HA_NEED_MB     free disk to ask for, in MB, in place of this script's own figure
#
# An environment that is complete is used as it is, whatever PYTHON says by then; delete it to change. Its stamp file is
# written last, so an interrupted or failed set-up is made again from the start; so it is when this script changes or
# the project moves. A change of setup.py or pyproject.toml only reinstalls the package.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
case "$VENV" in /*) ;; *) VENV=$root/$VENV ;; esac
UPSTREAM=${DETECTRON2_REPO:-https://github.com/facebookresearch/detectron2}
UPSTREAM_COMMIT=02b5c4e295e990042a714712c21dc79b731e8833
NUMPY_OF_GIT=2.4.6

# Upstream commit a59f0563 of 2024-04-17. detectron2 itself is not on PyPI.
WHEEL=sal-detectron2==0.7.2
WHEEL_SHA256=491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561

# Measured on Linux x86_64, where torch brings its CUDA libraries along.
DOWNLOAD_MB=2800
DISK_MB=6400

# What is asked for by name; versions are in pins(). detectron2's own requirements are here because its wheel is
# installed without them, and opencv because its visualizer imports cv2 without declaring it.
PACKAGES="torch torchvision numpy fvcore iopath pycocotools
  black cloudpickle hydra-core matplotlib omegaconf packaging pillow tabulate tensorboard termcolor tqdm yacs
  opencv-python-headless scikit-learn safetensors onnx onnxruntime onnxscript
  hypothesis mypy pytest pytest-xdist ruff types-pyyaml types-setuptools types-tabulate types-tqdm"

# Every version, the indirect ones too. setuptools stays below 81 because detectron2 imports pkg_resources, numpy
# below 2 because the detectron2 wheel asks for it; what is built here takes a newer one.
pins() {
  if [ "$mode" = git ]; then sed "s/^numpy==.*/numpy==$NUMPY_OF_GIT/"; else cat; fi <<'PINS'
absl-py==2.5.1
antlr4-python3-runtime==4.9.3
ast-serialize==0.13.1
black==26.10.1
click==8.5.1
cloudpickle==3.1.2
contourpy==1.3.3
cuda-bindings==13.5.0
cuda-pathfinder==1.9.0
cuda-toolkit==13.2.2
cycler==0.12.1
execnet==2.1.2
filelock==4.2.11
flatbuffers==25.12.19
fonttools==4.68.0
fsspec==2026.9.0
fvcore==0.1.5.post20221221
grpcio==1.85.1
hydra-core==1.3.8
hypothesis==6.170.15
iniconfig==2.3.1
iopath==0.1.9
jinja2==3.1.6
joblib==1.6.0
kiwisolver==1.5.1
librt==0.16.0
markdown==3.11.3
markupsafe==3.0.4
matplotlib==3.11.2
ml-dtypes==0.5.4
mpmath==1.3.0
mypy-extensions==1.2.0
mypy==2.4.1
narwhals==2.29.0
networkx==3.6.1
numpy==1.26.4
nvidia-cublas==13.4.1.3
nvidia-cuda-cccl==13.3.5.0.6
nvidia-cuda-cupti==13.2.86
nvidia-cuda-nvrtc==13.2.86
nvidia-cuda-runtime==13.2.86
nvidia-cudnn-cu13==9.26.0.51
nvidia-cufft==12.2.0.57
nvidia-cufile==1.17.1.22
nvidia-cusolver==12.2.0.11
nvidia-cusparse==12.7.10.12
nvidia-cusparselt-cu13==0.8.1
nvidia-nccl-cu13==2.30.7
nvidia-nvjitlink==13.5.37
nvidia-nvshmem-cu13==3.7.2
nvidia-nvtx==13.2.86
omegaconf==2.3.1
onnx-ir==1.1.0
onnx==1.23.2
onnxruntime==1.31.1
onnxscript==0.7.2
opencv-python-headless==4.11.0.86
packaging==26.3
pathspec==1.1.1
pillow==13.0.0
pip==26.3
platformdirs==4.14.7
pluggy==1.7.0
portalocker==4.4.2
protobuf==7.36.2
pycocotools==2.0.11
pygments==2.21.0
pyparsing==3.3.3
pytest-xdist==3.8.0
pytest==9.2.0
python-dateutil==4.0.0
pytokens==0.4.1
pyyaml==6.0.3
ruff==0.17.6
safetensors==0.8.0
scikit-learn==1.9.1
scipy==1.17.1
setuptools==80.10.2
sortedcontainers==2.4.0
sympy==1.14.0
tabulate==0.10.0
tensorboard-data-server==0.7.2
tensorboard==2.21.0
termcolor==3.3.0
threadpoolctl==3.8.0
torch==2.15.0
torchvision==0.29.2
tqdm==4.70.1
triton==3.9.0
types-pyyaml==6.0.12.20261113
types-setuptools==84.2.0.20261104
types-tabulate==0.10.0.20261006
types-tqdm==4.70.0.20261106
typing-extensions==4.16.0
tzdata==2026.6
werkzeug==3.1.9
yacs==0.1.8
PINS
}

# Describes the interpreter, one word or path per line. The last line is "over" when it has detectron2, else "own".
# Inside $VENV itself (an activated environment) the interpreter under it is meant.
PROBE='
import importlib.util, os, sys
venv = os.path.realpath(sys.argv[1])
if os.path.realpath(sys.prefix) == venv:
    print("base", getattr(sys, "_base_executable", sys.executable), sep="\n")
    sys.exit()
print("python", "%d.%d" % sys.version_info[:2], sep="\n")
try:
    import ensurepip, venv
    print("yes")
except ImportError:
    print("no")
print("venv" if sys.prefix != sys.base_prefix else "plain")
try:
    import detectron2.layers, numpy, torch, torchvision
    print("over")
except Exception:
    print("broken" if importlib.util.find_spec("detectron2") else "own")
'

# Version and place of the four packages that an environment made over another one must not change.
FOUR='
import detectron2, numpy, torch, torchvision
for module in (torch, torchvision, numpy, detectron2):
    print(module.__name__, getattr(module, "__version__", "?"), module.__file__)
'

# The lines of a .pth file that shows the packages which this interpreter sees and the new environment does not: those
# of a virtual environment that it belongs to (--system-site-packages shows the base interpreter's instead) and those
# on PYTHONPATH. addsitedir also runs the .pth files there, which editable installs depend on.
PARENT_PATHS='
import os, sys
visible = sys.argv[1].splitlines()
for path in sys.path:
    if os.path.isdir(path) and os.path.abspath(path) not in visible:
        if os.path.basename(path) in ("site-packages", "dist-packages"):
            print("import site; site.addsitedir(%r)" % os.path.abspath(path))
        else:
            print(os.path.abspath(path))
'

# Pins what is already there, so that pip never brings a second version of it.
PRESENT='
from importlib.metadata import distributions
from pip._vendor.packaging.utils import canonicalize_name
from pip._vendor.packaging.version import InvalidVersion, Version
seen = {}
for dist in distributions():
    name = canonicalize_name(dist.metadata["Name"] or "")
    if name and name not in ("pip", "setuptools", "wheel", "d2-headadapt"):
        seen.setdefault(name, dist.version)
for name, version in sorted(seen.items()):
    try:
        print("%s==%s" % (name, Version(version)))
    except (InvalidVersion, TypeError):
        pass
'

SMOKE='
import cv2, torch, torchvision
from detectron2 import model_zoo
from detectron2.layers import batched_nms
boxes, scores = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 1.0, 10.0, 10.0]]), torch.tensor([0.9, 0.8])
assert torchvision.ops.nms(boxes, scores, 0.5).tolist() == [0]
assert batched_nms(boxes, scores, torch.tensor([0, 0]), 0.5).tolist() == [0]
'

say() { printf 'setup_env: %s\n' "$*"; }
die() {
  printf 'setup_env: %s\n' "$*" >&2
  exit 1
}

current=
step() {
  step_done
  current=$1
  started=$SECONDS
  say "$1 ..."
}
step_done() { if [ -n "$current" ]; then say "  $((SECONDS - started)) s"; fi; }
failed() {
  local code=$?
  if [ -n "$current" ] && [ "$code" != 0 ]; then
    printf 'setup_env: failed at: %s. It is not marked as done; the next call does it again.\n' "$current" >&2
  fi
}
trap failed EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

dry_run=
case "${1:-}" in
  "") ;;
  --dry-run) dry_run=1 ;;
  -h | --help)
    sed -n '2,/^$/s/^# \{0,1\}//p' tools/setup_env.sh
    exit 0
    ;;
  *) die "unknown argument '$1'; the only one is --dry-run" ;;
esac
case "${DETECTRON2:-wheel}" in
  wheel | git) ;;
  *) die "DETECTRON2 is '$DETECTRON2'; expected wheel or git" ;;
esac

# What DETECTRON2=git builds, as the stamp names it.
origin="commit $UPSTREAM_COMMIT"
if [ -d "$UPSTREAM" ]; then
  UPSTREAM=$(cd "$UPSTREAM" && pwd)
  if commit=$(git -C "$UPSTREAM" rev-parse -q --verify HEAD 2>/dev/null) &&
    git -C "$UPSTREAM" cat-file -e HEAD:detectron2/__init__.py 2>/dev/null; then
    origin="commit $commit of $UPSTREAM"
  else
    origin="folder $UPSTREAM"
  fi
fi

# ------------------------------------------------------------------------------------------------ is it there already?

stamp=$VENV/.d2ha-complete
marker=$VENV/.d2ha # written first: only a folder that carries it is ever deleted
py=$VENV/bin/python

digest() { cat "$@" | cksum | tr ' \t' '--'; }
# The folder's own path counts because a virtual environment and an editable install both hold absolute paths.
base_id="script $(digest tools/setup_env.sh) at $root"
package_id="package $(digest setup.py pyproject.toml)"

has() { grep -qxF -- "$1" "$stamp" 2>/dev/null; }

check_agreement() {
  pip_check >"$VENV/.pip-check" || true
  # What counts is a complaint that was not there before this script installed anything.
  if grep -vxF -f "$VENV/.pip-check-before" "$VENV/.pip-check" >&2; then
    die "pip check found that the installed packages disagree, see above"
  fi
}
# The wheel is built for Python 3.10 but its Python files run on later ones, which pip cannot know.
pip_check() {
  "$py" -m pip check 2>/dev/null | grep -v -e '^sal-detectron2 .* is not supported on this platform' -e '^No broken'
}

# The last step. It alone runs again when only the package's own metadata changed or it alone failed.
install_package() {
  step "installing d2_headadapt itself, editable"
  # setuptools warns about every editable install of a package that lies beside other folders.
  PYTHONWARNINGS=ignore "$py" -m pip install -q --no-deps --no-build-isolation -e .
  check_agreement
  "$py" -W ignore -c 'import d2_headadapt'
  step_done
  current=
  printf '%s\n' "$base_id" "$package_id" "detectron2 $mode" "$built" >"$stamp.new"
  mv "$stamp.new" "$stamp"
  say "$VENV is ready, after $SECONDS s"
}

if [ -z "$dry_run" ] && command -v flock >/dev/null; then
  mkdir -p "$(dirname "$VENV")"
  exec 9>"$VENV.lock" # two commands started at once would delete each other's half-made environment
  flock -n 9 || { say "waiting for another set-up of $VENV" && flock 9; }
fi
if has "$base_id" && { [ "${DETECTRON2:-}" != git ] || has "built from $origin"; }; then
  if has "$package_id"; then
    say "$VENV is ready"
    exit 0
  elif [ -z "$dry_run" ]; then
    mode=$(sed -n 's/^detectron2 //p' "$stamp")
    built=$(sed -n '/^built from /p' "$stamp")
    install_package
    exit 0
  fi
fi

# ----------------------------------------------------------------------------------------------- can this machine do it?

command -v "$PYTHON" >/dev/null || die "no interpreter '$PYTHON'; install Python 3.11 or 3.12, or name one with PYTHON="
probe() {
  local out
  out=$("$PYTHON" -W ignore -c "$PROBE" "$VENV" 2>/dev/null) || die "'$PYTHON' does not run as a Python 3"
  { read -r kind && read -r version; } <<<"$out" || true
  if [ "$kind" = base ]; then
    PYTHON=$version
    return 1
  fi
  { read -r _ && read -r _ && read -r ensurepip && read -r flavour && read -r found; } <<<"$out"
}
probe || probe

case "$found" in
  over)
    [ "${DETECTRON2:-wheel}" = wheel ] ||
      die "$PYTHON already has detectron2, which stays as it is; for DETECTRON2=git name a Python without it"
    mode=present
    case "$version" in
      3.[0-9]) die "$PYTHON is Python $version; d2_headadapt needs 3.10 or later" ;;
    esac
    ;;
  *)
    mode=${DETECTRON2:-wheel}
    unset PYTHONPATH # what lies there is not part of the pinned environment
    case "$version" in
      3.11 | 3.12) ;;
      *) die "$PYTHON is Python $version; the pinned torch and numpy exist for 3.11 and 3.12 (name one with PYTHON=)" ;;
    esac
    ;;
esac
[ "$ensurepip" = yes ] ||
  die "$PYTHON cannot make virtual environments: it lacks venv or ensurepip (on Debian: apt install python$version-venv)"
if [ "$found" = broken ]; then
  say "$PYTHON has a detectron2 that does not import; it is left alone and not used"
fi
if [ -e "$VENV" ] && [ ! -e "$marker" ]; then
  die "$VENV exists and was not made by this script; move it away, or name another place with VENV="
fi
if [ "$mode" = git ]; then
  command -v git >/dev/null || die "DETECTRON2=git needs git"
  command -v "${CXX:-c++}" >/dev/null || die "DETECTRON2=git needs a C++ compiler; '${CXX:-c++}' is not there"
  if [ -d "$UPSTREAM" ]; then
    [ -f "$UPSTREAM/setup.py" ] || [ "$origin" != "folder $UPSTREAM" ] ||
      die "DETECTRON2=git: $UPSTREAM is neither a source tree nor a git directory of detectron2"
  else
    GIT_TERMINAL_PROMPT=0 git -c http.lowSpeedLimit=1000 -c http.lowSpeedTime=30 ls-remote "$UPSTREAM" HEAD \
      >/dev/null 2>&1 || die "DETECTRON2=git: $UPSTREAM cannot be reached from here; DETECTRON2=wheel needs PyPI only"
  fi
fi

if [ "$mode" = present ]; then
  DOWNLOAD_MB=250 DISK_MB=800
fi
# While pip works, the downloaded files lie beside the environment and, by default, in pip's cache.
need=${D2HA_NEED_MB:-$((DISK_MB + 2 * DOWNLOAD_MB))}
parent=$VENV
while [ ! -d "$parent" ]; do parent=$(dirname "$parent"); done
free=$(df -Pk "$parent" | awk 'NR == 2 { print int($4 / 1024) }')
if [ -d "$VENV" ]; then # it is deleted first
  free=$((free + $(du -sk "$VENV" | awk '{ print int($1 / 1024) }')))
fi
[ "$free" -ge "$need" ] || die "too little disk for $VENV: $need MB needed while installing, $free MB free"

case "$mode" in
  present) what="over $PYTHON, whose torch, torchvision, numpy and detectron2 stay as they are" ;;
  wheel) what="with $PYTHON (Python $version) and detectron2 from the wheel $WHEEL" ;;
  git) what="with $PYTHON (Python $version) and detectron2 built from $origin" ;;
esac
say "making $VENV $what"
say "download at most $DOWNLOAD_MB MB, disk at most $DISK_MB MB ($need MB free while installing; $free MB are)"
[ -z "$dry_run" ] || exit 0

# ---------------------------------------------------------------------------------------------------------- make it

step "making the virtual environment"
mkdir -p "$VENV"
: >"$marker"
rm -f "$stamp"
find "$VENV" -mindepth 1 -maxdepth 1 ! -name "${marker##*/}" -exec rm -rf {} +
mkdir "$VENV/tmp"
if [ "$mode" = present ] && [ "$flavour" = plain ]; then
  "$PYTHON" -m venv --system-site-packages "$VENV"
else
  "$PYTHON" -m venv "$VENV"
fi
site=$("$py" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
if [ "$mode" = present ]; then
  before=$("$PYTHON" -W ignore -c "$FOUR")
  visible=$(env -u PYTHONPATH "$py" -c 'import sys; print("\n".join(sys.path))')
  "$PYTHON" -c "$PARENT_PATHS" "$visible" >"$site/d2ha_parent.pth"
fi
unset PYTHONPATH PIP_TARGET PIP_PREFIX PIP_USER # or pip would find or put packages elsewhere
export TMPDIR=$VENV/tmp # a small /tmp would not hold the torch wheel

constraints=$VENV/.constraints.txt
pins >"$constraints"
: >"$VENV/.pip-check-before"
if [ "$mode" = present ]; then
  [ "$before" = "$("$py" -W ignore -c "$FOUR")" ] || die "$VENV does not see the packages that $PYTHON sees"
  pip_check >"$VENV/.pip-check-before" || true
  "$py" -c "$PRESENT" >"$VENV/.present.txt"
  case "$version" in
    3.11 | 3.12) # what is there keeps its version; a package that is not there gets ours
      cut -d= -f1 "$VENV/.present.txt" | sed 's/.*/^&==/' >"$VENV/.names.txt"
      pins | grep -v -f "$VENV/.names.txt" | cat - "$VENV/.present.txt" >"$constraints"
      ;;
    *) cp "$VENV/.present.txt" "$constraints" ;; # our pins have no wheels for this Python
  esac
  # Another build of OpenCV under another name would be shadowed by ours.
  if "$py" -c 'import cv2' 2>/dev/null; then PACKAGES=${PACKAGES/opencv-python-headless/}; fi
fi

if [ "$mode" = wheel ]; then
  step "installing detectron2 from $WHEEL, checked by its SHA-256"
  printf '%s --hash=sha256:%s\n' "$WHEEL" "$WHEEL_SHA256" >"$VENV/.wheel.txt"
  "$py" -m pip install -q --no-deps --require-hashes -r "$VENV/.wheel.txt" \
    --target "$site" --python-version 3.10 --only-binary=:all:
fi

step "installing pip and setuptools"
# Packages without a wheel are built with this setuptools, not with whatever is newest that day.
"$py" -m pip install -q -c <(pins) pip setuptools
if [ "$mode" = present ]; then
  step "installing what is missing"
else
  step "installing torch and the other packages (a few minutes)"
fi
# shellcheck disable=SC2086  # a list of words
"$py" -m pip install -q --no-build-isolation -c "$constraints" $PACKAGES

if [ "$mode" = git ]; then
  step "building detectron2 from $origin (five to ten minutes on two cores)"
  what="detectron2 @ git+$UPSTREAM@$UPSTREAM_COMMIT"
  if [ -d "$UPSTREAM" ]; then # a copy, because building writes into the folder
    what=$VENV/tmp/detectron2
    mkdir "$what"
    if [ -f "$UPSTREAM/setup.py" ]; then
      tar c -C "$UPSTREAM" --exclude=./.git --exclude=./build --exclude='*.so' . | tar x -C "$what"
    else
      git -C "$UPSTREAM" archive HEAD | tar x -C "$what"
    fi
  fi
  "$py" -m pip install -q --no-deps --no-build-isolation "$what"
fi
if [ "$mode" = present ] && [ "$before" != "$("$py" -W ignore -c "$FOUR")" ]; then
  die "torch, torchvision, numpy or detectron2 is no longer the one of $PYTHON"
fi
step "checking that it imports and that the packages agree"
"$py" -W ignore -c "$SMOKE"
check_agreement
rm -rf "$VENV/tmp"
unset TMPDIR
built=
[ "$mode" != git ] || built="built from $origin"
printf '%s\n' "$base_id" "detectron2 $mode" "$built" >"$stamp" # all but the package line, without which it is not complete
install_package
