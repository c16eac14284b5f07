#!/usr/bin/env bash
# Builds the image of docker/Dockerfile, also where no Docker daemon runs, and runs docker/smoke.sh in it.
#
#   docker/build.sh [--install] [argument of "docker build" ...]
#
# docker or podman does it where one of them answers, and keeps the image under the name d2_headadapt. Elsewhere
# buildah does it, as root, in a storage of its own under output/docker, which is deleted at the end. buildah's base is
# the image that BASE names or, where no registry gives it, the same release of Debian, made by debootstrap.
# --install lets apt-get install buildah and debootstrap where they are missing.
#
# Exit status: 0 built and the smoke test passed, 1 one of them failed, 3 not built, because this machine cannot.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=$PWD/output/docker
need_mb=${D2HA_NEED_MB:-25000}

say() { printf 'docker: %s\n' "$*"; }
fail() { # never with the status of what failed, which could be 3
  say "FAILED: $*" >&2
  exit 1
}
cannot() {
  say "NOT BUILT: $*" >&2
  exit 3
}

# How this machine reaches its registries, lent to the build, read-only: apt's and pip's settings, certificates, and the
# folders of packages that pip is told of. The image keeps empty mount points. buildah passes proxies and name servers.
lend() {
  local lent=$work/lent section key value place
  mkdir "$lent"
  apt-config dump 2>/dev/null | grep -E '^Acquire::(https?|Retries|Check-Valid-Until|Check-Date)\b.* ".+";$' \
    >"$lent/apt.conf" || true
  "${PYTHON:-python3}" -m pip config list >"$lent/listed" 2>/dev/null || true
  for section in :env: install global; do # the first that has a key counts, as for "pip install"
    sed -n "s/^$section\.\([a-z-]*\)='\(.*\)'\$/\1 \2/p" "$lent/listed" | sed 's/\\n/ /g'
  done | awk '!seen[$1]++' >"$lent/settings"
  echo '[global]' >"$lent/pip.conf"
  while read -r key value; do
    case "$key" in
      cert | client-cert)
        [ -f "$value" ] || continue
        volumes+=(-v "$value:/run/lent/$key:ro")
        value=/run/lent/$key
        ;;
      find-links | index-url | extra-index-url)
        for place in $value; do
          place=${place#file://}
          [ "$key" = find-links ] || place=$(dirname "$place") # an index links to files beside it
          if [ -d "$place" ] && [ "$place" != / ]; then volumes+=(-v "$place:$place:ro"); fi
        done
        ;;
      trusted-host | proxy | timeout | default-timeout | retries | no-index) ;;
      *) continue ;;
    esac
    printf '%s = %s\n' "$key" "$value" >>"$lent/pip.conf"
  done <"$lent/settings"
  [ ! -s "$lent/apt.conf" ] || volumes+=(-v "$lent/apt.conf:/etc/apt/apt.conf.d/99lent:ro")
  [ ! -s "$lent/settings" ] || volumes+=(-v "$lent/pip.conf:/etc/pip.conf:ro")
}

make_base() { # localhost/base of the release $1, such as bookworm
  local mirror container root
  # shellcheck disable=SC2016  # apt's own variables
  mirror=$(apt-get indextargets --format '$(CREATED_BY) $(CODENAME) $(COMPONENT) $(REPO_URI)' 2>/dev/null |
    sed -n "s/^Packages $1 main //p" | sed -n 1p) || true
  container=$(buildah from scratch)
  root=$(buildah mount "$container")
  debootstrap --force-check-gpg --variant=minbase "$1" "$root" ${mirror:+"$mirror"} >"$work/debootstrap.log" 2>&1 ||
    cannot "debootstrap made no Debian $1: $(tail -n 1 "$work/debootstrap.log")"
  rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
  buildah umount "$container" >/dev/null
  buildah commit -q --rm "$container" localhost/base >/dev/null
}

with_buildah() {
  local base container words driver=vfs volumes=() arguments=("$@")
  export CONTAINERS_STORAGE_CONF=$work/storage.conf BUILDAH_ISOLATION=chroot TMPDIR=$work/tmp
  mkdir -p "$TMPDIR"/{lower,upper,work,merged}
  # vfs works everywhere and copies every layer; overlay copies none, and does not work on top of another overlay.
  mount -t overlay -o "lowerdir=$TMPDIR/lower,upperdir=$TMPDIR/upper,workdir=$TMPDIR/work" none "$TMPDIR/merged" \
    2>/dev/null && driver=overlay
  printf '[storage]\ndriver = "%s"\ngraphroot = "%s"\nrunroot = "%s"\n' \
    "${STORAGE_DRIVER:-$driver}" "$work/storage" "$work/run" >"$CONTAINERS_STORAGE_CONF"
  base=$(sed -n 's/^ARG BASE=//p' docker/Dockerfile)
  if [[ "$*" != *BASE=* ]] && ! timeout 300 buildah pull -q "$base" >"$work/pull.log" 2>&1; then
    say "no registry gives $base here; Debian ${base##*-}, made by debootstrap, stands in for it"
    make_base "${base##*-}"
    arguments+=(--build-arg BASE=localhost/base)
  fi
  lend
  say "the base is there after $SECONDS s"
  buildah bud -f docker/Dockerfile -t localhost/d2_headadapt "${volumes[@]}" "${arguments[@]}" . ||
    fail "buildah bud ended with exit status $?"
  say "built after $SECONDS s"
  container=$(buildah from --pull-never localhost/d2_headadapt)
  read -ra words <<<"$(buildah inspect --format '{{range .OCIv1.Config.Cmd}}{{.}} {{end}}' "$container")"
  # A network of its own, and nothing in it.
  unshare --net -- buildah run "$container" -- bash docker/smoke.sh "${words[@]}" || fail "the smoke test"
  say "fine after $SECONDS s; $(du -sm "$(buildah mount "$container")" | cut -f 1) MB"
}

if [ "${1:-}" = --inside ]; then
  with_buildah "${@:2}"
  exit
fi
install=
if [ "${1:-}" = --install ]; then
  install=1
  shift
fi
for engine in docker podman; do
  if "$engine" info >/dev/null 2>&1; then
    "$engine" build -f docker/Dockerfile -t d2_headadapt "$@" . || fail "$engine build ended with exit status $?"
    read -ra words <<<"$("$engine" image inspect -f '{{range .Config.Cmd}}{{.}} {{end}}' d2_headadapt)"
    "$engine" run --rm --network none d2_headadapt bash docker/smoke.sh "${words[@]}" || fail "the smoke test"
    exit
  fi
done

[ "$(id -u)" = 0 ] || cannot "neither docker nor podman answers, and buildah needs root"
there() { command -v buildah && command -v debootstrap; } >/dev/null
if [ -n "$install" ] && ! there && command -v apt-get >/dev/null; then
  say "installing buildah and debootstrap with apt-get"
  { apt-get update && apt-get install -y --no-install-recommends buildah debootstrap debian-archive-keyring; } \
    >/dev/null 2>&1 || true
fi
there || cannot "buildah or debootstrap is missing (on Debian, as root: apt-get install buildah debootstrap)"
spaces=(unshare --mount --propagation private --pid --fork --kill-child --mount-proc --)
"${spaces[@]}" true 2>/dev/null || cannot "this machine does not let root make namespaces"
mkdir -p "$work"
exec 9>"$work.lock"
flock -n 9 || cannot "another build works in $work"
child=
stop() {
  trap - EXIT INT TERM HUP
  if [ -n "$child" ]; then
    kill -KILL "$child" 2>/dev/null || true
    { wait "$child"; } 2>/dev/null || true # bash would say that it was killed
  fi
  remove || { sleep 2 && remove; } # a process that is being killed may still write
  exit "$1"
}
remove() { rm -rf --one-file-system "$work"; }
trap 'stop $?' EXIT
trap 'stop 130' INT
trap 'stop 143' TERM HUP
remove # what a killed build left
mkdir -m 700 "$work"
free=$(df -Pm "$work" | awk 'NR == 2 { print $4 }')
[ "$free" -ge "$need_mb" ] || cannot "$need_mb MB of disk are needed under $work, $free MB are free"
# Its processes end with this one, however that ends, and what they mounted with them.
setpriv --pdeathsig KILL "${spaces[@]}" bash docker/build.sh --inside "$@" &
child=$!
status=0
wait "$child" || status=$?
case "$status" in 0 | 1 | 3) exit "$status" ;; *) fail "it ended with exit status $status" ;; esac
