"""What lies in a PyTorch file of the zip form (torch >= 1.6): names, shapes and places of tensors, without torch and executing nothing.

The file's pickle is not loaded but interpreted here, opcode by opcode, with a stack of inert values: a name such as `os.system` is never
looked up, whatever is not needed for a state_dict is refused, and no value of the pickle is ever called, hashed or compared.
Everything here raises one of npz.DAMAGE, with the cause as message.
"""

import dataclasses
import math
import pickletools
import struct
import warnings
import zipfile
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

MAX_PICKLE = 16 * 2**20  # bytes; those of the largest ViTs have less than 1 MiB
MAX_OPCODES = 500_000  # a bound for the memory that the values of a pickle take, about 100 bytes each; each tensor has about 30
MAX_RANK = 32  # numpy's least limit

# Of legacy torch storages, by which the pickle gives a tensor's dtype, the numpy ones.
STORAGES = {
    "torch.DoubleStorage": np.dtype("<f8"),
    "torch.FloatStorage": np.dtype("<f4"),
    "torch.HalfStorage": np.dtype("<f2"),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype("<i8"),
    "torch.IntStorage": np.dtype("<i4"),
    "torch.ShortStorage": np.dtype("<i2"),
    "torch.CharStorage": np.dtype("i1"),
    "torch.ByteStorage": np.dtype("u1"),
    "torch.BoolStorage": np.dtype("?"),
}
DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
MAPPINGS = ("collections.OrderedDict", "argparse.Namespace")  # MAE and DeiT save their command line's Namespace along
REBUILT = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
ALLOWED = {*STORAGES, *MAPPINGS, *REBUILT, "torch._utils._rebuild_parameter", "torch.Size", "torch.device", *(f"torch.{d}" for d in DTYPES)}
# Where training scripts put the state_dict, the first that holds tensors first; a teacher is what self-distillation is about.
WRAPPERS = ("model", "state_dict", "teacher", "student", "model_state", "model_ema", "net")

CONSTANTS = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
LITERALS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
SIZES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclasses.dataclass(frozen=True, eq=False)
class Name:
    """A class or function that the pickle names, by its name only."""

    name: str


@dataclasses.dataclass(frozen=True, eq=False)
class Storage:
    """A member of the archive and the dtype that it holds."""

    member: zipfile.ZipInfo
    dtype: np.dtype


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """A tensor: the elements of a storage from `offset` on, in these strides (of elements), all of them within it."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def span(self) -> int:
        """Number of elements from the first to the last."""
        return 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True)) if math.prod(self.shape) else 0


def pickle_of(archive: zipfile.ZipFile) -> str | None:
    """Name of the member that a PyTorch file has; None in other archives."""
    return next((name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1), None)


def views(archive: zipfile.ZipFile) -> dict[str, View]:
    """The tensors of the state_dict by name, in its order."""
    pickled = pickle_of(archive)
    folder = pickled.removesuffix("data.pkl")
    if f"{folder}constants.pkl" in archive.NameToInfo:
        raise ValueError("it is a TorchScript program, not a state_dict")
    for name, most in ((pickled, MAX_PICKLE), (f"{folder}byteorder", 16)):
        if name in archive.NameToInfo and _stored(archive, name).file_size > most:
            raise ValueError(f"its {name} has {archive.getinfo(name).file_size} bytes, more than the {most} that any state_dict needs")
    if f"{folder}byteorder" in archive.NameToInfo and archive.read(f"{folder}byteorder") != b"little":
        raise ValueError("its numbers are not little-endian")
    root = Interpreter(archive, folder).run(archive.read(pickled))
    if not isinstance(root, dict):
        raise ValueError(f"it holds a {'tensor' if isinstance(root, View) else type(root).__name__}, not a state_dict")
    found = state_dict(root)
    if not found:
        keys = ", ".join(repr(key[:40]) for key in list(root)[:8])
        raise ValueError(f"it holds no named tensors at its top or within {', '.join(WRAPPERS)}; its keys are {keys or 'none'}")
    return found


def state_dict(mapping: dict[str, Any], depth: int = 2) -> dict[str, View]:
    """The tensors within a wrapper, else those of the mapping itself; wrappers may be nested `depth` times."""
    for inner in (mapping.get(wrapper) for wrapper in WRAPPERS if depth):
        if isinstance(inner, dict) and (found := state_dict(inner, depth - 1)):
            return found
    return {name: value for name, value in mapping.items() if isinstance(value, View)}


def check(archive: zipfile.ZipFile, storage: Storage) -> None:
    """Read a whole storage in blocks, so that zipfile compares its CRC."""
    with archive.open(storage.member) as stream:
        while stream.read(2**20):
            pass


def start(file: BinaryIO, storage: Storage) -> int:
    """Where the bytes of a storage lie in the file of the archive: after the member's own header."""
    file.seek(storage.member.header_offset + 26)
    return storage.member.header_offset + 30 + sum(struct.unpack("<2H", file.read(4)))


def _stored(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """The member of that name, which lies in the archive as it is: torch writes no other."""
    if name not in archive.NameToInfo:
        raise ValueError(f"it lacks its part {name[:100]!r}")
    member = archive.getinfo(name)
    if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
        raise ValueError(f"its part {name[:100]!r} is compressed, which torch.save does not do")
    return member


class Interpreter:
    """A pickle machine that knows the opcodes and names of state_dicts only; mappings keep entries whose key is text, and drop others."""

    def __init__(self, archive: zipfile.ZipFile, folder: str):
        self.archive, self.folder = archive, folder
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under each open MARK
        self.memo: dict[int, Any] = {}

    def run(self, pickled: bytes) -> Any:
        """The value that the pickle describes."""
        try:
            with warnings.catch_warnings(action="ignore"):  # of odd escapes in names
                for count, (opcode, argument, _) in enumerate(pickletools.genops(pickled)):
                    if count > MAX_OPCODES:
                        raise ValueError(f"its pickle has more than {MAX_OPCODES} opcodes")
                    self.step(opcode.name, argument)
            return self.stack.pop()
        except (
            IndexError,
            KeyError,
            TypeError,
            AttributeError,
        ) as error:  # a stack that runs empty, an unknown memo, a wrong kind of value
            raise ValueError(f"its pickle is damaged ({type(error).__name__})") from error

    def step(self, opcode: str, argument: Any) -> None:
        """One opcode, as pickletools reads it."""
        stack, memo = self.stack, self.memo
        if opcode in CONSTANTS:
            stack.append(argument)
        elif opcode in LITERALS:
            stack.append(LITERALS[opcode])
        elif opcode in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif opcode == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif opcode == "MARK":
            self.below.append(stack)
            self.stack = []
        elif opcode in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if opcode == "EMPTY_DICT" else [])
        elif opcode in SIZES or opcode == "TUPLE":
            values = tuple(self._pop(SIZES[opcode]) if opcode in SIZES else self._pop_mark())
            self.stack.append(values)
        elif opcode in ("APPEND", "APPENDS"):
            values = self._pop(1) if opcode == "APPEND" else self._pop_mark()
            self._last(list).extend(values)
        elif opcode in ("SETITEM", "SETITEMS"):
            values = self._pop(2) if opcode == "SETITEM" else self._pop_mark()
            pairs = zip(values[::2], values[1::2], strict=True)
            self._last(dict).update((key, value) for key, value in pairs if type(key) is str)
        elif opcode in ("GLOBAL", "STACK_GLOBAL"):
            parts = argument.split(" ", 1) if opcode == "GLOBAL" else self._pop(2)
            stack.append(self._name(*parts))
        elif opcode in ("REDUCE", "NEWOBJ"):
            function, arguments = self._pop(2)
            stack.append(self._call(function.name, arguments))
        elif opcode == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif opcode == "BUILD":  # attributes, such as a state_dict's _metadata: none is needed
            self._pop(1)
            self._last(dict)
        elif opcode not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(f"its pickle has the opcode {opcode}, which torch.save does not write")

    def _pop(self, count: int) -> list[Any]:
        if count > len(self.stack):
            raise IndexError("stack underflow")
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def _pop_mark(self) -> list[Any]:
        values, self.stack = self.stack, self.below.pop()
        return values

    def _last(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise TypeError(f"not a {kind.__name__}")
        return self.stack[-1]

    def _name(self, module: str, name: str) -> Name:
        full = f"{module}.{name}"
        if full not in ALLOWED:
            raise ValueError(f"its pickle names {full[:100]!r}, which no state_dict of plain tensors needs")
        return Name(full)

    def _call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """What the function or class of that name would make of the arguments: a view, a mapping or an inert value."""
        if name in MAPPINGS and arguments == ():
            return {}
        if name in REBUILT:
            return _view(*arguments[:4])
        if name in ("torch._utils._rebuild_parameter", "torch.Size"):
            return arguments[0]
        if name == "torch.device":
            return None
        raise ValueError(f"its pickle calls {name!r} in a way that torch.save does not write")

    def _storage(self, identity: tuple[Any, ...]) -> Storage:
        """("storage", class, key, location, number of elements) -> the member that holds them."""
        match identity:
            case ("storage", Name(name=name), str(key), _, int(count)) if name in STORAGES:
                storage = Storage(_stored(self.archive, f"{self.folder}data/{key}"), STORAGES[name])
            case _:
                raise ValueError("its pickle refers to something that is no storage")
        if count * storage.dtype.itemsize != storage.member.file_size:
            raise ValueError(f"its part {key[:100]!r} has {storage.member.file_size} bytes, its pickle says otherwise")
        return storage


def _view(storage: Any, offset: Any, shape: Any, strides: Any) -> View:
    """The tensor that the pickle describes; ValueError where it does not lie within its storage or repeats it."""
    if type(storage) is not Storage or type(shape) is not tuple or type(strides) is not tuple:
        raise ValueError("its pickle describes a tensor of another kind")
    if (
        len(shape) > MAX_RANK
        or len(shape) != len(strides)
        or any(type(n) is not int or not 0 <= n < 2**48 for n in (offset, *shape, *strides))
    ):
        raise ValueError("a tensor has a shape, strides or an offset that no tensor has")
    view, count = View(storage, offset, shape, strides), storage.member.file_size // storage.dtype.itemsize
    if offset + view.span > count or math.prod(shape) > count:
        raise ValueError(f"a tensor {list(shape)} does not lie within its storage of {count} elements")
    return view
