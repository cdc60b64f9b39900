#!/bin/bash
# stage.sh SOURCE TARGET: an image, or a .tar of an environment, to the node's own disk; nothing if it is there.
set -eu
source=$1 target=$2 part=$2.$$
mkdir -p "$(dirname "$target")"
[ -e "$target" ] && exit 0
trap 'rm -rf "$part"' EXIT
if [[ $source == *.tar ]]; then
    mkdir "$part"
    tar -xf "$source" -C "$part"
else
    cp "$source" "$part"
fi
mv -T "$part" "$target" || [ -e "$target" ]   # another job on this node may have been quicker
