"""What a request may name as a video or an image, and what it stands for: files below a folder, data, allowed URLs.

What is unusual: a request can never switch the network on. A path is judged by where it really leads, links followed.
Of a URL every address is judged that is connected to, also after redirects, and what it gives is fetched whole before
anything looks into it: FFmpeg never opens a connection, and a playlist reaches nothing.
"""

import ipaddress
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path

import xxhash

from vamba.errors import UserError, opening, reason_of
from vamba.files import size_and_digest
from vamba.modeling.images import download
from vamba.modeling.media_limits import describe, is_url, path_or_bytes


NAT64 = ipaddress.ip_network("64:ff9b::/96")  # whose last 32 bits are an IPv4 address


@dataclass
class Medium:
    """A video or an image that a request names: `kind`, the path or the bytes, a digest of the bytes, and for a file
    the path below the root, as a client may know it, and in what state it was when the digest was taken."""

    kind: str
    content: str | bytes
    digest: str
    name: str = ""
    state: tuple = ()

    def check_unchanged(self) -> None:
        """Raises UserError where a file is no longer what the digest was taken of."""
        if self.name:
            with opening(self.content):
                if _state(Path(str(self.content))) != self.state:
                    raise UserError(f"{self.content} was changed while it was read; ask again.")


@dataclass
class Media:
    """Finds what requests name.

    Args:
        root: the folder below which files may be read; None for none.
        allow_urls: whether http and https may be fetched. max_bytes: of what one gives.
        may_connect: whether an address may be connected to.

    Raises:
        UserError: `root` is no folder.
    """

    root: Path | str | None = None
    allow_urls: bool = False
    max_bytes: int = 2**28
    may_connect: Callable[[str], bool] = lambda address: is_public(address)
    _digests: dict[tuple, str] = field(default_factory=dict)

    def __post_init__(self):
        if self.root is not None:
            self.root = Path(self.root).resolve()
            if not self.root.is_dir():
                raise UserError(f"--media-root is {self.root}, no folder; give the folder of the videos.")

    def find(self, kind: str, named: str) -> Medium:
        """What a request names, read or fetched as far as its digest needs.

        Raises:
            UserError: it must not be read, or cannot be.
        """
        try:
            found = path_or_bytes(named, allow_urls=True)
            if isinstance(found, str) and is_url(found):
                found = self._fetch(found)
            if isinstance(found, bytes):
                return Medium(kind, found, xxhash.xxh3_128_hexdigest(found))
            path = self._below_root(found, named)
            digest, state = self._digest(path)
            return Medium(kind, str(path), digest, str(path.relative_to(self.root)), state)
        except ValueError as error:
            raise UserError(f"{kind}_url {describe(named)!r:.100}: {reason_of(error)}") from error

    def _below_root(self, found: str, named: str) -> Path:
        if self.root is None:
            raise UserError("this server reads no files; give a data: URL, or start it with --media-root")
        if named[:7].lower() == "file://" and not named[7:].startswith("/"):
            raise UserError("a file: URL names no host; write file:///path")
        with opening("it"):
            path = (Path(self.root) / found).resolve()
            # one sentence for both, as it is nobody's business what lies elsewhere
            if not path.is_relative_to(self.root) or not path.is_file():
                raise UserError("there is no such file below the folder of media")
        return path

    def _digest(self, path: Path) -> tuple[str, tuple]:
        """Of the file's content, read again only when the file has changed; and the state that the file was in."""
        with opening("it"):
            state = _state(path)
            if state not in self._digests:
                if len(self._digests) >= 10_000:
                    self._digests.clear()
                self._digests[state] = size_and_digest(path)[1]
            return self._digests[state], state

    def _fetch(self, url: str) -> bytes:
        if not self.allow_urls:
            raise UserError("this server opens no URLs; give a data: URL, or start it with --allow-urls")
        if not url.lower().startswith(("http://", "https://")):
            raise UserError("it is no http or https URL")
        try:
            return download(url, limit=self.max_bytes, connect=self._connect)
        except (OSError, HTTPException) as error:
            raise UserError(f"it cannot be fetched ({reason_of(error)})") from error

    def _connect(self, address: tuple[str, int], timeout: float, source_address=None) -> socket.socket:
        """`socket.create_connection`, but only to where `may_connect` allows: to the very address that was judged."""
        host, port = address
        for family, kind, protocol, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            if not self.may_connect(str(place[0])):
                raise UserError(f"{host} has an address that is not public")
            connection = socket.socket(family, kind, protocol)
            try:
                connection.settimeout(timeout)
                connection.connect(place)
                return connection
            except OSError as error:
                connection.close()
                failure = error
        raise failure


def _state(path: Path) -> tuple:
    """What differs once a file was changed or replaced."""
    about = path.stat()
    return str(path), about.st_size, about.st_mtime_ns, about.st_ino


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the open internet: not to this machine, a private network or many at once."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        embedded = ip.ipv4_mapped or ip.sixtofour or (ip.teredo or [None, None])[1]
        if ip in NAT64:
            embedded = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if embedded is not None:
            return is_public(str(embedded))
        if ip.is_site_local:
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved
