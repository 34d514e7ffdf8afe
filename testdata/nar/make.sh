#!/bin/sh
# Makes the archives of this directory with the nix-store of the machine.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

: > empty-file
printf 'hello\n' > file
printf '#!/bin/sh\necho hi\n' > executable; chmod 755 executable
ln -s ../some/where symlink
mkdir empty-directory

mkdir names
printf 1 > 'names/with space'
printf 22 > names/.hidden
printf 333 > names/-dash
printf 4444 > 'names/ümläut-日本'
printf 55555 > "$(printf 'names/\377raw')"
printf 666666 > "$(printf 'names/new\nline')"
printf 7777777 > names/A
printf 88888888 > names/a
printf 999999999 > "names/$(printf '%0255d' 0)"
ln -s "$(printf 'target with space\nand \351')" names/link
ln -s "$(printf '%04095d' 0)" names/long-link

mkdir -p tree/bin tree/lib/empty tree/share/doc
printf '#!/bin/sh\n' > tree/bin/run; chmod 755 tree/bin/run
ln -s run tree/bin/alias
: > tree/bin/zero; chmod 700 tree/bin/zero
head -c 5000 /dev/zero > tree/lib/zeros
printf 'text' > tree/share/doc/a
printf 'text' > tree/share/doc.txt
printf 'last' > tree/z

d=deep; mkdir $d
for i in $(seq 62); do d=$d/d; mkdir "$d"; done
printf x > "$d/f"

for i in *; do nix-store --dump "$i" > "$here/$i.nar"; done
nix --extra-experimental-features nix-command nar ls --json -R "$here/tree.nar" / > "$here/tree.ls"
