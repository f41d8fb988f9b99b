"""Compile a Triton kernel for a GPU that is not there, and read what came out.

The pip wheel of Triton carries ptxas and cuobjdump, so registers, spills and machine code of a Hopper kernel can be
looked at, and asserted in tests, on a laptop.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

HOPPER = GPUTarget("cuda", 90, 32)


@dataclass(frozen=True)
class Compiled:
    """What ptxas made of a kernel.

    Attributes:
        registers: per thread.
        stack_bytes: local memory per thread; 0 means that nothing spilled.
        shared_bytes: shared memory per program.
        num_threads: per program, warp-specialised workers included.
        sass: machine code, one instruction a line.
        ttgir: Triton's GPU dialect, where layouts and pipelining can be read.
    """

    registers: int
    stack_bytes: int
    shared_bytes: int
    num_threads: int
    sass: str
    ttgir: str

    def opcodes(self) -> Counter[str]:
        """How often each opcode stands in the machine code, modifiers dropped: HGMMA, HMMA, LDGSTS, LOP3, …"""
        return Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9]*)", self.sass))


def tool(name: str) -> str:
    """Path of a CUDA tool that Triton's wheel carries."""
    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)


def compile_for_hopper(
    kernel,
    signature: Mapping[str, str],
    constexprs: Mapping[str, object],
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    maxnreg: int | None = None,
    divisible_by_16: tuple[str, ...] = (),
) -> Compiled:
    """Compile a `triton.jit` or `gluon.jit` function for sm_90a without a GPU.

    Args:
        kernel: the jitted function, decorated while TRITON_INTERPRET was not set.
        signature: Triton's type of each run-time argument ("*bf16", "i32", "tensordesc<bf16[64, 128]>", …; a Gluon
            descriptor's has its layout too: "tensordesc<bf16[64, 128],NVMMASharedLayout(…)>").
        constexprs: the values of the compile-time arguments, and None for pointers and descriptors that are None.
        num_warps, num_stages, maxnreg: as the launcher takes them.
        divisible_by_16: integer arguments that the launcher would find divisible by 16. Pointers always are.

    Raises:
        ValueError: an argument of the kernel that is in neither mapping or in both, or a name that is not one of its.
    """
    names = list(kernel.arg_names)
    stated = [*signature, *constexprs]
    if sorted(stated) != sorted(names):
        wrong = set(stated) ^ set(names) or {name for name in signature if name in constexprs}
        raise ValueError(f"signature and constexprs must name each argument once; see {', '.join(sorted(wrong))}")
    aligned = [name for name in names if signature.get(name, "").startswith("*") or name in divisible_by_16]
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(
        fn=kernel,
        signature={name: signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if maxnreg is not None:
        options["maxnreg"] = maxnreg
    compiled = triton.compile(source, target=HOPPER, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True)
        sass = subprocess.run([tool("cuobjdump"), "-sass", file.name], capture_output=True, text=True, check=True)
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage.stdout).group(1)) for key in ("REG", "STACK"))
    return Compiled(
        registers=registers,
        stack_bytes=stack,
        shared_bytes=compiled.metadata.shared,
        num_threads=32 * compiled.metadata.num_warps,
        sass=sass.stdout,
        ttgir=compiled.asm["ttgir"],
    )
