"""The fingerprint that ties a router file to the weights it was tuned on."""

import hashlib
import json
import struct
from pathlib import Path

EDGE = 4096  # bytes read from either end of a tensor: enough to tell two models apart, cheap on a large one


def fingerprint(path: Path) -> str:
    """First 32 hex digits of SHA-256 over each tensor's name, dtype, shape and edges, in byte order of the names."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[0].encode()):
            for field in (name, entry["dtype"], ",".join(map(str, entry["shape"]))):
                digest.update(field.encode() + b"\n")
            begin, end = entry["data_offsets"]
            edge = min(EDGE, end - begin)
            for at in (begin, end - edge):
                file.seek(8 + length + at)
                digest.update(file.read(edge))
    return digest.hexdigest()[:32]
