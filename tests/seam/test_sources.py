"""Sources are read as Python would have them, without being run."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tests.seam.sources import Missing, Sources

FILES = {
    "vllm/__init__.py": "raise RuntimeError('it was run')",
    "vllm/base.py": """
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic
import msgspec

class Base(Generic[T]):
    def __init__(self, one, two=None, *more, named, **rest):
        self.set_here = 1

    def called(self):
        return helper(self.reads, flag=True)

    @classmethod
    def make(cls, value): ...

    @staticmethod
    def free(value=1): ...

@dataclass
class Fields:
    needed: int
    shared: ClassVar[int] = 1
    given: list = field(default_factory=list)
    derived: int = field(init=False)

class Packed(msgspec.Struct, array_like=True):
    name: str
    size: int = 0
""",
    "vllm/sub/__init__.py": """
try:
    from .inner import Inner
except ImportError:
    Inner = None
from . import inner
from vllm.base import Base as Renamed
""",
    "vllm/sub/inner.py": """
from ..base import Base, Fields

class Inner(Base[int]):
    later: int

class More(Fields):
    extra: int = 0

if True:
    def conditional(a, /, b, *, c=1): ...
""",
}


@pytest.fixture
def sources() -> Sources:
    return Sources(FILES)


@pytest.mark.parametrize(
    ("name", "signature"),
    [
        ("vllm.base:Base", "one, two=, *more, named, **rest"),
        ("vllm.base:Base.make", "value"),
        ("vllm.base:Base.free", "value="),
        ("vllm.base:Base.called", "self"),
        ("vllm.base:Fields", "needed, given="),
        ("vllm.base:Packed", "name, size="),
        ("vllm.sub:Inner", "one, two=, *more, named, **rest"),
        ("vllm.sub:Inner.called", "self"),
        ("vllm.sub:Renamed.make", "value"),
        ("vllm.sub.inner:More", "needed, given=, extra="),
        ("vllm.sub.inner:conditional", "a, b, *, c="),
    ],
)
def test_a_signature_is_read(sources: Sources, name: str, signature: str) -> None:
    assert sources.signature(name) == signature


@pytest.mark.parametrize("name", ["vllm.none:", "vllm.base:None", "vllm.base:Base.none", "vllm.sub:inner.None"])
def test_what_is_not_there_is_missing(sources: Sources, name: str) -> None:
    with pytest.raises(Missing):
        sources.signature(name)


def test_a_class_has_its_own_and_inherited_attributes_and_those_that_it_sets(sources: Sources) -> None:
    assert {"set_here", "called", "make", "later"} <= sources.attributes("vllm.sub:Inner")
    assert "later" not in sources.attributes("vllm.base:Base")


def test_a_body_mentions_names_attributes_and_keywords(sources: Sources) -> None:
    assert {"helper", "reads", "flag="} <= sources.mentions("vllm.base:Base.called")


def test_a_wheel_is_read_as_a_directory_is(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "vllm.whl", "w") as wheel:
        for path, text in FILES.items():
            wheel.writestr(path, text)
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
    for sources in (Sources.of_wheel(tmp_path / "vllm.whl"), Sources.of_directory(tmp_path / "vllm")):
        assert sources.signature("vllm.sub:Inner.called") == "self"
