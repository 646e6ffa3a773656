"""vLLM's sources read as syntax trees, neither imported nor installed: which names are there, with what arguments."""

from __future__ import annotations

import ast
import contextlib
import functools
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

Scope = ast.Module | ast.ClassDef
Function = ast.FunctionDef | ast.AsyncFunctionDef
Node = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.Assign | ast.AnnAssign

FIELD_BASES = frozenset({"Struct", "NamedTuple", "BaseModel"})
"""Base classes whose annotated fields are the constructor's arguments."""

FIELD_DECORATORS = frozenset({"dataclass", "config", "pydantic_dataclass"})
"""Decorators that make a constructor of a class's annotated fields; `config` is vLLM's own."""


class Missing(Exception):
    """Raised when a name is not where it was looked for; the message says what was found last."""


@dataclass(frozen=True, slots=True)
class Found:
    """A definition, and the module that it stands in."""

    module: str
    node: Node


class Sources:
    """The Python files of one vLLM.

    Args:
        files: the text of each file by its path in the wheel, such as "vllm/config/__init__.py".
    """

    def __init__(self, files: Mapping[str, str]) -> None:
        self._files = files
        self._tree = functools.cache(self._parse)

    @classmethod
    def of_wheel(cls, path: Path) -> Sources:
        """The sources in a wheel."""
        with zipfile.ZipFile(path) as wheel:
            names = [name for name in wheel.namelist() if name.startswith("vllm/") and name.endswith(".py")]
            return cls({name: wheel.read(name).decode() for name in names})

    @classmethod
    def of_directory(cls, path: Path) -> Sources:
        """The sources of an installed package; `path` is the directory "vllm"."""
        files = path.rglob("*.py")
        return cls({str(file.relative_to(path.parent)): file.read_text(encoding="utf-8") for file in files})

    def find(self, name: str) -> Found:
        """The definition of "module:qualified.name"; of "module:" the module.

        Raises:
            Missing: when there is no such module, or it has no such name.
        """
        module, _, attributes = name.partition(":")
        found = Found(module, self._tree(module))
        for attribute in filter(None, attributes.split(".")):
            found = self._member(found, attribute)
        return found

    def signature(self, name: str) -> str:
        """The parameters of a function, or of a class's constructor without self: "self, one, two=, *, three="."""
        found = self.find(name)
        if isinstance(found.node, ast.ClassDef):
            return self._constructor(found)
        if not isinstance(found.node, Function):
            raise Missing(f"{name} is no function and no class")
        return _written(found.node, drop_first=_is_classmethod(found.node))

    def attributes(self, name: str) -> frozenset[str]:
        """What a class has: fields, methods, and what its methods set on self; inherited ones too."""
        names: set[str] = set()
        for each in self._lineage(self.find(name)):
            assert isinstance(each.node, ast.ClassDef)
            names |= {target for statement in _flat(each.node.body) for target in _defined(statement)}
            names |= {
                node.attr
                for node in ast.walk(each.node)
                if isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and isinstance(node.value, ast.Name)
                and node.value.id == "self"
            }
        return frozenset(names)

    def mentions(self, name: str) -> frozenset[str]:
        """The names and attributes that a function's body mentions."""
        names = set()
        for node in ast.walk(self.find(name).node):
            if isinstance(node, ast.Name):
                names.add(node.id)
            elif isinstance(node, ast.Attribute):
                names.add(node.attr)
            elif isinstance(node, ast.keyword) and node.arg is not None:
                names.add(f"{node.arg}=")
        return frozenset(names)

    def _parse(self, module: str) -> ast.Module:
        stem = module.replace(".", "/")
        for path in (f"{stem}.py", f"{stem}/__init__.py"):
            if path in self._files:
                return ast.parse(self._files[path])
        raise Missing(f"there is no module {module}")

    def _member(self, owner: Found, name: str) -> Found:
        if isinstance(owner.node, ast.ClassDef):
            for each in self._lineage(owner):
                if found := self._own(each, name):
                    return found
        elif isinstance(owner.node, ast.Module) and (found := self._own(owner, name)):
            return found
        raise Missing(f"{owner.module}:{getattr(owner.node, 'name', '')} has no {name}")

    def _own(self, owner: Found, name: str) -> Found | None:
        assert isinstance(owner.node, Scope)
        for statement in reversed(list(_flat(owner.node.body))):
            if isinstance(statement, ast.ImportFrom):
                for alias in statement.names:
                    if (alias.asname or alias.name) == name:
                        return self._imported(owner.module, statement, alias.name)
            elif name in _defined(statement):
                assert isinstance(statement, ast.ClassDef | Function | ast.Assign | ast.AnnAssign)
                return Found(owner.module, statement)
        return None

    def _imported(self, importer: str, statement: ast.ImportFrom, name: str) -> Found | None:
        module = statement.module or ""
        if statement.level:
            parts = importer.split(".")
            is_package = f"{'/'.join(parts)}/__init__.py" in self._files
            parts = parts[: len(parts) - statement.level + is_package]
            module = ".".join([*parts, *filter(None, [statement.module])])
        if not module.startswith("vllm"):
            return None
        if module != importer:
            with contextlib.suppress(Missing):
                return self.find(f"{module}:{name}")
        return self.find(f"{module}.{name}:")

    def _lineage(self, found: Found) -> Iterator[Found]:
        """A class and those that it inherits from, as far as they are vLLM's; near ones first."""
        yield found
        assert isinstance(found.node, ast.ClassDef), f"{found.module} has something that is no class"
        for base in found.node.bases:
            named = base.value if isinstance(base, ast.Subscript) else base
            if not isinstance(named, ast.Name):
                continue
            parent = self._own(Found(found.module, self._tree(found.module)), named.id)
            if parent is not None and isinstance(parent.node, ast.ClassDef):
                yield from self._lineage(parent)

    def _constructor(self, found: Found) -> str:
        lineage = list(self._lineage(found))
        for each in lineage:
            own = self._own(each, "__init__")
            if own is not None and isinstance(own.node, Function):
                return _written(own.node, drop_first=True)
            if _has_fields(each.node):
                break
        fields: dict[str, bool] = {}
        for each in reversed(lineage):
            assert isinstance(each.node, ast.ClassDef)
            fields |= dict(_fields(each.node))
        return ", ".join(f"{name}{'=' * has_default}" for name, has_default in fields.items())


def _flat(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a body, those under `if` and `try` too; what stands in for a failed import is left out."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If):
            yield from _flat(statement.body)
            yield from _flat(statement.orelse)
        elif isinstance(statement, ast.Try):
            yield from _flat(statement.body)


def _defined(statement: ast.stmt) -> set[str]:
    if isinstance(statement, ast.ClassDef | Function):
        return {statement.name}
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        return {statement.target.id}
    if isinstance(statement, ast.Assign):
        return {target.id for target in statement.targets if isinstance(target, ast.Name)}
    return set()


def _has_fields(node: Node) -> bool:
    assert isinstance(node, ast.ClassDef)
    named = {_last(base) for base in node.bases} & FIELD_BASES
    return bool(named or {_last(each) for each in node.decorator_list} & FIELD_DECORATORS)


def _last(node: ast.expr) -> str:
    if isinstance(node, ast.Call | ast.Subscript):
        return _last(node.func if isinstance(node, ast.Call) else node.value)
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, bool]]:
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            if _last(statement.annotation) == "ClassVar":
                continue
            value = statement.value
            if isinstance(value, ast.Call) and _last(value) in ("field", "Field"):
                keys = {keyword.arg: keyword.value for keyword in value.keywords}
                off = keys.get("init")
                if isinstance(off, ast.Constant) and off.value is False:
                    continue
                yield statement.target.id, bool({"default", "default_factory"} & set(keys)) or bool(value.args)
            else:
                yield statement.target.id, value is not None


def _is_classmethod(node: Function) -> bool:
    return any(isinstance(each, ast.Name) and each.id == "classmethod" for each in node.decorator_list)


def _written(node: Function, *, drop_first: bool) -> str:
    arguments = node.args
    places = [*arguments.posonlyargs, *arguments.args]
    first_default = len(places) - len(arguments.defaults)
    parts = [f"{each.arg}{'=' * (place >= first_default)}" for place, each in enumerate(places)][drop_first:]
    if arguments.vararg is not None:
        parts.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        parts.append("*")
    pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    parts += [f"{each.arg}{'=' * (default is not None)}" for each, default in pairs]
    if arguments.kwarg is not None:
        parts.append(f"**{arguments.kwarg.arg}")
    return ", ".join(parts)
