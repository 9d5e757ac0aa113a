// Switching between stacks: a few instructions on x86-64, ucontext elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__) && !defined(CUDA_SHIM_UCONTEXT)

struct Context { void* sp; };

// Saves what a called function must preserve, swaps the stack pointer and returns on the other stack.
extern "C" void cuda_shim_switch(void** save, void* load);
#ifdef CUDA_SHIM_DEFINES_SWITCH
asm(R"(
.text
.hidden cuda_shim_switch
.globl cuda_shim_switch
.type cuda_shim_switch, @function
cuda_shim_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size cuda_shim_switch, .-cuda_shim_switch
)");
#endif

inline void context_switch(Context& from, Context& to) { cuda_shim_switch(&from.sp, to.sp); }

// `run` must never return.
inline void context_start(Context& context, unsigned char* stack, size_t bytes, void (*run)()) {
  uintptr_t const top = ((uintptr_t)stack + bytes) & ~(uintptr_t)15;
  void** sp = (void**)top;
  *--sp = nullptr;       // where `run` would return to; also keeps the alignment that a call leaves
  *--sp = (void*)run;
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  context.sp = sp;
}

#else

#include <ucontext.h>

struct Context { ucontext_t state; };

inline void context_switch(Context& from, Context& to) { swapcontext(&from.state, &to.state); }

inline void context_start(Context& context, unsigned char* stack, size_t bytes, void (*run)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack;
  context.state.uc_stack.ss_size = bytes;
  context.state.uc_link = nullptr;
  makecontext(&context.state, run, 0);
}

#endif
