#!/bin/bash
# Prints the Python that Turnout builds with: the active environment's where its torch fits, else that of .venv.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
for prefix in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}"; do
  if [[ -n "$prefix" && -x "$prefix/bin/python" ]] && "$prefix/bin/python" "$root/cmake/find_torch.py" &>/dev/null; then
    echo "$prefix/bin/python"
    exit
  fi
done
echo "$root/.venv/bin/python"
