"""The program `turnout` as a user starts it: to its end, in the background, on several ranks, on a terminal."""

import os
import pathlib
import pty
import socket
import subprocess
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = pathlib.Path(os.environ.get("TURNOUT_PROGRAM", ROOT / "build" / "bin" / "turnout"))
TINY = ("--layers 2 --hidden 16 --heads 2 --context 16 --experts 4 --expert-ffn 12 --batch 4 --warmup 2 "
        "--eval-bytes 256 --threads 1").split()
TOKENS_A_STEP = 64


def turnout(*arguments, through="", **keywords):
    """Runs the program; `through` is a redirection of the shell."""
    command = ["bash", "-c", f'exec "$@" {through}', "-", PROGRAM, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, timeout=300, **keywords)
    # Bytes that are no UTF-8 survive, and so do the line ends that text mode would translate.
    done.stdout, done.stderr = (out.decode(errors="surrogateescape") for out in (done.stdout, done.stderr))
    return done


def refuses(*arguments, **keywords):
    """The one line on stderr of a run that must end with status 2."""
    done = turnout(*arguments, **keywords)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("turnout: "), done.stderr
    return done.stderr


def train(text, out, steps, *more):
    """Arguments of a run of the tiny model."""
    return ["train", *TINY, "--text", text, "--tokens", TOKENS_A_STEP * steps, "--output", out, *more]


def start(arguments, prefix=(), **environment):
    """The program in the background, behind the words of `prefix`."""
    return subprocess.Popen([*prefix, PROGRAM, *map(str, arguments)], env={**os.environ, **environment},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def start_ranks(arguments, size=2, host="127.0.0.1", prefixes=None, timeout=10):
    """One process a rank, as any launcher starts them. @param arguments: of all, or a list for each rank"""
    with socket.socket() as end:
        end.bind(("127.0.0.1", 0))
        port = end.getsockname()[1]
    own = arguments if isinstance(arguments[0], (list, tuple)) else [arguments] * size
    return [start(own[rank], prefixes[rank] if prefixes else (), RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR=host,
                  MASTER_PORT=str(port), TURNOUT_TIMEOUT=str(timeout)) for rank in range(size)]


def finish(processes, timeout=120):
    """(status, stdout, stderr) of each."""
    try:
        texts = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *both) for process, both in zip(processes, texts)]


def wait_for_checkpoint(out, processes, pattern="checkpoint.safetensors"):
    """Until a checkpoint stands in the folder. The processes must go on meanwhile."""
    deadline = time.monotonic() + 60
    while not list(out.glob(pattern)):
        running = all(process.poll() is None for process in processes)
        assert running and time.monotonic() < deadline, finish(processes)
        time.sleep(0.005)


def on_terminal(arguments, stream, **environment):
    """What the program shows on a terminal, which is its `stream`: "stdout" or "stderr"."""
    parent, child = pty.openpty()
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, stream: child}
    process = subprocess.Popen([PROGRAM, *map(str, arguments)], env={**os.environ, **environment}, **streams)
    os.close(child)
    shown = b""
    try:
        while chunk := os.read(parent, 4096):
            shown += chunk
    except OSError:  # the terminal is gone: the program ended
        pass
    os.close(parent)
    assert process.wait() == 0
    return shown
