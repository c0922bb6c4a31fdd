"""From the config to the teacher of every domain, and what goes together."""

from __future__ import annotations

import re
from typing import Any

import pytest

from posttrain.config import TeacherBackend, TeacherConfig, UserError
from teachers.scores import check_signal
from teachers.teacher import SIGNALS, resolve

SERVER, VLLM = TeacherBackend.server, TeacherBackend.vllm


def teachers(**sections: dict[str, Any]) -> dict[str, TeacherConfig]:
    return {name: TeacherConfig(**section) for name, section in sections.items()}


def test_a_default_serves_only_who_has_none() -> None:
    found = resolve(teachers(math={"path": "/m"}, default={"path": "/d"}), ["math", "code", "law"], "/s")
    assert {d: t.path for d, t in found.items()} == {"math": "/m", "code": "/d", "law": "/d"}
    assert found["law"].key == "teachers.default"


def test_adapters_sit_on_the_start_model_or_on_their_path() -> None:
    found = resolve(
        teachers(math={"adapter": "/a"}, code={"adapter": "/b", "path": "/base"}), ["math", "code"], "/s"
    )
    assert (found["math"].path, found["math"].adapter, found["math"].name) == ("/s", "/a", "/a")
    assert found["code"].path == "/base"


def test_a_server_is_named_by_url_and_model() -> None:
    section = {"path": "http://h:8000/v1/", "model": "big", "backend": SERVER}
    found = resolve(teachers(math=section), ["math"], "/s")["math"]
    assert (found.path, found.model, found.name) == ("http://h:8000", "big", "http://h:8000#big")


def test_one_domain_alone_needs_its_teacher_alone() -> None:
    both = {"math": {"path": "/m"}, "code": {"path": "/c"}}
    for sections in (both, both | {"default": {"path": "/d"}}):
        found = resolve(teachers(**sections), ["math", "code"], "/s", only="math")
        assert {d: t.path for d, t in found.items()} == {"math": "/m"}
    found = resolve(
        teachers(code={"path": "/c"}, default={"path": "/d"}), ["math", "code"], "/s", only="math"
    )
    assert {d: t.path for d, t in found.items()} == {"math": "/d"}
    with pytest.raises(
        UserError, match=r"^teachers\.math\.path=None: prompts of domain 'math' have no teacher"
    ):
        resolve(teachers(code={"path": "/c"}), ["math", "code"], "/s", only="math")
    with pytest.raises(UserError, match=r"^teachers\.code\.path='/c': no prompt belongs to domain 'code'"):
        resolve(teachers(**both), ["math"], "/s")


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"math": {"path": "/m"}}, "teachers.code.path=None: prompts of domain 'code' have no teacher; give teachers.code.path=DIR, or teachers.default.path=DIR"),
        ({"math": {"path": "/m"}, "code": {}}, "teachers.code.path=None: prompts of domain 'code' have no teacher"),
        ({"math": {"path": "/m"}, "code": {"self": True}}, "teachers.code.path=None: the student as its own teacher needs its path too; give teachers.code.path=/s"),
        ({"math": {"path": "/m"}, "code": {"path": "/c"}, "law": {"path": "/l"}}, "teachers.law.path='/l': no prompt belongs to domain 'law' (there are code, math)"),
        ({"math": {"path": "/m"}, "code": {"path": "/c"}, "default": {"path": "/d"}}, "teachers.default.path='/d': every domain (code, math) has a teacher of its own"),
        ({"default": {"path": "http://h:1"}}, "teachers.default.path='http://h:1': a URL; set teachers.default.backend=server"),
        ({"default": {"path": "/d", "model": "x"}}, "teachers.default.model='x': only a server has named models"),
        ({"default": {"path": "/d", "model": "x", "backend": SERVER}}, "teachers.default.path='/d': not the URL of a server"),
        ({"default": {"path": "http://h:bad", "model": "x", "backend": SERVER}}, "teachers.default.path='http://h:bad': not the URL"),
        ({"default": {"path": "http://h:1", "backend": SERVER}}, "teachers.default.model=None: which model of http://h:1?"),
        ({"default": {"path": "http://u:secret@h:1", "model": "x", "backend": SERVER}}, "teachers.default.path: a URL with a password in it; name a variable"),
        ({"default": {"path": "/d", "adapter": "/a", "backend": VLLM}}, "teachers.default.adapter='/a': adapters are put on by backend=transformers alone, not by vllm"),
        ({"default": {"path": "http://h:1", "model": "x", "adapter": "/a", "backend": SERVER}}, "teachers.default.adapter='/a': adapters are put on by backend=transformers alone, not by server; serve it there"),
    ],
)  # fmt: skip
def test_refused(sections: dict[str, dict[str, Any]], expected: str) -> None:
    with pytest.raises(UserError) as error:
        resolve(teachers(**sections), ["math", "code"], "/s")
    assert str(error.value).startswith(expected) and "\n" not in str(error.value)
    assert "secret" not in str(error.value)


def test_a_signal_that_an_engine_cannot_give() -> None:
    check_signal("teachers.math", "vllm", "top_k", SIGNALS[VLLM])
    expected = (
        "algorithm.signal='full': teachers.math.backend=server gives sampled, top_k, top_k_renorm; choose"
    )
    with pytest.raises(UserError, match=re.escape(expected)):
        check_signal("teachers.math", "server", "full", SIGNALS[SERVER])
