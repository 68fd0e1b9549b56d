"""Two hosts on one machine: network namespaces joined by a link of a given speed. For tests and measurements; needs root."""

import contextlib
import os
import shutil
import subprocess

ADDRESS = "10.213.7.1"  # of the first host


class Unavailable(Exception):
    """Why this machine has no two hosts."""


def run(*words):
    return subprocess.run(words, capture_output=True, text=True)


def limit(name, megabits):
    """Lets `megabits` a second pass, in bursts of what 5 ms carry."""
    burst = max(32 << 10, megabits * 1_000_000 // 8 // 200)
    return run("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", "t0", "root", "tbf", "rate", f"{megabits}mbit",
               "burst", str(burst), "latency", "50ms").returncode == 0


@contextlib.contextmanager
def two_hosts(megabits):
    """Yields what to put before a command, so that it runs on one host or the other.

    The link carries `megabits` a second each way, between devices of the name t0. Raises Unavailable.
    """
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None:
        raise Unavailable("two hosts need root and iproute2")
    names = [f"turnout{os.getpid()}{end}" for end in "ab"]
    if run("ip", "netns", "add", names[0]).returncode != 0:
        raise Unavailable("this machine gives no network namespaces")
    try:
        run("ip", "netns", "add", names[1])
        run("ip", "link", "add", "t0", "netns", names[0], "type", "veth", "peer", "name", "t0", "netns", names[1])
        for n, name in enumerate(names, 1):
            run("ip", "-n", name, "addr", "add", f"10.213.7.{n}/24", "dev", "t0")
            for device in ("lo", "t0"):
                run("ip", "-n", name, "link", "set", device, "up")
            if not limit(name, megabits):
                raise Unavailable("this kernel has no tbf, which limits a link")
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in names:
            run("ip", "netns", "del", name)
