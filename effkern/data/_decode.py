"""One image file decoded and, for training, augmented: also run as a program of its own, which needs Pillow alone.

As a program it answers requests until its input ends: a line of JSON (``path``, ``seed`` or null, and the fields of
:class:`effkern.data.ImageOptions`), answered by a byte (0: pixels, 1: an error's text), the length as a little-endian
uint32, and the content. Requests and answers are text and pixels; nothing is unpickled.

An image is a function of its file and its request: every draw is ``random.Random(seed).random()``, which no version of
Python may change.
"""

from __future__ import annotations

import json
import math
import random
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any

if __name__ == "__main__":
    sys.path.pop(0)  # the folder of this file: its neighbours are no top-level modules

from PIL import Image, ImageEnhance, ImageOps

MEAN = (124, 116, 104)  # what becomes about 0 once normalised; fills what augmentation uncovers
_BILINEAR, _BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC


def decode(path: str, seed: int | None, options: dict[str, Any]) -> bytes:
    """Pixels of one image, ``size x size x 3`` bytes.

    Args:
        path: Of any file Pillow reads.
        seed: Of the augmentation; None: the middle of the image, as it is.
        options: Fields of :class:`effkern.data.ImageOptions`.

    Raises:
        OSError, ValueError, SyntaxError: if the file is no image, cut short or of an absurd size.
    """
    size, resize = options["size"], options["resize"]
    with Image.open(path) as file:
        whole = seed is None or options["crop"] == "random"
        # JPEG is decoded at a half, a quarter or an eighth, whatever is still as large as asked for.
        file.draft("RGB", (resize, resize) if whole else (2 * size, 2 * size))
        image = file.convert("RGB")
    if seed is None:
        image = _shorter_side(image, resize)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        return image.crop((left, top, left + size, top + size)).tobytes()
    draw = random.Random(seed).random
    image = (_random_crop if options["crop"] == "random" else _resized_crop)(image, size, resize, draw)
    if options["flip"] and draw() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if options["randaugment"]:
        image = _randaugment(image, options["randaugment"], options["randaugment_deviation"], draw)
    if options["jitter"]:
        image = _jitter(image, options["jitter"], draw)
    if draw() < options["erasing"]:
        _erase(image, draw)
    return image.tobytes()


Draw = Callable[[], float]


def _between(low: float, high: float, draw: Draw) -> float:
    return low + (high - low) * draw()


def _shorter_side(image: Image.Image, to: int) -> Image.Image:
    scale = to / min(image.size)
    return image.resize((max(to, round(image.width * scale)), max(to, round(image.height * scale))), _BILINEAR)


def _random_crop(image: Image.Image, size: int, resize: int, draw: Draw) -> Image.Image:
    """The shorter side to ``resize``, then a square anywhere: what BlockDrop trains on."""
    image = _shorter_side(image, resize)
    left, top = int(draw() * (image.width - size + 1)), int(draw() * (image.height - size + 1))
    return image.crop((left, top, left + size, top + size))


def _resized_crop(image: Image.Image, size: int, resize: int, draw: Draw) -> Image.Image:
    """8 to 100 % of the area at an aspect ratio of 3/4 to 4/3, anywhere (arXiv 1409.4842); after ten tries that do not
    fit, the middle."""
    for _ in range(10):
        area = _between(0.08, 1.0, draw) * image.width * image.height
        ratio = math.exp(_between(math.log(3 / 4), math.log(4 / 3), draw))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= image.width and 0 < height <= image.height:
            left, top = int(draw() * (image.width - width + 1)), int(draw() * (image.height - height + 1))
            return image.resize((size, size), _BILINEAR, (left, top, left + width, top + height))
    return ImageOps.fit(image, (size, size), _BILINEAR)


def _jitter(image: Image.Image, strength: float, draw: Draw) -> Image.Image:
    """Brightness, contrast and colour times a factor in 1 +- ``strength``, in any order."""
    kinds = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    while kinds:
        kind = kinds.pop(int(draw() * len(kinds)))
        image = kind(image).enhance(_between(1 - strength, 1 + strength, draw))
    return image


def _erase(image: Image.Image, draw: Draw) -> None:
    """A rectangle of 2 to 33 % of the area becomes the mean colour (arXiv 1708.04896)."""
    for _ in range(10):
        area = _between(0.02, 1 / 3, draw) * image.width * image.height
        ratio = math.exp(_between(math.log(0.3), math.log(1 / 0.3), draw))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width < image.width and 0 < height < image.height:
            left, top = int(draw() * (image.width - width + 1)), int(draw() * (image.height - height + 1))
            image.paste(MEAN, (left, top, left + width, top + height))
            return


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, _BICUBIC, fillcolor=MEAN)


def _add_below(image: Image.Image, amount: int, threshold: int = 128) -> Image.Image:
    return image.point([min(255, v + amount) if v < threshold else v for v in range(256)] * 3)


def _enhance(kind: Any) -> Callable[[Image.Image, float, float], Image.Image]:
    return lambda image, m, sign: kind(image).enhance(0.1 + 1.8 * m)


#: The operations of RandAugment with AutoAugment's ranges: of an image, a magnitude m in [0, 1] and a sign.
OPERATIONS: dict[str, Callable[[Image.Image, float, float], Image.Image]] = {
    "autocontrast": lambda image, m, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, m, sign: ImageOps.equalize(image),
    "invert": lambda image, m, sign: ImageOps.invert(image),
    "rotate": lambda image, m, sign: image.rotate(30 * m * sign, _BICUBIC, fillcolor=MEAN),
    "posterize": lambda image, m, sign: ImageOps.posterize(image, max(1, int(4 * m))),
    "solarize": lambda image, m, sign: ImageOps.solarize(image, int(256 * m)),
    "solarize_add": lambda image, m, sign: _add_below(image, int(110 * m)),
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": lambda image, m, sign: _affine(image, 1, 0.3 * m * sign, 0, 0, 1, 0),
    "shear_y": lambda image, m, sign: _affine(image, 1, 0, 0, 0.3 * m * sign, 1, 0),
    "translate_x": lambda image, m, sign: _affine(image, 1, 0, 0.45 * m * sign * image.width, 0, 1, 0),
    "translate_y": lambda image, m, sign: _affine(image, 1, 0, 0, 0, 1, 0.45 * m * sign * image.height),
}


def _randaugment(image: Image.Image, magnitude: float, deviation: float, draw: Draw) -> Image.Image:
    """Two operations, each with probability 1/2, at a magnitude of 0 to 10 drawn around ``magnitude`` (arXiv 1909.13719
    in the form DS-Net trains with)."""
    names = list(OPERATIONS)
    for _ in range(2):
        name, runs = names[int(draw() * len(names))], draw() < 0.5
        normal = math.sqrt(-2 * math.log(1 - draw())) * math.cos(2 * math.pi * draw())
        sign = 1.0 if draw() < 0.5 else -1.0
        if runs:
            image = OPERATIONS[name](image, min(10.0, max(0.0, magnitude + deviation * normal)) / 10, sign)
    return image


def serve() -> None:
    """Answer requests on the standard streams until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training, which still finishes its step
    answers = sys.stdout.buffer
    for line in sys.stdin.buffer:
        request = json.loads(line)
        try:
            status, content = 0, decode(request.pop("path"), request.pop("seed"), request)
        except Exception as error:  # whatever a file does to its decoder is an answer, not the end of the decoder
            status, content = 1, f"{type(error).__name__}: {error}".encode()
        answers.write(struct.pack("<BI", status, len(content)) + content)
        answers.flush()


if __name__ == "__main__":
    serve()
