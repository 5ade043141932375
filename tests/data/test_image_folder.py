"""Image folders: what is read, that a batch is the same whoever decodes it, and what goes wrong by name."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from effkern import cli
from effkern.data import DataError, ImageOptions, load_image_folder
from effkern.data._decode import MEAN, OPERATIONS, _erase, decode
from effkern.data.decoders import Decoders

Image = pytest.importorskip("PIL.Image")
ROOT = Path(__file__).resolve().parents[2]
SMALL = ImageOptions(size=8, resize=10, crop="random")


def where(width: int = 14, height: int = 10):
    """An image whose pixels say where they are: red is the column, green the row."""
    image = Image.new("RGB", (width, height))
    image.putdata([(8 * x, 8 * y, 77) for y in range(height) for x in range(width)])
    return image


def make(folder: Path, counts: dict[str, tuple[int, ...]]) -> Path:
    """Random images, ``counts`` of each class in each part, of different sizes and kinds of file."""
    draw = random.Random(0)
    for part, numbers in counts.items():
        for label, count in enumerate(numbers):
            (folder / part / f"n{label:02}").mkdir(parents=True)
            for i in range(count):
                size = (draw.randrange(10, 20), draw.randrange(10, 20))
                image = Image.frombytes("RGB", size, draw.randbytes(3 * size[0] * size[1]))
                image = image.convert("L") if i % 3 == 1 else image
                image.save(folder / part / f"n{label:02}" / f"{i:03}.{('png', 'jpeg', 'bmp')[i % 3]}")
    return folder


def pixels(content: bytes, size: int = 8) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(size, size, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("images"), {"train": (30, 20), "val": (4, 5)})


@pytest.fixture(scope="module")
def data(folder):
    return load_image_folder(folder, SMALL, workers=2)


def test_splits_and_classes(folder, data, tmp_path):
    assert data.classes == ("n00", "n01") and data.image_shape == (3, 8, 8)
    assert (len(data.train), len(data.val), len(data.test)) == (49, 1, 9)
    assert set(data.train.paths).isdisjoint(data.val.paths)
    for split in (data.train, data.val, data.test):
        assert [int(Path(p).parent.name[1:]) for p in split.paths] == split.labels.tolist()
    more = load_image_folder(folder, held_out=10, workers=1)
    assert (len(more.train), len(more.val)) == (40, 10)
    assert {*more.train.paths, *more.val.paths} == {*data.train.paths, *data.val.paths}
    both = load_image_folder(make(tmp_path, {"train": (2, 2), "val": (1, 0), "test": (0, 3)}), workers=1)
    assert (len(both.train), len(both.val), len(both.test)) == (4, 1, 3) and both.test.labels.tolist() == [1, 1, 1]
    part = data.train[torch.tensor([3, 0])]
    assert part.paths == (data.train.paths[3], data.train.paths[0]) and len(data.train[5:9]) == 4


def test_evaluation_looks_at_the_middle_of_the_resized_image(data):
    batches = list(data.batches(data.test, 4))
    assert [len(y) for _, y in batches] == [4, 4, 1]
    assert torch.equal(torch.cat([y for _, y in batches]), data.test.labels)
    for x, path in zip(torch.cat([x for x, _ in batches]), data.test.paths, strict=True):
        image = Image.open(path).convert("RGB")
        scale = 10 / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
        left, top = (image.width - 8) // 2, (image.height - 8) // 2
        want = pixels(image.crop((left, top, left + 8, top + 8)).tobytes()).permute(2, 0, 1)[None]
        torch.testing.assert_close(x[None], data.normalize(want))
    mean, std = torch.tensor(data.mean), torch.tensor(data.std)
    white = data.normalize(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)).flatten()
    torch.testing.assert_close(white, (1 - mean) / std)


def test_any_step_can_be_asked_for_first_and_parts_make_the_whole(data, folder):
    walked = [data.feed(data.train, 12, seed=1, augment=True)(step) for step in range(6)]
    one = load_image_folder(folder, SMALL, workers=1)
    fresh = one.feed(one.train, 12, seed=1, augment=True)
    for step in (5, 0, 4):
        assert all(torch.equal(a, b) for a, b in zip(fresh(step), walked[step], strict=True))
    parts = [fresh(3, part, 3) for part in range(3)]
    assert torch.equal(torch.cat([x for x, _ in parts]), walked[3][0])
    assert torch.equal(torch.cat([y for _, y in parts]), walked[3][1])
    assert not torch.equal(data.feed(data.train, 12, seed=2, augment=True)(0)[0], walked[0][0])
    assert fresh.steps_per_epoch == 4
    plain, again = data.feed(data.train, 49), data.feed(data.train, 49)
    assert torch.equal(plain(0)[0].sum((1, 2, 3)).sort().values, again(1)[0].sum((1, 2, 3)).sort().values)


def test_training_passes_are_shuffled_and_whole(data):
    batches = list(data.batches(data.train, 10, generator=torch.Generator().manual_seed(0), augment=True))
    assert [len(y) for _, y in batches] == [10] * 4
    with pytest.raises(ValueError, match="augment: needs a generator"):
        next(data.batches(data.train, 10, augment=True))


def test_a_random_crop_is_a_window_of_the_resized_image(tmp_path):
    where().save(tmp_path / "a.png")
    seen = set()
    for seed in range(200):
        found = pixels(decode(str(tmp_path / "a.png"), seed, asdict(SMALL))).int()
        flipped = bool(found[0, 0, 0] > found[0, 1, 0])
        found = found.flip(1) if flipped else found
        left, top = int(found[0, 0, 0]) // 8, int(found[0, 0, 1]) // 8
        want = torch.stack(torch.meshgrid(torch.arange(8) + top, torch.arange(8) + left, indexing="ij")[::-1], 2) * 8
        assert torch.equal(found[..., :2], want) and (found[..., 2] == 77).all()
        seen.add((left, top, flipped))
    assert len(seen) == 7 * 3 * 2  # every window, mirrored and not


def test_a_resized_crop_has_its_area_and_ratio(tmp_path):
    where(32, 32).save(tmp_path / "a.png")
    options = asdict(ImageOptions(size=16, resize=32, flip=False))
    areas = []
    for seed in range(200):
        found = pixels(decode(str(tmp_path / "a.png"), seed, options), 16).double()
        # Neighbours in the result are width / 16 columns and height / 16 rows apart.
        width = float(found[8, 12, 0] - found[8, 4, 0]) / 8 * 2
        height = float(found[12, 8, 1] - found[4, 8, 1]) / 8 * 2
        areas.append(width * height / 32**2)
        assert 0.7 < width / height < 1.45
    assert 0.06 < min(areas) < 0.2 and 0.85 < max(areas) < 1.05
    assert 0.45 < sum(areas) / len(areas) < 0.6  # 0.54 but for what does not fit


def test_nothing_but_the_seed_decides(tmp_path):
    where().save(tmp_path / "a.png")
    options = asdict(ImageOptions(8, 10, "resized", jitter=0.4, randaugment=9, erasing=0.5))
    random.seed(1)
    first = [decode(str(tmp_path / "a.png"), seed, options) for seed in range(20)]
    random.seed(2)
    assert [decode(str(tmp_path / "a.png"), seed, options) for seed in range(20)] == first
    assert len(set(first)) == 20


def test_operations_of_randaugment():
    noise = Image.frombytes("RGB", (32, 32), bytes(30 + b % 220 for b in random.Random(0).randbytes(3 * 32 * 32)))
    for name, run in OPERATIONS.items():
        for sign in (1.0, -1.0):
            changed = run(noise, 0.9, sign)
            assert changed.size == noise.size and changed.mode == "RGB"
            assert changed.tobytes() != noise.tobytes(), name
    image = where(16, 16)
    for name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y", "solarize_add"):
        assert OPERATIONS[name](image, 0.0, 1.0).tobytes() == image.tobytes()
    for name in ("color", "contrast", "brightness", "sharpness"):
        assert OPERATIONS[name](image, 0.5, 1.0).tobytes() == image.tobytes()  # a factor of 1
    # By hand: 0.45 of 16 pixels at half the magnitude is 3.6 columns, filled with the mean colour.
    moved = OPERATIONS["translate_x"](image, 0.5, 1.0)
    assert moved.getpixel((15, 3)) == MEAN and moved.getpixel((2, 3))[0] == pytest.approx(8 * 5.6, abs=2)
    assert OPERATIONS["posterize"](Image.new("RGB", (1, 1), (255, 100, 31)), 0.9, 1.0).getpixel((0, 0)) == (224, 96, 0)
    assert OPERATIONS["solarize"](Image.new("RGB", (1, 1), (255, 100, 229)), 0.9, 1.0).getpixel((0, 0)) == (0, 100, 229)
    assert OPERATIONS["solarize_add"](Image.new("RGB", (1, 1), (255, 127, 128)), 1, 1).getpixel((0, 0)) == (
        255,
        237,
        128,
    )


def test_erasing_paints_a_rectangle_of_the_mean():
    shares = []
    for seed in range(100):
        image = Image.new("RGB", (40, 40))
        _erase(image, random.Random(seed).random)
        painted = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(40, 40, 3)
        gone = (painted == torch.tensor(MEAN, dtype=torch.uint8)).all(2)
        rows, columns = gone.any(1), gone.any(0)
        assert gone.any() and torch.equal(gone, rows[:, None] & columns)
        shares.append(gone.double().mean().item())
    assert min(shares) > 0.015 and max(shares) < 0.36 and len(set(shares)) > 20


@pytest.mark.parametrize("content", [b"", b"no image", None], ids=["empty", "text", "cut"])
def test_a_file_that_is_no_image_is_named_and_the_others_still_come(tmp_path, content):
    good, bad = tmp_path / "good.jpg", tmp_path / "bad.jpg"
    where(64, 64).save(good)
    bad.write_bytes(good.read_bytes()[:-300] if content is None else content)
    decoders = Decoders(1)
    with pytest.raises(DataError, match=r"bad\.jpg: cannot be decoded: \w+"):
        decoders.submit([str(good), str(bad)], SMALL)()
    assert decoders.submit([str(good)], SMALL)().shape == (1, 3, 8, 8)


def test_a_decoder_that_dies_is_an_error_and_is_replaced(tmp_path):
    where().save(tmp_path / "a.png")
    decoders, paths = Decoders(1), [str(tmp_path / "a.png")]
    first = decoders.submit(paths, SMALL)()
    one = decoders._idle.get()
    decoders._idle.put(one)
    os.kill(one.process.pid, signal.SIGINT)  # Ctrl-C reaches the whole terminal: a decoder goes on
    assert torch.equal(decoders.submit(paths, SMALL)(), first)
    one.process.kill()
    one.process.wait()
    with pytest.raises(DataError, match=r"a\.png: the process that decoded it died"):
        decoders.submit(paths, SMALL)()
    assert torch.equal(decoders.submit(paths, SMALL)(), first)


def test_decoders_end_with_the_process_they_serve(tmp_path):
    where().save(tmp_path / "a.png")
    program = (
        "import sys; from effkern.data.decoders import Decoders, ImageOptions\n"
        "d = Decoders(1); d.submit([sys.argv[1]], ImageOptions(8, 10))()\n"
        "print(d._idle.get().process.pid, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "a.png")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 60
    while _lives(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _lives(pid)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({}, "expected a folder with train/CLASS/FILE"),
        ({"val": (1,)}, "train: cannot be read: No such file"),
        ({"train": (2,)}, "expected a folder val or test beside train"),
        ({"train": (0,), "val": (1,)}, r"train: expected images \(.bmp, .jpeg"),
        ({"train": (1,), "val": (1, 1)}, "n01: is no class of the training images"),
        ({"train": (1,), "val": (1,)}, r"held_out: must be in \[1, 0\], got 1"),
    ],
)
def test_folders_that_cannot_be_used_are_named(tmp_path, counts, message):
    with pytest.raises(DataError, match=message):
        load_image_folder(make(tmp_path / "x", counts), workers=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 9, "resize": 8}, "size: must be in"),
        ({"crop": "middle"}, "crop: must be"),
        ({"erasing": 2}, r"erasing: must be in \[0, 1\], got 2"),
        ({"randaugment": 11}, r"randaugment: must be in \[0, 10\]"),
    ],
)
def test_senseless_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ImageOptions(**options)
    with pytest.raises(ValueError, match="workers: must be at least 1, got 0"):
        Decoders(0)


def test_a_recipe_trains_on_files(folder, tmp_path, capsys):
    settings = [
        "network.options={widths=[4,4,4],blocks=[1,1,1],stem_stride=2,shortcut='pool'}",
        "train.epochs=2",
        "train.batch_size=12",
        "data.files={size=8,resize=10,crop='random',randaugment=9,erasing=0.2}",
    ]
    words = [word for setting in settings for word in ("--set", setting)]
    command = ["train", "stochastic-depth", "--data", f"imagefolder:{folder}", "--workers", "2", *words]
    for name in ("first", "second"):
        assert cli.main([*command, "--out", str(tmp_path / name)]) == 0
    first, second = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("first", "second"))
    assert first["phases"]["train"]["steps"] == 8
    assert first["phases"]["train"]["test"] == second["phases"]["train"]["test"]
    files = [tmp_path / name / "train" / "final.safetensors" for name in ("first", "second")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert cli.main([*command, "--set", "data.files.size=11", "--out", str(tmp_path / "wrong")]) == 1
    assert "data.files.size: must be in [1, resize = 10], got 11" in capsys.readouterr().err
