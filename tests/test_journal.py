import json
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, make_scorer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skcifar._journal import Journal, _line, as_plain, describe, differences, digest

IDENTITY = {"data": {"X": "ab", "y": "cd"}, "grid": [{"alpha": 0.1}]}
RECORDS = [
    {"task": 0, "value": [{"score": 0.1 + 0.2, "fit_error": None}]},
    {"task": 1, "value": [{"score": float("nan"), "fit_error": "a\nb\u2028é"}]},
    {"task": 2, "value": [{"score": -1e-310, "n": 2**70, "done": True}]},
]


@pytest.fixture
def path(tmp_path):
    """A journal of three tasks."""
    path = tmp_path / "search.journal"
    with Journal(path, IDENTITY, {"seed": 3}) as journal:
        for record in RECORDS:
            journal.append(record)
    return path


def read(path, identity=IDENTITY):
    with Journal(path, identity, {"seed": 4}) as journal:
        return journal.records


# -- what is written is read -----------------------------------------------------------------------


def test__records__are_read_exactly_as_written(path):
    assert repr(read(path)) == repr(RECORDS)  # NaN does not equal itself, its text does


def test__notes__are_those_of_the_first_search(path):
    with Journal(path, IDENTITY, {"seed": 4}) as journal:
        assert journal.notes == {"seed": 3}


def test__file__is_a_json_object_a_line(path):
    lines = path.read_text().splitlines()
    assert len(lines) == 1 + len(RECORDS)
    assert all(set(json.loads(line)) == {"checksum", "record"} for line in lines)


def test__numpy_numbers__are_read_as_equal_python_numbers(tmp_path):
    with Journal(tmp_path / "j", IDENTITY) as journal:
        journal.append(
            {"a": np.float32(0.1), "b": np.float64(0.1), "c": np.int64(3), "d": np.True_}
        )
    (record,) = read(tmp_path / "j")
    assert record == {"a": float(np.float32(0.1)), "b": 0.1, "c": 3, "d": True}
    assert [type(value) for value in record.values()] == [float, float, int, bool]


@pytest.mark.parametrize("value", [1 + 2j, (1, 2), {1: 0.5}, np.arange(2), object(), b"x"])
def test__value_json_cannot_hold__error_names_it_and_nothing_is_written(path, value):
    before = path.read_bytes()
    with Journal(path, IDENTITY) as journal, pytest.raises(TypeError, match=r"record\['score'\]"):
        journal.append({"score": value})
    assert path.read_bytes() == before


def test__failed_write__leaves_no_half_line(path, monkeypatch):
    before = path.read_bytes()
    with Journal(path, IDENTITY) as journal:
        monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            journal.append({"task": 3})
    assert path.read_bytes() == before


# -- damage ----------------------------------------------------------------------------------------


def test__every_torn_end__costs_the_last_task_at_most(path):
    content = path.read_bytes()
    start = content[:-1].rfind(b"\n") + 1
    for stop in range(start, len(content)):
        path.write_bytes(content[:stop])
        assert repr(read(path)) == repr(RECORDS[:2])
        assert path.read_bytes() == content[:start]


def test__torn_header__begins_anew(path):
    header = path.read_bytes().split(b"\n")[0]
    for stop in (0, 5, 40, len(header)):
        path.write_bytes(header[:stop])
        assert read(path) == []
        assert len(path.read_bytes().split(b"\n")) == 2


def test__task_after_torn_end__is_read(path):
    path.write_bytes(path.read_bytes()[:-7])
    with Journal(path, IDENTITY) as journal:
        journal.append({"task": 7})
    assert [record["task"] for record in read(path)] == [0, 1, 7]


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test__any_changed_byte__error_names_the_line(path, number):
    lines = path.read_bytes().split(b"\n")
    line = lines[number - 1]
    for position in range(14, len(line), 7):
        changed = bytes([line[position] ^ 1])
        lines[number - 1] = line[:position] + changed + line[position + 1 :]
        path.write_bytes(b"\n".join(lines))
        with pytest.raises(ValueError, match=rf"line {number}: damaged"):
            read(path)


def test__missing_newline_between_tasks__error_names_the_line(path):
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], lines[1] + lines[2], *lines[3:]]))
    with pytest.raises(ValueError, match="line 2: damaged"):
        read(path)


@pytest.mark.parametrize(
    "content", [b"a,b\n1,2\n", b"no newline", b'{"a": 1}\n', b"\n", b"[1]\n", b"a\nb"]
)
def test__file_of_another_kind__is_an_error_and_stays(tmp_path, content):
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not the journal of a search"):
        read(path)
    assert path.read_bytes() == content


# -- another search --------------------------------------------------------------------------------


def test__other_identity__error_says_what_differs_and_what_to_do(path):
    before = path.read_bytes()
    other = {"data": {"X": "zz", "y": "cd"}, "grid": [{"alpha": 0.2}]}
    with pytest.raises(ValueError) as error:
        read(path, other)
    for part in (str(path), 'data.X (was "ab", is "zz")', "grid", "another path", "delete"):
        assert part in str(error.value)
    assert "data.y" not in str(error.value)
    assert path.read_bytes() == before


def test__other_format__is_an_error(tmp_path):
    path = tmp_path / "j"
    with Journal(path, IDENTITY):
        pass
    text = path.read_text().replace("version 1", "version 9")
    record = json.loads(text)["record"]
    path.write_bytes(_line(record))
    with pytest.raises(ValueError, match="version of skcifar"):
        read(path)


def test__second_search_on_open_journal__is_an_error_until_it_is_closed(path):
    with Journal(path, IDENTITY), pytest.raises(RuntimeError, match="in use by another search"):
        Journal(path, IDENTITY)
    assert len(read(path)) == 3


def test__failed_opening__leaves_no_lock(path):
    with pytest.raises(ValueError, match="another search"):
        read(path, {"data": None})
    assert len(read(path)) == 3


def test__differences__name_added_and_missing_entries():
    assert list(differences({"a": 1, "b": float("nan")}, {"b": float("nan"), "c": 2})) == [
        "a (was 1, is null)",
        "c (was null, is 2)",
    ]


# -- descriptions ----------------------------------------------------------------------------------


def test__digest__tells_values_dtypes_and_shapes_apart():
    arrays = [
        np.arange(6.0),
        np.arange(6.0, dtype=np.float32),
        np.arange(6.0).reshape(2, 3),
        np.arange(6),
        np.arange(6.0)[::-1],
        np.array(["a", "b"]),
        np.array(["a", "c"]),
        np.array(["a", "b"], dtype=object),
        pd.DataFrame({"a": [1.0, 2.0]}),
        pd.DataFrame({"b": [1.0, 2.0]}),
        pd.DataFrame({"a": [1, 2]}),
        pd.DataFrame({"a": ["x", "y"]}),
        pd.DataFrame({"a": pd.Categorical(["x", "y"])}),
        sparse.csr_matrix([[0, 1]]),
        sparse.csr_matrix([[1, 0]]),
        sparse.csr_matrix([[1, 0, 0]]),
        torch.arange(4.0, dtype=torch.bfloat16),
        None,
        3,
    ]
    assert len({digest(array) for array in arrays}) == len(arrays)


def test__digest__depends_on_values_not_on_memory():
    X = np.arange(24.0).reshape(4, 6)
    assert digest(X) == digest(np.asfortranarray(X)) == digest(torch.from_numpy(X)) == digest([*X])
    assert digest(X[:, ::2]) == digest(X[:, ::2].copy())
    frame = pd.DataFrame(X)
    assert digest(frame) == digest(frame.copy()) != digest(frame.iloc[::-1])


def scale(x, by):
    return x * by


def test__describe__tells_parameters_apart():
    def closure(by):
        return lambda x: x * by

    values = [
        None,
        True,
        0.5,
        "a",
        [1, 2],
        {"a": 1},
        {1, 2, 3},
        np.arange(3),
        LogisticRegression(),
        LogisticRegression(C=2),
        make_pipeline(StandardScaler(), LogisticRegression()),
        make_pipeline(StandardScaler(), LogisticRegression(C=2)),
        LogisticRegression,
        lambda x: x + 1,
        lambda x: x + 2,
        closure(1),
        closure(2),
        partial(scale, by=1),
        partial(scale, by=2),
        make_scorer(accuracy_score),
        make_scorer(accuracy_score, greater_is_better=False),
        torch.device("cpu"),
        np.random.RandomState(0),
        np.random.RandomState(1),
    ]
    texts = [json.dumps(describe(value, "value")) for value in values]
    assert len(set(texts)) == len(values)
    assert texts == [json.dumps(describe(value, "value")) for value in values]


def test__describe__value_without_identity__error_names_parameter():
    with pytest.raises(ValueError, match=r"estimator\.C = .* cannot be told from others"):
        describe(LogisticRegression(C=(number for number in [1.0])), "estimator")


def test__as_plain__keeps_subclasses_as_what_json_makes_of_them():
    class Count(int):
        pass

    assert type(as_plain(Count(3), "n")) is int
    assert type(as_plain(np.float64(3), "x")) is float


def test__describe__sees_through_scorers_and_partials():
    def one(y, p):
        return 1.0

    def two(y, p):
        return 2.0

    for wrap in (make_scorer, lambda f: partial(f, p=0)):
        assert describe(wrap(one), "scoring") != describe(wrap(two), "scoring")
        assert describe(wrap(one), "scoring") == describe(wrap(one), "scoring")
    assert describe({1: 2, "1": 3}, "p") != describe({"1": 3}, "p")


def test__describe__does_not_depend_on_the_order_within_sets():
    code = (
        "from skcifar._journal import describe; "
        "print(describe(lambda x: x in {'a', 'b', 'c', 'd'}, 'f')['code'])"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "12"
    }
    assert len(found) == 1
