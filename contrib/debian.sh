# What the scripts beside this file need of a Debian machine; sourced by them,
# not run. Debian 12 (bookworm) or newer, or something made of it.
#
# Everything that is fetched and is not a package goes under $work.
work=${NBD_WORK:-${TMPDIR:-/tmp}/nbd-demo}
apt_arch=
mkdir -p "$work"
root=$(cd "$(dirname "$0")/.." && pwd)

say() { printf '\033[1m== %s\033[0m\n' "$*"; }
die() { printf 'nbd: error: %s\n' "$*" >&2; exit 1; }

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

# install PROGRAM PACKAGE ...: installs those packages whose program is not there.
install() {
  missing=
  while [ $# -gt 0 ]; do
    command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ] || missing="$missing $2"
    shift 2
  done
  [ -n "$missing" ] || return 0
  command -v apt-get >/dev/null || die "missing:$missing; this script installs them on Debian only, on another system install them yourself"
  say "installing$missing"
  as_root apt-get update -qq
  # shellcheck disable=SC2086
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >"$work/apt.log" 2>&1 ||
    { cat "$work/apt.log"; die "apt-get could not install$missing"; }
}

# private_apt ARGS...: apt-get with a list of its own that has the sources too,
# so that nothing depends on how this machine's apt is set up but its mirror. With
# $apt_arch set it is for machines of that architecture.
private_apt() {
  apt=$work/apt${apt_arch:+-$apt_arch}
  if ! [ -e "$apt/ready" ]; then
    suite=$(. /etc/os-release && echo "${VERSION_CODENAME:-sid}")
    mirror=$( { awk '/^URIs:/ {print $2}' /etc/apt/sources.list.d/*.sources
      awk '$1 == "deb" {for (i = 2; i <= NF; i++) if ($i ~ /^http/) {print $i; break}}' \
        /etc/apt/sources.list /etc/apt/sources.list.d/*.list; } 2>/dev/null | grep -E '/debian/?$' | head -n 1)
    mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial" "$apt/etc/apt.conf.d" "$apt/etc/preferences.d" "$apt/etc/sources.list.d"
    : >"$apt/status"
    key=/usr/share/keyrings/debian-archive-keyring.gpg
    for kind in deb deb-src; do
      echo "$kind [signed-by=$key] ${mirror:-http://deb.debian.org/debian} $suite main"
    done >"$apt/etc/sources.list"
    apt_get update || die "the package lists of $suite could not be fetched"
    : >"$apt/ready"
  fi
  apt_get "$@"
}
apt_get() {
  apt-get -qq -o Dir::Etc="$apt/etc" -o Dir::State="$apt" -o Dir::State::status="$apt/status" \
    -o Dir::Cache="$apt/cache" -o APT::Sandbox::User=root \
    ${apt_arch:+-o APT::Architecture=$apt_arch -o APT::Architectures=$apt_arch} "$@"
}

# fetch_debs DIR PACKAGE...: downloads the packages that are not in DIR yet.
fetch_debs() {
  dir=$1; shift
  mkdir -p "$dir"
  for p; do
    ls "$dir/${p}_"*.deb >/dev/null 2>&1 || (cd "$dir" && private_apt download "$p") || die "package $p could not be fetched"
  done
}

# fetch_source DIR PACKAGE: downloads a Debian source package's original archive.
fetch_source() {
  mkdir -p "$1"
  ls "$1/$2_"*.orig.tar.* >/dev/null 2>&1 || (cd "$1" && private_apt source --download-only --tar-only "$2") || die "source $2 could not be fetched"
}

# fetch_kernel DIR [ARCH]: the package with the kernel for guests, which need not
# be the host's; prints its file. Only the files are used, nothing is installed.
fetch_kernel() {
  if ! ls "$1"/linux-image-[0-9]*.deb >/dev/null 2>&1; then
    fetch_debs "$1" "linux-image-cloud-${2:-amd64}" >&2
    fetch_debs "$1" "$(dpkg-deb -f "$1"/linux-image-cloud-*.deb Depends | grep -o 'linux-image-[0-9][^ ,]*' | head -n 1)" >&2
  fi
  ls "$1"/linux-image-[0-9]*.deb
}

# fetch_aarch64 DIR: the packages with a kernel and a busybox for guests of that
# architecture; prints DIR, which `nbd kernel import` takes.
fetch_aarch64() {
  apt_arch=arm64
  fetch_kernel "$1" arm64 >/dev/null
  fetch_debs "$1" busybox-static >&2
  apt_arch=
  echo "$1"
}

# use_go: puts a Go that can build nbd on the PATH. Debian's older ones fetch
# the newer toolchain as the Go module that it is.
use_go() {
  PATH=$PATH:/usr/local/go/bin
  command -v go >/dev/null || install go golang-go
  want=$(sed -n 's/^go //p' "$root/go.mod")
  # From Go 1.21 on, go itself fetches what go.mod asks for.
  case $(GOTOOLCHAIN=local go env GOVERSION 2>/dev/null) in
    go1.1?|go1.1?.*|go1.20|go1.20.*) ;;
    *) return 0 ;;
  esac
  case $want in *.*.*) ;; *) want=$want.0 ;; esac
  module=golang.org/toolchain@v0.0.1-go$want.linux-$(go env GOARCH)
  tool=$(go env GOMODCACHE)/$module
  if ! [ -x "$tool/bin/go" ]; then
    say "fetching Go $want"
    (cd "$work" && GOFLAGS=-mod=mod GONOSUMDB=golang.org/toolchain go mod download "$module") || die "Go $want could not be fetched"
    as_root chmod -R u+x "$tool/bin" "$tool/pkg/tool"
  fi
  PATH=$tool/bin:$PATH
  export PATH GOTOOLCHAIN=local
}

build_nbd() {
  use_go
  "$root/contrib/agents"
  (cd "$root" && CGO_ENABLED=0 go build -trimpath -o "$root/nbd" .)
}

# The real package that the demonstration builds, see testdata/demo.
fetch_demo() {
  fetch_debs "$work/debs" tcc musl-dev make libc6
  fetch_source "$work/sources" lua5.4
  mkdir -p "$work/tools"
  cp "$(command -v busybox)" "$work/tools/busybox"
}
