"""Inputs of every format give the same rows; what is wrong in one is a bad row in its place."""

import gzip
import io
import json
import math
import sys
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisgl.batch_run import formats
from minisgl.batch_run.formats import read_lines
from minisgl.batch_run.rows import RowError
from minisgl.batch_run.sources import count_rows, default_output, open_sources, read_records
from minisgl.errors import MinisglError

TABLE = [
    {"prompt": "one", "label": "a"},
    {"prompt": 'two, "2"\nlines', "label": "é\u2028"},
    {"prompt": "x", "label": ""},
]


def zstd(data: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(data, asbytes=True))


def write(path: Path, data: bytes) -> Path:
    path.write_bytes({".gz": gzip.compress, ".zst": zstd}.get(path.suffix, bytes)(data))
    return path


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def values(*inputs: Any, **options: Any) -> list[Any]:
    """The rows' content; JSON lines parsed."""
    records = read_records(open_sources([str(name) for name in inputs], **options))
    found = [record.value for record in records]
    return [json.loads(value) if isinstance(value, bytes) else value for value in found]


CONTENT = {
    ".jsonl": "".join(json.dumps(row) + "\n" for row in TABLE).encode(),
    ".json": json.dumps(TABLE, indent=2).encode(),
    ".csv": 'prompt,label\r\none,a\r\n"two, ""2""\nlines",é\u2028\r\nx,\r\n'.encode(),
    ".parquet": parquet(TABLE),
}


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("suffix", CONTENT)
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str, compression: str) -> None:
    path = write(tmp_path / f"rows{suffix}{compression}", CONTENT[suffix])
    assert values(path) == TABLE
    assert [record.index for record in read_records(open_sources([str(path)]))] == [0, 1, 2]


def test_text_is_a_prompt_a_line(tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.txt", b"one\n\ntwo\xff\nthree")
    first, bad, last = values(path)
    assert (first, last) == ("one", "three")
    assert isinstance(bad, RowError) and "0xff at position 4" in bad.message
    assert [record.place for record in read_records(open_sources([str(path)]))] == ["line 1", "line 3", "line 4"]


def test_a_json_file_of_lines(tmp_path: Path) -> None:
    assert values(write(tmp_path / "rows.json", CONTENT[".jsonl"])) == TABLE


elements = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@settings(deadline=None)
@given(st.lists(elements), st.sampled_from([None, 2]), st.booleans(), st.integers(1, 40))
def test_any_json_array(array: list[Any], indent: int | None, ascii: bool, chunk: int) -> None:
    data = json.dumps(array, indent=indent, ensure_ascii=ascii).encode("utf-8", "replace")
    with mock.patch.object(formats, "CHUNK_CHARS", chunk):
        found = [json.loads(cast(bytes, value)) for _, value in formats.read_json(io.BytesIO(data))]
    assert found == json.loads(data)


def test_odd_values_of_a_json_array(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.json", b'[{"label": "\\ud83d", "v": NaN}, {"label": "\\u2028", "v": -Infinity}]')
    first, second = values(path)
    assert first["label"] == "\ud83d" and math.isnan(first["v"])
    assert second == {"label": "\u2028", "v": -math.inf}


def test_a_json_array_that_breaks_off(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.json", b'[{"prompt": "x"}, {"prompt": "y"}, {"pro')
    with pytest.raises(MinisglError, match="rows.json: .* breaks off after 2 elements"):
        values(path)


@pytest.mark.parametrize("behind", [b"[1]", b" x", b"\n" * 300_000 + b"[]"])
@pytest.mark.parametrize("array", [b"[]", b'[{"prompt": "x"}]'])
def test_text_behind_a_json_array_is_not_lost(tmp_path: Path, array: bytes, behind: bytes) -> None:
    assert len(values(write(tmp_path / "rows.json", array + b" \n"))) == len(json.loads(array))
    with pytest.raises(MinisglError, match="there is text after its end"):
        values(write(tmp_path / "rows.json", array + behind))


def test_bad_elements_of_a_json_array_stay_alone(tmp_path: Path) -> None:
    good, digits = b'{"prompt": "x"}', b'{"prompt": "y", "seed": ' + b"1" * 5000 + b"}"
    path = write(tmp_path / "rows.json", b"[" + b", ".join([good, digits, b'"\xff"', good]) + b"]")
    with path.open("rb") as file:
        assert [value for _, value in formats.read_json(cast(Any, file))] == [good, digits, b'"\xff"', good]
    deep = b"[" * 5000 + b"]" * 5000
    with pytest.raises(MinisglError, match="element 2 of the JSON array is nested too deeply"):
        values(write(tmp_path / "rows.json", b"[1, " + deep + b"]"))


def test_a_cell_that_is_nested_too_deeply_is_text(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", b"prompt,stop\na," + b"[" * 50_000 + b"\nb,x\n")
    assert [value["prompt"] for value in values(path)] == ["a", "b"]


def test_bad_rows_of_a_table_stay_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", b"\xef\xbb\xbfprompt,max_tokens\na,5\nb\nc\xff,6\n\nd,7,8\ne,\nf,many\n")
    found = values(path)
    assert found[0] == {"prompt": "a", "max_tokens": 5}
    assert [isinstance(value, RowError) for value in found] == [False, True, True, True, False, False]
    assert [found[4]["max_tokens"], found[5]["max_tokens"]] == [None, "many"]
    assert "1 cells; the header has 2" in found[1].message and "UTF-8" in found[2].message


def test_a_quote_that_never_closes_is_not_a_long_cell(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", b'prompt\na\n"b" c\n"d\ne\nf\n')
    rows = read_records(open_sources([str(path)]))
    assert next(rows).value == {"prompt": "a"}
    assert isinstance(next(rows).value, RowError)
    with pytest.raises(MinisglError, match="a quote opens in line 4 or after it and never closes"):
        next(rows)


def test_parameters_as_pandas_writes_them(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", b"prompt,max_tokens,ignore_eos,temperature\nTrue,3.0,False,0.5\nb,,True,1.0\n")
    assert values(path) == [
        {"prompt": "True", "max_tokens": 3, "ignore_eos": False, "temperature": 0.5},
        {"prompt": "b", "max_tokens": None, "ignore_eos": True, "temperature": 1},
    ]


def test_stdin_is_read_once() -> None:
    with pytest.raises(MinisglError, match="- is named twice"):
        open_sources(["-", "-"])


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.csv.zst", "rows.parquet"])
def test_a_file_that_is_cut_off(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, CONTENT["." + name.split(".")[1]])
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(MinisglError, match="cannot be read to its end|not a readable Parquet"):
        values(path)


def test_several_files_a_glob_and_a_folder(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    paths = [
        write(tmp_path / name, CONTENT["." + name.split(".")[1]]) for name in ("a.jsonl", "b.csv", "inner/c.json.gz")
    ]
    (tmp_path / "notes.md").write_text("not an input")
    (tmp_path / "a.results.jsonl").write_text("results of an earlier run")
    (tmp_path / "out.jsonl").write_text("this run's")
    output = str(tmp_path / "out.jsonl")
    for inputs in ([str(path) for path in paths], [str(tmp_path)]):
        assert values(*inputs, output=output) == TABLE * 3
    assert values(tmp_path / "[ab].*l", tmp_path / "*.csv", output=output) == TABLE * 2
    records = list(read_records(open_sources([str(path) for path in paths])))
    assert [record.index for record in records] == list(range(9))
    assert records[3].place == "b.csv, row 1"


def test_results_with_a_manifest_are_no_input_of_their_folder(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", CONTENT[".jsonl"])
    write(tmp_path / "answers.csv", b"text\nx\n")
    (tmp_path / "answers.csv.manifest.json").write_text("{}")
    (tmp_path / "answers.csv.journal.jsonl").write_text("{}\n")
    assert values(tmp_path) == TABLE


def test_shards_and_limits(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.txt", b"".join(b"%d\n" % index for index in range(10)))
    sources = open_sources([str(path)])
    parts = [[record.index for record in read_records(sources, (number, 3))] for number in (1, 2, 3)]
    assert parts == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]
    assert [count_rows(sources, (number, 3)) for number in (1, 2, 3)] == [4, 3, 3]
    assert [record.index for record in read_records(sources, (2, 3), limit=2)] == [1, 4]
    assert count_rows(sources, (2, 3), limit=2) == 2


def test_counts(tmp_path: Path) -> None:
    counts = {
        suffix: count_rows(open_sources([str(write(tmp_path / f"rows{suffix}", content))]))
        for suffix, content in CONTENT.items()
    }
    assert counts == {".jsonl": 3, ".json": None, ".csv": None, ".parquet": 3}
    assert count_rows(open_sources(["-"])) is None
    assert count_rows(open_sources(["/dev/null"])) is None


def test_saved_data_sets(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list(TABLE)
    data.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(str(tmp_path / "two"))
    assert values(tmp_path / "one") == TABLE
    assert count_rows(open_sources([str(tmp_path / "one")])) == 3
    assert values(tmp_path / "two", split="test") == TABLE[:1]
    with pytest.raises(MinisglError, match=r"several splits: name one with --split \(train, test\)"):
        values(tmp_path / "two")
    with pytest.raises(MinisglError, match="no split 'dev'"):
        values(tmp_path / "two", split="dev")
    with pytest.raises(MinisglError, match="has no splits"):
        values(tmp_path / "one", split="train")


def test_images_of_a_data_set_stay_bytes(tmp_path: Path) -> None:
    from datasets import Dataset, Features, Image, Value

    rows = {"prompt": ["x"], "image": [{"bytes": b"no image", "path": None}]}
    features = Features({"prompt": Value("string"), "image": Image()})
    Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    [row] = values(tmp_path / "saved")
    assert row == {"prompt": "x", "image": {"bytes": b"no image", "path": None}}


def test_data_sets_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streamed by `datasets` itself, which takes a folder of that name for the repository."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/plain/data").mkdir(parents=True)
    write(tmp_path / "org/plain/data/train.jsonl", CONTENT[".jsonl"])
    write(tmp_path / "org/plain/data/test.jsonl", CONTENT[".jsonl"].splitlines()[0])
    assert values("hf:org/plain", split="train") == TABLE
    assert values("hf:org/plain:default", split="test") == TABLE[:1]
    for split, says in ((None, "has several splits"), ("dev", "has no split 'dev'")):
        with pytest.raises(MinisglError, match=rf"{says}: name one with --split \(train, test\)"):
            values("hf:org/plain", split=split)

    configs = [
        {"config_name": name, "data_files": [{"split": "train", "path": f"{name}.parquet"}]} for name in ("a", "b")
    ]
    (tmp_path / "org/several").mkdir()
    write(tmp_path / "org/several/README.md", f"---\n{json.dumps({'configs': configs})}\n---\n".encode())
    for config in configs:
        write(tmp_path / f"org/several/{config['config_name']}.parquet", CONTENT[".parquet"])
    assert values("hf:org/several:b") == TABLE
    with pytest.raises(MinisglError, match=r"several configurations: name one as hf:org/several:a \(a, b\)"):
        values("hf:org/several")
    with pytest.raises(MinisglError, match="cannot read hf:org/several:c: .*'c'"):
        values("hf:org/several:c")
    with pytest.raises(MinisglError, match="name it as hf:ORG/NAME"):
        values("hf:")


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(name: str) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "get_dataset_default_config_name", fail)
    with pytest.raises(MinisglError, match="cannot read hf:org/name: no network"):
        values("hf:org/name")


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, says in (("none.jsonl", "does not exist"), ("empty", "no file to read"), ("*.csv", "no file matches")):
        with pytest.raises(MinisglError, match=says):
            open_sources([str(tmp_path / name)])
    path = write(tmp_path / "rows.jsonl", b"")
    with pytest.raises(MinisglError, match="--split is for data sets"):
        open_sources([str(path)], split="train")
    with pytest.raises(MinisglError, match="twice"):
        values(write(tmp_path / "rows.csv", b"a,b,a\n1,2,3\n"))


def test_the_input_is_never_the_output(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", b'{"prompt": "x"}\n')
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "hard").hardlink_to(path)
    for name in ("in.jsonl", "link", "hard"):
        with pytest.raises(MinisglError, match="is the input"):
            open_sources([str(path)], output=str(tmp_path / name))


def test_default_output() -> None:
    for name in ("prompts.jsonl", "prompts.csv", "prompts.jsonl.gz", "prompts"):
        assert default_output([f"data/{name}"]) == "data/prompts.results.jsonl"
    assert default_output(["part.01"]) == "part.01.results.jsonl"
    assert default_output(["-"]) == "-"
    assert default_output(["hf:org/name:main"]) == "name-main.results.jsonl"
    assert default_output(["a.jsonl"], (2, 4)) == "a.2-of-4.results.jsonl"
    with pytest.raises(MinisglError, match="-o: /dev/null is a pipe or a device"):
        default_output(["/dev/null"])
    for several in (["a", "b"], ["*.jsonl"]):
        with pytest.raises(MinisglError, match="name the output"):
            default_output(several)


# -- lines --


def lines(data: bytes) -> list[Any]:
    return list(read_lines(io.BytesIO(data)))


def test_lines_of_any_kind() -> None:
    assert lines(b"a\n\n  \t\nb\n") == [(0, b"a"), (3, b"b")]
    assert lines(b"\xef\xbb\xbfa\r\n\r\nb\r\n") == [(0, b"a"), (2, b"b")]
    assert lines(b"a\nb") == [(0, b"a"), (1, b"b")]
    assert lines(b"") == []


@pytest.mark.parametrize("length", [16, 17, 31, 32, 33, 100])
def test_a_line_that_is_too_long_is_one_bad_row(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MAX_LINE_BYTES", 16)
    (_, first), (_, long), (_, last) = lines(b"a\n" + b"x" * length + b"\nb\n")
    assert (first, last) == (b"a", b"b")
    assert long == b"x" * 16 if length == 16 else "longer than" in long.message


def test_rows_are_read_as_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO(b'{"prompt": "x"}\n' * 10)
    rows = read_lines(file)
    next(rows)
    assert file.tell() == len(b'{"prompt": "x"}\n')


def test_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"prompt": "x"}\n')))
    assert values("-") == [{"prompt": "x"}]
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(MinisglError, match="stdin is closed"):
        values("-")
