"""Runs the engine's CUDA kernels on the CPU, and stands in for CuPy. For tests; it says nothing about
speed.

**Kernels.** `compile_program(path or text, options)["name"]`, or `.run(…)` on NumPy arrays. g++
compiles the `.cu` text as it is behind `shim.h`, which is CUDA's language as far as our kernels may use
it. Threads are fibers; a seed chooses their order, the blocks' order and how many blocks are alive at
once, at every barrier, warp primitive and atomic, and for half the seeds at plain loads and stores too.
`KernelFault` names kernel, block, thread and line of: an access outside live device memory, shared
memory or the stack; misalignment; signed overflow, shifts too far; a barrier that some threads never
reach; a warp primitive whose mask names a lane that exited or does something else; a deadlock; a kernel
that does not end.

*Not seen:* effects of a GPU's weak memory order (fences do nothing here); use of another device's
memory by an address found in memory; registers, occupancy and time; floating-point contraction.

**CuPy.** `fixtures.fake_cupy` or `fixtures.installed(seed)` puts a module `cupy` into `sys.modules`:
devices with budgets, guarded and poisoned memory, streams that run only when the host waits and then in
a random order within stream and event order. What CuPy refuses is refused, and so is what it would do
in silence: the default stream, arguments of another width, an empty grid, memory used after its stream
gave it back (`errors.Misuse`; a test that swallows one fails in the end). Semantics: CuPy 14's sources,
named in each file.
"""

from cuda_shim.build import CompilationFailed
from cuda_shim.program import BadLaunch, KernelFault, Program, compile_program
from cuda_shim.source import UnreadableSource

__all__ = ["BadLaunch", "CompilationFailed", "KernelFault", "Program", "UnreadableSource", "compile_program"]
