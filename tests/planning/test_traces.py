"""Traces of other services: what their lines become, which part is played, and which lines are refused."""

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.planning.rows import SimpleRows
from triptych.config import KV_BLOCK_TOKENS
from triptych.errors import ConfigError
from triptych.planning.quantities import PerSecond, Seconds
from triptych.planning.workloads.demand import Demand, Item
from triptych.planning.workloads.traces import Trace, azure, burstgpt, mooncake

AZURE = """\
TIMESTAMP,NumImages,ContextTokens,GeneratedTokens
2024-10-15T12:00:00.269Z,0,770,491
2024-10-15T12:00:05.819Z,1,949,126
2024-10-15T12:00:06.269Z,3,100,0
"""
BURSTGPT = """\
Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,GPT-4,1087,0,1087,API log
118,ChatGPT,417,276,693,Conversation log
"""
MOONCAKE = [
    {"timestamp": 1000, "input_length": 1100, "output_length": 52, "hash_ids": [46, 47, 48]},
    {"timestamp": 4500, "input_length": 600, "output_length": 0, "hash_ids": [46, 7]},
]
BLOCKS = 512 // KV_BLOCK_TOKENS


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.fixture
def azure_file(tmp_path: Path) -> Path:
    return written(tmp_path / "azure.csv", AZURE)


@pytest.fixture
def burstgpt_file(tmp_path: Path) -> Path:
    return written(tmp_path / "burst.csv", BURSTGPT)


@pytest.fixture
def mooncake_file(tmp_path: Path) -> Path:
    return written(tmp_path / "mooncake.jsonl", "\n".join(map(json.dumps, MOONCAKE)) + "\n\n")


def test_azure_what_pictures_leave_of_the_context_is_text(azure_file: Path) -> None:
    picture = Item((300,), 300_000, 75_000)
    assert list(azure(azure_file, SimpleRows(), "600x500")) == [
        Demand(0.0, (), 770, 491),
        Demand(5.55, (picture,), 649, 126),
        Demand(6.0, (picture,) * 3, 1, 1),
    ]


def test_azure_may_be_gzipped_and_without_pictures(tmp_path: Path) -> None:
    path = tmp_path / "text.csv.gz"
    with gzip.open(path, "wt") as file:
        file.write("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n")
    assert list(azure(path, SimpleRows())) == [Demand(0.0, (), 4808, 10)]


def test_burstgpt_leaves_failed_requests_out(burstgpt_file: Path) -> None:
    assert list(burstgpt(burstgpt_file)) == [Demand(0.0, (), 472, 18), Demand(113.0, (), 417, 276)]


def test_burstgpt_finds_its_columns_by_name(tmp_path: Path) -> None:
    text = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens\n1.5,s,2,GPT-4,7,8\n"
    assert list(burstgpt(written(tmp_path / "b.csv", text))) == [Demand(0.0, (), 7, 8)]


def test_mooncake_hashes_name_the_full_blocks_of_the_prompt(mooncake_file: Path) -> None:
    first, second = mooncake(mooncake_file)
    assert (first.at_s, first.text_tokens, first.output_tokens) == (0.0, 1100, 52)
    assert (second.at_s, second.text_tokens, second.output_tokens) == (3.5, 600, 1)
    assert len(first.prefix) == 1100 // KV_BLOCK_TOKENS and len(second.prefix) == 600 // KV_BLOCK_TOKENS
    assert first.prefix[:BLOCKS] == second.prefix[:BLOCKS]
    assert len({*first.prefix, *second.prefix}) == len(first.prefix) + len(second.prefix) - BLOCKS


def played(path: Path, format: str = "burstgpt", **options: object) -> list[float]:
    limits = {name: options.pop(name) for name in ("duration_s", "max_requests") if name in options}
    return [one.at_s for one in Trace(format=format, path=str(path), **options).demands(SimpleRows(), **limits)]


@pytest.fixture
def steady(tmp_path: Path) -> Path:
    lines = "".join(f"{10 + second},m,5,5\n" for second in range(100))
    return written(tmp_path / "steady.csv", "Timestamp,Model,Request tokens,Response tokens\n" + lines)


def test_a_part_of_a_trace_begins_at_0(steady: Path) -> None:
    assert played(steady, start=Seconds(20), duration_s=3.0) == [0, 1, 2]
    assert played(steady, start=Seconds(20.5), max_requests=2) == [0.5, 1.5]
    assert len(played(steady)) == 100


def test_what_comes_after_the_part_is_not_read(steady: Path) -> None:
    steady.write_text(steady.read_text() + "this is no line\n")
    assert len(played(steady, max_requests=100)) == 100
    assert len(played(steady, duration_s=99.0)) == 99


def test_another_rate_stretches_the_times(steady: Path) -> None:
    assert played(steady, duration_s=4.0, rate=PerSecond(2)) == [0, 0.5, 1, 1.5]
    times = played(steady, rate=PerSecond(0.5))
    assert len(times) / times[-1] == pytest.approx(0.5)


def test_a_rate_is_that_of_the_part_that_is_played_whatever_ends_it(steady: Path) -> None:
    assert played(steady, duration_s=50.0, max_requests=5, rate=PerSecond(5)) == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert played(steady, duration_s=50.0, max_requests=60, rate=PerSecond(2))[-1] == pytest.approx(24.5)
    assert played(steady, duration_s=1000.0, rate=PerSecond(2))[-1] == pytest.approx(50)  # the file is shorter


@pytest.mark.filterwarnings("error")
def test_a_rate_at_which_requests_never_come_is_refused(steady: Path) -> None:
    with pytest.raises(ConfigError, match="rate: 1e-310 req/s is too slow for the last request ever to come"):
        played(steady, rate=PerSecond(1e-310))


def test_what_spreadsheets_write_is_read(tmp_path: Path) -> None:
    path = tmp_path / "sheet.csv"
    path.write_text(BURSTGPT + "\n", encoding="utf-8-sig")
    assert len(list(burstgpt(path))) == 2
    path.write_text(BURSTGPT + "\n119,ChatGPT,1,1,x\n", encoding="utf-8-sig")
    with pytest.raises(ConfigError, match=r"sheet\.csv:6: 5 columns, 6 are needed"):
        list(burstgpt(path))


def test_the_encoding_is_not_that_of_the_locale(tmp_path: Path) -> None:
    path = tmp_path / "mark.csv"
    path.write_text("Timestamp,Request tokens,Response tokens,Ärger\n1,2,3,é\n", encoding="utf-8")
    command = f"from triptych.planning.workloads.traces import burstgpt; print(len(list(burstgpt({str(path)!r}))))"
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    found = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True)
    assert found.stdout.strip() == "1", found.stderr


def test_a_part_without_requests_is_refused(steady: Path) -> None:
    with pytest.raises(ConfigError, match=r"steady\.csv: no request in the part that is played, from 500 s on"):
        played(steady, start=Seconds(500))


def test_requests_of_one_moment_have_no_rate_to_change(steady: Path) -> None:
    with pytest.raises(ConfigError, match="rate: all requests that are played come at one moment"):
        played(steady, max_requests=1, rate=PerSecond(2))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("yesterday,0,1,1", "4: TIMESTAMP is 'yesterday'; a date and time such as"),
        ("2024-10-15T12:01:00Z,-1,1,1", "4: NumImages is '-1'; a whole number from 0 to 10000 is needed"),
        ("2024-10-15T12:01:00Z,0,many,1", "4: ContextTokens is 'many'"),
        ("2024-10-15T12:01:00Z,0,1,1.5", "4: GeneratedTokens is '1.5'"),
        ("2024-10-15T12:01:00Z,0,1", "4: 3 columns, 4 are needed"),
        ("2024-10-15T11:00:00Z,0,1,1", "4: .* is earlier than the line before"),
        ("2024-10-15T12:01:00,0,1,1", "4: TIMESTAMP is"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, told: str) -> None:
    good = "\n".join(AZURE.splitlines()[:3])
    path = written(tmp_path / "bad.csv", f"{good}\n{line}\n2024-10-15T12:02:00Z,0,1,1\n")
    with pytest.raises(ConfigError, match=rf"bad\.csv:{told}"):
        list(azure(path, SimpleRows()))


FIELDS = st.sampled_from(
    ["2024-10-15T12:00:00.269Z", "2024-10-15", "", "0", "3", "9" * 30, "9" * 5000, '"', "\0"]
) | st.text(max_size=5)
LINES = st.lists(st.lists(FIELDS, max_size=5).map(",".join) | st.text(max_size=20), max_size=4).map("\n".join)


@given(header=st.sampled_from([AZURE.splitlines()[0], BURSTGPT.splitlines()[0], ""]), lines=LINES)
@pytest.mark.parametrize("format", ["azure", "burstgpt", "mooncake"])
def test_whatever_stands_in_it_a_trace_is_read_or_refused_by_name(
    format: str, header: str, lines: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(f"{header}\n{lines}".encode(errors="surrogatepass"))
    try:
        Trace(format=format, path=str(path), image_size="10x10").demands(SimpleRows())
    except ConfigError as error:
        refused = str(error)
    else:
        return
    assert refused.startswith(str(path))


@pytest.mark.parametrize("stamp", ["soon", "nan", "-5", "inf"])
def test_a_malformed_number_of_seconds_is_named(tmp_path: Path, stamp: str) -> None:
    text = f"Timestamp,Request tokens,Response tokens\n{stamp},1,1\n"
    with pytest.raises(ConfigError, match=rf"b\.csv:2: Timestamp is '{stamp}'; seconds, a finite number of at least 0"):
        list(burstgpt(written(tmp_path / "b.csv", text)))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", r"JSON is malformed|truncated"),
        ('{"timestamp": 5000, "input_length": 1}', "missing required field `output_length`"),
        ('{"timestamp": 5000, "input_length": -1, "output_length": 1}', "Expected `int` >= 0"),
        ('{"timestamp": 5000, "input_length": 1, "output_length": 1, "hash_ids": ["a"]}', "Expected `int`, got `str`"),
        ('{"timestamp": 5000, "input_length": 1, "output_length": 1, "hash_ids": [-1]}', "Expected `int` >= 0"),
        (
            f'{{"timestamp": 5000, "input_length": 1, "output_length": 1, "hash_ids": [{10**60}]}}',
            "Integer value out of range|Expected `int`|out of range",
        ),
        ('{"timestamp": 5, "input_length": 1, "output_length": 1}', "earlier than the line before"),
    ],
)
def test_a_malformed_line_of_json_is_named(mooncake_file: Path, line: str, told: str) -> None:
    mooncake_file.write_text(mooncake_file.read_text() + line + "\n")
    with pytest.raises(ConfigError, match=rf"mooncake\.jsonl:4: .*({told})"):
        list(mooncake(mooncake_file))


def test_a_missing_column_is_named_with_all_that_are_needed(burstgpt_file: Path) -> None:
    told = (
        r"burst\.csv:1: the column 'TIMESTAMP' is missing; the first line must name TIMESTAMP, NumImages, ContextTokens"
    )
    with pytest.raises(ConfigError, match=told):
        list(azure(burstgpt_file, SimpleRows()))


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.csv: cannot be read: No such file"):
        list(burstgpt(tmp_path / "none.csv"))
    (tmp_path / "bytes.csv").write_bytes(b"Timestamp,Request tokens,Response tokens\n\xff\xfe")
    with pytest.raises(ConfigError, match=r"bytes\.csv: not UTF-8 text"):
        list(burstgpt(tmp_path / "bytes.csv"))
    (tmp_path / "not.gz").write_text("plain text")
    with pytest.raises(ConfigError, match=r"not\.gz: cannot be read: Not a gzipped file"):
        list(burstgpt(tmp_path / "not.gz"))
    whole = gzip.compress((AZURE + "2024-10-15T12:00:07Z,0,1,1\n" * 9999).encode())
    (tmp_path / "cut.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"cut\.gz: not a whole gzip file"):
        list(azure(tmp_path / "cut.gz", SimpleRows()))
    with pytest.raises(ConfigError, match=r"empty\.csv:1: the column 'Timestamp' is missing"):
        list(burstgpt(written(tmp_path / "empty.csv", "")))


def test_a_hundred_thousand_lines_take_seconds(tmp_path: Path) -> None:
    """0.5 s on one core of 2022."""
    lines = "".join(
        f"2024-10-15T{12 + n // 36000}:{n // 600 % 60:02}:{n // 10 % 60:02}.{n % 10}00Z,1,999,9\n"
        for n in range(100_000)
    )
    path = written(tmp_path / "long.csv", AZURE.splitlines()[0] + "\n" + lines)
    began = time.perf_counter()
    assert len(Trace(format="azure", path=str(path), rate=PerSecond(3)).demands(SimpleRows())) == 100_000
    assert time.perf_counter() - began < 5
