"""CIFAR-10 from the files people have, and what is said about files that are something else."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from effkern.data import DataError, load_cifar10, open_data

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)
LABELS = np.arange(12, dtype=np.uint8) % 10


def write_binary(folder, name, pixels, labels):
    folder.mkdir(exist_ok=True)
    records = np.concatenate([labels[:, None], pixels.reshape(len(pixels), -1)], 1)
    (folder / name).write_bytes(records.tobytes())


def test_binary_version(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    for i in range(5):
        write_binary(folder, f"data_batch_{i + 1}.bin", PIXELS[2 * i : 2 * i + 2], LABELS[2 * i : 2 * i + 2])
    write_binary(folder, "test_batch.bin", PIXELS[10:], LABELS[10:])
    for path in (tmp_path, folder):
        data = load_cifar10(path, held_out=3)
        assert (len(data.train), len(data.val), len(data.test)) == (7, 3, 2)
        assert torch.equal(torch.cat([data.train.images, data.val.images]), torch.from_numpy(PIXELS[:10]))
        assert data.test.labels.tolist() == [0, 1]
    x = data.normalize(data.test.images)
    want = (torch.from_numpy(PIXELS[10:]).double() / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)).div(
        torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    )
    torch.testing.assert_close(x.double(), want, rtol=1e-5, atol=1e-5)
    (folder / "data_batch_3.bin").write_bytes(b"x" * 5000)
    with pytest.raises(DataError, match=r"data_batch_3.bin: expected a multiple of 3073 bytes, found 5000"):
        load_cifar10(tmp_path)


def archive(path, **changes):
    np.savez(
        path,
        **{
            "train_images": PIXELS[:8],
            "train_labels": LABELS[:8],
            "test_images": PIXELS[8:].transpose(0, 2, 3, 1),
            "test_labels": LABELS[8:],
            **changes,
        },
    )
    return path


def test_archive_of_pixels(tmp_path):
    data = load_cifar10(archive(tmp_path / "a.npz"), held_out=2)
    assert torch.equal(data.test.images, torch.from_numpy(PIXELS[8:]))
    assert torch.equal(data.val.images, torch.from_numpy(PIXELS[6:8]))


def test_archive_of_jpeg(tmp_path):
    image = pytest.importorskip("PIL.Image")
    files = []
    for pixels in (np.full((32, 32, 3), v, np.uint8) for v in (10, 90, 200)):
        file = io.BytesIO()
        image.fromarray(pixels).save(file, "JPEG")
        files.append(np.frombuffer(file.getvalue(), np.uint8))
    offsets = np.cumsum([0, *map(len, files)])
    parts = {f"{part}_jpeg": np.concatenate(files) for part in ("train", "test")}
    parts |= {f"{part}_offsets": offsets for part in ("train", "test")}
    parts |= {f"{part}_labels": np.array([3, 2, 9]) for part in ("train", "test")}
    np.savez(tmp_path / "a.npz", **parts)
    data = load_cifar10(tmp_path / "a.npz", held_out=1)
    assert [int(i.float().mean()) for i in data.test.images] == [10, 90, 200]
    assert data.test.labels.tolist() == [3, 2, 9]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_labels": np.full(4, 10)}, "expected labels 0 to 9"),
        ({"test_labels": LABELS[:3]}, "found torch.uint8 .* and 3"),
        ({"train_images": PIXELS[:8].astype(np.float32)}, "found torch.float32"),
        ({"train_labels": np.array([{}] * 8)}, "cannot be read as CIFAR-10: Object arrays cannot be loaded"),
    ],
)
def test_other_archives_are_refused(tmp_path, changes, message):
    with pytest.raises(DataError, match=f"a.npz: .*{message}"):
        load_cifar10(archive(tmp_path / "a.npz", **changes))


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"not a zip")
    np.save(tmp_path / "b.npy", np.zeros(3))
    (tmp_path / "b.npy").rename(tmp_path / "b.npz")
    whole = archive(tmp_path / "c.npz").read_bytes()
    for at in range(0, len(whole), 97):  # a fault anywhere is found, or changes nothing that is read
        (tmp_path / "c.npz").write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            load_cifar10(tmp_path / "c.npz", held_out=2)
        except DataError as error:
            assert "c.npz" in str(error)
    with pytest.raises(DataError, match=r"b.npz: cannot be read"):
        load_cifar10(tmp_path / "b.npz")
    for path, message in ((tmp_path / "a.npz", "cannot be read"), (tmp_path / "data.tar", "expected a folder")):
        with pytest.raises(DataError, match=message):
            load_cifar10(path)
    with pytest.raises(DataError, match=r"data_batch_1.bin: cannot be read"):
        load_cifar10(tmp_path)


def test_names_of_the_command_line(tmp_path):
    assert open_data("digits").name.startswith("digits")
    with pytest.raises(
        DataError, match=r"data: must be fashion-mnist, digits, cifar10:PATH or imagefolder:PATH, got 'cifar10'"
    ):
        open_data("cifar10")
