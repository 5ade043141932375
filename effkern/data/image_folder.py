"""Folders of image files, as ImageNet comes: ``train/CLASS/*.jpg`` and ``val/CLASS/*.jpg``; needs Pillow."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from .dataset import Dataset
from .decoders import Decoders, ImageOptions
from .feed import BatchFeed
from .idx import DataError
from .split import Split, one_pass

__all__ = ["FileFeed", "FileSplit", "ImageFolder", "load_image_folder"]

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm"})
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
HELD_OUT, MOST_HELD_OUT = 0.02, 10_000


@dataclass(frozen=True)
class FileSplit:
    """``paths`` of image files and their ``labels``: ``[n]`` int64."""

    paths: tuple[str, ...]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: slice | Tensor) -> FileSplit:
        rows = torch.arange(len(self))[index]
        return FileSplit(tuple(self.paths[i] for i in rows.tolist()), self.labels[rows])


@dataclass(frozen=True)
class ImageFolder(Dataset):
    """Images that stay in their files until a batch needs them; the splits are `FileSplit`.

    Attributes:
        options: how files become squares.
        decoders: who does it.
    """

    options: ImageOptions = field(default_factory=ImageOptions)
    decoders: Decoders = field(default_factory=lambda: Decoders(1), repr=False)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(3, size, size)``."""
        return (3, self.options.size, self.options.size)

    def with_options(self, options: ImageOptions) -> ImageFolder:
        """The same files read in another way."""
        return replace(self, options=options)

    def feed(self, split: Split, batch_size: int, seed: int = 0, augment: bool = False, shift: int = 0) -> BatchFeed:
        """Batches by step number; ``shift`` has no meaning here, ``options`` say how images are augmented."""
        return FileFeed(self, split, batch_size, seed, augment)

    def batches(
        self,
        split: Split,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        augment: bool = False,
        shift: int = 0,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As :meth:`Dataset.batches`; the next batch is decoded while one is looked at."""
        files = _files(split)

        def begin(chosen: Tensor) -> tuple[Callable[[], Tensor], Tensor]:
            part = files[chosen]
            seeds = torch.randint(2**62, (len(part),), generator=generator).tolist() if augment else None
            return self.decoders.submit(part.paths, self.options, seeds), part.labels

        waiting = None
        for chosen in one_pass(len(split), batch_size, generator, augment):
            following = begin(chosen)
            if waiting is not None:
                yield self.normalize(waiting[0]()), waiting[1]
            waiting = following
        if waiting is not None:
            yield self.normalize(waiting[0]()), waiting[1]


class FileFeed(BatchFeed):
    """Batches by step number from files; while a step computes, the images of the one after it are decoded.

    An image is augmented as seed, step and its place in the batch say, whoever decodes it and how often.
    """

    def __init__(self, data: ImageFolder, split: Split, batch_size: int, seed: int = 0, augment: bool = False) -> None:
        super().__init__(data, split, batch_size, seed, augment)
        self.files = data
        self._ahead: dict[tuple[int, int, int], Callable[[], Tensor]] = {}

    def __call__(self, step: int, part: int = 0, parts: int = 1) -> tuple[Tensor, Tensor]:
        images = self._ahead.pop((step, part, parts), None) or self._begin(step, part, parts)
        labels = self.split.labels[self.chosen(step, part, parts)]
        self._ahead = {key: job for key, job in self._ahead.items() if key[0] == step or key[0] == step + 1}
        self._ahead[step + 1, part, parts] = self._begin(step + 1, part, parts)
        return self.data.normalize(images()), labels

    def _begin(self, step: int, part: int, parts: int) -> Callable[[], Tensor]:
        chosen, seeds = self.chosen(step, part, parts), None
        if self.augment:
            whole = torch.randint(2**62, (self.batch_size,), generator=self._generator(_AUGMENT, step))
            begin = part * len(chosen)
            seeds = whole[begin : begin + len(chosen)].tolist()
        paths = [_files(self.split).paths[i] for i in chosen.tolist()]
        return self.files.decoders.submit(paths, self.files.options, seeds)


_AUGMENT = 1


def load_image_folder(
    path: Path, options: ImageOptions | None = None, workers: int | None = None, held_out: int | None = None
) -> ImageFolder:
    """Find the images of a folder; none is opened yet.

    Args:
        path: With ``train/CLASS/FILE`` and ``test/CLASS/FILE`` or, as ImageNet has it, ``val/CLASS/FILE``. With both
            of the latter, ``val`` is what choices are made by; with one of them it is the test set, and some training
            images are held out.
        options: how files become squares.
        workers: processes that decode; default: one for each processor this process may use,
            shared among the ranks of a machine.
        held_out: training images to hold out; default: 2 %, at most 10,000. Which ones depends on their number alone.

    Raises:
        DataError: if a folder is missing, has no images or classes that ``train`` does not have, or there is no Pillow.
    """
    if not path.is_dir():
        raise DataError(f"{path}: expected a folder with train/CLASS/FILE, found none")
    classes = _classes(path / "train")
    train = _scan(path / "train", classes)
    others = [name for name in ("val", "test") if (path / name).is_dir()]
    if not others:
        raise DataError(f"{path}: expected a folder val or test beside train, found neither")
    *first, test = [_scan(path / name, classes) for name in others]
    if first:
        val = first[0]
    else:
        count = max(1, min(MOST_HELD_OUT, round(len(train) * HELD_OUT))) if held_out is None else held_out
        if not 0 < count < len(train):
            raise DataError(f"held_out: must be in [1, {len(train) - 1}], got {count}")
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(len(train)))
        train, val = train[order[count:].sort().values], train[order[:count].sort().values]
    return ImageFolder(
        name=f"images of {path.resolve().name}",
        source=str(path),
        train=train,  # type: ignore[arg-type]
        val=val,  # type: ignore[arg-type]
        test=test,  # type: ignore[arg-type]
        classes=tuple(classes),
        mean=MEAN,
        std=STD,
        flip=True,
        options=options or ImageOptions(),
        decoders=Decoders(_share_of_processors() if workers is None else workers),
    )


def _share_of_processors() -> int:
    """Of one rank, where torchrun has started several on this machine."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _classes(folder: Path) -> list[str]:
    try:
        found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror or error}") from error
    if not found:
        raise DataError(f"{folder}: expected a folder for each class, found none")
    return found


def _scan(folder: Path, classes: list[str]) -> FileSplit:
    numbers = {name: i for i, name in enumerate(classes)}
    paths: list[str] = []
    labels: list[int] = []
    for name in _classes(folder):
        if name not in numbers:
            raise DataError(f"{folder / name}: is no class of the training images")
        files = sorted(entry.path for entry in os.scandir(folder / name) if _is_image(entry))
        paths += files
        labels += [numbers[name]] * len(files)
    if not paths:
        raise DataError(f"{folder}: expected images ({', '.join(sorted(SUFFIXES))}), found none")
    return FileSplit(tuple(paths), torch.tensor(labels))


def _is_image(entry: os.DirEntry[str]) -> bool:
    name = entry.name.lower()
    return not name.startswith(".") and os.path.splitext(name)[1] in SUFFIXES and entry.is_file()


def _files(split: Split) -> FileSplit:
    assert isinstance(split, FileSplit)
    return split
