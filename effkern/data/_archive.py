"""What reading a NumPy archive raises when it is damaged, encrypted or none."""

from __future__ import annotations

import zipfile
import zlib

UNREADABLE = (OSError, ValueError, TypeError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
