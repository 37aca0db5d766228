import logging

import pytest

from data import rows
from data.bad_rows import BadRowLog, BadRows
from data.rows import RowFormat, read_rows

TABS = RowFormat(fields=("user", "item", "rating", "timestamp"), delimiter="\t")
COLONS = RowFormat(fields=("user", "", "item", "", "rating", "", "timestamp"), delimiter=":")

BAD_LINES = {
    "1\t2\t3": "expected 4 fields",
    "1\t2\t3\t4\t5": "expected 4 fields",
    "1\t2\tgood\t4": "rating 'good' is not a finite number",
    "1\t2\tnan\t4": "rating 'nan'",
    "1\t2\tinf\t4": "rating 'inf'",
    "1\t2\t1e99\t4": "rating '1e99'",
    "1\t2\t\t4": "rating ''",
    "1\t2\t3\tnoon": "timestamp 'noon'",
    "1\t2\t3\t1e40": "timestamp '1e40'",
    "\t2\t3\t4": "empty user id",
    "1\t\t3\t4": "empty item id",
}


def read_text(tmp_path, text, row_format=TABS, on_bad_rows="error"):
    path = tmp_path / "events"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    log = BadRowLog(on_bad_rows)
    return read_rows(path, row_format, log), log


def columns(events):
    return (
        events.user.to_pylist(),
        events.item.to_pylist(),
        events.rating.tolist(),
        events.timestamp.tolist(),
    )


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_well_formed_rows(tmp_path, ending):
    events, log = read_text(tmp_path, ending.join(["7\tNA\t3.5\t20", "", 'x"y\t1\t4\t10']))
    assert columns(events) == (["7", 'x"y'], ["NA", "1"], [3.5, 4.0], [20, 10])
    assert log.count == 0


def test_large_and_fractional_timestamps(tmp_path):
    nanoseconds = 1_700_000_000_123_456_789  # float64 would round it
    events, _ = read_text(tmp_path, f"1\t2\t3\t{nanoseconds}\n")
    assert events.timestamp.tolist() == [nanoseconds]
    events, _ = read_text(tmp_path, "1\t2\t3\t8.8e8\n1\t2\t3\t12.75\n1\t2\t3\t5\n")
    assert events.timestamp.tolist() == [880_000_000, 12, 5]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.items())
def test_a_bad_row_is_named_with_its_line(tmp_path, line, reason):
    _, log = read_text(tmp_path, f"1\t2\t3\t4\n\n{line}\n5\t6\t7\t8\n")
    with pytest.raises(BadRows) as error:
        log.close()
    assert "Malformed rows: 1 " in str(error.value)
    assert f"events:3: {reason}" in str(error.value)


def test_bad_rows_are_counted_and_the_first_shown(tmp_path):
    _, log = read_text(tmp_path, "1\t2\t3\t4\n" + "bad\n" * 100)
    with pytest.raises(BadRows, match="Malformed rows: 100 ") as error:
        log.close()
    shown = str(error.value).splitlines()[1:]
    assert [line.split(":")[1] for line in shown[:-1]] == ["2", "3", "4", "5", "6"]
    assert shown[-1].strip() == "..."
    assert "--data.on_bad_rows skip" in str(error.value)


def test_skip_drops_bad_rows_and_reports_them(tmp_path, caplog):
    text = "9\t9\t3\t4\n" + "\n".join(BAD_LINES) + "\n5\t6\t4\t8\n"
    with caplog.at_level(logging.WARNING, "shardrec"):
        events, log = read_text(tmp_path, text, on_bad_rows="skip")
        log.close()
    assert columns(events) == (["9", "5"], ["9", "6"], [3.0, 4.0], [4, 8])
    assert f"Malformed rows skipped: {len(BAD_LINES)}" in caplog.text


def test_only_bad_rows(tmp_path):
    events, log = read_text(tmp_path, "bad\n", on_bad_rows="skip")
    assert len(events.user) == 0
    assert log.count == 1


def test_line_numbers_and_ids_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "_BLOCK_BYTES", 64)
    lines = [f"{i % 7}\t{i}\t3\t{i}" for i in range(100)]
    lines[61] = "bad"
    events, log = read_text(tmp_path, "\n".join(lines))
    assert events.item.to_pylist() == [str(i) for i in range(100) if i != 61]
    assert events.user.to_pylist() == [str(i % 7) for i in range(100) if i != 61]
    assert "events:62:" in log.shown[0]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("1::2:x:3::4", "expected the separator '::'"),
        ("1:2:3:4", "expected 7 fields separated by ':', found 4"),
    ],
)
def test_double_colons(tmp_path, line, reason):
    events, log = read_text(tmp_path, f"1::2::3::4\n{line}\n5::6::7::8\n", COLONS, "skip")
    assert columns(events) == (["1", "5"], ["2", "6"], [3.0, 7.0], [4, 8])
    assert log.count == 1
    assert f"events:2: {reason}" in log.shown[0]


def test_other_encodings_are_bad_rows(tmp_path):
    _, log = read_text(tmp_path, b"1\t2\t3\t4\n\xe9\t2\t3\t4\n")
    assert "events:2: not UTF-8" in log.shown[0]


def test_columns_that_are_absent(tmp_path):
    events, _ = read_text(tmp_path, "a b\na c\n", RowFormat(fields=("user", "item"), delimiter=" "))
    assert columns(events) == (["a", "a"], ["b", "c"], [1.0, 1.0], [0, 1])
