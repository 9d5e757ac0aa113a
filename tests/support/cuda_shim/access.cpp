// Called before every load and store of a kernel (what -fsanitize=thread compiles in, answered here and not by its own
// library): the address must be in live device memory, in the block's shared memory or on the thread's own stack. For
// some seeds other threads run first, now and then, so that what is changed without an atomic can be lost.
#include "access.h"

#include <dlfcn.h>

#include "faults.h"
#include "memory.h"
#include "scheduler.h"

namespace {
constexpr unsigned ONE_IN = 24;  // accesses at which others run, where they do: a few for each thread of a kernel
unsigned long long until_others;  // accesses
constexpr int KNOWN = 8;
Range known[KNOWN];  // where accesses went last
int next_known;

unsigned long long next_pause() { return launch.fine ? 1 + below(2 * ONE_IN) : ~0ull; }

bool inside(Range range, uintptr_t address, size_t bytes) {
  return address >= range.begin && address + bytes <= range.end;
}

bool remembered(Range range, uintptr_t address, size_t bytes) {
  if (!inside(range, address, bytes)) return false;
  known[next_known] = range;
  next_known = (next_known + 1) % KNOWN;
  return true;
}

// Constants of the kernel's own library.
bool constant(uintptr_t address) {
  Dl_info found, kernel;
  return dladdr((void*)address, &found) && dladdr((void*)launch.entry, &kernel) && found.dli_fbase == kernel.dli_fbase;
}

void check(uintptr_t address, size_t bytes, const char* what, uintptr_t caller) {
  Fiber const& f = *current();
  uintptr_t const place = (uintptr_t)&f.place, shared = (uintptr_t)f.block->shared, stack = (uintptr_t)f.stack;
  if (address - place < sizeof f.place) return;  // threadIdx, blockIdx
  if (address - (uintptr_t)&cuda_shim::visible < sizeof cuda_shim::visible) return;  // and the way there, blockDim, …
  if (inside({shared, shared + launch.shared_bytes}, address, bytes)) return;
  for (Range const& range : known)
    if (inside(range, address, bytes)) return;
  if (inside({stack, stack + STACK_BYTES}, address, bytes)) return;
  if (remembered(allocation_of(address), address, bytes)) return;
  if (constant(address)) return;
  char where[256];
  long long const offset = (long long)(address - shared);
  if (shared && offset > -(1 << 20) && offset < (1 << 20))
    snprintf(where, sizeof where, "byte %lld of %zu bytes of shared memory", offset, launch.shared_bytes);
  else
    cuda_shim_describe((void*)address, where, sizeof where);
  fail("illegal %s of %zu bytes: %s%s", what, bytes, where, instruction(caller).text);
}

void access(uintptr_t address, size_t bytes, const char* what, void* caller) {
  check(address, bytes, what, (uintptr_t)caller - 1);
  if (--until_others == 0) {
    until_others = next_pause();
    let_others_run();
  }
}
}  // namespace

void prepare_accesses() {
  for (Range& range : known) range = {0, 0};
  until_others = next_pause();
}

namespace cuda_shim {
void before_atomic(const volatile void* address, unsigned bytes, const void* caller) {
  uintptr_t const from = (uintptr_t)caller - 1;
  if ((uintptr_t)address % bytes) fail("atomic on an address that is not a multiple of %u%s", bytes, instruction(from).text);
  check((uintptr_t)address, bytes, "atomic", from);
  if (below(2)) let_others_run();
}
}  // namespace cuda_shim

extern "C" {
#define ACCESS(N)                                                                                         \
  void __tsan_read##N(uintptr_t address) { access(address, N, "load", __builtin_return_address(0)); }   \
  void __tsan_write##N(uintptr_t address) { access(address, N, "store", __builtin_return_address(0)); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __tsan_read_range(uintptr_t address, size_t n) { access(address, n, "load", __builtin_return_address(0)); }
void __tsan_write_range(uintptr_t address, size_t n) { access(address, n, "store", __builtin_return_address(0)); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
