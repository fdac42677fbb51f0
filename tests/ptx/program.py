"""PTX, the code that Triton compiles for a GPU, as instructions that can be carried out."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property

SIZES = {"pred": 1, "b8": 1, "b16": 2, "f16": 2, "b32": 4, "f32": 4, "b64": 8, "f64": 8, "b128": 16}

PART = re.compile(r"(?:\[[^]]*\]|\{[^}]*\}|[^,[{])+")


@dataclass(frozen=True)
class Operand:
    """One operand: a register, a number, a symbol, `[address + offset, {coordinates}]`, or `{a, b, ...}`."""

    text: str
    register: str = ""
    parts: tuple[Operand, ...] = ()
    address: Operand | None = None
    offset: int = 0


@dataclass
class Instruction:
    """`@guard name.modifier.type a, b, c`, the guard negated or not; `target` is where a branch goes."""

    name: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: str
    negated: bool
    text: str
    target: int = 0

    @cached_property
    def type(self) -> str:
        return self.modifiers[-1] if self.modifiers else ""


@dataclass
class Program:
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)  # the type of each that was declared by name
    families: dict[str, str] = field(default_factory=dict)  # of those declared as %r<20>
    branches: list[tuple[Instruction, list[str]]] = field(
        default_factory=list
    )  # names of their target, innermost first
    threads: int = 0

    def type_of(self, register: str) -> str:
        return self.registers.get(register) or self.families[register.rstrip("0123456789")]


def split(text: str) -> list[str]:
    """At commas that are in no brackets."""
    return [part.strip() for part in PART.findall(text)] if text.strip() else []


def parse(text: str) -> Program:
    """The one kernel of a module."""
    text = re.sub(r"//[^\n]*|^\s*\.loc[^\n]*", "", text, flags=re.MULTILINE)
    program = Program()
    threads = re.search(r"\.reqntid (\d+)", text)
    assert threads, "no .reqntid"
    program.threads = int(threads[1])
    entry = text.index(".visible .entry")
    begin = text.index("{", text.index(")", entry)) + 1
    scopes, opened = [""], 0
    # a statement ends with ";", a label with ":", and braces that begin one open a scope of names
    for token in re.finditer(r"\s*([{}]|[$\w%.]+:(?!:)|[^;{}]*?(?:\{[^}]*\}[^;{}]*?)*;)", text[begin:]):
        statement = token[1].strip()
        if statement == "{":
            opened += 1
            scopes.append(f"{scopes[-1]}.{opened}")
        elif statement == "}":
            scopes.pop()
            if not scopes:
                break
        elif statement.endswith(":"):
            program.labels[statement[:-1] + scopes[-1]] = len(program.instructions)
        else:
            _add(program, " ".join(statement[:-1].split()), scopes)
    for branch, names in program.branches:
        branch.target = next(program.labels[name] for name in names if name in program.labels)
    return program


def _add(program: Program, statement: str, scopes: list[str]) -> None:
    if statement.startswith(".reg"):
        kind, names = re.fullmatch(r"\.reg \.(\w+) (.*)", statement).groups()
        for name in split(names):
            if "<" in name:
                program.families[name[: name.index("<")]] = kind
            else:
                program.registers[name + scopes[-1]] = kind
        return
    if not statement or statement.startswith("."):
        return
    match = re.fullmatch(r"(?:@(!?)([%\w.]+) )?([a-z]\w*)([.\w:]*)(?: (.*))?", statement)
    assert match, f"not understood: {statement}"
    negated, guard, name, modifiers, rest = match.groups()
    operands = [_operand(program, part, scopes) for part in split(rest or "")]
    guard = _register(program, guard, scopes) if guard else ""
    kinds = tuple(m for m in re.split(r"\.", modifiers.replace("::", ":")) if m)
    program.instructions.append(Instruction(name, kinds, tuple(operands), guard, bool(negated), statement))
    if name == "bra":
        names = [operands[0].text + scope for scope in reversed(scopes)]
        program.branches.append((program.instructions[-1], names))


def _register(program: Program, name: str, scopes: list[str]) -> str:
    for scope in reversed(scopes):
        if name + scope in program.registers:
            return name + scope
    return name if name.rstrip("0123456789") in program.families else ""


def _operand(program: Program, text: str, scopes: list[str]) -> Operand:
    text = text.strip()
    if text.startswith("{"):
        return Operand(text, parts=tuple(_operand(program, part, scopes) for part in split(text[1:-1])))
    if text.startswith("["):
        first, *rest = split(text[1:-1])
        place = re.fullmatch(r"([^+\s]+)(?:\s*\+\s*(-?\w+))?", first.strip())
        assert place, f"not understood: {text}"
        parts = _operand(program, rest[0], scopes).parts if rest else ()
        base = _operand(program, place[1], scopes)
        return Operand(text, parts=parts, address=base, offset=int(place[2] or "0", 0))
    if "|" in text:
        return Operand(text, parts=tuple(_operand(program, part, scopes) for part in text.split("|")))
    return Operand(text, register=_register(program, text, scopes))
