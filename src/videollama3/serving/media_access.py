"""Which media a server may read for its clients.

What a client wrote as the address of a medium enters, an address that the processor may open leaves. Opening it is
left to `processing/media_sources.py`.
"""

from __future__ import annotations

import os
import re
from typing import Any
from urllib.parse import unquote, urlsplit

from ..processing.media_sources import describe

_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):")
_URL_SCHEMES = ("data", "http", "https")


class MediaAccess:
    """Lets data: and http(s): URLs through, and files below one folder, where there is one.

    Args:
        root: the folder; None where clients may name no file at all.

    Raises:
        NotADirectoryError: when `root` is no folder.
    """

    def __init__(self, root: str | None = None) -> None:
        if root is not None and not os.path.isdir(root):
            raise NotADirectoryError(f"Expected the media root as a folder, got {root!r}.")
        self._root = None if root is None else os.path.realpath(root)

    def admit(self, address: Any, *, what: str) -> str:
        """Checks one address.

        Args:
            address: what the client wrote.
            what: how to call it in errors, for instance "message 0, part 1 (video)".

        Returns:
            The URL as it is, or the file's absolute path with every link resolved.

        Raises:
            TypeError: when it is no string.
            ValueError: for another scheme, for a file where none may be named, and for one outside the root.
            FileNotFoundError: when no file of that name lies below the root.
        """
        if not isinstance(address, str):
            raise TypeError(f"Expected {what} with its URL as a string, got {address!r:.80}.")
        # As the processor tells schemes, so that what is let through here is not read as something else there.
        match = _SCHEME.match(address)
        scheme = match.group(1).lower() if match else ""
        if scheme in _URL_SCHEMES:
            return address
        if scheme not in ("", "file"):
            raise ValueError(f"Expected {what} as a data:, http: or https: URL, got {describe(address)!r}.")
        if self._root is None:
            raise ValueError(
                f"Expected {what} as a data:, http: or https: URL, got {describe(address)!r}: this server reads no "
                "files for its clients (it was started without --media-root)."
            )
        return self._below_root(address, scheme, what)

    def _below_root(self, address: str, scheme: str, what: str) -> str:
        assert self._root is not None
        path = address
        if scheme == "file":
            parts = urlsplit(address)
            if parts.netloc not in ("", "localhost"):
                raise ValueError(f"Expected {what} on the server itself (file:///...), got {describe(address)!r}.")
            path = unquote(parts.path)
        if "\0" in path:
            raise ValueError(
                f"Expected {what} as the name of a file, got {describe(address)!r}: it holds a zero byte."
            )
        # Relative names count from the root; links and `..` are followed before the place is judged.
        resolved = os.path.realpath(os.path.join(self._root, path))
        if os.path.commonpath([self._root, resolved]) != self._root:
            raise ValueError(f"Expected {what} below the media root of this server, got {describe(address)!r}.")
        # No folders of pictures: links inside them would be followed unseen.
        if not os.path.isfile(resolved):
            raise FileNotFoundError(
                f"Expected {what} as a file below the media root of this server, got {describe(address)!r}: there is "
                "no such file."
            )
        return resolved
