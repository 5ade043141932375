"""Image files decoded by processes of their own, ahead of the step that needs them."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .idx import DataError

__all__ = ["Decoders", "ImageOptions"]

PROGRAM = Path(__file__).with_name("_decode.py")


@dataclass(frozen=True)
class ImageOptions:
    """How image files become squares.

    Attributes:
        size: of the squares.
        resize: the shorter side before the middle, or with ``crop = "random"`` any square, is cut out.
        crop: of training images. ``"random"``: any square of the resized image. ``"resized"``: 8 to 100 % of the area
            at any place and an aspect ratio of 3/4 to 4/3.
        flip: whether training images are mirrored half of the time.
        jitter: brightness, contrast and colour times 1 +- this.
        randaugment: magnitude, 0 to 10, of two random operations; 0: none.
        randaugment_deviation: of the magnitude from operation to operation.
        erasing: probability of painting over a rectangle.
    """

    size: int = 224
    resize: int = 256
    crop: Literal["random", "resized"] = "resized"
    flip: bool = True
    jitter: float = 0.0
    randaugment: float = 0.0
    randaugment_deviation: float = 0.5
    erasing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.size <= self.resize:
            raise ValueError(f"size: must be in [1, resize = {self.resize}], got {self.size}")
        if self.crop not in ("random", "resized"):
            raise ValueError(f"crop: must be 'random' or 'resized', got {self.crop!r}")
        for name, limit in (("jitter", 1), ("randaugment", 10), ("erasing", 1)):
            if not 0 <= getattr(self, name) <= limit:
                raise ValueError(f"{name}: must be in [0, {limit}], got {getattr(self, name)}")


class Decoders:
    """Processes that decode and augment images: a thread each waits for its process, so that this one can train.

    The processes are fresh interpreters with Pillow alone, not forks of this one: a fork of a process whose threads
    hold locks may hang. They end with this process, however that ends, as their input does.

    Args:
        workers: number of processes.

    Raises:
        ValueError: if there is to be none.
        DataError: if Pillow is not installed.
    """

    def __init__(self, workers: int) -> None:
        if workers < 1:
            raise ValueError(f"workers: must be at least 1, got {workers}")
        try:
            import PIL.Image  # noqa: F401
        except ImportError as error:
            raise DataError("image files need Pillow (pip install pillow)") from error
        self._threads = ThreadPoolExecutor(workers, "decode")
        self._idle: SimpleQueue[_Decoder] = SimpleQueue()
        decoders = [_Decoder() for _ in range(workers)]
        for one in decoders:
            self._idle.put(one)
        weakref.finalize(self, _stop, self._threads, decoders)

    def submit(
        self, paths: Sequence[str], options: ImageOptions, seeds: Sequence[int] | None = None
    ) -> Callable[[], Tensor]:
        """Begin decoding.

        Args:
            paths: of the files.
            options: how.
            seeds: of the augmentation, one a file; None: none.

        Returns:
            A function that waits for the images, uint8 ``[n, 3, size, size]`` in channels-last layout, and raises
            `DataError` naming the first file that cannot be decoded.
        """
        side = options.size
        # NumPy's, as a tensor made in inference mode could not be written to from other threads.
        pixels = np.empty((len(paths), side, side, 3), np.uint8)
        plain = asdict(options)

        def one(i: int) -> None:
            decoder = self._idle.get()
            try:
                content = decoder.ask({"path": paths[i], "seed": None if seeds is None else seeds[i], **plain})
            finally:
                self._idle.put(decoder)
            pixels[i] = np.frombuffer(content, np.uint8).reshape(side, side, 3)

        pending = [self._threads.submit(one, i) for i in range(len(paths))]

        def images() -> Tensor:
            for job in pending:
                job.result()
            return torch.from_numpy(pixels).permute(0, 3, 1, 2)

        return images


class _Decoder:
    """One process, started when it is first asked and again after it died."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, request: dict[str, object]) -> bytes:
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, os.fspath(PROGRAM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        process = self.process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            status, length = struct.unpack("<BI", process.stdout.read(5))
            content = process.stdout.read(length)
        except (OSError, struct.error):
            content, status, length = b"", 1, 1
        if len(content) != length:
            self.stop()
            raise DataError(f"{request['path']}: the process that decoded it died (status {process.returncode})")
        if status:
            raise DataError(f"{request['path']}: cannot be decoded: {content.decode(errors='replace')}")
        return content

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            process, self.process = self.process, None
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):  # what was not yet written has nowhere to go
                        stream.close()


def _stop(threads: ThreadPoolExecutor, decoders: list[_Decoder]) -> None:
    threads.shutdown(wait=False, cancel_futures=True)
    for decoder in decoders:
        decoder.stop()
