"""Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv:1708.07747): 70,000 grey images of clothes, 28x28.

Looked for where a machine may have it, in this order: the folder ``EFFKERN_DATA``, the folder of Debian's package
``dataset-fashion-mnist``, that package by apt-get when root, a download, and last scikit-learn's digits as a stand-in
that says so. Wherever the files come from, their SHA-256 is checked before a pixel is used; a file that is there but
wrong stops everything, since quietly going on with other data would hide it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from effkern.training import say, write_atomically

from .dataset import Dataset
from .digits import load_digits
from .fetch import apt_install, can_apt_install, download
from .idx import DataError, Expected, check_idx, read_idx
from .split import Split

__all__ = ["load_fashion_mnist", "read_folder"]

NAME = "Fashion-MNIST"
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
PACKAGE = "dataset-fashion-mnist"
SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")
MIRRORS = (
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    "https://fashion-mnist.s3.eu-central-1.amazonaws.com/",
)
HELD_OUT = 5000  # last images of the training set; its order is random already

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
# Of the uncompressed files; Debian's package and the authors' own .gz files (whose MD5 the authors publish) agree.
FILES: Mapping[str, Expected] = {
    TRAIN_IMAGES: Expected((60000, 28, 28), "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
    TRAIN_LABELS: Expected((60000,), "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
    TEST_IMAGES: Expected((10000, 28, 28), "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
    TEST_LABELS: Expected((10000,), "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
}


def load_fashion_mnist(
    *,
    system_folder: Path = SYSTEM_FOLDER,
    cache: Path | None = None,
    mirrors: Sequence[str] = MIRRORS,
    files: Mapping[str, Expected] = FILES,
    held_out: int = HELD_OUT,
    fallback: bool = True,
    tell: Callable[[str], None] = say,
) -> Dataset:
    """Find or fetch Fashion-MNIST, checked.

    Args:
        system_folder: where Debian's package puts the files.
        cache: where downloads are kept; ``$XDG_CACHE_HOME/effkern/fashion-mnist`` by default.
        mirrors: addresses of folders to download from, tried in turn.
        files: what each file must be.
        held_out: images of the training set that become ``val``.
        fallback: whether the digits of scikit-learn may stand in.
        tell: prints a line; every step beyond reading a local folder is announced.

    Raises:
        DataError: if a file that is there is not the right one, ``EFFKERN_DATA`` is no folder, or no data could be had;
            the message says what was tried.
    """
    tried = []
    places = []
    if given := os.environ.get("EFFKERN_DATA"):
        if not Path(given).is_dir():
            raise DataError(f"EFFKERN_DATA: must be a folder, got {given!r}")
        places += [Path(given), Path(given) / "fashion-mnist"]
    for folder in [*places, system_folder]:
        if found := read_folder(folder, files, held_out):
            return found
        tried.append(f"{folder}: not there")
    if places:
        tell(f"{NAME}: EFFKERN_DATA={given} has no {TRAIN_IMAGES}.gz; looking further.")

    if can_apt_install():
        tell(f"{NAME}: installing Debian's package {PACKAGE} (apt-get, as root).")
        try:
            apt_install(PACKAGE)
        except DataError as error:
            tell(f"{NAME}: {error}")
            tried.append(str(error))
        else:
            if found := read_folder(system_folder, files, held_out):
                return found
            tried.append(f"{PACKAGE}: installed, but {system_folder} has no {TRAIN_IMAGES}.gz")
    else:
        tried.append(f"{PACKAGE}: not root on a Debian machine")

    cache = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "effkern" / "fashion-mnist"
    try:
        _fill(cache, mirrors, files, tell)
    except DataError as error:
        tell(f"{NAME}: {error}")
        tried.append(str(error))
    else:
        if found := read_folder(cache, files, held_out):
            return found

    if not fallback:
        raise DataError(f"{NAME} could not be found or fetched:\n  " + "\n  ".join(tried))
    try:
        digits = load_digits()
    except DataError as error:
        raise DataError(f"{NAME} could not be found or fetched:\n  " + "\n  ".join([*tried, str(error)])) from error
    tell(f"NOTICE: this is not {NAME}. It could not be found or fetched, so {digits.name} stand in:")
    tell(f"        {len(digits.train)} training images, enlarged from 8x8.")
    tell("        Set EFFKERN_DATA to a folder with the real files.")
    return digits


def read_folder(folder: Path, files: Mapping[str, Expected] = FILES, held_out: int = HELD_OUT) -> Dataset | None:
    """The data set in ``folder``, each file as ``<name>.gz`` or ``<name>``; None if none of them is there.

    Raises:
        DataError: if only some files are there, or one is not as expected.
    """
    paths = {name: path for name in files if (path := _existing(folder, name))}
    if not paths:
        return None
    if missing := [name for name in files if name not in paths]:
        raise DataError(f"{folder}: expected {', '.join(files)}, found no {', '.join(missing)} (.gz or not)")
    arrays = {name: read_idx(path, files[name]) for name, path in paths.items()}
    every = Split(arrays[TRAIN_IMAGES][:, None], arrays[TRAIN_LABELS].to(torch.int64))
    train, val = every[: len(every) - held_out], every[len(every) - held_out :]
    pixels = train.images.flatten()
    # Exact integer sums: a float mean over 43 million pixels depends on the thread count in its last digits.
    counts = torch.bincount(pixels, minlength=256).double()
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = float((counts * values).sum() / counts.sum())
    std = float(((counts * (values - mean) ** 2).sum() / counts.sum()).sqrt())
    test = Split(arrays[TEST_IMAGES][:, None], arrays[TEST_LABELS].to(torch.int64))
    return Dataset(NAME, str(folder), train, val, test, CLASSES, mean, std, flip=True)


def _existing(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)


def _fill(cache: Path, mirrors: Sequence[str], files: Mapping[str, Expected], tell: Callable[[str], None]) -> None:
    """Bring what is missing into ``cache``. Files get their name only after they were checked."""
    for name, expected in files.items():
        path = cache / f"{name}.gz"
        if path.is_file():
            try:
                read_idx(path, expected)
                continue
            except DataError as error:
                tell(f"{NAME}: {error}; downloading it again.")
        problems = []
        for mirror in mirrors:
            url = f"{mirror.rstrip('/')}/{name}.gz"
            tell(f"{NAME}: downloading {url}")
            try:
                body = download(url, limit=expected.size + 1024)  # gzip adds a few bytes even where it cannot compress
                check_idx(body, expected, url)
            except DataError as error:
                problems.append(str(error))
                continue
            try:
                write_atomically(path, body)
            except OSError as error:
                raise DataError(f"{path}: cannot be written: {error}") from error
            break
        else:
            raise DataError("; ".join(problems) or "no address to download from")
