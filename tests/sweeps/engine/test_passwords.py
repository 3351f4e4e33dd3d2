"""Passwords of storages are neither accepted in a configuration nor shown."""

import pytest

from bn_lightning.sweeps.engine.errors import SweepError
from bn_lightning.sweeps.engine.passwords import redacted, refuse_password


@pytest.mark.parametrize(
    "setting",
    [
        "journal",
        "journal:///a:b@c/d",
        "sqlite:////a/b.db",
        "postgresql://user@host/db",
        "postgresql://user@host:5432/db",
        "postgresql://${oc.env:USER}:${oc.env:PGPASSWORD}@host/db",
        "postgresql://user@host/db?connect_timeout=9&password=${oc.env:PGPASSWORD}",
        "${oc.env:STORAGE}",
        "grpc://host:13000",
    ],
)
def test_what_holds_no_password_is_taken(setting):
    refuse_password(setting)


@pytest.mark.parametrize(
    "setting",
    [
        "postgresql://user:secret@host/db",
        "postgresql+psycopg://user:sec@ret@host:5432/db",
        "mysql://user:${oc.env:NAME,secret}@host/db",
        "postgresql://user:secret${oc.env:NAME}@host/db",
        "postgresql://user@host/db?password=secret",
        "postgresql://user:${oc.env:NAME}@host/db?sslmode=require&sslpassword=secret",
    ],
)
def test_a_password_is_refused_and_not_repeated(setting):
    with pytest.raises(SweepError, match="password from the environment") as error:
        refuse_password(setting)
    assert "secret" not in str(error.value)
    assert "sec@ret" not in str(error.value)


@pytest.mark.parametrize("password", ["secret", "s%40cret", "se:cr@et"])
def test_redacted(password):
    url = f"postgresql://user:{password}@host/db"
    text = f"cannot reach {url}: no user with s@cret or {password}"
    shown = redacted(text, url)
    assert password not in shown
    assert "postgresql://user:***@host/db" in shown
    if "%40" in password:
        assert "s@cret" not in shown


@pytest.mark.parametrize("password", ["secret", "s%40cret", "se+cret"])
def test_redacted_behind_the_address(password):
    url = f"postgresql://user:other@host/db?a=b&password={password}&c=d"
    text = f"cannot reach {url}: no user with s@cret, se cret or {password}"
    shown = redacted(text, url)
    assert "postgresql://user:***@host/db?a=b&password=***&c=d" in shown
    assert password not in shown and "other" not in shown
    assert "s@cret" not in shown or "%40" not in password
    assert "se cret" not in shown or "+" not in password


def test_without_a_password_nothing_is_redacted():
    assert redacted("sqlite:///a and b", "sqlite:///a") == "sqlite:///a and b"
