#!/bin/bash
# Sets up what Turnout needs to build and test: compiler check, Debian packages, Python environment, its packages.
#
# Each step says what it does, is skipped when it is done, and says what to do when it fails. Run by make. With the word
# `browser` it sets up that alone: the Chromium that the tests open the report in.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

step() { echo "set-up: $*"; }

# fail STEP WHY WHAT-TO-DO
fail() {
  printf 'set-up failed at: %s\n  why: %s\n  do:  %s\n' "$@" >&2
  exit 1
}

# as_root COMMAND...: runs it where that needs no password; status 126 where it would.
as_root() {
  if [[ $(id -u) == 0 ]]; then
    "$@"
  elif sudo -n true 2>/dev/null; then
    sudo -n "$@"
  else
    return 126
  fi
}

# apt_install STEP PACKAGE...
apt_install() {
  local name="$1" log
  shift
  local line="apt-get update && apt-get install -y $*"
  command -v apt-get >/dev/null || fail "$name" "this system has no apt-get" "install the equivalents of: $*"
  as_root true || fail "$name" "installing them needs root" "run: sudo sh -c '$line'"
  step "installing $* (apt)"
  log="$(mktemp)"
  as_root sh -c "export DEBIAN_FRONTEND=noninteractive; $line" >"$log" 2>&1 ||
    fail "$name" "$(tail -n 5 "$log")" "run it by hand: sudo sh -c '$line'"
  rm -f "$log"
}

# has_header HEADER: whether the compiler finds it.
has_header() { echo "#include <$1>" | g++ -std=c++20 -E -x c++ - &>/dev/null; }

check_compiler() {
  command -v g++ >/dev/null || fail "compiler" "there is no g++" "apt-get install g++ (version 12 or newer)"
  local version
  version="$(g++ -dumpversion)"
  [[ ${version%%.*} -ge 12 ]] ||
    fail "compiler" "g++ is version $version" "install g++ 12 or newer and put it first in PATH"
}

install_headers() {
  local missing=()
  has_header CLI/CLI.hpp || missing+=(libcli11-dev)
  has_header nlohmann/json.hpp || missing+=(nlohmann-json3-dev)
  has_header gtest/gtest.h || missing+=(libgtest-dev)
  has_header benchmark/benchmark.h || missing+=(libbenchmark-dev)
  has_header gloo/context.h || missing+=(libgloo-dev)
  if [[ ${#missing[@]} -gt 0 ]]; then
    apt_install "Debian packages" "${missing[@]}"
  fi
}

install_browser() {
  local name
  for name in chromium chromium-browser google-chrome chrome; do
    if command -v "$name" >/dev/null; then return; fi
  done
  apt_install "browser of the tests" chromium
}

make_environment() {
  if [[ "$python" != "$PWD/.venv/bin/python" ]]; then
    return # the active environment's torch fits
  fi
  if [[ -x .venv/bin/pip ]] && "$python" -c '' 2>/dev/null; then
    return
  fi
  local active="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
  if [[ -n "$active" ]]; then
    step "the active environment is left alone: $("$active/bin/python" cmake/find_torch.py 2>&1 || true)"
  fi
  command -v python3 >/dev/null || fail "Python" "there is no python3" "install Python 3.10 or newer"
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "Python" "$(python3 --version) is too old" "put Python 3.10 or newer first in PATH"
  if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
    apt_install "Python environment" python3-venv
  fi
  step "making .venv with $(python3 --version)"
  local reason
  reason="$(python3 -m venv --clear .venv 2>&1)" ||
    fail "Python environment" "$reason" "make it by hand: python3 -m venv .venv"
}

# pip_install WHAT REQUIREMENTS...: skipped while the environment holds the stamp of the same requirements.
pip_install() {
  local what="$1" log stamp wanted file files=()
  shift
  for file in "$@"; do files+=(-r "$file"); done
  stamp="$(dirname "$(dirname "$python")")/turnout-${what// /-}.stamp"
  wanted="$(cat "$@")"
  if [[ -f "$stamp" && "$(<"$stamp")" == "$wanted" ]]; then
    return
  fi
  step "installing $what (pip)"
  log="$(mktemp)"
  "$python" -m pip install --disable-pip-version-check "${files[@]}" >"$log" 2>&1 ||
    fail "$what" "$(grep -v '^\[notice\]' "$log" | tail -n 5)" \
      "check the network and the free disk (torch takes 6 GB), then run the same command again"
  rm -f "$log"
  printf '%s\n' "$wanted" >"$stamp"
}

if [[ "${1:-}" == browser ]]; then
  install_browser
  exit
fi
check_compiler
install_headers
python="$(scripts/python.sh)"
make_environment
if [[ "$python" == "$PWD/.venv/bin/python" ]]; then
  pip_install "torch" requirements/torch.txt
fi
pip_install "build and test tools" requirements/build.txt requirements/test.txt
reason="$("$python" cmake/find_torch.py 2>&1 >/dev/null)" ||
  fail "torch" "$reason" "remove .venv, or leave the active environment, and run the same command again"
