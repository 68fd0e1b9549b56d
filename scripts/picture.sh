#!/bin/bash
# picture.sh REPORT PNG: draws the main chart of a report, 1200 x 675, by the headless browser that the tests use.
set -euo pipefail
report="$(realpath -- "$1")"
for name in chromium chromium-browser google-chrome chrome; do
  if browser="$(command -v "$name")"; then break; fi
done
[[ -n "${browser:-}" ]] || { echo "picture.sh: needs Chromium: apt-get install chromium" >&2; exit 2; }
profile="$(mktemp -d)"
trap 'rm -rf "$profile"' EXIT
"$browser" --headless=new --no-sandbox --disable-gpu --hide-scrollbars --window-size=1200,675 --virtual-time-budget=20000 \
  --user-data-dir="$profile" --screenshot="$(realpath -m -- "$2")" "file://$report#picture" 2>"$profile/log" ||
  { cat "$profile/log" >&2; exit 1; }
