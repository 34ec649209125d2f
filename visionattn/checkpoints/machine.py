"""A pickle machine that can build plain data, tensors' descriptions and inert records, and nothing else.

Python's own unpickler calls what a file names, grows its memo to any index a file gives, and hashes what a file nests;
each is a way to harm the reader. Here ``pickletools.genops`` (the standard library's parser) splits the stream, and the
opcodes that training files need work on a list. No attribute is looked up by a name that a file gives.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

from visionattn.models._checkpoint import CheckpointError


class CorruptCheckpoint(CheckpointError):
    """Truncated, damaged, or not a checkpoint."""


class UnsafeCheckpoint(CheckpointError):
    """Asks for more than data, or for more memory than allowed."""


class Inert(dict):
    """An instance of a class that training files hold (``kind``: its dotted name), read as a dict of its fields."""

    kind: str = ""


@dataclass(frozen=True)
class Name:
    """A global that the file names; data until a REDUCE or NEWOBJ finds it in a table."""

    path: str


@dataclass(frozen=True)
class StorageRef:
    """``BINPERSID``: a run of numbers kept outside of the pickle."""

    storage_type: str
    key: str
    numel: int


@dataclass(frozen=True)
class TensorRef:
    """A tensor's description; the reader makes it once the storages are known to hold it."""

    storage: StorageRef
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str | None = None


RECORDS = {
    "argparse.Namespace", "yacs.config.CfgNode", "types.SimpleNamespace", "easydict.EasyDict",
    "mmengine.logging.history_buffer.HistoryBuffer",  # the losses that mmengine's Runner saves beside its weights
}  # fmt: skip
_CONSTANTS = {"torch.Size", "torch.device", "collections.OrderedDict", "collections.defaultdict", "numpy.ndarray"}
_SCALARS = (str, int, float, bool, bytes, type(None))
_MARK = object()


def _tensor(args: tuple) -> TensorRef:
    storage, offset, size, stride = args[:4]
    if not isinstance(storage, StorageRef):
        raise CorruptCheckpoint("a tensor has no storage")
    size, stride = _whole(size, "size"), _whole(stride, "stride")
    if len(size) != len(stride) or len(size) > 32:
        raise CorruptCheckpoint(f"a tensor has {len(size)} sizes and {len(stride)} strides")
    (offset,) = _whole((offset,), "offset")
    return TensorRef(storage, offset, size, stride)


def _whole(values: Any, what: str) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or not all(type(v) is int and 0 <= v < 2**62 for v in values):
        raise CorruptCheckpoint(f"a tensor's {what} is not made of whole numbers")
    return tuple(values)


def _tensor_v3(args: tuple) -> TensorRef:
    ref = _tensor(args)
    dtype = args[6] if len(args) > 6 else None
    if not isinstance(dtype, Name):
        raise CorruptCheckpoint("a tensor has no dtype")
    return TensorRef(ref.storage, ref.offset, ref.size, ref.stride, dtype.path)


def _parameter(args: tuple) -> TensorRef:
    if not isinstance(args[0], TensorRef):
        raise CorruptCheckpoint("a parameter holds no tensor")
    return args[0]


def _ordered_dict(args: tuple) -> dict:
    if not args:
        return {}
    result: dict = {}
    pairs = args[0] if isinstance(args[0], list) else list(args[0].items()) if isinstance(args[0], dict) else None
    if pairs is None:
        raise CorruptCheckpoint("an ordered dictionary is not made of pairs")
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise CorruptCheckpoint("an ordered dictionary is not made of pairs")
        result[_key(pair[0])] = pair[1]
    return result


def _numpy_scalar(args: tuple) -> Any:
    import numpy as np

    kind, data = args
    if isinstance(data, str):  # protocol 2 keeps bytes as latin-1 text
        data = data.encode("latin-1")
    if not isinstance(kind, Inert) or kind.get("code") not in _NUMPY_CODES or not isinstance(data, bytes):
        raise UnsafeCheckpoint("it holds a numpy object that is no plain number")
    values = np.frombuffer(data, dtype=kind.get("order", "<") + kind["code"])
    if values.size != 1:
        raise CorruptCheckpoint("a numpy number has the wrong length")
    return values[0].item()


_NUMPY_CODES = {f"{kind}{size}" for kind, sizes in (("f", "248"), ("i", "1248"), ("u", "1248")) for size in sizes}
_NUMPY_CODES.add("b1")


def _numpy_dtype(args: tuple) -> Inert:
    return _inert("numpy.dtype", code=args[0] if isinstance(args[0], str) else None)


def _numpy_array(args: tuple) -> Inert:
    # a logged history: what it holds is not needed, so its bytes are never made an array
    if not isinstance(args[0], Name) or args[0].path != "numpy.ndarray":
        raise UnsafeCheckpoint("it holds an array of a class that numpy does not have")
    return _inert("numpy.ndarray")


def _method(args: tuple) -> Inert:
    # mmengine's history names its own methods; the name is kept, nothing is looked up
    if len(args) != 2 or not isinstance(args[0], Name) or args[0].path not in RECORDS or not isinstance(args[1], str):
        raise UnsafeCheckpoint(_refusal("builtins.getattr"))
    return _inert("builtins.getattr", of=args[0].path, name=args[1])


def _inert(kind: str, **fields: Any) -> Inert:
    record = Inert(**fields)
    record.kind = kind
    return record


def _encode(args: tuple) -> bytes:
    if not isinstance(args[0], str) or args[1:] not in ((), ("latin1",), ("latin-1",)):
        raise UnsafeCheckpoint("it encodes text in an unexpected way")
    return args[0].encode("latin-1")


def _reconstructor(args: tuple) -> Inert:
    if not isinstance(args[0], Name):
        raise CorruptCheckpoint("an object has no class")
    return _record(args[0].path)


def _record(path: str) -> Inert:
    if path not in RECORDS:
        raise UnsafeCheckpoint(_refusal(path))
    return _inert(path)


def _refusal(path: str) -> str:
    return f"its pickle asks for {path!r}, which is more than data: get weights as safetensors, or re-save them"


# What REDUCE may do. Everything here returns data that this file made.
REDUCERS: dict[str, Callable[[tuple], Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "collections.OrderedDict": _ordered_dict,
    "collections.defaultdict": lambda args: {},
    "torch.Size": lambda args: _whole(args[0], "size"),
    "torch.device": lambda args: ":".join(str(a) for a in args if isinstance(a, str | int)),
    "builtins.set": lambda args: list(args[0]) if args and isinstance(args[0], list | tuple) else [],
    "__builtin__.set": lambda args: list(args[0]) if args and isinstance(args[0], list | tuple) else [],
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    "numpy.core.multiarray._reconstruct": _numpy_array,
    "numpy._core.multiarray._reconstruct": _numpy_array,
    "numpy.dtype": _numpy_dtype,
    "builtins.getattr": _method,
    "__builtin__.getattr": _method,
    "_codecs.encode": _encode,
    "copy_reg._reconstructor": _reconstructor,
    "copyreg._reconstructor": _reconstructor,
}


def _is_known(path: str) -> bool:
    if path in REDUCERS or path in RECORDS or path in _CONSTANTS or path in ("builtins.object", "__builtin__.object"):
        return True
    module, _, name = path.rpartition(".")
    if module in ("torch", "torch.storage") and name.endswith("Storage") and name.isidentifier():
        return True
    return module == "torch" and name in DTYPE_NAMES


DTYPE_NAMES = {
    "float16", "bfloat16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64", "bool",
    "complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64",
}  # fmt: skip


def _key(key: Any) -> Any:
    # a nested tuple's hash recurses in C without a limit, so keys are scalars, or flat tuples of them
    if type(key) in _SCALARS or (type(key) is tuple and len(key) <= 64 and all(type(k) in _SCALARS for k in key)):
        return key
    raise CorruptCheckpoint(f"a dictionary has a key that is a {type(key).__name__}")


class Machine:
    """Runs one pickle; ``persistent`` are the storages seen."""

    def __init__(self, max_ops: int):
        self.max_ops = max_ops
        self.copied = 0
        self.stack: list = []
        self.memo: dict[int, Any] = {}
        self.persistent: dict[str, StorageRef] = {}

    def run(self, stream: BinaryIO | bytes) -> Any:
        """The object that the stream describes; the stream stands after its STOP.

        Raises:
            CorruptCheckpoint: for a stream that ends early or makes no sense.
            UnsafeCheckpoint: for one that asks for more than data.
        """
        self.stack, self.memo = [], {}
        count = 0
        try:
            for opcode, arg, _ in pickletools.genops(stream):
                count += 1
                if count > self.max_ops:
                    raise UnsafeCheckpoint(f"its pickle is longer than {self.max_ops:,} operations")
                name = opcode.name
                if name == "STOP":
                    break
                if name in _PUSHES:
                    self.stack.append(arg)
                    continue
                handler = _HANDLERS.get(name)
                if handler is None:
                    raise UnsafeCheckpoint(f"its pickle uses {name}, which no saved tensor needs")
                handler(self, arg)
            (result,) = self.stack
        except CheckpointError:
            raise
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, EOFError) as e:
            raise CorruptCheckpoint(f"its pickle makes no sense ({type(e).__name__}: {str(e)[:80]})") from None
        if result is _MARK:
            raise CorruptCheckpoint("its pickle ends inside a list")
        return result

    def since_mark(self) -> list:
        for i in range(len(self.stack) - 1, -1, -1):
            if self.stack[i] is _MARK:
                items = self.stack[i + 1 :]
                del self.stack[i:]
                return items
        raise CorruptCheckpoint("its pickle closes a list that it did not open")

    # One method an operation; each gets the opcode's argument.

    def mark(self, _: Any) -> None:
        self.stack.append(_MARK)

    def skip(self, _: Any) -> None:
        pass

    def pop(self, _: Any) -> None:
        self.stack.pop()

    def empty_dict(self, _: Any) -> None:
        self.stack.append({})

    def empty_list(self, _: Any) -> None:
        self.stack.append([])

    def empty_tuple(self, _: Any) -> None:
        self.stack.append(())

    def make_tuple(self, _: Any) -> None:
        self.stack.append(tuple(self.since_mark()))

    def make_list(self, _: Any) -> None:
        self.stack.append(self.since_mark())

    def make_dict(self, _: Any) -> None:
        items = self.since_mark()
        self.stack.append({})
        self._update(self.stack[-1], items)

    def last_tuple(self, count: int) -> None:
        items = tuple(self.stack[-count:])
        if len(items) != count:
            raise CorruptCheckpoint("its pickle takes more than it has")
        del self.stack[-count:]
        self.stack.append(items)

    def append(self, _: Any) -> None:
        value = self.stack.pop()
        self._list().append(value)

    def appends(self, _: Any) -> None:
        items = self.since_mark()
        self._list().extend(items)

    def setitem(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update(self.stack[-1], [key, value])

    def setitems(self, _: Any) -> None:
        items = self.since_mark()
        self._update(self.stack[-1], items)

    def put(self, index: int) -> None:
        if self.stack[-1] is _MARK:
            raise CorruptCheckpoint("its pickle remembers the opening of a list")
        self.memo[int(index)] = self.stack[-1]

    def memoize(self, _: Any) -> None:
        self.put(len(self.memo))

    def get(self, index: int) -> None:
        self.stack.append(self.memo[int(index)])

    def name(self, arg: str) -> None:
        self._name(arg.replace(" ", ".", 1))

    def stack_name(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise CorruptCheckpoint("a global has no name")
        self._name(f"{module}.{name}")

    def reduce(self, _: Any) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Name) or not isinstance(args, tuple):
            raise UnsafeCheckpoint("its pickle calls something that it does not name")
        self._spend(sum(len(a) for a in args if isinstance(a, str | bytes | list | tuple | dict)))
        if function.path in RECORDS:
            self.stack.append(_record(function.path))
        elif function.path in REDUCERS:
            self.stack.append(REDUCERS[function.path](args))
        else:
            raise UnsafeCheckpoint(_refusal(function.path))

    def new_object(self, _: Any) -> None:
        args, cls = self.stack.pop(), self.stack.pop()
        if not isinstance(cls, Name) or args != ():
            raise UnsafeCheckpoint("its pickle makes an object with arguments")
        self.stack.append({} if cls.path == "collections.OrderedDict" else _record(cls.path))

    def build(self, _: Any) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, Inert):
            return  # a state dict's _metadata, say
        if target.kind == "numpy.dtype":
            if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|"):
                target["order"] = state[1]
            return
        if target.kind == "numpy.ndarray":
            if not isinstance(state, tuple) or len(state) != 5:
                raise CorruptCheckpoint("an array has no shape")
            target["shape"] = _whole(state[1], "shape")
            return
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
            state = {**(state[0] or {}), **state[1]} if isinstance(state[0], dict | None) else None
        if not isinstance(state, dict):
            raise CorruptCheckpoint(f"a {target.kind} has no fields")
        self._spend(len(state))
        if target.kind != "yacs.config.CfgNode":  # whose state is bookkeeping: its entries came as items
            target.update(state)

    def persistent_id(self, _: Any) -> None:
        pid = self.stack.pop()
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], Name):
            raise CorruptCheckpoint("a storage is not described as torch does it")
        key, (numel,) = pid[2], _whole((pid[4],), "storage")
        if not isinstance(key, str) or len(key) > 64:
            raise CorruptCheckpoint("a storage has no key")
        if len(pid) > 5 and pid[5] is not None:
            raise CorruptCheckpoint("a storage is a view of another: too old a file")
        ref = StorageRef(pid[1].path.rpartition(".")[2], key, numel)
        if self.persistent.setdefault(key, ref) != ref:
            raise CorruptCheckpoint(f"storage {key!r} is described twice, differently")
        self.stack.append(ref)

    def _spend(self, items: int) -> None:
        # a few operations can copy one long list again and again, so copies count as operations do
        self.copied += items
        if self.copied > self.max_ops:
            raise UnsafeCheckpoint(f"its pickle copies more than {self.max_ops:,} items")

    def _name(self, path: str) -> None:
        if not _is_known(path):
            raise UnsafeCheckpoint(_refusal(path[:120]))
        self.stack.append(Name(path))

    def _list(self) -> list:
        if not isinstance(self.stack[-1], list):
            raise CorruptCheckpoint("its pickle appends to what is no list")
        return self.stack[-1]

    def _update(self, target: Any, items: list) -> None:
        if not isinstance(target, dict) or len(items) % 2:
            raise CorruptCheckpoint("its pickle sets items of what is no dictionary")
        for i in range(0, len(items), 2):
            target[_key(items[i])] = items[i + 1]


# opcodes whose argument, as parsed, is the value
_PUSHES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip

_HANDLERS: dict[str, Callable[[Machine, Any], None]] = {
    "PROTO": Machine.skip,
    "FRAME": Machine.skip,
    "MARK": Machine.mark,
    "POP": Machine.pop,
    "POP_MARK": lambda m, _: m.since_mark() and None,
    "NONE": lambda m, _: m.stack.append(None),
    "NEWTRUE": lambda m, _: m.stack.append(True),
    "NEWFALSE": lambda m, _: m.stack.append(False),
    "EMPTY_DICT": Machine.empty_dict,
    "EMPTY_LIST": Machine.empty_list,
    "EMPTY_SET": Machine.empty_list,
    "ADDITEMS": Machine.appends,
    "EMPTY_TUPLE": Machine.empty_tuple,
    "TUPLE": Machine.make_tuple,
    "TUPLE1": lambda m, _: m.last_tuple(1),
    "TUPLE2": lambda m, _: m.last_tuple(2),
    "TUPLE3": lambda m, _: m.last_tuple(3),
    "LIST": Machine.make_list,
    "DICT": Machine.make_dict,
    "APPEND": Machine.append,
    "APPENDS": Machine.appends,
    "SETITEM": Machine.setitem,
    "SETITEMS": Machine.setitems,
    "PUT": Machine.put,
    "BINPUT": Machine.put,
    "LONG_BINPUT": Machine.put,
    "MEMOIZE": Machine.memoize,
    "GET": Machine.get,
    "BINGET": Machine.get,
    "LONG_BINGET": Machine.get,
    "GLOBAL": Machine.name,
    "STACK_GLOBAL": Machine.stack_name,
    "REDUCE": Machine.reduce,
    "NEWOBJ": Machine.new_object,
    "BUILD": Machine.build,
    "BINPERSID": Machine.persistent_id,
}
