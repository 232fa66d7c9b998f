"""`triptych serve --config FILE`: from the words of a file to the options of a server, and what is refused."""

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from triptych import cli, config_file
from triptych.config import GIB
from triptych.errors import ConfigError
from triptych.serve import ServeOptions

EXAMPLES = sorted((Path(__file__).parents[1] / "examples" / "placements").glob("*.yaml"))


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ServeOptions]:
    """The options of servers, which are not started."""
    started: list[ServeOptions] = []

    async def start(options: ServeOptions) -> None:
        started.append(options)

    monkeypatch.setattr("triptych.commands.serve._serve", start)
    monkeypatch.setattr("triptych.telemetry.set_up_logging", lambda level: None)  # it would outlive the test
    return started


def serve(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, ["serve", *map(str, arguments)])


def written(folder: Path, text: str, name: str = "placement.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def refusal(folder: Path, text: str, *arguments: str) -> str:
    """What `triptych serve` says about a file, and about nothing else."""
    result = serve("--config", written(folder, text), *arguments)
    assert isinstance(result.exception, ConfigError), result.output
    return str(result.exception)


# ---- what is taken


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_a_server(served: list[ServeOptions], path: Path):
    assert serve("--config", path).exception is None
    assert len(served) == 1


def test_there_are_examples():
    assert len(EXAMPLES) >= 4


def test_keys_are_flags_with_hyphens_or_underscores(served: list[ServeOptions], tmp_path: Path):
    text = "placement: 2e1pd\nmax-num-seqs: 7\nmax_encode_tokens: 99\nirp: false\nkv-cache-gib: 0.5\nmax_queue_s: 1e2\n"
    assert serve("--config", written(tmp_path, text)).exception is None
    (options,) = served
    assert str(options.placement) == "2e1pd"
    assert (options.scheduling.max_num_seqs, options.scheduling.max_encode_tokens) == (7, 99)
    assert not options.scheduling.parallel_encode
    assert options.memory.kv_cache_bytes == GIB // 2
    assert options.admission.max_queue_s == 100.0


def test_flags_win_over_the_file_and_the_file_over_defaults(served: list[ServeOptions], tmp_path: Path):
    path = written(tmp_path, "port: 1234\nhost: 0.0.0.0\nirp: false\n")
    assert serve("--port", "4321", "--config", path, "--irp").exception is None
    (options,) = served
    assert (options.server.port, options.server.host) == (4321, "0.0.0.0")
    assert options.scheduling.parallel_encode


def test_json_is_yaml_and_may_stand_for_a_flag_that_is_json(served: list[ServeOptions], tmp_path: Path):
    asked = {"limit_mm_per_prompt": {"image": 2}, "served_model_name": ["a", "b"], "gpu_memory_utilization": 5e-1}
    assert serve("--config", written(tmp_path, json.dumps(asked), "placement.json")).exception is None
    (options,) = served
    assert options.server.limit_mm_per_prompt == {"image": 2}
    assert options.server.served_model_names == ("a", "b")
    assert options.memory.gpu_memory_utilization == 0.5


def test_a_file_may_name_the_model_and_one_name_is_a_list_of_one(
    served: list[ServeOptions], tmp_path: Path, built_in: Path
):
    text = f"model: {built_in}\nserved_model_name: demo\n"
    assert serve("--config", written(tmp_path, text)).exception is None
    (options,) = served
    assert options.model.path == str(built_in)
    assert options.server.served_model_names == ("demo",)


def test_the_built_in_model_has_its_name_also_where_its_folder_is_given(served: list[ServeOptions], built_in: Path):
    assert serve(built_in).exception is None
    assert serve().exception is None
    assert [options.server.served_model_names for options in served] == [
        (str(built_in), "triptych-demo"),
        ("triptych-demo",),
    ]


def test_an_empty_file_changes_nothing(served: list[ServeOptions], tmp_path: Path):
    assert serve("--config", written(tmp_path, "# nothing\n")).exception is None
    assert serve().exception is None
    assert served[0] == served[1]


@pytest.fixture
def built_in() -> Path:
    from triptych.demo import checkpoint_path

    return checkpoint_path()


# ---- what is refused, with the file, the key and what is valid


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot: 80", "placement.yaml: unknown key 'prot'; did you mean 'port'?"),
        ("max-num-seq: 8", "placement.yaml: unknown key 'max-num-seq'; did you mean 'max_num_seqs'?"),
        ("config: other.yaml", "placement.yaml: unknown key 'config'; known are adaptive, "),
        ("port: eighty", "placement.yaml: port: expected a whole number, got 'eighty'"),
        ("port: true", "placement.yaml: port: expected a whole number, got True"),
        ("port: 70000", "placement.yaml: port: 70000 is not valid; a whole number of at least 0 and at most 65535 is"),
        ("irp: 3", "placement.yaml: irp: expected true or false, got 3"),
        ("model: 3", "placement.yaml: model: expected text or nothing, got 3"),
        ("placement: 1e1x", "placement.yaml: placement '1e1x': expected counts and roles"),
        ("placement: 1e", "placement.yaml: placement '1e': no instance serves prefill or decode"),
        ("kv-cache-gib: 0", "placement.yaml: kv_cache_gib: 0 is not a finite number above 0"),
        ("kv-cache-gib: .nan", "placement.yaml: kv_cache_gib: nan is not a finite number"),
        ("max_queue_s: -1", "placement.yaml: max_queue_s: -1 is not a finite number above 0"),
        ("schedule: random", "placement.yaml: schedule: 'random' is none of fcfs, sjf, slo"),
        ("log_level: loud", "placement.yaml: log_level: 'loud' is none of debug, info"),
        ("max_num_seqs: 4096", "placement.yaml: max_num_seqs: max_num_batched_tokens: 2048 leaves no room"),
        (
            "limit_mm_per_prompt: {image: -1}",
            "placement.yaml: limit_mm_per_prompt: {'image': -1} is not valid; a whole",
        ),
        ("port: 1\nport: 2", "placement.yaml:2: 'port' stands there twice"),
        ("max-num-seqs: 1\nmax_num_seqs: 2", "placement.yaml: max_num_seqs stands there twice"),
        ("port: [", "placement.yaml:2: expected the node content, but found '<stream end>'"),
        ("- port", "placement.yaml: expected keys and values, got ['port']"),
        ("port: !!python/object:os.system {}", "placement.yaml:1: could not determine a constructor for the tag"),
        ("[" * 5000, "placement.yaml: "),
    ],
)
def test_a_bad_file_is_refused_with_its_name_and_key(served: list[ServeOptions], tmp_path: Path, text: str, said: str):
    assert f"{tmp_path}/{said}" in refusal(tmp_path, text + "\n")
    assert not served


def test_an_error_of_the_command_line_is_not_blamed_on_the_file(served: list[ServeOptions], tmp_path: Path):
    assert refusal(tmp_path, "port: 1\nhost: h\n", "--port", "70000").startswith("--port: 70000 is not valid; ")


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--max-num-seqs", "-1", "--max-num-seqs: -1 is not valid; a whole number of at least 1 is needed"),
        ("--max-body-mib", "0", "--max-body-mib: 0 is not a whole number above 0"),
        ("--embedding-cache-gib", "-1", "--embedding-cache-gib: -1 is not a finite number above 0"),
        ("--schedule", "lifo", "--schedule: 'lifo' is none of fcfs, sjf, slo"),
        ("--media-io-kwargs", "{", "--media-io-kwargs: '{' is not JSON"),
        ("--media-io-kwargs", '{"video": 3}', "--media-io-kwargs: expected keys and values, got {'video': 3}"),
        (
            "--max-num-seqs",
            "4096",
            "--max-num-batched-tokens: 2048 leaves no room for prefill beside --max-num-seqs=4096 decodes",
        ),
    ],
)
def test_what_is_wrong_on_the_command_line_is_told_by_flags_and_once(
    served: list[ServeOptions], flag: str, value: str, said: str
):
    assert str(serve(flag, value).exception) == said


def test_a_file_that_cannot_be_read_is_told_with_its_flag(tmp_path: Path):
    for path in (tmp_path / "none.yaml", tmp_path):
        assert f"--config: cannot read {path}" in str(serve("--config", path).exception)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8 text" in str(serve("--config", binary).exception)


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, "utf-8")
    with contextlib.suppress(ConfigError):
        config_file.read(path, {})
