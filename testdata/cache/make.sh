#!/bin/sh
# Makes the caches of this directory again; see README.md.
set -eu
export NIX_CONFIG='build-users-group =
substituters =
sandbox = false
experimental-features = nix-command'
store=$(mktemp -d)
mkdir bb && cp "$(command -v busybox)" bb/busybox
[ -e key.secret ] || nix-store --generate-binary-cache-key cache.example-1 key.secret key.public
nix-build --store "$store" --no-out-link > paths
nix-store --store "$store" --add source >> paths
for c in xz zstd bzip2 gzip br none; do
	nix copy --store "$store" --to "file://$PWD/$c?compression=$c&secret-key=$PWD/key.secret" $(cat paths)
done
rm -rf bb
{ seq 1 4000 | xz --block-size=4096 --threads=2; seq 5000 6000 | xz --check=none; } > blocks.xz
