"""Hosts of their own on one machine: network namespaces, joined by a switch that delays what it passes on.

The kernel's netem is not in every kernel, so the switch is a process: it reads Ethernet frames from a TAP device in
each namespace and writes them to the others a fixed time later. A host's cable can be pulled. Needs root and `ip`.
"""

import fcntl
import heapq
import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
_MTU = 9000
_MOST_FRAME = 65536
_MAC = 6
_SUBNET = "10.77.0"


def can_make_hosts() -> bool:
    """Whether this process may make namespaces and TAP devices."""
    return os.geteuid() == 0 and Path("/dev/net/tun").exists() and _ok("ip", "-V")


class Network:
    """`n` hosts with `addresses`, and this machine as one more. What begins with `within[i]` runs on host i."""

    def __init__(self, n: int, switch: "subprocess.Popen[bytes]") -> None:
        self.addresses = [f"{_SUBNET}.{i + 1}" for i in range(n)]
        self.within = [("ip", "netns", "exec", _name(i)) for i in range(n)]
        self._switch = switch

    def cut(self, host: int) -> None:
        """Pull a host's cable: nothing reaches it and nothing comes from it, and nobody is told."""
        self._say(f"cut {host}")

    def join(self, host: int) -> None:
        self._say(f"join {host}")

    def _say(self, line: str) -> None:
        assert self._switch.stdin is not None
        self._switch.stdin.write(f"{line}\n".encode())
        self._switch.stdin.flush()


@contextmanager
def network(n: int, delay: float) -> Iterator[Network]:
    """Hosts whose frames take `delay` seconds from one to another, also to this machine. Gone afterwards."""
    with ExitStack() as made:
        taps = []
        for i in range(n + 1):
            taps.append(tap := _tap(f"tcrank{i}"))
            made.callback(os.close, tap)
            where: list[str] = []
            if i < n:
                _run("ip", "netns", "add", _name(i))
                made.callback(_run, "ip", "netns", "del", _name(i))
                _run("ip", "link", "set", f"tcrank{i}", "netns", _name(i))
                where = ["-n", _name(i)]
                _run("ip", *where, "link", "set", "lo", "up")
            _run("ip", *where, "address", "add", f"{_SUBNET}.{i + 1 if i < n else 254}/24", "dev", f"tcrank{i}")
            _run("ip", *where, "link", "set", f"tcrank{i}", "mtu", str(_MTU), "up")
        command = [sys.executable, __file__, str(delay), *map(str, taps)]
        switch = made.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=taps))
        made.callback(switch.kill)
        yield Network(n, switch)


def _name(host: int) -> str:
    return f"tcrank{host}"


def _tap(name: str) -> int:
    """A TAP device, there as long as the descriptor is open."""
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TAP | _IFF_NO_PI))
    return tap


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def _ok(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def switch(delay: float, taps: Sequence[int]) -> None:
    """Pass frames on until stdin ends. A frame for a host that has not been heard of goes to all."""
    at: dict[bytes, int] = {}
    cut: set[int] = set()
    due: list[tuple[float, int, int, bytes]] = []
    poll, number, commands = select.epoll(), 0, sys.stdin.fileno()
    for tap in taps:
        poll.register(tap, select.EPOLLIN)
    poll.register(commands, select.EPOLLIN)
    while True:
        wait = max(0.0, due[0][0] - time.monotonic()) if due else -1
        for source, _ in poll.poll(wait if wait < 0 else min(wait, 1e-4) if wait < 1e-3 else wait - 1e-3):
            if source == commands:
                if not (line := os.read(commands, 100).decode()):
                    return
                for verb, host in (said.split() for said in line.splitlines()):
                    (cut.add if verb == "cut" else cut.discard)(int(host))
                continue
            frame = os.read(source, _MOST_FRAME)
            if taps.index(source) in cut:
                continue
            at[frame[_MAC : 2 * _MAC]] = source
            to = at.get(frame[:_MAC])
            for target in taps if to is None else (to,):
                if target != source and taps.index(target) not in cut:
                    number += 1
                    heapq.heappush(due, (time.monotonic() + delay, number, target, frame))
        while due and due[0][0] <= time.monotonic():
            _, _, target, frame = heapq.heappop(due)
            try:
                os.write(target, frame)
            except (BlockingIOError, OSError):
                continue  # as a full or broken link does; TCP sends again


if __name__ == "__main__":
    switch(float(sys.argv[1]), [int(argument) for argument in sys.argv[2:]])
