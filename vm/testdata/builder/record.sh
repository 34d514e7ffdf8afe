#!/bin/sh
# record.sh BUSYBOX-DIR: builds cases.nix with the Nix in PATH and records what
# the builders were given. Run in this directory; see README.md.
set -e
for c in plain outputs graph graph-drv structured floating fixed; do
  drv=$(nix-instantiate cases.nix --arg busybox "$1" -A $c)
  out=$(nix-build cases.nix --arg busybox "$1" -A $c --no-out-link --cores 3)
  rm -rf $c
  mkdir $c
  cp $drv $c/$(basename $drv)
  case $c in
    fixed) nix-store --read-log $drv > $c/environ.lines ;;
    *) cp -r $out/environ $out/cmdline $c/; mkdir $c/files; cp $out/files/.[!.]* $out/files/* $c/files/ 2>/dev/null || true ;;
  esac
  # The closure of the inputs: of the sources, and of the outputs of input
  # derivations; for a graph of derivations, of these and all their outputs.
  own=$(nix-store -q --outputs $drv 2>/dev/null || true)
  for i in $(grep -o '/nix/store/[0-9a-z]\{32\}-[0-9A-Za-z+._?=-]*' $drv | sort -u); do
    case "$own" in *$i*) continue ;; esac
    case $i in
      *.drv) nix-store -qR $(nix-store -q --outputs $i) ;;
      *) nix-store -qR $i ;;
    esac
    if [ $c = graph-drv ]; then nix-store -qR --include-outputs $i; fi
  done | grep -vxF $drv | sort -u > inputs
  if [ $c = graph-drv ]; then
    mkdir $c/drvs
    grep '\.drv$' inputs | xargs -I{} cp {} $c/drvs/
  fi
  xargs nix path-info --json --json-format 1 < inputs > $c/inputs.json
  rm inputs
  chmod -R u+w $c
done
