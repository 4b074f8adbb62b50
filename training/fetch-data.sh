#!/bin/bash
# Fetch the photographs and cut-outs that the demo models are trained on: Debian packages, unpacked and not installed.
# Usage: training/fetch-data.sh [FOLDER]     Needs: apt-get, dpkg-deb; about 400 MB downloaded, 900 MB unpacked.
set -euo pipefail

folder=${1:-${PALIMPSEST_TRAINING_DATA:-$HOME/.cache/palimpsest/training}}
packages=(
  mate-backgrounds             # GPL-2+
  lomiri-wallpapers-16.04      # CC0, CC-BY-4.0, CC-BY-SA-4.0, one picture each
  lomiri-wallpapers-20.04      # CC-BY-SA-3.0
  plasma-workspace-wallpapers  # GPL-2+
  tuxpaint-data                # GPL-2+
  tuxpaint-stamps-default      # GPL-2+, objects cut out with an alpha channel
)

mkdir -p "$folder/packages"
cd "$folder/packages"
for package in "${packages[@]}"; do
  [[ -e $folder/usr/share/doc/$package/copyright ]] && continue
  rm -f "$package"_*.deb
  apt-get download "$package"
  dpkg-deb --extract "$package"_*.deb "$folder"
done
echo "Unpacked into $folder; each package's licence is in usr/share/doc/PACKAGE/copyright"
