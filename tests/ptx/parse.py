"""PTX text to kernels: parameters with their offsets, registers, labels and instructions with typed operands."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


class Fault(RuntimeError):
    """What a GPU would answer with an error or with undefined behaviour, or what the emulator does not know."""


@dataclass(frozen=True)
class Register:
    name: str
    negated: bool = False


@dataclass(frozen=True)
class Immediate:
    """``kind`` is ``"int"``, or ``"f32"`` and ``"f64"`` for bit patterns."""

    value: int
    kind: str


@dataclass(frozen=True)
class Special:
    name: str


@dataclass(frozen=True)
class Symbol:
    """A parameter, a shared array or a label."""

    name: str


@dataclass(frozen=True)
class Address:
    base: Register | Symbol | Immediate
    offset: int


@dataclass(frozen=True)
class Vector:
    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """``d|p``: a result and a predicate."""

    value: Operand
    predicate: Operand


@dataclass(frozen=True)
class Sink:
    """``_``: a result that nobody wants."""


Operand = Register | Immediate | Special | Symbol | Address | Vector | Pair | Sink


@dataclass(frozen=True)
class Instruction:
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None
    text: str


@dataclass(frozen=True)
class Parameter:
    name: str
    type: str
    offset: int
    bytes: int


@dataclass
class Kernel:
    """An entry point; ``shared`` maps arrays to (offset, bytes), the dynamic one (0 bytes) behind all others."""

    name: str
    parameters: list[Parameter]
    max_threads: int | None
    # the file that it is in
    text: str = field(default="", repr=False)
    registers: dict[str, str] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)
    static_shared: int = 0

    @property
    def parameter_bytes(self) -> int:
        last = self.parameters[-1] if self.parameters else None
        return 0 if last is None else last.offset + last.bytes

    def add_shared(self, name: str, alignment: int, size: int) -> None:
        offset = -(-self.static_shared // alignment) * alignment
        self.shared[name] = (offset, size)
        self.static_shared = offset + size


def bits_of(kind: str) -> int:
    """Width of a PTX type: 32 of ``"u32"``, ``"bf16x2"`` and ``"f16x2"``, 64 of ``"f32x2"``, 1 of ``"pred"``."""
    if kind == "pred":
        return 1
    base, _, lanes = kind.partition("x")
    return int(re.sub(r"\D", "", base)) * int(lanes or 1)


_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.S)
_DEBUG = re.compile(r"^\s*\.(loc|file)\b[^\n]*$", re.M)
_ENTRY = re.compile(r"\.entry\s+([$\w]+)\s*\(([^)]*)\)([^{;]*)\{")
_STATEMENT = re.compile(r"\s*(?:([$\w]+):(?!:)|([{}])|([^;{}](?:[^;\"]|\"[^\"]*\")*);)")
_SHARED = re.compile(r"(?:\.extern\s+)?\.shared\s+\.align\s+(\d+)\s+\.b8\s+([$\w]+)\[(\d*)\]")
_OPERAND = re.compile(r"\{[^{}]*\}|\[[^\]]*\]|[^,\s][^,]*")


def parse(text: str) -> dict[str, Kernel]:
    """All kernels of a PTX file by name.

    Raises:
        Fault: local memory (spills, stack arrays) or text that cannot be read.
    """
    whole = text
    text = _DEBUG.sub("", _COMMENT.sub(" ", text))
    section = re.search(r"^\s*\.section", text, re.M)
    if section:
        text = text[: section.start()]
    entries = list(_ENTRY.finditer(text))
    outside = text[: entries[0].start()] if entries else text
    kernels = {}
    for entry in entries:
        name, parameters, directives = entry.groups()
        threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", directives)
        kernel = Kernel(name, _parameters(parameters), int(threads[1]) if threads else None, whole)
        for alignment, array, size in _SHARED.findall(outside):
            kernel.add_shared(array, int(alignment), int(size or 0))
        _Body(kernel, text, entry.end()).read()
        kernels[name] = kernel
    return kernels


def _parameters(text: str) -> list[Parameter]:
    found: list[Parameter] = []
    offset = 0
    for declaration in filter(None, (" ".join(part.split()) for part in text.split(","))):
        match = re.fullmatch(
            r"\.param (?:\.align (\d+) )?\.(\w+)(?: \.ptr(?: \.\w+)?(?: \.align \d+)?)? ([$\w]+)(?:\[(\d+)\])?",
            declaration,
        )
        if match is None:
            raise Fault(f"parameter {declaration!r}")
        alignment, kind, name, count = match.groups()
        width = bits_of(kind) // 8
        step = int(alignment or width)
        offset = -(-offset // step) * step
        found.append(Parameter(name, kind, offset, width * int(count or 1)))
        offset += found[-1].bytes
    return found


class _Body:
    """Statements between an entry's braces, with the scopes that inline assembly opens."""

    def __init__(self, kernel: Kernel, text: str, start: int) -> None:
        self.kernel, self.text, self.position = kernel, text, start
        self.scopes: list[dict[str, str]] = [{}]
        self.opened = 0

    def read(self) -> None:
        while self.scopes:
            match = _STATEMENT.match(self.text, self.position)
            if match is None:
                raise Fault(f"{self.kernel.name}: cannot read {self.text[self.position : self.position + 80]!r}")
            self.position = match.end()
            label, brace, statement = match.groups()
            if label:
                self.kernel.labels[label] = len(self.kernel.code)
            elif brace == "{":
                self.opened += 1
                self.scopes.append({})
            elif brace == "}":
                self.scopes.pop()
            else:
                self._statement(" ".join(statement.split()))

    def _statement(self, text: str) -> None:
        if text.startswith(".reg"):
            _, kind, names = text.split(" ", 2)
            for name in names.split(","):
                self._register(kind[1:], name.strip())
        elif text.startswith(".shared"):
            match = _SHARED.fullmatch(text)
            if match is None:
                raise Fault(f"{self.kernel.name}: {text}")
            self.kernel.add_shared(match[2], int(match[1]), int(match[3]))
        elif text.startswith(".pragma"):
            pass
        elif text.startswith("."):
            # .local above all: spills and arrays that did not fit into registers
            raise Fault(f"{self.kernel.name}: {text}")
        else:
            self.kernel.code.append(self._instruction(text))

    def _register(self, kind: str, name: str) -> None:
        several = re.fullmatch(r"(%\w+)<(\d+)>", name)
        if several:
            self.kernel.registers |= {f"{several[1]}{i}": kind for i in range(int(several[2]))}
            return
        unique = name if len(self.scopes) == 1 else f"{name}@{self.opened}"
        self.scopes[-1][name] = unique
        self.kernel.registers[unique] = kind

    def _instruction(self, text: str) -> Instruction:
        guard, rest = None, text
        if text.startswith("@"):
            condition, rest = text.split(" ", 1)
            guard = Register(self._resolve(condition.lstrip("@!")), "!" in condition)
        name, _, operands = rest.partition(" ")
        opcode, *modifiers = name.split(".")
        found = tuple(self._operand(part.strip()) for part in _OPERAND.findall(operands))
        return Instruction(opcode, tuple(modifiers), found, guard, text)

    def _resolve(self, name: str) -> str:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return name

    def _operand(self, text: str) -> Operand:
        if text.startswith("{"):
            return Vector(tuple(self._operand(part.strip()) for part in text[1:-1].split(",")))
        if text.startswith("["):
            match = re.fullmatch(r"([%$\w.]+)\s*(?:\+\s*(-?\w+))?", text[1:-1].strip())
            if match is None:
                raise Fault(f"address {text}")
            base = self._operand(match[1])
            assert isinstance(base, Register | Symbol | Immediate)
            return Address(base, int(match[2], 0) if match[2] else 0)
        if "|" in text:
            value, predicate = text.split("|")
            return Pair(self._operand(value), self._operand(predicate))
        if text == "_":
            return Sink()
        name = self._resolve(text.lstrip("!"))
        if name in self.kernel.registers:
            return Register(name, text.startswith("!"))
        if name.startswith("%"):
            return Special(name)
        for prefix, kind, digits in (("0f", "f32", 8), ("0d", "f64", 16)):
            if name.lower().startswith(prefix) and len(name) == 2 + digits:
                return Immediate(int(name[2:], 16), kind)
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", name):
            return Immediate(int(name.rstrip("U"), 0), "int")
        return Symbol(name)
