"""Says where the torch package of this Python is, without importing it: its folder and its version, one a line.

CMake and the set-up script both ask here, so the range of accepted versions is written once. Exit status 1 and one line
on stderr when there is no torch or its version does not fit. Every torch of this range uses the C++11 ABI of libstdc++.
"""

import importlib.util
import pathlib
import re
import sys

OLDEST = (2, 11)
BELOW = (2, 16)


def main() -> int:
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        print(f"no torch package in {sys.executable}", file=sys.stderr)
        return 1
    folder = pathlib.Path(spec.submodule_search_locations[0])
    found = re.search(r"__version__ = '((\d+)\.(\d+)[^']*)'", (folder / "version.py").read_text())
    if found is None:
        print(f"{folder / 'version.py'} does not tell the version of torch", file=sys.stderr)
        return 1
    if not OLDEST <= (int(found[2]), int(found[3])) < BELOW:
        accepted = "at least {}.{} and below {}.{}".format(*OLDEST, *BELOW)
        print(f"torch {found[1]} in {folder} does not fit: Turnout accepts {accepted}", file=sys.stderr)
        return 1
    print(folder, found[1], sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
