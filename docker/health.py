"""Fail unless a SuperLink or SuperNode answers: ``health.py URL [CA]``, CA for https."""

import ssl
import sys
from urllib.request import urlopen

url, *ca = sys.argv[1:]
urlopen(url, timeout=5, context=ssl.create_default_context(cafile=ca[0]) if ca else None)
