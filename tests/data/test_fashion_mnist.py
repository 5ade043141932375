"""Where the images come from, in which order, and what happens to wrong ones. Nothing here leaves the machine."""

import gzip
import http.server
import threading
from functools import partial

import fake_files
import pytest
import torch
from fake_files import HELD_OUT, TEST, TRAIN, contents, expectations, fill

from effkern.data import DataError, fashion_mnist, fetch, load_digits, load_fashion_mnist
from effkern.data.fashion_mnist import TEST_LABELS, TRAIN_IMAGES, TRAIN_LABELS

NOWHERE = "http://127.0.0.1:9"  # the discard port: refused at once


class Machine:
    """A machine whose system folder, cache, package manager and network are all made up."""

    def __init__(self, tmp_path, monkeypatch) -> None:
        self.folder = tmp_path
        self.system = tmp_path / "system"
        self.cache = tmp_path / "cache"
        self.said: list[str] = []
        self.installed: list[str] = []
        self.set = monkeypatch.setattr
        self.env = monkeypatch
        monkeypatch.delenv("EFFKERN_DATA", raising=False)
        self.root(False)

    def root(self, yes: bool, install=None) -> None:
        self.set(fashion_mnist, "can_apt_install", lambda: yes)
        self.set(fashion_mnist, "apt_install", lambda name: (self.installed.append(name), install and install()))

    def load(self, *mirrors: str, **options):
        return load_fashion_mnist(
            **{
                "system_folder": self.system,
                "cache": self.cache,
                "mirrors": mirrors or (NOWHERE,),
                "files": expectations(),
                "held_out": HELD_OUT,
                "tell": self.said.append,
                **options,
            }
        )


@pytest.fixture
def machine(tmp_path, monkeypatch):
    return Machine(tmp_path, monkeypatch)


@pytest.fixture
def mirror(tmp_path):
    """A server on loopback; gives the folder it serves, its address and what was asked of it."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *arguments):
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


# --- order -----------------------------------------------------------------------------------------------------------


def test_the_users_folder_comes_first(machine):
    fill(machine.system)
    for place in ("mine", "mine2/fashion-mnist"):
        folder = fill(machine.folder / place)
        machine.env.setenv("EFFKERN_DATA", str(machine.folder / place.split("/")[0]))
        assert machine.load().source == str(folder)
    assert machine.said == []


def test_then_the_system_folder(machine):
    fill(machine.system)
    fill(machine.cache)
    machine.root(True)
    assert machine.load().source == str(machine.system)
    assert machine.said == machine.installed == []


def test_a_users_folder_without_the_files_is_left_with_a_word(machine):
    fill(machine.system)
    machine.env.setenv("EFFKERN_DATA", str(machine.folder))
    machine.system.rename(machine.folder / "elsewhere")
    machine.root(True, install=lambda: fill(machine.system))
    assert machine.load().source == str(machine.system)
    assert "EFFKERN_DATA" in machine.said[0] and "looking further" in machine.said[0]


def test_a_users_folder_that_is_none_is_an_error(machine):
    machine.env.setenv("EFFKERN_DATA", str(machine.folder / "typo"))
    with pytest.raises(DataError, match=r"EFFKERN_DATA: must be a folder, got '.*typo'"):
        machine.load()


def test_then_the_package_when_root_with_a_word(machine):
    machine.root(True, install=lambda: fill(machine.system))
    assert machine.load().source == str(machine.system)
    assert machine.installed == ["dataset-fashion-mnist"]
    assert any("apt-get" in line and "dataset-fashion-mnist" in line for line in machine.said)


def test_then_a_download_kept_for_next_time(machine, mirror):
    folder, address, asked = mirror
    fill(folder)

    def no_network():
        raise DataError("no network")

    machine.root(True, install=no_network)
    assert machine.load(NOWHERE, address).source == str(machine.cache)
    assert len(asked) == 4 and any("no network" in line for line in machine.said)
    assert machine.load(NOWHERE, address).source == str(machine.cache)
    assert len(asked) == 4  # from the cache


def test_last_the_digits_and_a_notice_that_cannot_be_missed(machine):
    digits = machine.load()
    assert digits.name.startswith("digits")
    assert any(line.startswith("NOTICE: this is not Fashion-MNIST") for line in machine.said)


def test_without_any_source_the_error_says_what_was_tried(machine):
    with pytest.raises(DataError) as error:
        machine.load(fallback=False)
    for tried in (str(machine.system), "dataset-fashion-mnist", NOWHERE):
        assert tried in str(error.value)


# --- wrong files -----------------------------------------------------------------------------------------------------


def damage(folder, name, change):
    path = folder / f"{name}.gz"
    path.write_bytes(gzip.compress(change(contents()[name])))
    return path


@pytest.mark.parametrize("place", ["user", "system"])
@pytest.mark.parametrize("change", [lambda raw: raw[:-1], lambda raw: raw[:-1] + b"\xee"], ids=["short", "corrupt"])
@pytest.mark.parametrize("name", list(contents()))
def test_a_wrong_file_stops_everything(machine, place, change, name):
    machine.root(True, install=lambda: fill(machine.system))
    folder = fill(machine.system if place == "system" else machine.folder / "mine")
    if place == "user":
        machine.env.setenv("EFFKERN_DATA", str(folder))
    path = damage(folder, name, change)
    with pytest.raises(DataError, match=f"{path}: expected .* found"):
        machine.load()
    assert machine.installed == []


def test_a_missing_file_among_the_four_stops_everything(machine):
    fill(machine.system)
    (machine.system / f"{TEST_LABELS}.gz").unlink()
    with pytest.raises(DataError, match=f"{machine.system}: expected .*, found no {TEST_LABELS}"):
        machine.load()


@pytest.mark.parametrize("change", [lambda raw: raw[:-1], lambda raw: raw[:-1] + b"\xee"], ids=["short", "corrupt"])
def test_a_wrong_download_is_never_kept(machine, mirror, change):
    folder, address, _ = mirror
    fill(folder)
    damage(folder, TRAIN_LABELS, change)
    assert machine.load(address).name.startswith("digits")
    assert any(f"{TRAIN_LABELS}.gz: expected" in line for line in machine.said)
    assert not (machine.cache / f"{TRAIN_LABELS}.gz").exists()
    assert all(path.name.endswith("ubyte.gz") for path in machine.cache.iterdir())  # and nothing half-written


def test_a_wrong_file_in_the_cache_is_fetched_again(machine, mirror):
    folder, address, asked = mirror
    fill(folder)
    fill(machine.cache)
    path = damage(machine.cache, TRAIN_IMAGES, lambda raw: raw[:-5])
    assert machine.load(address).source == str(machine.cache)
    assert asked == [f"/{TRAIN_IMAGES}.gz"]
    assert any(f"{path}: expected" in line and "downloading it again" in line for line in machine.said)


def test_a_missing_page_goes_on_to_the_next_mirror(machine, mirror):
    folder, address, asked = mirror
    fill(folder / "good")
    assert machine.load(f"{address}/bad", f"{address}/good/").source == str(machine.cache)
    assert f"/bad/{TRAIN_IMAGES}.gz" in asked and f"/good/{TRAIN_IMAGES}.gz" in asked


# --- fetching --------------------------------------------------------------------------------------------------------


def test_download_refuses_too_much(mirror):
    folder, address, _ = mirror
    (folder / "large").write_bytes(bytes(5000))
    assert len(fetch.download(f"{address}/large", 5000)) == 5000
    with pytest.raises(DataError, match="/large: expected at most 4999 bytes, found more"):
        fetch.download(f"{address}/large", 4999)


def test_download_notices_a_connection_that_ends_early():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(bytes(60))

        def log_message(self, format, *arguments):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        with pytest.raises(DataError, match="expected 100 bytes, found 60 before the connection ended"):
            fetch.download(f"http://127.0.0.1:{server.server_port}/x", 1000)
        thread.join()


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://127.0.0.1/x", "x"])
def test_download_takes_web_addresses_only(url):
    with pytest.raises(DataError, match="must be an http or https address"):
        fetch.download(url, 10)


def test_apt_updates_its_lists_once_when_the_package_is_not_known(monkeypatch):
    calls: list[str] = []

    def run(arguments, **options):
        calls.append(arguments[1])
        failed = calls == ["install"]

        class Done:
            returncode = 100 if failed else 0
            stdout = ""
            stderr = "E: Unable to locate package dataset-fashion-mnist\n" if failed else ""

        return Done()

    monkeypatch.setattr(fetch.subprocess, "run", run)
    fetch.apt_install("dataset-fashion-mnist")
    assert calls == ["install", "update", "install"]


def test_apt_failure_says_why(tmp_path, monkeypatch):
    fake = tmp_path / "apt-get"
    fake.write_text("#!/bin/sh\necho 'E: no network today' >&2\nexit 100\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(DataError, match="could not install some-package: E: no network today"):
        fetch.apt_install("some-package")


# --- what is returned ------------------------------------------------------------------------------------------------


def test_splits_statistics_and_types(machine):
    data = fashion_mnist.read_folder(fill(machine.system), expectations(), HELD_OUT)
    assert data is not None
    assert [len(data.train), len(data.val), len(data.test)] == [TRAIN - HELD_OUT, HELD_OUT, TEST]
    assert data.val.labels.tolist() == [6, 7] and data.train.images.shape == (6, 1, 28, 28)
    x = data.normalize(data.train.images)
    assert abs(float(x.mean())) < 1e-4 and abs(float(x.std(unbiased=False)) - 1) < 1e-4


def test_plain_files_do_too(machine):
    machine.system.mkdir()
    for name, raw in contents().items():
        (machine.system / name).write_bytes(raw)
    assert machine.load().source == str(machine.system)


def test_the_files_of_the_real_set_are_pinned():
    shapes = {name: expected.shape for name, expected in fashion_mnist.FILES.items()}
    assert shapes == {
        "train-images-idx3-ubyte": (60000, 28, 28),
        "train-labels-idx1-ubyte": (60000,),
        "t10k-images-idx3-ubyte": (10000, 28, 28),
        "t10k-labels-idx1-ubyte": (10000,),
    }
    assert all(len(expected.sha256) == 64 for expected in fashion_mnist.FILES.values())
    assert fake_files.expectations().keys() == fashion_mnist.FILES.keys()


def test_digits_have_the_same_form():
    digits = load_digits()
    assert digits.train.images.shape == (1237, 1, 28, 28) and digits.train.images.dtype == torch.uint8
    assert digits.train.images.max() == 255 and not digits.flip
    assert sorted(set(digits.test.labels.tolist())) == list(range(10))
    assert torch.equal(digits.train.labels, load_digits().train.labels)
