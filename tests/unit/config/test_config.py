"""config.load: precedence, origins, and what is refused."""

import tomllib
from pathlib import Path

import pytest

from galley import values
from galley.config import SETTINGS, colour_wanted, load, template
from galley.errors import ConfigError


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_flag_beats_env_beats_file_beats_default(tmp_path: Path) -> None:
    file = write(tmp_path / "c.toml", "[server]\nport = 1001\n[engine]\nthreads = 3\nmax_jobs = 7\n")
    env = {"GALLEY_PORT": "1002", "GALLEY_THREADS": "4", "GALLEY_HOME": str(tmp_path)}
    config = load({"port": "1003"}, env, file)
    assert (config.server.port, config.origin("server.port")) == (1003, "flag:--port")
    assert (config.engine.threads, config.origin("engine.threads")) == (4, "env:GALLEY_THREADS")
    assert (config.engine.max_jobs, config.origin("engine.max_jobs")) == (7, f"file:{file}")
    assert (config.engine.token_budget, config.origin("engine.token_budget")) == (512, "default")


def test_none_and_empty_are_not_given(tmp_path: Path) -> None:
    config = load({"port": None}, {"GALLEY_PORT": "", "GALLEY_HOME": str(tmp_path)})
    assert config.origin("server.port") == "default"


def test_default_home_is_the_platforms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    assert load(env={"XDG_DATA_HOME": str(tmp_path)}).home == tmp_path / "galley"
    assert load(env={"XDG_DATA_HOME": "relative"}).home == Path("~/.local/share/galley").expanduser()
    monkeypatch.setattr("sys.platform", "darwin")
    assert load(env={}).home == Path("~/Library/Application Support/galley").expanduser()


def test_file_is_found_in_home_and_by_name(tmp_path: Path) -> None:
    write(tmp_path / "config.toml", 'model = "a"\n')
    assert load(env={"GALLEY_HOME": str(tmp_path)}).model == "a"
    other = write(tmp_path / "other.toml", 'model = "b"\n')
    config = load(env={"GALLEY_HOME": str(tmp_path), "GALLEY_CONFIG": str(other)})
    assert (config.model, config.file) == ("b", other)
    with pytest.raises(ConfigError, match="no such file"):
        load(env={"GALLEY_HOME": str(tmp_path)}, file=tmp_path / "missing.toml")


def test_receipts_lie_in_home_unless_told(tmp_path: Path) -> None:
    assert load(env={"GALLEY_HOME": str(tmp_path)}).receipts.path == tmp_path / "receipts.db"
    assert load({"receipts.path": "/x/y.db"}, {}).receipts.path == Path("/x/y.db")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[server]\nprot = 1\n", ["unknown setting 'server.prot'", "'server.port'"]),
        ("[sever]\nport = 1\n", ["unknown setting 'sever'"]),
        ("port = 1\n", ["unknown setting 'port'", "'server.port'"]),
        ("[server]\nport = 70000\n", ["server.port = 70000", "0 to 65535"]),
        ('[server]\nport = "x"\n', ["server.port = 'x'", "an integer"]),
        ("[server]\nport = 1.5\n", ["an integer"]),
        ("[server]\nport = true\n", ["an integer"]),
        ('[engine]\nbackend = "gpu"\n', ["one of auto, native, reference"]),
        ('[engine]\nkv_memory = "many"\n', ["a size such as"]),
        ("[engine]\nkv_memory = 0\n", ["above zero"]),
        ('[receipts]\ncapture = "perhaps"\n', ["true or false"]),
        ("[server]\nallowed_hosts = [1]\n", ["list of names"]),
        ('model = ""\n', ["not empty"]),
        ("[server\n", ["not TOML"]),
        ('[pull]\nhf_token = "secret"\n', ["HF_TOKEN"]),
    ],
)
def test_bad_file_is_refused_and_named(tmp_path: Path, text: str, words: list[str]) -> None:
    file = write(tmp_path / "c.toml", text)
    with pytest.raises(ConfigError) as caught:
        load(env={}, file=file)
    assert caught.value.message.startswith(f"file:{file}: ")
    assert all(word in caught.value.message for word in words), caught.value.message
    assert caught.value.exit_code == 2


def test_bad_env_and_flag_are_named() -> None:
    with pytest.raises(ConfigError, match=r"env:GALLEY_THREADS: engine\.threads = '0'"):
        load(env={"GALLEY_THREADS": "0"})
    with pytest.raises(ConfigError, match=r"flag:--port: server\.port = 'x'"):
        load({"port": "x"}, {})
    with pytest.raises(ConfigError, match=r"Did you mean 'engine\.threads'"):
        load({"engine.thread": 1}, {})


def test_misspelt_env_is_told_and_orchestrators_are_not() -> None:
    env = {"GALLEY_TREADS": "2", "GALLEY_SERVICE_HOST": "x", "GALLEY_PORT_7117_TCP": "y", "GALLEY_PURE": "1"}
    assert list(load(env=env).warnings) == [
        "env:GALLEY_TREADS: not a setting of Galley. Did you mean 'GALLEY_THREADS'?"
    ]


def test_secrets_are_never_shown() -> None:
    config = load(env={"GALLEY_API_KEY": "sk-topsecret", "HF_TOKEN": "hf_topsecret"})
    assert config.server.api_key == "sk-topsecret"
    assert "topsecret" not in repr(config.rows())
    assert [row["key"] for row in config.rows()] == list(SETTINGS)


def test_every_setting_has_its_own_env_and_flag() -> None:
    assert len({setting.env for setting in SETTINGS.values()}) == len(SETTINGS)
    assert len({setting.flag for setting in SETTINGS.values()}) == len(SETTINGS)


def test_template_is_toml_and_every_line_of_it_can_be_used() -> None:
    assert [key for key, value in tomllib.loads(template()).items() if value != {}] == []
    for key, setting in SETTINGS.items():
        assert not setting.in_file or f"# {key.rpartition('.')[2]} = " in template()


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("2GB", 2 * 10**9),
        ("512MiB", 512 << 20),
        ("1.5 GiB", 3 << 29),
        ("8k", 8000),
    ],
)
def test_sizes(text: object, count: int) -> None:
    assert values.size(text) == count


@pytest.mark.parametrize("text", ["", "MB", "-1", "1XB", "0", "1iB", True])
def test_sizes_refused(text: object) -> None:
    with pytest.raises(ValueError, match="expected a size"):
        values.size(text)


def test_token_counts() -> None:
    assert [values.tokens(text) for text in ("4096", "8K", "8k", 16)] == [4096, 8192, 8000, 16]
    for bad in ("0", "x", "1M", True):
        with pytest.raises(ValueError, match="expected"):
            values.tokens(bad)


def test_no_color() -> None:
    assert colour_wanted({}) and colour_wanted({"NO_COLOR": ""})
    assert not colour_wanted({"NO_COLOR": "1"}) and not colour_wanted({"TERM": "dumb"})


def test_template_with_every_line_uncommented_is_all_defaults(tmp_path: Path) -> None:
    lines = [
        line.removeprefix("# ") for line in template().splitlines() if " = " in line or line.startswith("[")
    ]
    file = tmp_path / "config.toml"
    file.write_text("\n".join(lines))
    env = {"GALLEY_HOME": str(tmp_path)}
    bare, full = load(env=env, file=None), load(env=env, file=file)
    assert {row["key"]: row["value"] for row in full.rows()} == {
        row["key"]: row["value"] for row in bare.rows()
    }
    assert full.origin("server.api_key") == "default"


def test_rules_of_approvals_and_redaction() -> None:
    config = load({"approvals.tools": "send_*=write, delete=destructive", "approvals.above_usd": "0.25"}, {})
    assert config.approvals.tools == (("send_*", "write"), ("delete", "destructive"))
    assert config.approvals.above_usd == 250_000_000_000
    assert load({"redact.stores": "receipts"}, {}).redact.stores == ("receipts",)
    for key, value in (
        ("approvals.tools", "send"),
        ("approvals.tools", "send=often"),
        ("approvals.above_usd", "much"),
        ("approvals.above_usd", "-1"),
        ("redact.stores", "diary"),
    ):
        with pytest.raises(ConfigError):
            load({key: value}, {})
