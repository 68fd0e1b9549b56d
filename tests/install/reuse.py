"""A compiler launcher that takes an object over from another build, if that made it of the same file by the same command.

    python reuse.py OTHER-BUILD compiler arguments…    (CMake: CMAKE_CXX_COMPILER_LAUNCHER="python;reuse.py;OTHER-BUILD")

Commands are the same when they differ at most in the build's own folder, the compiler's alias, the dependency file and -Werror.
All else is compiled. Whoever starts it sees to it that OTHER-BUILD is up to date.
"""

import json
import os
import pathlib
import shlex
import shutil
import sys


def meaning(words, build):
    """What a command asks for: its words, without those that change no object."""
    kept, words = [os.path.realpath(shutil.which(words[0]) or words[0])], iter(words[1:])
    for word in words:
        if word in ("-MT", "-MF"):
            next(words)
        elif word not in ("-MD", "-Werror"):
            kept.append(word.replace(build, "BUILD"))
    return kept


def finished(other, words):
    """The object of the other build, or None."""
    asked = meaning(words, os.getcwd())
    for entry in json.loads((other / "compile_commands.json").read_text()):
        if meaning(shlex.split(entry["command"]), entry["directory"]) == asked:
            found = other / asked[asked.index("-o") + 1]
            return found if found.is_file() else None
    return None


def main():
    other, words = pathlib.Path(sys.argv[1]), sys.argv[2:]
    if "-o" in words and (found := finished(other, words)):
        shutil.copyfile(found, words[words.index("-o") + 1])
    else:
        os.execvp(words[0], words)


main()
