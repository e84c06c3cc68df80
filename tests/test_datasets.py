import gzip
import hashlib
import http.server
import io
import multiprocessing
import os
import struct
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets

from skcifar import datasets
from skcifar.datasets import fetch_cifar10, fetch_mnist, load_digits

RECORDS, RECORD = 10_000, 3_073
TRAIN = [f"data_batch_{i}.bin" for i in range(1, 6)]
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def cifar10_bytes(seed):
    """One file of full size. Pixels take few values, so that archives of it are small."""
    rng = np.random.RandomState(seed)
    records = np.repeat(rng.randint(0, 256, (RECORDS, 97), dtype=np.uint8), 32, axis=1)
    records = records[:, :RECORD]
    records[:, 0] = rng.randint(0, 10, RECORDS)
    return records.tobytes()


def idx_bytes(array):
    return struct.pack(f">{1 + array.ndim}i", 2048 + array.ndim, *array.shape) + array.tobytes()


def mnist_bytes():
    """The four files, uncompressed."""
    rng = np.random.RandomState(7)
    files = {}
    for part, n in [("train", 60_000), ("t10k", 10_000)]:
        images = np.repeat(rng.randint(0, 256, (n, 28, 1), dtype=np.uint8), 28, axis=2)
        files[f"{part}-images-idx3-ubyte"] = idx_bytes(images)
        files[f"{part}-labels-idx1-ubyte"] = idx_bytes(rng.randint(0, 10, n, dtype=np.uint8))
    return files


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A data home with both sets, in made-up contents of the true format. Not to be changed."""
    home = tmp_path_factory.mktemp("home")
    (home / "cifar-10-batches-bin").mkdir()
    for seed, name in enumerate([*TRAIN, "test_batch.bin"]):
        (home / "cifar-10-batches-bin" / name).write_bytes(cifar10_bytes(seed))
    (home / "MNIST" / "raw").mkdir(parents=True)
    for name, content in mnist_bytes().items():
        (home / "MNIST" / "raw" / f"{name}.gz").write_bytes(gzip.compress(content, 1))
    return home


@pytest.fixture(scope="module")
def remote(tmp_path_factory, home):
    """Where to download from: the constants to patch."""
    remote = tmp_path_factory.mktemp("remote")
    archive = remote / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        tar.add(home / "cifar-10-batches-bin", arcname="cifar-10-batches-bin")
        tar.addfile(tarfile.TarInfo("cifar-10-batches-bin/readme.html"))
        tar.addfile(tarfile.TarInfo("../escaped"))
    raw = home / "MNIST" / "raw"
    return {
        "_CIFAR10_URL": local_url(archive),
        "_CIFAR10_SHA256": sha256(archive),
        "_MNIST_URL": local_url(raw) + "/",
        "_MNIST_SHA256": {path.stem: sha256(path) for path in raw.glob("*.gz")},
    }


@pytest.fixture
def serve(remote, monkeypatch):
    for name, value in remote.items():
        monkeypatch.setattr(datasets, name, value)


def local_url(path):
    # scikit-learn's fetch_file wants a host in the address.
    return path.as_uri().replace("file:///", "file://localhost/")


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# CIFAR-10, laid out


def test__cifar10__pixels_equal_a_bytewise_reading(home):
    X, y = fetch_cifar10(data_home=home, subset="all", return_X_y=True, download_if_missing=False)
    assert (X.shape, X.dtype, y.dtype) == ((60_000, 3_072), np.uint8, np.int64)
    for row in [0, 9_999, 10_000, 34_567, 59_999]:
        content = home / "cifar-10-batches-bin" / [*TRAIN, "test_batch.bin"][row // RECORDS]
        record = content.read_bytes()[row % RECORDS * RECORD :][:RECORD]
        pixels = [
            record[1 + 1024 * channel + 32 * line + column]
            for line in range(32)
            for column in range(32)
            for channel in range(3)
        ]
        assert X[row].tolist() == pixels
        assert y[row] == record[0]


def test__cifar10_subsets__are_the_parts_of_all(home):
    X, y = fetch_cifar10(data_home=home, subset="all", return_X_y=True)
    X_train, y_train = fetch_cifar10(data_home=home, return_X_y=True)
    X_test, y_test = fetch_cifar10(data_home=home, subset="test", return_X_y=True)
    assert len(X_train) == 50_000 and len(X_test) == 10_000
    assert np.array_equal(X, np.concatenate([X_train, X_test]))
    assert np.array_equal(y, np.concatenate([y_train, y_test]))


def test__bunch__holds_images_names_and_files(home):
    cifar10 = fetch_cifar10(data_home=home, subset="test")
    assert cifar10.images.shape == (10_000, 32, 32, 3)
    assert np.shares_memory(cifar10.images, cifar10.data) and cifar10.data.flags.c_contiguous
    assert cifar10.target_names.tolist() == NAMES
    assert [Path(name).name for name in cifar10.filenames] == ["test_batch.bin"]
    assert "photographs" in cifar10.DESCR
    images = fetch_cifar10(data_home=home, subset="test", as_images=True).data
    assert np.array_equal(images, cifar10.images)


@pytest.mark.parametrize("fetch, name", [(fetch_cifar10, "cat"), (fetch_mnist, "3")])
def test__classes__by_name_or_code__keep_order_and_codes(home, fetch, name):
    X, y = fetch(data_home=home, subset="test", return_X_y=True)
    some = fetch(data_home=home, subset="test", classes=[name, np.int64(9)])
    rows = [row for row, code in enumerate(y) if code in (3, 9)]
    assert np.array_equal(some.data, X[rows]) and np.array_equal(some.target, y[rows])
    assert len(some.target_names) == 10


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"subset": "val"}, "subset='val' is none of"),
        ({"classes": ["cat", "kat"]}, r"names \['kat'\], which do not exist.*airplane"),
        ({"classes": [10]}, r"names \[10\], which do not exist: give some of the codes 0 to 9"),
        ({"classes": "cats"}, r"names \['cats'\]"),
        ({"classes": []}, "classes=.. is empty"),
    ],
)
def test__wrong_argument__error_says_what_exists(home, arguments, message):
    with pytest.raises(ValueError, match=message):
        fetch_cifar10(data_home=home, **arguments)


def test__truncated_file__error_names_file_expected_and_found(home, tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    whole = (home / "cifar-10-batches-bin" / "test_batch.bin").read_bytes()
    (folder / "test_batch.bin").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"test_batch.bin has 30,729,999 bytes; expected 30,730,0"):
        fetch_cifar10(data_home=tmp_path, subset="test")


def test__class_out_of_range__error_names_file_and_record(home, tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    content = bytearray((home / "cifar-10-batches-bin" / "test_batch.bin").read_bytes())
    content[1_234 * RECORD] = 11
    (folder / "test_batch.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"test_batch.bin gives record 1,234 the class 11; exp"):
        fetch_cifar10(data_home=tmp_path, subset="test")


def test__incomplete_set__error_names_missing_file(home, tmp_path, serve):
    # What lies there may be another rendering of the images: nothing is mixed into it.
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    os.link(home / "cifar-10-batches-bin" / "data_batch_1.bin", folder / "data_batch_1.bin")
    with pytest.raises(FileNotFoundError, match=r"data_batch_2.bin does not exist, but other"):
        fetch_cifar10(data_home=tmp_path)
    assert contents(folder) == ["data_batch_1.bin"]


def test__training_set__peak_memory_below_1_3_times_its_bytes(home):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from Linux's /proc")
    program = f"""if True:
        import pathlib
        from skcifar.datasets import fetch_cifar10

        def memory(name):
            status = pathlib.Path("/proc/self/status").read_text()
            return 1024 * int(status.split(name + ":")[1].split()[0])

        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
        before = memory("VmRSS")
        X, y = fetch_cifar10(data_home={str(home)!r}, return_X_y=True)
        assert X.nbytes == 153_600_000
        print((memory("VmHWM") - before) / X.nbytes)
    """
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert 0.9 < float(run.stdout) < 1.3


# MNIST, laid out


@pytest.mark.parametrize("gzipped", [True, False])
def test__mnist__pixels_equal_the_written_ones(home, tmp_path, gzipped):
    files = mnist_bytes()
    if not gzipped:
        (tmp_path / "MNIST" / "raw").mkdir(parents=True)
        for name, content in files.items():
            (tmp_path / "MNIST" / "raw" / name).write_bytes(content)
    where = home if gzipped else tmp_path
    mnist = fetch_mnist(data_home=where, subset="all", download_if_missing=False)
    assert (mnist.data.shape, mnist.data.dtype) == ((70_000, 784), np.uint8)
    assert mnist.images.shape == (70_000, 28, 28) and mnist.target.dtype == np.int64
    written = [files[f"{part}-images-idx3-ubyte"][16:] for part in ("train", "t10k")]
    assert mnist.data.tobytes() == b"".join(written)
    written = [files[f"{part}-labels-idx1-ubyte"][8:] for part in ("train", "t10k")]
    assert mnist.target.tolist() == list(b"".join(written))
    assert [Path(name).suffix for name in mnist.filenames] == [".gz" if gzipped else ""] * 4


def damaged(content, how):
    match how:
        case "truncated":
            return content[: len(content) // 2]
        case "bit flipped":
            return content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]
        case "no gzip":
            return b"<html>not found</html>"
    plain = bytearray(gzip.decompress(content))
    match how:
        case "labels for images":
            plain[3] = 1
        case "other number":
            plain[4:8] = struct.pack(">i", 9_999)
        case "empty":
            plain = b""
        case "short":
            plain = plain[:-3]
        case "surplus":
            plain += b"\0\0"
    return gzip.compress(plain, 1)


@pytest.mark.parametrize(
    "how, message",
    [
        ("truncated", "is no whole gzip file: Compressed file ended"),
        ("bit flipped", "is no whole gzip file: "),
        ("no gzip", "is no whole gzip file: Not a gzipped file"),
        ("labels for images", r"begins with \[2049, 10000, 28, 28\]; expected \[2051, 10000, 28"),
        ("other number", r"begins with \[2051, 9999, 28, 28\]; expected \[2051, 10000, 28, 28\]"),
        ("empty", r"begins with \[\]; expected \[2051, 10000, 28, 28\]"),
        ("short", "holds 7,839,997 bytes after its header; expected 7,840,000"),
        ("surplus", "holds 7,840,002 bytes after its header; expected 7,840,000"),
    ],
)
def test__damaged_idx_file__error_names_file_expected_and_found(home, tmp_path, how, message):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    whole = (home / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz").read_bytes()
    (raw / "t10k-images-idx3-ubyte.gz").write_bytes(damaged(whole, how))
    labels = "t10k-labels-idx1-ubyte.gz"
    (raw / labels).write_bytes((home / "MNIST" / "raw" / labels).read_bytes())
    with pytest.raises(ValueError, match=f"t10k-images-idx3-ubyte.gz {message}"):
        fetch_mnist(data_home=tmp_path, subset="test")


def test__digit_out_of_range__error_names_file_and_record(home, tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    files = mnist_bytes()
    labels = bytearray(files["t10k-labels-idx1-ubyte"])
    labels[8 + 77] = 10
    (raw / "t10k-images-idx3-ubyte").write_bytes(files["t10k-images-idx3-ubyte"])
    (raw / "t10k-labels-idx1-ubyte").write_bytes(labels)
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte gives record 77 the class 10"):
        fetch_mnist(data_home=tmp_path, subset="test")


# Downloads


@pytest.mark.parametrize("fetch, what", [(fetch_cifar10, "CIFAR-10"), (fetch_mnist, "MNIST")])
def test__missing__download_declined__error_names_folder(tmp_path, fetch, what):
    with pytest.raises(OSError, match=f"{what} is missing: {tmp_path}.*download_if_missing=False"):
        fetch(data_home=tmp_path, download_if_missing=False)
    assert contents(tmp_path) == []


@pytest.mark.parametrize("fetch", [fetch_cifar10, fetch_mnist])
def test__download__equals_laid_out_data_and_happens_once(
    home, tmp_path, serve, monkeypatch, capsys, fetch
):
    X, y = fetch(data_home=home, subset="all", return_X_y=True)
    for download in [True, False]:
        if not download:
            monkeypatch.setattr(datasets, "fetch_file", None)
        fetched = fetch(data_home=tmp_path, subset="all", return_X_y=True)
        assert np.array_equal(fetched[0], X) and np.array_equal(fetched[1], y)
    folder = "cifar-10-batches-bin" if fetch is fetch_cifar10 else "MNIST"
    # Neither the archive nor what else was in it is left.
    expected = [path for path in contents(home) if path.startswith(folder)]
    assert contents(tmp_path) == expected and not (tmp_path.parent / "escaped").exists()
    assert capsys.readouterr() == ("", "")


def test__verbose_download__says_so_on_stderr(tmp_path, serve, capsys):
    fetch_mnist(data_home=tmp_path, subset="test", verbose=True)
    out, err = capsys.readouterr()
    assert out == "" and err.count("downloading file://") == 2
    assert "t10k-labels-idx1-ubyte.gz to " in err
    assert len(contents(tmp_path / "MNIST" / "raw")) == 2  # the test set's two files only


@pytest.mark.parametrize("fetch", [fetch_cifar10, fetch_mnist])
def test__wrong_checksum__error_gives_both_and_nothing_is_kept(tmp_path, serve, monkeypatch, fetch):
    found = datasets._MNIST_SHA256["train-images-idx3-ubyte"]
    if fetch is fetch_cifar10:
        found = datasets._CIFAR10_SHA256
    monkeypatch.setattr(datasets, "_CIFAR10_SHA256", "0" * 64)
    monkeypatch.setattr(datasets, "_MNIST_SHA256", dict.fromkeys(datasets._MNIST_SHA256, "0" * 64))
    with pytest.raises(OSError, match=rf"could not be downloaded.*\({found}\).*expected \(0000"):
        fetch(data_home=tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not list(tmp_path.glob("cifar*"))


class BreaksOff(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        self.wfile.write(b"x" * 1000)

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("fetch", [fetch_cifar10, fetch_mnist])
def test__connection_breaks_off__error_names_url_and_nothing_is_kept(tmp_path, monkeypatch, fetch):
    with http.server.HTTPServer(("127.0.0.1", 0), BreaksOff) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setattr(datasets, "_CIFAR10_URL", url + "cifar-10-binary.tar.gz")
        monkeypatch.setattr(datasets, "_MNIST_URL", url)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        try:
            with pytest.raises(OSError, match=rf"{url}.* could not be downloaded: .*lay the files"):
                fetch(data_home=tmp_path, n_retries=0)
        finally:
            server.shutdown()
            thread.join()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def link(name):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return member


@pytest.mark.parametrize(
    "member, message",
    [
        (link("cifar-10-batches-bin/data_batch_1.bin"), "data_batch_1.bin in a.tar.gz is a member"),
        (tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin"), "and 0 bytes; expected a regular"),
        (tarfile.TarInfo("elsewhere/test_batch.bin"), "a.tar.gz lacks data_batch_1.bin, data_bat"),
    ],
)
def test__unexpected_archive__error_names_member_and_nothing_is_kept(
    tmp_path, monkeypatch, member, message
):
    archive = tmp_path / "a.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(member, io.BytesIO())
    monkeypatch.setattr(datasets, "_CIFAR10_URL", local_url(archive))
    monkeypatch.setattr(datasets, "_CIFAR10_SHA256", sha256(archive))
    with pytest.raises(ValueError, match=message):
        fetch_cifar10(data_home=tmp_path / "home")
    assert contents(tmp_path / "home") == []


def fetch_at_once(barrier, queue, home, remote):
    """In a process of its own: meet the others, fetch, and tell what came."""
    for name, value in remote.items():
        setattr(datasets, name, value)
    barrier.wait()
    digest = hashlib.sha256()
    for fetch in [fetch_cifar10, fetch_mnist]:
        for array in fetch(data_home=home, subset="test", return_X_y=True):
            digest.update(array.tobytes())
    queue.put(digest.hexdigest())


def test__processes_at_once__all_get_the_data_and_leave_one_copy(home, tmp_path, remote):
    expected = hashlib.sha256()
    for fetch in [fetch_cifar10, fetch_mnist]:
        for array in fetch(data_home=home, subset="test", return_X_y=True):
            expected.update(array.tobytes())
    spawn = multiprocessing.get_context("spawn")
    barrier, queue = spawn.Barrier(3), spawn.Queue()
    arguments = (barrier, queue, tmp_path, remote)
    processes = [spawn.Process(target=fetch_at_once, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert [queue.get(timeout=10) for _ in processes] == [expected.hexdigest()] * 3
    assert contents(tmp_path) == [
        name for name in contents(home) if not name.startswith("MNIST/raw/train")
    ]


# The real data, and scikit-learn's digits


def test__real_cifar10__has_balanced_classes_and_red_first(cifar10):
    X, y = cifar10
    assert X.shape == (50_000, 3_072) and np.bincount(y).tolist() == [5_000] * 10
    # The channel means of the published training set; recompressed images differ a little.
    means = X.reshape(-1, 3).mean(axis=0)
    assert np.allclose(means, [125.31, 122.95, 113.87], atol=0.5)


def test__real_mnist__has_published_counts_and_mean(mnist):
    X, y = mnist
    published = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(y).tolist() == published
    assert X.mean() / 255 == pytest.approx(0.1307, abs=5e-5)


def test__digits__equal_those_of_scikit_learn():
    theirs, ours = sklearn.datasets.load_digits(), load_digits()
    assert ours.data.dtype == np.uint8 and ours.target.dtype == np.int64
    assert np.array_equal(ours.data, theirs.data) and np.array_equal(ours.target, theirs.target)
    assert np.array_equal(ours.images, theirs.images)
    assert load_digits(as_images=True).data.shape == (1797, 8, 8)
    X, y = load_digits(classes=["8", 3], return_X_y=True)
    chosen = (theirs.target == 3) | (theirs.target == 8)
    assert np.array_equal(X, theirs.data[chosen]) and np.array_equal(y, theirs.target[chosen])
