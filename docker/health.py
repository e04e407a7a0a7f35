"""Fail unless a SuperLink or SuperNode answers and, of a SuperNode, unless it is connected.

``health.py URL [CA]`` asks a SuperLink, with CA for https; ``health.py URL --connected-to
HOST:PORT`` a SuperNode, which answers even where it cannot reach the SuperLink. It asks for
messages every few seconds, and so keeps a connection open to that port.
"""

import argparse
import ssl
import sys
from pathlib import Path
from urllib.request import urlopen

ESTABLISHED = "01"


def is_connected(port: int) -> bool:
    """Return whether a process of this container has a TCP connection to a port elsewhere."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text(encoding="utf-8").splitlines()[1:]:
            _, _, remote, state, *_ = line.split()
            if state == ESTABLISHED and int(remote.rpartition(":")[2], 16) == port:
                return True
    return False


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("url")
parser.add_argument("ca", nargs="?")
parser.add_argument("--connected-to", metavar="HOST:PORT")
arguments = parser.parse_args()
context = ssl.create_default_context(cafile=arguments.ca) if arguments.ca else None
urlopen(arguments.url, timeout=5, context=context)
if arguments.connected_to and not is_connected(int(arguments.connected_to.rpartition(":")[2])):
    sys.exit(f"not connected to {arguments.connected_to}")
