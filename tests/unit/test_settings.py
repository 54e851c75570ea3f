"""labkit.settings: what the environment says, and the defaults."""

from __future__ import annotations

from pathlib import Path

import platformdirs
import pytest

from labkit.settings import settings


def test_defaults(clean_environment: pytest.MonkeyPatch) -> None:
    now = settings()
    assert now.model == "smollm2-135m-instruct"
    assert now.cache == Path(platformdirs.user_cache_dir("labkit"))
    assert now.shared_cache is None
    assert (now.offline, now.progress) == (False, True)


def test_each_variable_is_read_at_the_call(clean_environment: pytest.MonkeyPatch) -> None:
    values = {"MODEL": "tiny", "CACHE": "/a", "SHARED_CACHE": "/b", "OFFLINE": "1", "PROGRESS": "0"}
    for name, value in values.items():
        clean_environment.setenv(f"LABKIT_{name}", value)
    now = settings()
    assert (now.model, now.cache, now.shared_cache) == ("tiny", Path("/a"), Path("/b"))
    assert (now.offline, now.progress) == (True, False)


def test_an_empty_variable_is_an_unset_one(clean_environment: pytest.MonkeyPatch) -> None:
    expected = settings()
    for name in ("MODEL", "CACHE", "SHARED_CACHE", "OFFLINE", "PROGRESS"):
        clean_environment.setenv(f"LABKIT_{name}", "")
    assert settings() == expected


@pytest.mark.parametrize("name", ["LABKIT_OFFLINE", "LABKIT_PROGRESS"])
def test_a_switch_is_0_or_1(clean_environment: pytest.MonkeyPatch, name: str) -> None:
    clean_environment.setenv(name, "yes")
    with pytest.raises(ValueError, match=f"{name} must be 0 or 1, found 'yes'"):
        settings()
