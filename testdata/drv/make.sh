#!/bin/sh
# Makes what README.md describes. Needs Nix 2.34 with a store of its own in
# /nix, /bin/sh in its sandbox, and root.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
key=$here/key.secret
export NIX_CONFIG="
experimental-features = nix-command ca-derivations impure-derivations
secret-key-files = $key
"
[ -e "$key" ] || nix-store --generate-binary-cache-key test.example-1 "$key" "$here/key.public"
cd "$here"
rm -f ./*.drv ./*.nar

attrs=$(nix-instantiate --eval -E 'builtins.concatStringsSep " " (builtins.attrNames (removeAttrs (import ./.) [ "text" ]))' | tr -d '"')
: > drvs
for a in $attrs; do
  echo "$a $(nix-instantiate . -A "$a" 2>/dev/null | sed 's/!.*//')" >> drvs
done
for d in $(nix-store -qR $(cut -d' ' -f2 drvs) | grep '\.drv$'); do cp "$d" .; done
chmod 644 ./*.drv

# Builds: what became of the outputs that a derivation does not tell, and the
# path information of everything with a content address.
built="simple sources dependent odd fixedFlat fixedMd5 fixedSha1 fixedSha512 fixedTree fixedTreeSha1 both merged
  floating floatingSelf floatingMulti floatingFlat floatingOn deferred deferredTwice"
: > realisations
for a in $built; do
  drv=$(grep "^$a " drvs | cut -d' ' -f2)
  nix-store -r "$drv" >/dev/null
  case $a in floating* | deferred*)
    nix realisation info --json "$drv^*" | tr -d '\n' | sed 's/},{"dep/}\n{"dep/g; s/^\[//; s/]$//' >> realisations
    echo >> realisations
  esac
done

nix-store --read-log "$(grep '^floatingSelf ' drvs | cut -d' ' -f2)" > scratch

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
printf 'flat\n' > "$work/added"
cp "$work/added" "$work/added-tree"
nix-store --add "$work/added"
for algo in md5 sha1 sha256 sha512; do
  nix-store --add-fixed $algo "$work/added"
  nix-store --add-fixed --recursive $algo "$work/added-tree"
done
nix store sign -k "$key" --all
nix path-info --json --json-format 1 --all | sed 's/},"\/nix/},\n"\/nix/g' > infos.json
# The archives of content-addressed paths, without those of derivations.
for p in $(nix path-info --all | grep -v '\.drv$'); do
  if nix path-info --json --json-format 1 "$p" | grep -q '"ca":"'; then
    nix-store --dump "$p" > "$(basename "$p").nar"
  fi
done
for a in dependent fixedFlat floatingSelf; do
  p=$(nix-store -r "$(grep "^$a " drvs | cut -d' ' -f2)")
  nix copy --to "file://$work/cache?compression=xz" "$p"
  h=$(basename "$p" | cut -c1-32)
  cp "$work/cache/$h.narinfo" $a.narinfo
done
