"""Passwords of storages are refused in configurations and redacted in messages."""

import pytest
from omegaconf import OmegaConf

from bn_lightning.sweeps.engine.passwords import (
    redacted,
    refuse_copied_password,
    refuse_password,
    refuse_several_ats,
    refuse_typed_password,
)
from bn_lightning.sweeps.engine.sweep_error import SweepError


@pytest.mark.parametrize(
    "setting",
    [
        "journal",
        "journal:///a:b@c/d",
        "sqlite:////a/b.db",
        "sqlite:////a:b@c/d.db",
        "postgresql://user@host/db",
        "postgresql://user@host:5432/db",
        "postgresql://${oc.env:USER}:${oc.env:PGPASSWORD}@host/db",
        "postgresql://user@host/db?connect_timeout=9&password=${oc.env:PGPASSWORD}",
        "${oc.env:STORAGE}",
        "${db.address}",
        "${db.kind}://${db.user}@host/db",
        "${oc.env:START}:${oc.env:PGPASSWORD}@host/db",
        "${oc.env:KIND}://user:${oc.env:PGPASSWORD}@host/db",
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
        "postgresql://us@er:secret@host/db",
        "postgresql://us/er:secret@host/db",
        "postgresql:user:secret@host/db",
        "postgresql://secret@user@host/db",
        "postgresql://user:secret\n@host/db",
        "${oc.env:KIND,postgresql}://user:secret@host/db",
        "${oc.env:START}:secret@host/db",
        "${start}:secret@host/db",
        "postgresql://user@host/db?password=secret",
        "postgresql://user:${oc.env:NAME}@host/db?sslmode=require&sslpassword=secret",
    ],
)
def test_a_password_is_refused_and_not_repeated(setting):
    with pytest.raises(SweepError, match="`storage` .* password") as error:
        refuse_password(setting)
    assert "secret" not in str(error.value)
    assert "sec@ret" not in str(error.value)


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_a_typed_password_is_refused(plus):
    setting = f"{plus}hydra.sweeper.storage=postgresql://user:secret@host/db"
    for given in (setting, setting.replace("=", "='") + "'"):
        with pytest.raises(SweepError, match="`storage` .* password"):
            refuse_typed_password(["-m", "x=1", given])
    refuse_typed_password(["-m", "note=a:b@c", setting.replace("secret", "${oc.env:PGPASSWORD}")])


class TestCopies:
    URL = "postgresql://user:%73ecret@host/db"

    @pytest.mark.parametrize(
        ("key", "task"),
        [
            ("db", {"db": "${oc.env:STORAGE}"}),
            ("db", {"db": "${hydra.sweeper.storage}"}),
            ("a.0.b", {"a": [{"b": "of ${oc.env:STORAGE}"}]}),
            ("a.b", {"a": "${c}", "c": {"b": "secret"}}),
        ],
    )
    def test_a_task_with_the_password_is_refused(self, monkeypatch, key, task):
        monkeypatch.setenv("STORAGE", self.URL)
        config = OmegaConf.create({**task, "hydra": {"sweeper": {"storage": "${oc.env:STORAGE}"}}})
        with pytest.raises(SweepError, match=f"`{key}` .* no password") as error:
            refuse_copied_password(self.URL, config)
        assert "secret" not in str(error.value)

    def test_others_are_not(self):
        task = {"a": "???", "b": "${nothing}", "c": ["${hydra:run.dir}", None, 1, "user@host"]}
        config = OmegaConf.create({**task, "hydra": {"sweeper": {"storage": self.URL}}})
        refuse_copied_password(self.URL, config)
        refuse_copied_password("journal", config)


def test_several_ats():
    refuse_several_ats("postgresql://us%40er:s%40cret@host/db")
    with pytest.raises(SweepError, match="%40 for @") as error:
        refuse_several_ats("postgresql://user:se@cret@host/db")
    assert "se" + "@" not in str(error.value) and "cret" not in str(error.value)


@pytest.mark.parametrize("password", ["secret", "s%40cret", "se:cr@et"])
@pytest.mark.parametrize("user", ["user", "us@er", "us/er"])
def test_redacted(password, user):
    url = f"postgresql://{user}:{password}@host/db"
    text = f"cannot reach {url}: no user with s@cret or {password}"
    shown = redacted(text, url)
    assert password not in shown
    assert f"postgresql://{user}:***@host/db" in shown
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
