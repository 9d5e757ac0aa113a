// Runs a kernel: every thread is a fiber, a few blocks are alive at once, and a seeded generator says which thread goes
// on whenever one has to wait (or meets an atomic). One launch at a time; the caller holds a lock.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "faults.h"
#define CUDA_SHIM_DEFINES_SWITCH
#include "access.h"
#include "scheduler.h"

namespace cuda_shim {
Visible visible;
}  // namespace cuda_shim
Launch launch;

namespace {
using cuda_shim::u64;

constexpr unsigned MAX_THREADS = 1024;   // CUDA's limit on threads of a block
constexpr unsigned char SHARED_POISON = 0xA5;
constexpr size_t SHARED_CLOSED = 1 << 20;



Block* blocks[16];
std::vector<Fiber*> ready;
Context main_context;
u64 random_state;
char message[1024];
bool failed;
Block* finished;

u64 next_random() {  // xorshift64*, Vigna 2016
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return random_state * 2685821657736338717ULL;
}

[[noreturn]] void to_main() {
  Context dropped;
  context_switch(dropped, main_context);
  __builtin_unreachable();
}

int place_words(char* out, size_t size, const Fiber* f) {
  auto const& b = f->place.block;
  auto const& t = f->place.thread;
  return snprintf(out, size, "block (%u, %u, %u) thread (%u, %u, %u)", b.x, b.y, b.z, t.x, t.y, t.z);
}

}  // namespace

unsigned below(unsigned n) { return (unsigned)(((next_random() >> 32) * (u64)n) >> 32); }

Fiber* current() { return (Fiber*)cuda_shim::visible.self; }

void fail(const char* format, ...) {
  int n = snprintf(message, sizeof message, "kernel %s, ", launch.name);
  n += place_words(message + n, sizeof message - (size_t)n, current());
  n += snprintf(message + n, sizeof message - (size_t)n, ": ");
  va_list list;
  va_start(list, format);
  vsnprintf(message + n, sizeof message - (size_t)n, format, list);
  va_end(list);
  failed = true;
  to_main();
}

namespace {
// 0: any thread that can go on, each as likely; 1: the one that got ready last, so that threads run far ahead of the
// others; 2: mostly the last, now and then another.
Fiber* pick() {
  size_t const n = ready.size();
  bool const newest = launch.order == 1 ? below(64) != 0 : launch.order == 2 && below(8) != 0;
  size_t const i = newest ? n - 1 : below((unsigned)n);
  Fiber* const f = ready[i];
  ready[i] = ready.back();
  ready.pop_back();
  return f;
}

void run_another() {
  Fiber* const from = current();
  if (ready.empty()) to_main();  // a deadlock, or nothing left: main sees which
  Fiber* const to = pick();
  if (to == from) return;
  cuda_shim::visible.self = &to->place;
  context_switch(from->context, to->context);
}

void wake(Fiber* f) {
  f->state = READY;
  ready.push_back(f);
}

const char* kind_name(int kind) {
  static const char* const names[] = {"__syncwarp", "__ballot_sync", "__any_sync", "__all_sync",
                                      "__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync"};
  return names[kind];
}

u64 warp_result(Fiber* warp, unsigned lane, unsigned lanes, unsigned mask) {
  using namespace cuda_shim;
  Fiber& f = warp[lane];
  unsigned votes = 0;
  if (f.kind <= ALL)
    for (unsigned i = 0; i < lanes; ++i)
      if (mask >> i & 1u) votes |= (unsigned)(f.kind != SYNCWARP && warp[i].value) << i;
  switch (f.kind) {
    case SYNCWARP: return 0;
    case BALLOT: return votes;
    case ANY: return votes != 0;
    case ALL: return votes == mask;
    default: break;
  }
  // PTX ISA, "shfl.sync": sources outside the lane's segment of `width` lanes give the lane's own value.
  int const first = (int)lane & ~(f.width - 1), last = first + f.width - 1;
  int source = (int)lane;
  if (f.kind == SHFL) source = first | (f.argument & (f.width - 1));
  if (f.kind == SHFL_UP) source = (int)lane - f.argument;
  if (f.kind == SHFL_DOWN) source = (int)lane + f.argument;
  if (f.kind == SHFL_XOR) source = (int)lane ^ f.argument;
  if (f.kind == SHFL_UP ? source < first : source > last) source = (int)lane;
  if (source < 0 || source > 31 || !(mask >> source & 1u))
    fail("%s reads lane %d, which mask %#x does not name", kind_name(f.kind), source, mask);
  return warp[source].value;
}

void run_thread() {
  for (;;) {
    Fiber* const f = current();
    launch.entry(launch.args);
    f->state = DONE;
    Block& block = *f->block;
    if (block.arrived) fail("exits while %u threads of its block wait at a barrier", block.arrived);
    unsigned const base = f->index & ~31u;
    for (unsigned i = base; i < base + 32 && i < launch.threads; ++i) {
      Fiber const& other = block.fibers[i];
      if (other.state == AT_WARP && (other.mask >> (f->index - base) & 1u))
        fail("exits while lane %u waits for it in %s(mask %#x)", i - base, kind_name(other.kind), other.mask);
    }
    ++block.exited;
    if (--block.alive == 0) {
      finished = &block;
      to_main();
    }
    run_another();
  }
}

void make_stacks(Block& block) {
  size_t const page = (size_t)sysconf(_SC_PAGESIZE);
  size_t const each = STACK_BYTES + page;
  unsigned char* const area = (unsigned char*)mmap(nullptr, each * MAX_THREADS, PROT_READ | PROT_WRITE,
                                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (area == MAP_FAILED) abort();
  block.fibers.resize(MAX_THREADS);
  for (unsigned i = 0; i < MAX_THREADS; ++i) {
    mprotect(area + i * each, page, PROT_NONE);
    block.fibers[i].stack = area + i * each + page;
    block.fibers[i].block = &block;
    block.fibers[i].index = i;
  }
}

void make_shared(Block& block) {
  size_t const page = (size_t)sysconf(_SC_PAGESIZE);
  size_t const room = (launch.shared_bytes + page - 1) / page * page;
  if (room > block.shared_room) {
    if (block.shared_map) munmap(block.shared_map - SHARED_CLOSED, block.shared_room + 2 * SHARED_CLOSED);
    void* const map = mmap(nullptr, room + 2 * SHARED_CLOSED, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) abort();
    block.shared_map = (unsigned char*)map + SHARED_CLOSED;
    if (mprotect(block.shared_map, room, PROT_READ | PROT_WRITE)) abort();
    block.shared_room = room;
  }
  // It ends where what is closed begins, but for the rounding that keeps its start aligned to 16.
  block.shared = block.shared_map ? block.shared_map + block.shared_room - (launch.shared_bytes + 15) / 16 * 16 : nullptr;
  if (block.shared) memset(block.shared_map, SHARED_POISON, block.shared_room);
}

bool shared_sound(const Block& block) {
  if (!block.shared) return true;
  for (const unsigned char* p = block.shared_map; p < block.shared; ++p)
    if (*p != SHARED_POISON) return false;
  for (const unsigned char* p = block.shared + launch.shared_bytes; p < block.shared_map + block.shared_room; ++p)
    if (*p != SHARED_POISON) return false;
  return true;
}

void start(Block& block, u64 number) {
  auto const& grid = cuda_shim::visible.grid;
  auto const& dim = cuda_shim::visible.block;
  uint3 const at = {(unsigned)(number % grid.x), (unsigned)(number / grid.x % grid.y),
                    (unsigned)(number / grid.x / grid.y)};
  make_shared(block);
  block.alive = launch.threads;
  block.arrived = block.exited = 0;
  size_t const base = ready.size();
  for (unsigned i = 0; i < launch.threads; ++i) {
    Fiber& f = block.fibers[i];
    f.place.block = at;
    f.place.thread = {i % dim.x, i / dim.x % dim.y, i / dim.x / dim.y};
    f.state = READY;
    // Stacks a whole number of pages apart would share a few cache sets: each begins some lines further down.
    context_start(f.context, f.stack, STACK_BYTES - 64 * (i % 31), run_thread);
    ready.push_back(&f);
    std::swap(ready.back(), ready[base + below(i + 1)]);
  }
}

void describe_deadlock() {
  int n = snprintf(message, sizeof message, "kernel %s: no thread can go on;", launch.name);
  unsigned shown = 0, waiting = 0;
  for (unsigned slot = 0; slot < launch.resident; ++slot)
    for (unsigned i = 0; blocks[slot]->alive && i < launch.threads; ++i) {
      Fiber const& f = blocks[slot]->fibers[i];
      if (f.state != AT_BARRIER && f.state != AT_WARP) continue;
      ++waiting;
      bool const news = i == 0 || f.state != blocks[slot]->fibers[i - 1].state || f.mask != blocks[slot]->fibers[i - 1].mask;
      if (!news || shown == 4 || n > 800) continue;
      ++shown;
      n += snprintf(message + n, sizeof message - (size_t)n, " ");
      n += place_words(message + n, sizeof message - (size_t)n, &f);
      if (f.state == AT_BARRIER) n += snprintf(message + n, sizeof message - (size_t)n, " waits at __syncthreads;");
      else n += snprintf(message + n, sizeof message - (size_t)n, " waits in %s(mask %#x);", kind_name(f.kind), f.mask);
    }
  snprintf(message + n, sizeof message - (size_t)n, " %u threads wait in all", waiting);
  failed = true;
}

// Runs the blocks in a random order, `resident` at a time.
void run_blocks(u64 n_blocks) {
  u64 begun = 0;
  // A stride coprime to the count visits every block once.
  u64 stride = n_blocks > 2 ? 1 + next_random() % (n_blocks - 1) : 1;
  auto coprime = [&] {
    u64 a = n_blocks, b = stride;
    while (b) a %= b, std::swap(a, b);
    return a == 1;
  };
  while (!coprime()) stride = stride % n_blocks + 1;
  u64 const offset = next_random() % n_blocks;
  auto number = [&] { return (u64)(((unsigned __int128)begun++ * stride + offset) % n_blocks); };
  for (unsigned slot = 0; slot < launch.resident; ++slot) {
    blocks[slot]->alive = 0;
    if (begun < n_blocks) start(*blocks[slot], number());
  }
  for (u64 done = 0; done < n_blocks;) {
    if (ready.empty()) return describe_deadlock();
    Fiber* const f = pick();
    cuda_shim::visible.self = &f->place;
    finished = nullptr;
    context_switch(main_context, f->context);
    if (failed) return;
    if (!finished) continue;
    ++done;
    if (!shared_sound(*finished)) {
      snprintf(message, sizeof message, "kernel %s, block (%u, %u, %u): wrote outside its %zu bytes of shared memory", launch.name,
               finished->fibers[0].place.block.x, finished->fibers[0].place.block.y, finished->fibers[0].place.block.z,
               launch.shared_bytes);
      failed = true;
      return;
    }
    if (begun < n_blocks) start(*finished, number());
  }
}
}  // namespace

void let_others_run() {
  wake(current());
  run_another();
}

namespace cuda_shim {
int barrier(int kind, int predicate) {
  Fiber* const f = current();
  Block& block = *f->block;
  if (block.exited) fail("reaches a barrier after %u threads of its block have exited", block.exited);
  if (block.arrived == 0) block.barrier_kind = kind, block.barrier_count = 0;
  if (block.barrier_kind != kind) fail("meets threads of its block at another kind of barrier");
  block.barrier_count += predicate != 0;
  f->state = AT_BARRIER;
  if (++block.arrived == launch.threads) {
    int const votes = block.barrier_count;
    u64 const all = (unsigned)votes == launch.threads;
    u64 const result = kind == COUNT ? (u64)votes : kind == AND ? all : kind == OR ? (u64)(votes != 0) : 0;
    block.arrived = 0;
    size_t const base = ready.size();
    for (unsigned i = 0; i < launch.threads; ++i) {
      block.fibers[i].result = result;
      wake(&block.fibers[i]);
      std::swap(ready.back(), ready[base + below(i + 1)]);
    }
  }
  run_another();
  return (int)f->result;
}

u64 warp(int kind, unsigned mask, u64 value, int argument, int width) {
  Fiber* const f = current();
  unsigned const base = f->index & ~31u, lane = f->index - base;
  unsigned const lanes = launch.threads - base < 32 ? launch.threads - base : 32;
  Fiber* const warp = &f->block->fibers[base];
  if (!(mask >> lane & 1u)) fail("calls %s with mask %#x, which does not name its own lane %u", kind_name(kind), mask, lane);
  if (width < 1 || width > 32 || (width & (width - 1))) fail("%s: width %d is no power of two up to 32", kind_name(kind), width);
  f->kind = kind, f->mask = mask, f->value = value, f->argument = argument, f->width = width;
  f->state = AT_WARP;
  bool complete = true;
  for (unsigned i = 0; i < 32; ++i) {
    if (!(mask >> i & 1u)) continue;
    if (i >= lanes) fail("%s: mask %#x names lane %u of a warp of %u threads", kind_name(kind), mask, i, lanes);
    Fiber const& other = warp[i];
    if (other.state == DONE) fail("%s: mask %#x names lane %u, which has exited", kind_name(kind), mask, i);
    if (other.state != AT_WARP) complete = false;
    else if (other.kind != kind || other.mask != mask)
      fail("%s(mask %#x) meets lane %u in %s(mask %#x)", kind_name(kind), mask, i, kind_name(other.kind), other.mask);
  }
  if (complete) {
    for (unsigned i = 0; i < lanes; ++i)
      if (mask >> i & 1u) warp[i].result = warp_result(warp, i, lanes, mask);
    for (unsigned i = 0; i < lanes; ++i)
      if (mask >> i & 1u) wake(&warp[i]);
  }
  run_another();
  return f->result;
}

unsigned char* dynamic_shared() { return current()->block->shared; }

void trap(const char* what) { fail("%s", what); }
}  // namespace cuda_shim

extern "C" {

// Runs one kernel to its end. 0: done; 1: failed, with the reason in `error`.
int cuda_shim_launch(void (*entry)(void**), const char* name, const unsigned* grid, const unsigned* block,
                     unsigned long long shared_bytes, void** args, unsigned long long seed, unsigned resident,
                     double limit_s, char* error, unsigned long long error_size) {
  random_state = seed * 0x9E3779B97F4A7C15ULL + 0xD1B54A32D192ED03ULL;
  if (!random_state) random_state = 1;
  for (int i = 0; i < 4; ++i) next_random();
  cuda_shim::visible.grid = {grid[0], grid[1], grid[2]};
  cuda_shim::visible.block = {block[0], block[1], block[2]};
  launch = {entry, args, name, block[0] * block[1] * block[2], 1 + below(resident < 16 ? resident : 16),
            (size_t)shared_bytes, (int)below(4) - 1, below(2) != 0};
  prepare_accesses();
  for (unsigned slot = 0; slot < launch.resident; ++slot)
    if (!blocks[slot]) make_stacks(*(blocks[slot] = new Block));
  ready.clear();
  ready.reserve((size_t)launch.resident * MAX_THREADS + 1);
  failed = false;
  message[0] = 0;
  {
    Faults const watch(limit_s, [](const char* what) { fail("%s", what); });
    run_blocks((u64)grid[0] * grid[1] * grid[2]);
  }
  if (failed) snprintf(error, error_size, "%s", message);
  return failed;
}

}  // extern "C"
