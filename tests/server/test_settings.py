"""server.settings: names, values, and the words of a refusal."""

import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from server.settings import (
    KNOWN_NAMES,
    MemoryBudget,
    Settings,
    SettingsError,
    load_settings,
    parse_bytes,
    parse_memory,
    shared_settings,
)
from turbocache.backends import CHOICES


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TURBOCACHE_BLAS", raising=False)


def load_with(monkeypatch: pytest.MonkeyPatch, **values: str) -> Settings:
    for name, value in values.items():
        monkeypatch.setenv(f"TURBOCACHE_{name}", value)
    return load_settings()


def refusal(monkeypatch: pytest.MonkeyPatch, **values: str) -> str:
    with pytest.raises(SettingsError) as caught:
        load_with(monkeypatch, **values)
    return str(caught.value)


def test_defaults() -> None:
    settings = load_settings()
    assert (settings.model, settings.backend, settings.kv_preset, settings.max_size) == (None, "auto", "k6v4", None)
    assert (settings.kv_condition, settings.kv_protect) == ("auto", 0)
    assert (settings.keep, settings.window, settings.max_batch, settings.queue_limit) == (64, 128, 8, 64)
    assert (settings.kv_memory, settings.api_keys, settings.session_dir, settings.blas) == (None, (), None, None)
    assert (settings.prefill_chunk, settings.keepalive_seconds, settings.stall_seconds) == (512, 10.0, 120.0)
    assert (settings.body_limit, settings.log_level) == (16 * 1024 * 1024, "info")
    assert (settings.deadline, settings.stop_grace, settings.cors_origins) == (None, 5.0, ())


def test_values_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_with(
        monkeypatch,
        MODEL="org/name",
        BACKEND="packed",
        MAX_SIZE="4096",
        KV_MEMORY="4GiB",
        API_KEYS=" one, two ,",
        LOG_LEVEL="DEBUG",
        KEEPALIVE_SECONDS="0.5",
        BODY_LIMIT="1MiB",
    )
    assert (settings.model, settings.backend, settings.max_size) == ("org/name", "packed", 4096)
    assert settings.kv_memory == MemoryBudget(bytes=4 << 30)
    assert settings.api_keys == ("one", "two")
    assert (settings.log_level, settings.keepalive_seconds, settings.body_limit) == ("debug", 0.5, 1 << 20)


def test_empty_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_with(monkeypatch, MAX_SIZE="", MODEL="", API_KEYS="", SESSION_DIR="", KV_MEMORY="")
    assert settings == load_settings(None)
    assert (settings.max_size, settings.model, settings.session_dir) == (None, None, None)


def test_env_file_is_read_and_the_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("TURBOCACHE_KEEP=32\nTURBOCACHE_WINDOW=64\nHF_TOKEN=other\n")
    settings = load_with(monkeypatch, WINDOW="192")
    assert (settings.keep, settings.window) == (32, 192)


def test_an_unknown_name_is_refused_with_the_closest_known_one(monkeypatch: pytest.MonkeyPatch) -> None:
    text = refusal(monkeypatch, MAXSIZE="3")
    assert text == (
        "TURBOCACHE_MAXSIZE in the environment is not a setting of this version. Did you mean TURBOCACHE_MAX_SIZE?"
    )


def test_an_unknown_name_like_no_other_lists_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    text = refusal(monkeypatch, ZZZ="3")
    assert all(name in text for name in KNOWN_NAMES)


def test_an_unknown_name_in_the_env_file_is_refused() -> None:
    Path(".env").write_text("TURBOCACHE_QUEUE=3\n")
    with pytest.raises(SettingsError, match=r"TURBOCACHE_QUEUE in \.env .* TURBOCACHE_QUEUE_LIMIT\?"):
        load_settings()


def test_blas_is_known_but_comes_too_late_in_the_env_file(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_with(monkeypatch, BLAS="auto").blas == "auto"
    monkeypatch.delenv("TURBOCACHE_BLAS")
    Path(".env").write_text("TURBOCACHE_BLAS=none\n")
    with pytest.raises(SettingsError, match=r"TURBOCACHE_BLAS in \.env comes too late"):
        load_settings()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("BACKEND", "gpu", "one of auto, metal, cuda, packed, reference"),
        ("MAX_SIZE", "many", "a positive number of tokens"),
        ("MAX_SIZE", "0", "a positive number of tokens"),
        ("KEEP", "-1", "0 or more"),
        ("WINDOW", "100", "a positive multiple of 64"),
        ("WINDOW", "0", "a positive multiple of 64"),
        ("WINDOW", "1e3", "a positive multiple of 64"),
        ("KV_MEMORY", "2", "512MB or 4GiB, or a fraction"),
        ("KV_MEMORY", "1.5", "512MB or 4GiB, or a fraction"),
        ("KV_MEMORY", "0.0", "512MB or 4GiB, or a fraction"),
        ("KV_MEMORY", "4 apples", "512MB or 4GiB, or a fraction"),
        ("KV_MEMORY", "-1GB", "512MB or 4GiB, or a fraction"),
        ("MAX_BATCH", "0", "1 or more"),
        ("QUEUE_LIMIT", "0", "1 or more"),
        ("PREFILL_CHUNK", "0", "1 or more"),
        ("LOG_LEVEL", "loud", "one of debug"),
        ("KEEPALIVE_SECONDS", "0", "seconds above 0"),
        ("KEEPALIVE_SECONDS", "inf", "seconds above 0"),
        ("STALL_SECONDS", "nan", "seconds above 0"),
        ("BODY_LIMIT", "12", "at least 1024"),
        ("DEADLINE", "0", "seconds above 0"),
        ("DEADLINE", "soon", "seconds above 0"),
        ("DEADLINE", "inf", "seconds above 0"),
        ("STOP_GRACE", "-1", "0 or more"),
        ("STOP_GRACE", "nan", "0 or more"),
        ("CORS_ORIGINS", "localhost:3000", "each as browsers send it"),
        ("CORS_ORIGINS", "http://localhost:3000/", "no slash at the end"),
        ("CORS_ORIGINS", "http://ok.example,https://chat.example/app", "no path"),
        ("CORS_ORIGINS", "https://Chat.example", "lower case"),
        ("CORS_ORIGINS", "https://chat.example:443", "no default port"),
        ("CORS_ORIGINS", "http://*.example", "each as browsers send it"),
        ("CORS_ORIGINS", "*,http://localhost:3000", "* or origins"),
        ("CORS_ORIGINS", "null", "each as browsers send it"),
    ],
)
def test_a_bad_value_names_key_value_and_expectation(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: str
) -> None:
    text = refusal(monkeypatch, **{name: value})
    assert text.startswith(f"TURBOCACHE_{name}=")
    assert value in text
    assert expected in text
    assert "\n" not in text


def test_every_bad_value_gets_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(refusal(monkeypatch, WINDOW="1", KEEP="x").splitlines()) == 2


def test_origins(monkeypatch: pytest.MonkeyPatch) -> None:
    given = "http://localhost:3000, https://chat.example,http://[::1]:8080,app://obsidian.md,chrome-extension://abc"
    assert load_with(monkeypatch, CORS_ORIGINS=given).cors_origins == tuple(given.replace(" ", "").split(","))
    assert load_with(monkeypatch, CORS_ORIGINS="*").cors_origins == ("*",)
    assert load_with(monkeypatch, CORS_ORIGINS="").cors_origins == ()


def test_sessions_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_with(monkeypatch, SESSION_DIR="sessions", SESSION_DISK="2GiB")
    assert (settings.session_dir, settings.session_disk) == (Path("sessions"), 2 << 30)
    assert "at least 1 MiB" in refusal(monkeypatch, SESSION_DISK="1000")


def test_max_size_holds_sink_window_and_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "expected at least 256 tokens" in refusal(monkeypatch, MAX_SIZE="255")
    assert load_with(monkeypatch, MAX_SIZE="256").max_size == 256


def test_keys_are_not_shown() -> None:
    build = Settings.model_validate
    assert "secret" not in repr(build({"api_keys": "secret"}))


def test_sizes() -> None:
    assert [parse_bytes(text) for text in ("1024", "2kb", "2KiB", "1.5 MB")] == [1024, 2000, 2048, 1_500_000]
    for text in ("", "1.5", "x", "1XB", "-1", "1e3"):
        with pytest.raises(ValueError, match="number of bytes"):
            parse_bytes(text)


def test_memory_budgets() -> None:
    assert parse_memory("0.5").resolve(1000) == 500
    assert parse_memory("1.0").resolve(1000) == 1000
    assert parse_memory("512MB").resolve(1) == 512_000_000
    for n_bytes, fraction in ((None, None), (1 << 30, 0.5)):
        with pytest.raises(ValueError, match="either bytes or a fraction"):
            MemoryBudget(n_bytes, fraction)


def test_the_page_has_each_setting_with_its_default_and_its_choices() -> None:
    page = (Path(__file__).parents[2] / "docs" / "settings.md").read_text()
    rows = re.findall(r"^\| `TURBOCACHE_(\w+)` \| (.*?) \| (.*?) \|$", page, re.MULTILINE)
    assert len(rows) == page.count("| `TURBOCACHE_")
    assert sorted(name.lower() for name, _, _ in rows) == sorted(Settings.model_fields)
    for name, default, meaning in rows:
        field = Settings.model_fields[name.lower()]
        if field.default in (None, ()):
            assert not re.search(r"\d", default), name
        else:
            assert default == shown(field.default), name
        choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        for choice in CHOICES if name == "BACKEND" else choices:
            assert f"`{choice}`" in meaning, name


def shown(default: Any) -> str:
    match default:
        case bool() | str():
            return f"`{str(default).lower()}`"
        case int() if default >= 1 << 20:
            return f"{default >> 30} GiB" if default >= 1 << 30 else f"{default >> 20} MiB"
        case _:
            return f"{default:g}"


def test_a_group_shares_every_setting_that_is_not_marked_as_a_process_s_own() -> None:
    class More(Settings):
        new: int = 3

    shared = shared_settings(More())
    assert shared["new"] == 3
    assert shared["kv_preset"] == "k6v4"
    assert not shared.keys() & {"api_keys", "kv_memory", "session_dir", "rank_address"}
