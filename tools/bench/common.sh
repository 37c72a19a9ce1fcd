# shellcheck shell=bash
# What the measuring programs beside this file have in common; they source it. It leaves the shell in the repository.
#
# They set image, work and their other options, read the command line, and call `begun`.

# Relative paths of the caller are told by `absolute`.
caller=$PWD
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.."
absolute() { case $1 in /*) echo "$1" ;; *) echo "$caller/$1" ;; esac; }
die() { echo "bench: $*" >&2; exit 1; }

# begun [SIZE]: root, the program (HEADSTART, or a release build), the directory to work in, the image (that of tools/mkimage
# if none is named).
begun() {
  [ "$(id -u)" = 0 ] || die "needs root"
  if [ -z "${HEADSTART:-}" ]; then
    cargo build --quiet --release --locked
    HEADSTART=$PWD/target/release/headstart
  fi
  HEADSTART=$(absolute "$HEADSTART")
  [ -x "$HEADSTART" ] || die "there is no program $HEADSTART"
  mkdir -p "$work"
  work=$(readlink -f "$work")
  if [ -z "$image" ]; then
    image=$work/image-${1:-full}
    [ -d "$image" ] || tools/mkimage --size "${1:-full}" "$image"
  fi
  [ -e "$image/index.json" ] || die "$image is no image layout"
  image=$(readlink -f "$image")
  rm -rf "$work/results"
  mkdir -p "$work/results"
}

# Which image it is: names what is made of it, so that another one does not find it.
name_of() { sha256sum "$1/index.json" | cut -c1-12; }

# made PLACE COMMAND...: has COMMAND PLACE.part make PLACE, unless it is there.
made() {
  local to=$1; shift
  [ -e "$to" ] || { rm -rf "$to.part"; "$@" "$to.part"; mv "$to.part" "$to"; }
}

# convert_to [OPTION...] DEST: the image, converted.
convert_to() { "$HEADSTART" convert "${@:1:$#-1}" "oci:$image:latest" "oci:${*: -1}:latest" > /dev/null; }

# flat_of DEST: the tree of the converted image as one image of kernel EROFS, decompressed and local; $judges are the tools.
flat_of() {
  mkdir -p "$work/mnt-tree"
  rm -rf "$work/root-tree"
  "$HEADSTART" --root "$work/root-tree" mount --driver fuse "oci:$converted:latest" "$work/mnt-tree"
  "$judges/mkfs.erofs" -T 0 "$1" "$work/mnt-tree" > /dev/null
  "$HEADSTART" --root "$work/root-tree" umount "$work/mnt-tree"
  rm -rf "$work/root-tree"
}

# Takes away every mount below the directory of the work.
mounts_away() {
  awk -v p="$work/" 'index($5, p) == 1 { print $5 }' /proc/self/mountinfo | sort -r | while read -r mount; do umount --lazy "$mount" || true; done
}

# end PROCESS [SIGNAL]: ends a process that was started here and waits for it.
end() {
  [ -n "$1" ] || return 0
  kill -"${2:-TERM}" "$1" 2> /dev/null || true
  for _ in $(seq 300); do kill -0 "$1" 2> /dev/null || break; sleep 0.1; done
  kill -KILL "$1" 2> /dev/null || true
  wait "$1" 2> /dev/null || true
}

# serve LAYOUT: serves it through a link of $latency and $bandwidth; sets server and registry, and writes $work/access.log.
server=
serve() {
  # It would wait for connections that containerd keeps.
  end "$server" KILL
  rm -f "$work/address" "$work/access.log"
  "$HEADSTART" serve "oci:$1" --listen 127.0.0.1:0 --latency "$latency" --bandwidth "$bandwidth" --access-log "$work/access.log" > "$work/address" &
  server=$!
  # The shell need not tell that it was killed.
  disown "$server"
  for _ in $(seq 600); do [ -s "$work/address" ] && break; sleep 0.05; done
  registry=$(sed 's,^http://,,' "$work/address")
  [ -n "$registry" ] || die "the server did not start"
}

now_us() { echo $(($(date +%s%N) / 1000)); }
seconds() { awk -v us="$1" 'BEGIN { printf "%.3f\n", us / 1e6 }'; }
# Runs "$@", prints the seconds it took with three digits.
timed() { local begin; begin=$(now_us); "$@" > /dev/null; seconds $(($(now_us) - begin)); }
# One more value of a row: note NAME VALUE.
note() { echo "$2" >> "$work/results/$1"; }
# quantile NAME Q: of the values of a row, the smallest that is no smaller than the part Q of them.
quantile() { sort -n "$work/results/$1" 2> /dev/null | awk -v q="$2" '{ v[NR] = $1 } END { if (!NR) { print "-"; exit } i = int(q * NR); if (i < q * NR) i++; if (i < 1) i = 1; print v[i] }'; }
median() { quantile "$1" 0.5; }
# ratio A B [DIGITS]
ratio() { awk -v a="$1" -v b="$2" -v d="${3:-2}" 'BEGIN { if (b + 0 > 0) printf "%." d "f", a / b; else print "-" }'; }
drop_caches() { sync; echo 3 > /proc/sys/vm/drop_caches; }
