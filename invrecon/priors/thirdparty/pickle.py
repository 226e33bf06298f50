"""The tensors of an EDM network snapshot, read without unpickling it.

A pickle is a program for a stack machine whose instructions include calling any function of any module. This reader
walks the instructions (`pickletools.genops` decodes, and runs nothing) and carries out those that build plain data.
A name in the file is kept as two strings and never looked up: the few that a snapshot needs are recognised, and what
they stand for is done here; any other name, or instruction, ends the import.

Nothing is imported, no object of the file's classes is made, and the source code that a snapshot carries is ignored.
"""

from __future__ import annotations

import io
import pickletools
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invrecon.errors import InputError

MAX_MODULES, MAX_DEPTH = 20_000, 32
# Bytes a number has in numpy's type codes, and how struct spells it.
NUMBERS = {"f8": "<d", "f4": "<f", "f2": "<e", "i8": "<q", "i4": "<i", "i2": "<h", "i1": "<b", "u1": "<B", "b1": "<?"}
NUMBERS |= {"u8": "<Q", "u4": "<I", "u2": "<H"}


@dataclass(frozen=True)
class Name:
    """A name that the file uses; never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass
class Record:
    """What the file says of one object of a class: the class's name and the object's attributes, plain data."""

    name: str
    state: dict[Any, Any] = field(default_factory=dict)


def _plain(items: Any) -> Any:
    """Returns keys or members as they are: a tuple of tuples of ... costs 2^n steps to hash, and a file n bytes."""
    if not all(item is None or isinstance(item, str | int | float) for item in items):
        raise TypeError("a key that is neither text nor a number")
    return items


def _mapping(*args: Any) -> dict[Any, Any]:
    if args and not isinstance(args[0], dict):
        _plain([key for key, _ in args[0]])
    return dict(args[0]) if args else {}


def _storage(content: Any) -> Any:
    # Tensors in a plain pickle carry their numbers as a file of torch's, nested as bytes.
    if not isinstance(content, bytes):
        raise TypeError("a storage that is not bytes")
    storage = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if not isinstance(storage, torch.storage.TypedStorage):
        raise TypeError("a storage that holds something else")
    return storage


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    if not isinstance(storage, torch.storage.TypedStorage):
        raise TypeError("a tensor without storage")
    numbers = torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage)
    if numbers.numel() < torch.Size(size).numel():
        raise ValueError("a tensor larger than its storage")
    return numbers.as_strided(size, stride, offset)


def _parameter(data: Any, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise TypeError("a parameter that is no tensor")
    return data


def _record(meta: Any) -> Record:
    if not isinstance(meta, dict) or not isinstance(meta.get("state"), dict):
        raise TypeError("an object without attributes")
    name = meta.get("class_name")
    return Record(name if isinstance(name, str) else "", meta["state"])


def _number(code: Any, content: Any) -> float | int | bool:
    if not isinstance(code, Record) or not isinstance(content, bytes):
        raise TypeError("a number of no known type")
    return struct.unpack(NUMBERS[code.name], content)[0]


def _number_type(code: Any, *_: Any) -> Record:
    return Record(code if isinstance(code, str) and code in NUMBERS else "unknown")


# What a snapshot may call, and what is done instead.
CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _mapping,
    "dnnlib.util.EasyDict": _mapping,
    "dnnlib.EasyDict": _mapping,
    "torch_utils.persistence._reconstruct_persistent_obj": _record,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.storage._load_from_bytes": _storage,
    "numpy.core.multiarray.scalar": _number,
    "numpy._core.multiarray.scalar": _number,
    "numpy.dtype": _number_type,
}
# Containers of torch, which the file describes by their attributes.
CLASSES = re.compile(r"torch\.nn\.modules\.[a-z_.]+\.[A-Z]\w*")


class _Machine:
    """The instructions that build plain data."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def name(self, module: Any, name: Any) -> Name:
        found = Name(module, name)
        if not (isinstance(module, str) and isinstance(name, str)):
            raise TypeError("a name that is no text")
        if str(found) not in CALLS and not CLASSES.fullmatch(str(found)):
            raise InputError(f"it refers to '{found}', which no network snapshot needs and which is never called here")
        return found

    def call(self, name: Any, args: Any) -> Any:
        if not isinstance(name, Name) or not isinstance(args, tuple):
            raise TypeError("a call of something that is no name")
        action = CALLS.get(str(name))
        return Record(name.name) if action is None else action(*args)

    def update(self, pairs: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict):
            raise TypeError("items for something that is no dictionary")
        self.stack[-1].update(zip(_plain(pairs[::2]), pairs[1::2], strict=True))

    def extend(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], set):
            self.stack[-1].update(_plain(items))
        elif isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)
        else:
            raise TypeError("items for something that is no list")

    def build(self, state: Any) -> None:
        # A dictionary's own attributes, or the byte order of a number type, add nothing.
        if isinstance(self.stack[-1], Record) and isinstance(state, dict):
            self.stack[-1].state = state

    def step(self, code: str, arg: Any) -> None:
        """Carries out one instruction."""
        stack = self.stack
        if code in ("PROTO", "FRAME"):
            return
        if code in PUSHES:
            stack.append(arg)
        elif code in CONSTANTS:
            stack.append(CONSTANTS[code]())
        elif code == "MARK":
            self.below.append(stack)
            self.stack = []
        elif code == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif code in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[int(arg)] = stack[-1]
        elif code in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[int(arg)])
        elif code in ("TUPLE1", "TUPLE2", "TUPLE3"):
            num = int(code[-1])
            self.stack[-num:] = [tuple(stack[-num:])]
        elif code in ("TUPLE", "LIST", "FROZENSET"):
            items = self.since_mark()
            kind: Any = {"TUPLE": tuple, "LIST": list, "FROZENSET": frozenset}[code]
            self.stack.append(kind(_plain(items) if kind is frozenset else items))
        elif code == "DICT":
            items = self.since_mark()
            self.stack.append({})
            self.update(items)
        elif code == "APPEND":
            self.extend([stack.pop()])
        elif code in ("APPENDS", "ADDITEMS"):
            self.extend(self.since_mark())
        elif code == "SETITEM":
            value, key = stack.pop(), stack.pop()
            self.update([key, value])
        elif code == "SETITEMS":
            self.update(self.since_mark())
        elif code == "GLOBAL":
            stack.append(self.name(*arg.split(" ", 1)))
        elif code == "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            stack.append(self.name(module, name))
        elif code in ("REDUCE", "NEWOBJ"):
            args, name = stack.pop(), stack.pop()
            stack.append(self.call(name, args))
        elif code == "BUILD":
            self.build(stack.pop())
        elif code == "POP":
            stack.pop()
        elif code == "POP_MARK":
            self.since_mark()
        else:
            raise InputError(f"it uses the instruction {code}, which no network snapshot needs")


PUSHES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}
CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": set,
}


def read_pickle(path: Path) -> Any:
    """Returns the plain data of a pickle: dicts, lists, tuples, sets, strings, numbers, tensors and `Record`s.

    Raises:
        InputError: If the pickle refers to anything that is not in the list of what a snapshot needs, or is truncated.
    """
    machine = _Machine()
    try:
        with open(path, "rb") as file:
            for opcode, arg, _ in pickletools.genops(file):
                if opcode.name == "STOP":
                    return machine.stack[-1]
                machine.step(opcode.name, arg)
    except InputError as error:
        raise InputError(
            f"'{path}' is a pickle that is not read, because {error}: expected a network snapshot of EDM or PaDIS; "
            "export the weights as safetensors where you trust the file."
        ) from None
    except Exception as error:  # what a hostile or damaged file provokes is of many kinds
        raise InputError(_broken(path, error)) from None
    raise InputError(_broken(path, "it has no end"))


def _broken(path: Path, why: object) -> str:
    reason = (str(why).splitlines() or [type(why).__name__])[0][:120]
    return f"'{path}' cannot be read as a network snapshot ({reason}): it is truncated, or a pickle of something else."


def state_dict(module: Record) -> dict[str, Tensor]:
    """Returns the parameters and buffers of a recorded network under their dotted names.

    Raises:
        InputError: If the record is no network.
    """
    tensors: dict[str, Tensor] = {}
    todo, num = [("", module)], 0
    while todo:
        prefix, record = todo.pop()
        num += 1
        if num > MAX_MODULES or prefix.count(".") > MAX_DEPTH:
            raise InputError("The network of the snapshot refers to itself: it is no network.")
        transient = record.state.get("_non_persistent_buffers_set")
        transient = transient if isinstance(transient, set) else set()
        for kind in ("_parameters", "_buffers"):
            found = record.state.get(kind)
            for key, value in found.items() if isinstance(found, dict) else ():
                if isinstance(value, Tensor) and key not in transient:
                    tensors[f"{prefix}{key}"] = value
        children = record.state.get("_modules")
        for key, child in children.items() if isinstance(children, dict) else ():
            if isinstance(child, Record):
                todo.append((f"{prefix}{key}.", child))
    return tensors
