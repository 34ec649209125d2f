"""Compiles Triton kernels as a launch would, for a GPU that is not there."""

import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

SHARED_KIB = {80: 163, 89: 99, 90: 227, 100: 227}
FEW = 16  # bytes spilled of one thread: one version of ptxas does, the next does not
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32"}


class Recorder:
    """In a kernel's place: takes a launch, and keeps its arguments."""

    def __init__(self, kernel):
        self.kernel, self.launches, self.arg_names = kernel, [], kernel.arg_names

    def __getitem__(self, grid):
        return lambda *args, **named: self.launches.append((args, named))

    def compile(self, capability: int) -> list:
        return [_compile(self.kernel, args, named, capability) for args, named in self.launches]


def _compile(kernel, args, named, capability):
    options = {k: named[k] for k in ("num_warps", "num_stages", "maxnreg") if k in named}
    constants = {k: v for k, v in named.items() if k not in options}
    values = dict(zip([n for n in kernel.arg_names if n not in constants], args, strict=True))
    signature, constexprs, attrs = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = constants.get(name, values.get(name))
        if name in constants or value is None or (isinstance(value, int) and value == 1):
            signature[name], constexprs[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + _NAMES[value.dtype]
            attrs[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{_NAMES[value.base.dtype]}{value.block_shape}>"
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def usage(compiled) -> dict[str, int]:
    """By cuobjdump's names, of a thread: REG, its registers; STACK, the bytes of its stack, where spilled registers lie
    (LOCAL is 0 even then)."""
    tool = next(Path(triton.__file__).parent.rglob("cuobjdump"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        out = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout
    line = next(line for line in out.splitlines() if "REG:" in line)
    return {name: int(number) for name, number in re.findall(r"(\w+)(?:\[\d+\])?:(\d+)", line)}


def record(monkeypatch, module, *names: str) -> list[Recorder]:
    """Recorders in the place of a module's kernels."""
    recorders = [Recorder(getattr(module, name)) for name in names]
    for name, recorder in zip(names, recorders, strict=True):
        monkeypatch.setattr(module, name, recorder)
    if hasattr(module, "_plans"):  # those of other tests launch the kernels themselves
        monkeypatch.setattr(module, "_plans", type(module._plans)())
    return recorders


def check(recorders: list[Recorder], capability: int, spills: dict[str, int] | None = None) -> None:
    """Every kernel was launched, compiles, fits the shared memory, and spills no more bytes a thread than `spills`
    says: FEW where it names other kernels, anything where it is None."""
    for recorder in recorders:
        name = recorder.kernel.__name__
        assert recorder.launches, name
        for compiled in recorder.compile(capability):
            assert compiled.asm["ptx"]
            assert compiled.metadata.shared <= SHARED_KIB[capability] * 1024, name
            if spills is not None:
                assert usage(compiled)["STACK"] <= spills.get(name, FEW), (name, usage(compiled))
