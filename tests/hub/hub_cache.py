"""Folders laid out as the Hub's client stores what it downloaded."""

import hashlib
import os

REVISION = "0123456789abcdef0123456789abcdef01234567"


def as_hub_cache(folder, home, repository):
    """Stores a folder under `home` (for HF_HOME) as a downloaded repository: a snapshot of links to blobs."""
    cached = home / "hub" / f"models--{repository.replace('/', '--')}"
    snapshot = cached / "snapshots" / REVISION
    for name in ("refs", "blobs"):
        (cached / name).mkdir(parents=True)
    (cached / "refs" / "main").write_text(REVISION)
    snapshot.mkdir(parents=True)
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        blob = cached / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    return repository
