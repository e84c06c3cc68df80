"""Stored rows: computed once whoever asks, and right whatever happens to the file."""

import os
import pickle
import shutil
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from skcifar import _row_cache
from skcifar._row_cache import RowCache

MEBIBYTE = 1 << 20
N_COLUMNS = 5
ROWS = np.random.default_rng(0).integers(0, 256, (40, 12), dtype=np.uint8)


class Counted:
    """The function of the tests; keeps the positions that it was called with."""

    def __init__(self, rows, n_columns=N_COLUMNS, dtype=np.float32):
        self.rows, self.n_columns, self.dtype = rows, n_columns, np.dtype(dtype)
        self.calls = []

    def __call__(self, positions):
        assert positions.dtype == np.int64
        self.calls.append(positions.tolist())
        return expected(self.rows[positions], self.n_columns, self.dtype)

    @property
    def positions(self):
        return [position for call in self.calls for position in call]


def expected(rows, n_columns=N_COLUMNS, dtype=np.float32):
    """Each result from its own row alone, in plain Python."""
    table = [[sum(row) * column + row[0] for column in range(n_columns)] for row in rows.tolist()]
    return np.array(table, dtype).reshape(len(rows), n_columns)


def run(cache, rows, namespace=b"net", n_columns=N_COLUMNS, dtype=np.float32, batch_size=8):
    """Compute `rows`, check the results and return the counted function."""
    function = Counted(rows, n_columns, dtype)
    results = cache.compute(rows, namespace, function, n_columns, dtype, batch_size)
    assert results.dtype == dtype and results.shape == (len(rows), n_columns)
    np.testing.assert_array_equal(results, expected(rows, n_columns, dtype))
    return function


def file_of(folder):
    return Path(folder) / "rows.sqlite"


@pytest.fixture
def cache(tmp_path):
    return RowCache(tmp_path, 4 * MEBIBYTE)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(_row_cache, "_LOCK_TIMEOUT", 0.0)


# What is computed


def test__second_call__computes_nothing(cache):
    assert run(cache, ROWS).positions == list(range(40))
    assert run(cache, ROWS).calls == []


def test__batches__are_of_batch_size_rows(cache):
    assert [len(call) for call in run(cache, ROWS, batch_size=16).calls] == [16, 16, 8]


def test__overlapping_folds__compute_only_the_new_rows(cache):
    run(cache, ROWS[:30])
    function = run(cache, ROWS[::-1])  # the new ones come first now
    assert function.positions == list(range(10))
    assert run(cache, ROWS[7:33]).calls == []


def test__equal_rows__are_computed_once(cache):
    rows = ROWS[[3, 1, 3, 3, 2, 1]]
    assert run(cache, rows).positions == [0, 1, 4]


def test__equal_rows__are_computed_once_without_cache(tmp_path):
    rows = ROWS[[3, 1, 3, 3, 2, 1]]
    assert run(RowCache(tmp_path, 0), rows).positions == [0, 1, 4]


def test__no_rows__give_an_empty_array(cache):
    assert run(cache, ROWS[:0]).calls == []


def test__namespaces__are_apart(cache):
    run(cache, ROWS, b"net")
    assert len(run(cache, ROWS, b"other net").positions) == 40
    # Nor can the end of a name pass for the beginning of a row.
    assert len(run(cache, ROWS[:, 1:], b"net" + ROWS[:, 0].tobytes()).positions) == 40


def test__dtypes_and_widths__are_apart(cache):
    run(cache, ROWS)
    assert len(run(cache, ROWS, dtype=np.int32).positions) == 40
    assert len(run(cache, ROWS, dtype=np.float64).positions) == 40
    assert len(run(cache, ROWS, n_columns=3).positions) == 40
    assert len(run(cache, ROWS.view(np.int8)).positions) == 40


def test__order_in_memory__does_not_matter(cache):
    run(cache, ROWS)
    assert run(cache, np.asfortranarray(ROWS)).calls == []
    assert run(cache, np.repeat(ROWS, 2, axis=1)[:, ::2]).calls == []
    assert run(cache, ROWS.reshape(40, 12)[::-1][::-1]).calls == []


def test__float_rows__are_told_apart_by_their_bytes(cache):
    quiet, payload = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    rows = np.array([[0.0], [-0.0], [quiet], [payload], [-0.0], [payload]], np.float32)

    def bits(positions):
        calls.append(positions.tolist())
        return rows[positions].view(np.uint32)

    for calls, asked in ([], [[0, 1, 2, 3]]), ([], []):
        results = cache.compute(rows, b"bits", bits, 1, np.uint32)
        np.testing.assert_array_equal(results, rows.view(np.uint32))
        assert calls == asked


def test__results_of_another_dtype__are_cast_before_they_are_stored(cache):
    def thirds(positions):
        return ROWS[positions, :2] / 3  # float64

    def fail(positions):
        raise AssertionError("all rows are stored")

    first = cache.compute(ROWS, b"thirds", thirds, 2, np.float32)
    np.testing.assert_array_equal(first, (ROWS[:, :2] / 3).astype(np.float32))
    np.testing.assert_array_equal(cache.compute(ROWS, b"thirds", fail, 2, np.float32), first)


def test__nan_and_infinity__come_back(cache):
    values = np.array([np.nan, np.inf, -np.inf, -0.0])
    for _ in range(2):
        results = cache.compute(ROWS[:4], b"", lambda at: values[at][:, None], 1, np.float64)
        np.testing.assert_array_equal(results.view(np.uint64)[:, 0], values.view(np.uint64))


def test__wrong_shape_of_results__is_an_error_with_both_shapes(cache):
    with pytest.raises(ValueError, match=r"shape \(5,\) for 8 rows, expected \(8, 5\)"):
        cache.compute(ROWS, b"net", lambda at: np.zeros(5), N_COLUMNS, np.float32, 8)


def test__objects__are_refused(cache):
    with pytest.raises(TypeError, match="Rows of object and results of float32 were given"):
        run(cache, ROWS.astype(object))


# The object and its folder


def test__pickle__keeps_the_folder_whatever_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = RowCache("below/deeper", MEBIBYTE)
    run(cache, ROWS)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    copy = pickle.loads(pickle.dumps(cache))
    assert copy.folder == str(tmp_path / "below" / "deeper")
    assert run(copy, ROWS).calls == []


def test__between_calls__one_file_and_none_open(cache):
    run(cache, ROWS)
    assert os.listdir(cache.folder) == ["rows.sqlite"]
    handles = Path("/proc/self/fd")
    if handles.exists():
        assert str(file_of(cache.folder)) not in [os.path.realpath(h) for h in handles.iterdir()]


@pytest.mark.parametrize("below", ["", "deeper"])
def test__folder_that_is_a_file__error_names_it_and_the_remedy(tmp_path, below):
    (tmp_path / "taken").write_text("")
    folder = tmp_path / "taken" / below
    with pytest.raises(OSError, match="Choose another one") as info:
        run(RowCache(folder, MEBIBYTE), ROWS)
    assert f"memory={str(folder)!r}" in str(info.value)


def test__file_that_cannot_be_opened__error_names_the_folder(tmp_path):
    file_of(tmp_path).mkdir()
    with pytest.raises(OSError, match=r"unable to open .* Choose another one") as info:
        run(RowCache(tmp_path, MEBIBYTE), ROWS)
    assert str(tmp_path) in str(info.value)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test__read_only_file__serves_what_it_has_and_refuses_more(cache):
    run(cache, ROWS[:20])
    file_of(cache.folder).chmod(0o444)
    assert run(cache, ROWS[:20]).calls == []
    with pytest.raises(OSError, match="Choose another one"):
        run(cache, ROWS)


# Interruptions


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError, sqlite3.DatabaseError])
def test__exception__keeps_the_batches_done_before(cache, error):
    function = Counted(ROWS)

    def interrupted(positions):
        if len(function.calls) == 3:
            raise error("in the middle")
        return function(positions)

    with pytest.raises(error, match=r"^in the middle$"):
        cache.compute(ROWS, b"net", interrupted, N_COLUMNS, np.float32, 8)
    assert run(cache, ROWS).positions == list(range(24, 40))
    assert run(cache, ROWS).calls == []


def test__killed_process__keeps_the_batches_done_before(cache, tmp_path):
    program = PROGRAM + "compute(range(40), after=3)"
    process = start(program, cache.folder, tmp_path / "log")
    process.communicate("go\n", timeout=60)
    assert process.returncode == 7
    assert run(cache, ROWS).positions == list(range(24, 40))


def test__removed_folder__is_made_again_for_the_batches_to_come(cache):
    function = Counted(ROWS)

    def removing(positions):
        if not function.calls:
            shutil.rmtree(cache.folder)
        return function(positions)

    results = cache.compute(ROWS, b"net", removing, N_COLUMNS, np.float32, 8)
    np.testing.assert_array_equal(results, expected(ROWS))
    assert function.positions == list(range(40))
    assert run(cache, ROWS).positions == list(range(8))


# Several at once

PROGRAM = """
import importlib.util, os, sys
import numpy as np

path, folder, log = sys.argv[1:]
spec = importlib.util.spec_from_file_location("row_cache", path)  # without torch: it takes seconds
row_cache = importlib.util.module_from_spec(spec)
spec.loader.exec_module(row_cache)
every_row = np.random.default_rng(0).integers(0, 256, (40, 12), dtype=np.uint8)

def compute(chosen, after=-1):
    chosen, calls = list(chosen), []
    rows = every_row[chosen]

    def function(positions):
        if len(calls) == after:
            os._exit(7)
        calls.append(positions)
        with open(log, "a") as lines:
            lines.writelines(f"{chosen[position]}\\n" for position in positions)
        sums = rows[positions].astype(int).sum(axis=1, keepdims=True)
        return sums * np.arange(5) + rows[positions, :1]

    print("ready", flush=True)
    sys.stdin.readline()
    results = row_cache.RowCache(folder, 1 << 22).compute(rows, b"net", function, 5, "f4", 8)
    print(results.astype(int).ravel().tolist())

"""


def start(program, folder, log):
    arguments = [sys.executable, "-c", program, _row_cache.__file__, folder, str(log)]
    pipe = subprocess.PIPE
    return subprocess.Popen(arguments, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def test__processes__compute_each_row_once(cache, tmp_path):
    log = tmp_path / "log"
    chosen = range(0, 30), range(39, -1, -1), range(10, 40)
    programs = [f"{PROGRAM}compute({some!r})" for some in chosen]
    processes = [start(program, cache.folder, log) for program in programs]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for some, process in zip(chosen, processes, strict=True):
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and err == ""
        assert out == f"{expected(ROWS[list(some)]).astype(int).ravel().tolist()}\n"
    assert sorted(map(int, log.read_text().split())) == list(range(40))


def test__threads__compute_each_row_once(cache):
    start_line = threading.Barrier(4)
    orders = [np.random.default_rng(seed).permutation(40)[:32] for seed in range(4)]
    functions = [Counted(ROWS[order]) for order in orders]
    results = [None] * 4

    def work(number):
        start_line.wait(60)
        results[number] = cache.compute(
            ROWS[orders[number]], b"net", functions[number], N_COLUMNS, np.float32, 4
        )

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for order, result in zip(orders, results, strict=True):
        np.testing.assert_array_equal(result, expected(ROWS[order]))
    pairs = zip(orders, functions, strict=True)
    computed = [order[at] for order, function in pairs for at in function.positions]
    assert sorted(computed) == sorted(set(np.concatenate(orders)))


def test__who_waits__follows_what_another_stores(cache, monkeypatch, impatient):
    # Refused eight times: waiting goes on, since each time one more row is there.
    other, try_to_begin, refusals = RowCache(cache.folder, cache.cache_size), None, []

    def refused(connection):
        monkeypatch.setattr(_row_cache, "_try_to_begin", try_to_begin)
        row = len(refusals)
        assert run(other, ROWS[row : row + 1]).positions == [0]
        monkeypatch.setattr(_row_cache, "_try_to_begin", refused)
        refusals.append(sqlite3.OperationalError("database is locked"))
        return refusals[-1]

    try_to_begin = _row_cache._try_to_begin
    run(cache, ROWS[8:9])  # lays the file out
    monkeypatch.setattr(_row_cache, "_try_to_begin", refused)
    assert run(cache, ROWS[:8]).calls == []
    assert len(refusals) == 8


@pytest.mark.parametrize("lock", ["IMMEDIATE", "EXCLUSIVE"])
def test__locked_file__warns_and_computes_without_it(cache, lock, impatient):
    run(cache, ROWS[:16])
    other = sqlite3.connect(file_of(cache.folder), isolation_level=None)
    other.execute(f"BEGIN {lock}")
    with pytest.warns(UserWarning, match=r"rows\.sqlite cannot be used now \(SQLite: .* locked"):
        function = run(cache, ROWS)
    other.close()
    # Under the first of the two, what is stored can still be read.
    assert function.positions == list(range(16 if lock == "IMMEDIATE" else 0, 40))
    assert run(cache, ROWS).positions == list(range(16, 40))


def test__full_disk__warns_and_computes_each_row_once(cache, monkeypatch):
    def with_a_full_disk(path):
        connection = open_file(path)
        connection.execute("PRAGMA max_page_count = 4")  # not enough for all rows
        return connection

    open_file = _row_cache._open
    monkeypatch.setattr(_row_cache, "_open", with_a_full_disk)
    rows = np.arange(400, dtype=np.uint16)[:, None]
    with pytest.warns(UserWarning, match=r"cannot be used now \(SQLite: database or disk is full"):
        function = run(cache, rows, n_columns=100)
    assert function.positions == list(range(400))
    assert 0 < len(run(RowCache(cache.folder, 0), rows, n_columns=100).positions)


# Damage


def test__flipped_byte__is_computed_again_and_repaired(cache):
    run(cache, ROWS)
    path, value = file_of(cache.folder), expected(ROWS)[17].tobytes()
    content = bytearray(path.read_bytes())
    assert content.count(value) == 1
    content[content.index(value) + 3] ^= 1
    path.write_bytes(content)
    assert run(cache, ROWS).positions == [17]
    assert run(cache, ROWS).calls == []


@pytest.mark.parametrize(
    "damage",
    [
        "value = substr(value, 2)",
        "value = value || x'00'",
        "value = 'text'",
        "value = CAST(x'8081' AS TEXT)",
        "value = 1.5",
        "value = x''",
        "checksum = x'00'",
        "checksum = 'text'",
        "value = (SELECT value FROM entry WHERE rowid = 7)",
        "(value, checksum) = (SELECT value, checksum FROM entry WHERE rowid = 7)",
    ],
)
def test__wrong_entry__is_computed_again_and_repaired(cache, damage):
    run(cache, ROWS)
    other = sqlite3.connect(file_of(cache.folder))
    with other:
        assert other.execute(f"UPDATE entry SET {damage} WHERE rowid = 18").rowcount == 1
    other.close()
    assert run(cache, ROWS).positions == [17]
    assert run(cache, ROWS).calls == []


PAGE = 65_536


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:100],
        lambda content: content[: PAGE + 10],
        lambda content: content[: 2 * PAGE],
        lambda content: b"not a database, but some text\n" * 100,
        lambda content: bytes(len(content)),
        lambda content: np.random.default_rng(0).bytes(len(content)),
        lambda content: content[:PAGE] + b"\xff" * (len(content) - PAGE),
        lambda content: content.replace(b"checksum", b"chicksum"),
    ],
    ids=["header", "part", "pages", "text", "zeros", "noise", "noisy pages", "other columns"],
)
def test__damaged_file__warns_once_and_is_begun_anew(cache, damage):
    run(cache, ROWS)
    path = file_of(cache.folder)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match="are damaged") as warned:
        function = run(cache, ROWS)
    assert [str(path) in str(warning.message) for warning in warned] == [True]
    assert warned[0].filename == __file__
    assert function.positions == list(range(40))
    assert run(cache, ROWS).calls == []
    assert os.listdir(cache.folder) == ["rows.sqlite"]


def test__file_of_a_future_format__is_read_and_begun_anew_to_write(cache):
    run(cache, ROWS[:20])
    path = file_of(cache.folder)
    content = bytearray(path.read_bytes())
    content[18] = 9  # the version that a writer must know
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="are damaged"):
        function = run(cache, ROWS)
    assert function.positions == list(range(20, 40))
    assert len(run(cache, ROWS[20:28]).positions) == 8  # lost with the old file
    assert run(cache, ROWS[20:]).calls == []


def test__empty_file__is_a_new_one(cache):
    file_of(cache.folder).touch()
    run(cache, ROWS)
    assert run(cache, ROWS).calls == []


@pytest.mark.parametrize("seed", range(20))
def test__any_flipped_byte__leaves_results_right(cache, seed, recwarn):
    run(cache, ROWS)
    path, rng = file_of(cache.folder), np.random.default_rng(seed)
    content = np.frombuffer(path.read_bytes(), np.uint8).copy()
    # Where something is written: most of three pages of 40 rows is empty.
    content[rng.choice(np.flatnonzero(content), 8)] ^= rng.integers(1, 256, 8, dtype=np.uint8)
    path.write_bytes(content.tobytes())
    run(cache, ROWS)
    run(cache, ROWS[::-1])


# The bound


@pytest.mark.parametrize(
    ("n_columns", "cache_size"), [(4, MEBIBYTE), (512, MEBIBYTE), (25_000, 3 * MEBIBYTE)]
)
def test__file__never_grows_beyond_the_bound(tmp_path, n_columns, cache_size):
    cache = RowCache(tmp_path, cache_size)
    n_rows = 3 * cache_size // (4 * n_columns + 60)
    rows = np.arange(n_rows, dtype=np.int64)[:, None]
    ramp = np.arange(n_columns, dtype=np.int32)
    batch_size = max(1, n_rows // 50)
    sizes = []

    def ramps(positions):
        if file_of(tmp_path).exists():
            sizes.append(file_of(tmp_path).stat().st_size)
        return rows[positions].astype(np.int32) + ramp

    for _ in range(2):
        results = cache.compute(rows, b"", ramps, n_columns, np.int32, batch_size)
        np.testing.assert_array_equal(results, rows + ramp)
    sizes.append(file_of(tmp_path).stat().st_size)
    assert 0.7 * cache_size < max(sizes) <= cache_size


def test__oldest_rows__leave_first(tmp_path):
    cache = RowCache(tmp_path, MEBIBYTE)
    rows = np.arange(900, dtype=np.int64)[:, None]
    for start in range(0, 900, 100):
        run(cache, rows[start : start + 100], n_columns=512, batch_size=50)
    connection = sqlite3.connect(file_of(tmp_path))
    stored = connection.execute("SELECT value FROM entry ORDER BY rowid").fetchall()
    connection.close()
    kept = [np.frombuffer(value, np.float32)[0] for (value,) in stored]
    assert kept == list(range(900 - len(kept), 900))
    assert 300 < len(kept) < 500  # of 2 kB each


def test__smaller_bound__is_kept_from_then_on(tmp_path):
    rows = np.arange(1000, dtype=np.int64)[:, None]
    run(RowCache(tmp_path, 8 * MEBIBYTE), rows, n_columns=512)
    length = file_of(tmp_path).stat().st_size
    run(RowCache(tmp_path, MEBIBYTE), rows[:50] - 50, n_columns=512)
    connection = sqlite3.connect(file_of(tmp_path))
    (n_entries,) = connection.execute("SELECT count(*) FROM entry").fetchone()
    connection.close()
    assert 300 < n_entries < 500
    assert file_of(tmp_path).stat().st_size == length


@pytest.mark.parametrize("cache_size", [0, 100, PAGE, 4 * PAGE])
def test__too_small_a_bound__stores_nothing(tmp_path, cache_size):
    folder = tmp_path / "new"
    for _ in range(2):
        function = run(RowCache(folder, cache_size), ROWS, n_columns=2000, batch_size=40)
        assert function.positions == list(range(40))
    assert not folder.exists()


def test__module__needs_numpy_and_the_standard_library_only():
    program = f"import sys; sys.argv[1:] = [{_row_cache.__file__!r}, '', '']\n{PROGRAM}"
    program += "print(sorted({'torch', 'sklearn', 'scipy', 'joblib', 'pandas'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
