"""Give every option in every way, and check what is said about wrong ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr
from ws2api.gateway.option_types import format_duration, format_size
from ws2api.gateway.settings import (
    Address,
    ApiUrl,
    Settings,
    SettingsError,
    doubts,
    load,
    option_rows,
)

A_VALUE = {
    "workers": ("3", 3),
    "listen": ("[::1]:80", Address("::1", 80)),
    "path": ("/ocpp/{id},/{id...}", ("/ocpp/{id}", "/{id...}")),
    "push_listen": (":7102", Address("0.0.0.0", 7102)),
    "push_advertise": ("gateway-1.example", "gateway-1.example"),
    "push_token": ("s3cret", "s3cret"),
    "admin_listen": ("localhost:0", Address("127.0.0.1", 0)),
    "admin_token": ("s3same", "s3same"),
    "single_port": ("true", True),
    "api": ("https://api.example/v1/", ApiUrl("api.example", 443, True, "/v1", "api.example")),
    "api_timeout": ("2m", 120.0),
    "api_connect_timeout": ("500ms", 0.5),
    "api_max_connections": ("5", 5),
    "api_max_idle": ("0", 0),
    "api_max_age": ("0", 0.0),
    "max_connecting": ("7", 7),
    "api_ca": ("/etc/ca.pem", Path("/etc/ca.pem")),
    "redis": ("rediss://:pw@redis.example:6380/2", "rediss://:pw@redis.example:6380/2"),
    "redis_prefix": ("gw:", "gw:"),
    "max_pending_disconnects": ("5000", 5000),
    "reap_rate": ("50", 50),
    "max_message_size": ("64KiB", 65536),
    "max_in_flight": ("4", 4),
    "max_queue": ("100", 100),
    "max_write_buffer": ("32KiB", 32768),
    "write_timeout": ("1m", 60.0),
    "ping_interval": ("0", 0.0),
    "ping_timeout": ("7.5", 7.5),
    "handshake_timeout": ("3s", 3.0),
    "push_timeout": ("1s", 1.0),
    "shutdown_timeout": ("1h", 3600.0),
    "drain_seconds": ("5m", 300.0),
    "max_connections_per_ip": ("20", 20),
    "forward_header": ("X-Tenant, Accept-Language", ("X-Tenant", "Accept-Language")),
    "subprotocol": ("ocpp1.6,ocpp2.0.1", ("ocpp1.6", "ocpp2.0.1")),
    "trusted_proxy": ("10.0.0.0/8", ("10.0.0.0/8",)),
    "allow_origin": ("https://*.example", ("https://*.example",)),
    "log_level": ("debug", "debug"),
    "log_format": ("json", "json"),
    "log_requests": ("true", True),
    "cpuprofile": ("/tmp/cpu", Path("/tmp/cpu")),
    "memprofile": ("/tmp/memory", Path("/tmp/memory")),
    "config": ("", None),
    "check": ("true", True),
}
"""For each option, a value as text and what it means."""

NAMES = [name for name in A_VALUE if name != "config"]


@pytest.fixture(autouse=True)
def _no_options_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for row in option_rows():
        monkeypatch.delenv(row.variable, raising=False)


def value_of(settings: Settings, name: str) -> object:
    value = getattr(settings, name)
    return value.get_secret_value() if isinstance(value, SecretStr) else value


def complaint(*arguments: str) -> str:
    with pytest.raises(SettingsError) as caught:
        load(arguments)
    return str(caught.value)


def test_every_option_is_tried_here() -> None:
    assert list(A_VALUE) == list(Settings.model_fields)


@pytest.mark.parametrize("name", NAMES)
def test_reads_flag(name: str) -> None:
    text, meaning = A_VALUE[name]
    flag = "--" + name.replace("_", "-")
    arguments = [flag] if meaning is True else [flag, text]
    assert value_of(load(arguments), name) == meaning


@pytest.mark.parametrize("name", NAMES)
def test_reads_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, meaning = A_VALUE[name]
    monkeypatch.setenv(f"WS2API_{name.upper()}", text)
    assert value_of(load([]), name) == meaning


@pytest.mark.parametrize("dash", ["_", "-"])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "check"])
def test_reads_toml(name: str, dash: str, tmp_path: Path) -> None:
    text, meaning = A_VALUE[name]
    path = tmp_path / "ws2api.toml"
    key = name.replace("_", dash)
    path.write_text(f"{key} = true" if meaning is True else f'{key} = "{text}"')
    assert value_of(load(["--config", str(path)]), name) == meaning


def test_reads_toml_types(tmp_path: Path) -> None:
    path = tmp_path / "ws2api.toml"
    path.write_text(
        "workers = 2\nping-timeout = 1.5\napi-timeout = 9\nmax_message_size = 100\n"
        'subprotocol = ["a", "b,c"]\nsingle-port = true\n'
    )
    settings = load(["--config", str(path)])
    assert settings.workers == 2
    assert settings.ping_timeout == 1.5
    assert settings.api_timeout == 9.0
    assert settings.max_message_size == 100
    assert settings.subprotocol == ("a", "b", "c")
    assert settings.single_port


def test_flag_wins_over_environment_over_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ws2api.toml"
    path.write_text("workers = 2\nmax_queue = 2\nmax_in_flight = 2\n")
    monkeypatch.setenv("WS2API_CONFIG", str(path))
    monkeypatch.setenv("WS2API_MAX_QUEUE", "3")
    monkeypatch.setenv("WS2API_MAX_IN_FLIGHT", "3")
    settings = load(["--max-in-flight", "4"])
    assert (settings.workers, settings.max_queue, settings.max_in_flight) == (2, 3, 4)


def test_repeated_flag_adds_up_and_replaces_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WS2API_SUBPROTOCOL", "x")
    assert load(["--subprotocol", "a", "--subprotocol", "b, c"]).subprotocol == ("a", "b", "c")


def test_knows_which_options_were_given() -> None:
    assert load(["--api", "http://h/"]).model_fields_set == {"api"}


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load([]).workers = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--workers", "0"], "workers: must be at least 1, got 0"),
        (["--workers", "many"], "workers: must be a whole number, got many"),
        (["--workers"], "--workers: expected one argument"),
        (["--nonsense"], "no such option: --nonsense"),
        (["--work", "2"], "no such option: --work; did you mean --workers?"),
        (["--push-tokn=x"], "no such option: --push-tokn; did you mean --push-token?"),
        (["2"], "there is a value too many, which belongs to no option"),
        (["--listen", "7001"], "listen: expected HOST:PORT, got '7001'"),
        (["--listen", "1.2.3.4:70000"], "listen: expected HOST:PORT, got '1.2.3.4:70000'"),
        (["--listen", "h:1"], "listen: expected an IP address before the port, got 'h'"),
        (
            ["--push-listen", "127.0.0.1:7001"],
            "listen and push-listen name the same port, 7001",
        ),
        (
            ["--admin-listen", "127.0.0.1:7002"],
            "push-listen and admin-listen name the same port, 7002",
        ),
        (
            ["--api-timeout", "soon"],
            "api-timeout: expected a duration like 30, 500ms, 60s or 5m, got 'soon'",
        ),
        (["--api-timeout", "0"], "api-timeout: must be more than 0, got 0"),
        (["--api-timeout", "48h"], "api-timeout: must be at most 24h, got 48h"),
        (["--max-message-size", "2GiB"], "max-message-size: must be at most 1GiB, got 2GiB"),
        (
            ["--max-message-size", "big"],
            "max-message-size: must be a size like 65536, 64KiB or 1MiB, got big",
        ),
        (
            ["--log-level", "loud"],
            "log-level: must be 'debug', 'info', 'warning' or 'error', got loud",
        ),
        (["--api", "ftp://h/"], "api: expected an http:// or https:// URL, got 'ftp://h/'"),
        (["--api", "http:///x"], "api: no host in 'http:///x'"),
        (["--api", "http://h:0/"], "api: no server can listen on port 0, got 'http://h:0/'"),
        (["--api", "https://h:/"], "api: no port behind the colon in 'https://h:/'"),
        (
            ["--api", "http://unix:/run/api.sock"],
            "api: the API is asked over TCP, not over a Unix socket: give host and port",
        ),
        (
            ["--api", "unix:/run/api.sock"],
            "api: expected an http:// or https:// URL, got 'unix:/run/api.sock'",
        ),
        (
            ["--api", "http://h/?x"],
            "api: no user, query or fragment may stand in the URL of the API",
        ),
        (
            ["--redis", "redis"],
            "redis: expected embedded, or a URL with redis://, rediss:// or unix://",
        ),
        (
            ["--redis", "rediss://h/?socket_timeout=3"],
            "redis: the URL's option socket_timeout is not known; known are db, ssl_ca_certs, "
            "ssl_cert_reqs",
        ),
        (
            ["--redis-prefix", "a b"],
            "redis-prefix: expected 1 to 64 printable ASCII characters, no spaces or braces",
        ),
        (["--forward-header", "X Y"], "forward-header: 'X Y' is no header name"),
        (
            ["--forward-header", "Host"],
            "forward-header: Host is set by the gateway and cannot be forwarded",
        ),
        (["--subprotocol", "a/b"], "subprotocol: 'a/b' is no subprotocol name"),
        (
            ["--push-advertise", "http://h"],
            "push-advertise: expected a host name or address, without port or scheme",
        ),
        (
            ["--push-token", "two words"],
            "push-token: expected one or more printable ASCII characters without spaces",
        ),
        (["--config", "/nowhere"], "config: cannot read /nowhere: No such file or directory"),
    ],
)
def test_says_what_is_wrong(arguments: list[str], text: str) -> None:
    assert complaint(*arguments) == text


def test_says_what_is_wrong_with_a_path() -> None:
    assert complaint("--path", "/ocpp") == (
        "path: expected a path with {id} or {id...} for one whole segment, as /ocpp/{id}, "
        "got '/ocpp'"
    )
    assert complaint("--path", "/a/{id}", "--path", "/../{id}").startswith(
        "path: '/../{id}' has a segment that is empty, . or .."
    )
    assert complaint("--path", ",") == "path: expected a path with {id}"


def test_says_what_is_wrong_with_a_network() -> None:
    assert complaint("--trusted-proxy", "10.0.0.1/8").startswith(
        "trusted-proxy: expected a network like 10.0.0.0/8: "
    )


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ("wrokers = 2", "config: no option 'wrokers' may stand in {}; did you mean workers?"),
        ("Max-Que = 2", "config: no option 'Max_Que' may stand in {}; did you mean max_queue?"),
        ("check = true", "config: no option 'check' may stand in {}"),
        ("_cli_parse_args = true", "config: no option '_cli_parse_args' may stand in {}"),
        ("workers = [", "config: {} is no TOML: "),
        ("workers = [1]", "workers: must be a whole number"),
        ("listen = 7001", "listen: expected HOST:PORT, got 7001"),
        ("push_token = 5", "push-token: must be text"),
    ],
)
def test_says_what_is_wrong_in_the_file(document: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "ws2api.toml"
    path.write_text(document)
    assert complaint("--config", str(path)).startswith(text.format(path))


def test_says_what_is_wrong_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WS2API_SINGLE_PORT", "perhaps")
    assert complaint() == "single-port: must be true or false, got perhaps"


def test_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for row in option_rows():
        monkeypatch.setenv(row.variable, "")
    assert load([]) == Settings.model_construct()
    assert load([]).model_fields_set == set()


@pytest.mark.parametrize(
    ("flag", "text", "meaning"),
    [
        ("log_level", "WARNING", "warning"),
        ("log_format", "Json", "json"),
        ("redis", "Embedded", "embedded"),
    ],
)
def test_enumerations_are_in_any_case(flag: str, text: str, meaning: str) -> None:
    assert getattr(load([f"--{flag.replace('_', '-')}", text]), flag) == meaning


def test_reads_a_file_that_begins_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "ws2api.toml"
    path.write_text("workers = 3", encoding="utf-8-sig")
    assert load(["--config", str(path)]).workers == 3


# Origins.


@pytest.mark.parametrize(
    ("written", "sent"),
    [
        ("https://Shop.Example", "https://shop.example"),
        ("HTTPS://shop.example:443", "https://shop.example"),
        ("http://shop.example:80", "http://shop.example"),
        ("http://shop.example:0080", "http://shop.example"),
        ("https://shop.example:80", "https://shop.example:80"),
        ("https://*.shop.example:443", "https://*.shop.example"),
        ("http://localhost:*", "http://localhost:*"),
        ("https://[::1]:8443", "https://[::1]:8443"),
        ("chrome-extension://abcdef", "chrome-extension://abcdef"),
        ("capacitor://localhost", "capacitor://localhost"),
        ("file://", "file://"),
        ("NULL", "null"),
        ("*", "*"),
    ],
)
def test_origin_is_kept_as_a_browser_sends_it(written: str, sent: str) -> None:
    assert load(["--allow-origin", written]).allow_origin == (sent,)


FORM = "expected scheme://host[:port]"


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("shop.example", f"{FORM}, as https://shop.example"),
        ("shop.example:443", f"{FORM}, as https://shop.example"),
        ("//shop.example", f"{FORM}, as https://shop.example"),
        ("https://Shop.example/", f"{FORM}, without a path: https://shop.example"),
        ("https://shop.example/cart", f"{FORM}, without a path: https://shop.example"),
        ("https://shop.example:", FORM),
        ("https://shop.example?x", FORM),
        ("https://me@shop.example", FORM),
        ("https://a b", FORM),
        ("https://", FORM),
        ("https://bücher.example", f"{FORM}, the host as browsers send it (xn--…)"),
        ("wss://shop.example", "a page's origin begins with http:// or https://"),
        ("https://shop.example:65536", "no port has so high a number"),
        ("https://shop.*:443", "browsers leave out :443"),
    ],
)
def test_what_no_browser_sends_is_refused_as_an_origin(written: str, text: str) -> None:
    assert complaint("--allow-origin", written) == f"allow-origin: {text}, got {written!r}"


# What is doubtful.


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ([], []),
        (["--push-listen=127.0.0.2:7002", "--admin-listen=[::1]:7003"], []),
        (["--push-listen=0.0.0.0:7002"], ["push-listen"]),
        (["--push-listen=[::]:7002", "--push-token=x"], []),
        (["--admin-listen=192.0.2.1:7003"], ["admin-listen"]),
        (["--admin-listen=192.0.2.1:7003", "--admin-token=x"], []),
        (["--single-port"], ["single-port"]),
        (["--single-port", "--listen=127.0.0.1:7001"], []),
        (["--single-port", "--push-listen=:7002", "--push-token=x"], []),
    ],
)
def test_open_port_without_a_token_is_doubtful(arguments: list[str], options: list[str]) -> None:
    assert [text.partition(":")[0] for text in doubts(load(arguments), {})] == options


def test_unknown_variable_is_doubtful() -> None:
    environment = {
        "WS2API_WORKRES": "2",
        "ws2api_log_levle": "debug",
        "WS2API_BANANA": "1",
        "WS2API_WORKERS": "2",
        "ws2api_workers": "2",
        "WS2API_PUSH": "http://127.0.0.1:7002",
        "WS2API_SERVICE_HOST": "10.0.0.1",
        "WS2API_PUSH_SERVICE_PORT_HTTP": "7002",
        "WS2API_PORT": "tcp://10.0.0.1:7001",
        "WS2API_PORT_7001_TCP_ADDR": "10.0.0.1",
        "PATH": "/bin",
    }
    assert doubts(load([]), environment) == [
        "WS2API_WORKRES: there is no such option; did you mean WS2API_WORKERS?",
        "ws2api_log_levle: there is no such option; did you mean WS2API_LOG_LEVEL?",
        "WS2API_BANANA: there is no such option",
    ]


def test_secrets_are_not_repeated() -> None:
    assert "hunter2" not in complaint("--redis", "redsi://:hunter2@h")
    assert "hunter2" not in complaint("--push-token", "hunter2 ")
    assert "hunter2" not in complaint("--push-tokn", "hunter2")
    assert "hunter2" not in repr(load(["--push-token", "hunter2"]))


def test_listening_on_a_wildcard_takes_the_port_everywhere() -> None:
    assert Address("0.0.0.0", 1).overlaps(Address("127.0.0.1", 1))
    assert not Address("127.0.0.1", 1).overlaps(Address("127.0.0.2", 1))
    assert not Address("0.0.0.0", 0).overlaps(Address("0.0.0.0", 0))


def test_help_is_made_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load(["--help"])
    assert caught.value.code == 0
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "--listen HOST:PORT Where clients connect with their WebSockets. (default: 0.0." in text
    assert (
        "--api-timeout SECONDS Time for one request to the API, retries included. (default: 60s)"
        in text
    )
    assert "(default: 1MiB)" in text
    assert "Worker processes. (default: one per CPU)" in text
    assert "--no-" not in text
    assert "factory" not in text


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load(["--version"])
    assert caught.value.code == 0
    assert re.fullmatch(r"ws2api \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_rows_describe_every_option() -> None:
    rows = option_rows()
    assert [row.flag[2:].replace("-", "_") for row in rows] == list(Settings.model_fields)
    assert all(row.description.endswith(".") for row in rows)
    assert all(row.variable.startswith("WS2API_") for row in rows)
    by_flag = {row.flag: row for row in rows}
    assert by_flag["--api-timeout"].default == "60s"
    assert by_flag["--single-port"].metavar == ""
    assert by_flag["--subprotocol"].repeatable
    assert by_flag["--config"].key == ""
    assert by_flag["--push-listen"].key == "push_listen"


def test_defaults_in_the_rows_are_the_defaults() -> None:
    literal = [row for row in option_rows() if row.default and " " not in row.default]
    arguments = [
        part for row in literal if row.flag != "--allow-origin" for part in (row.flag, row.default)
    ]
    assert load(arguments) == load([])


@given(st.integers(1, 86_400_000))
def test_written_duration_is_read_as_the_same(milliseconds: int) -> None:
    text = format_duration(milliseconds / 1000)
    assert load(["--api-timeout", text]).api_timeout == pytest.approx(milliseconds / 1000)


@given(st.integers(1, 1 << 30))
def test_written_size_is_read_as_the_same(size_bytes: int) -> None:
    settings = load(["--max-message-size", format_size(size_bytes)])
    assert settings.max_message_size == size_bytes


@given(st.text())
def test_any_text_is_an_address_or_refused_by_name(text: str) -> None:
    others = ["--push-listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0"]
    try:
        address = load([f"--listen={text}", *others]).listen
    except SettingsError as error:
        said = str(error)
    else:
        said = "listen" if load([f"--listen={address}", *others]).listen == address else ""
    assert said.startswith("listen")
