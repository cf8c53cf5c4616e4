#!/usr/bin/env bash
# Builds the folder of wheels that a GPU machine without a network needs beside its own torch and triton.
#
#     bench/wheelhouse.sh FOLDER [--python 3.12] [--limit MB] [--only GROUP]...
#     FOLDER/install.sh [python]              on that machine: joins what was split, checks sums, installs
#
# Groups (all if none is named):
#     ours          ava-fast, with the CPU half of its extension; `make bench-gpu` builds the CUDA half where it runs
#     deepspeed     DeepSpeed as a pure wheel
#     needed        what the wheels that are there ask for, and what that asks for, apart from what comes with torch
#     liger         Liger's Triton kernels: the easiest strong peer
#     transformers  the training step's peer, with what it asks for
#     sonic         SonicMoE with the versions that it asks for, in a folder of their own: they are not flash-attn's. It
#                   asks for torch 2.9.1 at most, too; a newer one is tried, and `make bench-gpu` records how that ends
#     flash         flash-attn 4 with what it asks for, in a folder of its own likewise
# A group that cannot be had is told and left out; the exit code is then 1. With --limit no file is larger than that: a
# wheel is recompressed first, and split if that does not do (`python -m bench.wheels`).
set -euo pipefail

usage() { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
PYTHON=${PYTHON:-python3}
export DS_BUILD_OPS=0 DS_ACCELERATOR=cpu  # DeepSpeed's wheel is a pure one
here=$(cd "$(dirname "$0")/.." && pwd)
folder= target=3.12 limit= groups=
while [ $# -gt 0 ]; do
  case $1 in
    --python) target=${2:?"--python needs a version such as 3.12"}; shift 2 ;;
    --limit) limit=${2:?"--limit needs megabytes"}; shift 2 ;;
    --only) groups="$groups ${2:?"--only needs a group"}"; shift 2 ;;
    -*) echo "wheelhouse.sh: $1 is no option" >&2; usage ;;
    *) [ -z "$folder" ] || usage; folder=$1; shift ;;
  esac
done
[ -n "$folder" ] || usage
every="ours deepspeed needed liger transformers sonic flash"
groups=${groups:-$every}
for name in $groups; do
  case " $every " in *" $name "*) ;; *) echo "wheelhouse.sh: there is no group $name; there are $every" >&2; exit 2 ;; esac
done
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)

pinned() { sed -n "s/^\($1==[^ ;]*\).*/\1/p" "$here/constraints.txt" | grep . || echo "$1"; }
build() { "$PYTHON" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$folder" "$@"; }
fetch() { # into a folder, for the other machine's Python
  local into=$1; shift
  "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$target" --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    --constraint "$here/constraints.txt" --dest "$into" "$@"
}
complete() { # adds what the wheels in a folder ask for, until they ask for nothing more
  local wanted
  while true; do
    wanted=$(PYTHONPATH=$here "$PYTHON" -m bench.wheels needs --python "$target" "$1" "$folder")
    case $wanted in
      "") return ;;
      *hjson*) build hjson ;; # has no wheel
      *deepspeed*) build "$(pinned deepspeed)" ;; # nor has this
      *) mapfile -t wanted <<<"$wanted" && fetch "$1" "${wanted[@]}" ;;
    esac
  done
}

group() {
  case $1 in
    ours) # from a copy: what an earlier build has left in the tree would go into the wheel
      copy=$(mktemp -d)
      trap 'rm -rf "$copy"' EXIT
      (cd "$here" && cp -r pyproject.toml setup.py README.md LICENSE csrc ava_fast kernels "$copy")
      find "$copy" \( -name '*.so' -o -name __pycache__ \) -prune -exec rm -rf {} +
      build "$copy" ;;
    deepspeed) build "$(pinned deepspeed)" ;;
    needed) complete "$folder" ;;
    liger) fetch "$folder" liger-kernel==0.8.5 ;;
    transformers) fetch "$folder" transformers && complete "$folder" ;;
    sonic)
      fetch "$folder/sonic-moe" sonic-moe==0.1.2.post1 quack-kernels==0.3.11 nvidia-cutlass-dsl-libs-cu13==4.4.2
      complete "$folder/sonic-moe" ;;
    flash)
      fetch "$folder/flash-attn-4" flash-attn-4==4.0.0b36 'nvidia-cutlass-dsl>=4.6.2' 'nvidia-cutlass-dsl-libs-cu13>=4.6.2'
      complete "$folder/flash-attn-4" ;;
  esac
}

missing=
for name in $groups; do
  echo "--- $name"
  # In a process of its own, and not asked for its success by || or if, which would switch set -e off in there.
  set +e
  (set -e; group "$name")
  code=$?
  set -e
  [ $code -eq 0 ] || { missing="$missing $name"; echo "--- $name could not be had"; }
done

cat >"$folder/install.sh" <<'INSTALL'
#!/usr/bin/env bash
# Installs these wheels: install.sh [python]. Those in folders of their own (sonic-moe, flash-attn-4) exclude each other
# and are left: pip install --no-index --no-deps sonic-moe/*.whl
set -euo pipefail
cd "$(dirname "$0")"
find . -name '*.part00' | while read -r first; do
  whole=${first%.part00}
  cat "$whole".part[0-9][0-9] >"$whole"
done
sha256sum --quiet --check SHA256SUMS
"${1:-python3}" -m pip install --no-index --no-deps ./*.whl
INSTALL
chmod +x "$folder/install.sh"
(cd "$folder" && find . -name '*.whl' | sort | xargs -r sha256sum >SHA256SUMS)
if [ -n "$limit" ]; then
  PYTHONPATH=$here "$PYTHON" -m bench.wheels fit --limit "$limit" "$folder"
fi
echo "$folder: $(find "$folder" -type f | wc -l) files, $(du -sh "$folder" | cut -f1); install.sh installs them"
[ -z "$missing" ] || { echo "not in the folder:$missing" >&2; exit 1; }
