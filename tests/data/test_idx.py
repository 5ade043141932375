"""Wrong files are named, with what was expected and what was found, and never become tensors."""

import gzip
import hashlib

import numpy as np
import pytest
from fake_files import idx
from hypothesis import given, settings
from hypothesis import strategies as st

from effkern.data import DataError
from effkern.data.idx import Expected, check_idx, read_idx

ARRAY = np.arange(60, dtype=np.uint8).reshape(5, 4, 3)
RAW = idx(ARRAY)
EXPECTED = Expected((5, 4, 3), hashlib.sha256(RAW).hexdigest())


@pytest.mark.parametrize("pack", [gzip.compress, lambda raw: raw], ids=["gzip", "plain"])
def test_the_right_file_is_read(tmp_path, pack):
    path = tmp_path / "file"
    path.write_bytes(pack(RAW))
    got = read_idx(path, EXPECTED)
    assert (got.numpy() == ARRAY).all() and got.dtype.itemsize == 1


WRONG = {
    "one pixel differs": (RAW[:-1] + b"\xff", "expected SHA-256 .*, found "),
    "short": (RAW[:-7], r"expected 76 bytes \(uncompressed\), found 69"),
    "long": (RAW + b"\0", r"expected 76 bytes \(uncompressed\), found 77"),
    "other shape": (
        idx(ARRAY[:4]),
        r"expected an idx file of shape \(5, 4, 3\), found an idx file of shape \(4, 4, 3\)",
    ),
    "other rank": (idx(ARRAY.reshape(-1)), "found an idx file of shape|found the bytes"),
    "wrong magic": (b"\0\0\x0d\x03" + RAW[4:], r"found the bytes 00 00 0d 03"),
    "not idx": (b"<html>404 not found</html>" * 9, "found the bytes 3c 68 74 6d"),
    "empty": (b"", "found only 0 bytes"),
}


@pytest.mark.parametrize("raw, message", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("pack", [gzip.compress, lambda raw: raw], ids=["gzip", "plain"])
def test_a_wrong_file_is_named(tmp_path, raw, message, pack):
    path = tmp_path / "train-images.gz"
    path.write_bytes(pack(raw))
    with pytest.raises(DataError, match=message) as error:
        read_idx(path, EXPECTED)
    assert str(error.value).startswith(f"{path}: expected ")


def test_a_gzip_that_breaks_off_is_named():
    packed = gzip.compress(RAW)
    with pytest.raises(DataError, match=r"x.gz: expected 76 bytes \(uncompressed\), found \d+ before the file ended"):
        check_idx(packed[:-12], EXPECTED, "x.gz")
    with pytest.raises(DataError, match=r"x\.gz: expected gzip data, found it broken"):
        check_idx(packed[:20] + b"\xaa" * 20, EXPECTED, "x.gz")
    with pytest.raises(DataError, match=r"x.gz: .*broken: .*check"):  # the pixels are whole, gzip's checksum is not
        check_idx(packed[:-8] + bytes(4) + packed[-4:], EXPECTED, "x.gz")


def test_a_gzip_bomb_is_not_unpacked():
    bomb = gzip.compress(RAW[:16] + bytes(1 << 25))
    with pytest.raises(DataError, match=r"expected 76 bytes .*, found 77 or more"):
        check_idx(bomb, EXPECTED, "bomb")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.gz: cannot be read: No such file"):
        read_idx(tmp_path / "nothing.gz", EXPECTED)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_damage_is_seen(data):
    raw = bytearray(data.draw(st.sampled_from([RAW, gzip.compress(RAW, mtime=0)])))
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] ^= data.draw(st.integers(1, 255))
    try:
        got = check_idx(bytes(raw), EXPECTED, "damaged")
    except DataError:
        return
    assert (got.numpy() == ARRAY).all()  # a bit of gzip's own header that changes nothing


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_garbage_is_refused(raw):
    with pytest.raises(DataError):
        check_idx(raw, EXPECTED, "garbage")
