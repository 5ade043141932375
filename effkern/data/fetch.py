"""Getting data files onto this machine: Debian's packages and downloads."""

from __future__ import annotations

import os
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException

from effkern.training import progress

from .idx import DataError

__all__ = ["apt_install", "can_apt_install", "download"]

TIMEOUT_S = 30.0  # without a byte
APT_TIMEOUT_S = 600.0


def can_apt_install() -> bool:
    """Whether this process may install Debian packages."""
    return os.geteuid() == 0 and shutil.which("apt-get") is not None


def apt_install(package: str) -> None:
    """Install a Debian package, with fresh package lists if the present ones do not lead to it.

    Raises:
        DataError: with the last line apt-get said.
    """
    install = ("install", "-y", "-q", "--no-install-recommends", package)
    if _apt_get(install) is None:
        return
    problem = _apt_get(("update", "-q")) or _apt_get(install)
    if problem is not None:
        raise DataError(f"apt-get could not install {package}: {problem}")


def _apt_get(arguments: Sequence[str]) -> str | None:
    """Run apt-get; the reason it failed, or None."""
    try:
        done = subprocess.run(
            ["apt-get", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=APT_TIMEOUT_S,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return None
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return said[-1].strip() if said else f"exit status {done.returncode}"


def download(url: str, limit: int) -> bytes:
    """The body of ``url``, in memory, with a progress bar.

    Args:
        url: http or https address.
        limit: most bytes to accept.

    Raises:
        DataError: if the server cannot be reached, refuses, ends early, or sends more than ``limit`` bytes.
    """
    if not url.startswith(("https://", "http://")):
        raise DataError(f"{url}: must be an http or https address")
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as reply:
            size = int(reply.headers.get("Content-Length") or 0)
            body = bytearray()
            with progress(size, url.rsplit("/", 1)[-1], unit="B", unit_scale=True) as bar:
                while part := reply.read(1 << 16):
                    body += part
                    bar.update(len(part))
                    if len(body) > limit:
                        raise DataError(f"{url}: expected at most {limit} bytes, found more")
            if size and len(body) != size:
                raise DataError(f"{url}: expected {size} bytes, found {len(body)} before the connection ended")
    except (urllib.error.URLError, HTTPException, OSError, ValueError) as error:
        raise DataError(f"{url}: download failed: {getattr(error, 'reason', None) or error}") from error
    return bytes(body)
