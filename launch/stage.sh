#!/bin/bash
# stage.sh SOURCE TARGET: an image, or a .tar of an environment, to the node's own disk; nothing if it is there.
set -eu
source=$1 target=$2 part=$2.$$
folder=$(dirname "$target")
mkdir -p "$folder"
# Its name can be guessed, in a folder where all may write: what others put there is not run.
[ -O "$folder" ] || { echo "$folder on $(hostname): belongs to somebody else" >&2; exit 1; }
[ -e "$target" ] && exit 0
trap 'rm -rf "$part"' EXIT
if [[ $source == *.tar ]]; then
    mkdir "$part"
    tar -xf "$source" -C "$part"
else
    cp "$source" "$part"
fi
mv -T "$part" "$target" || [ -e "$target" ]   # another job on this node may have been quicker
