// The threads and blocks of the running kernel, as access.cpp sees them.
#pragma once

#include <cstddef>
#include <vector>

#include "fiber.h"
#include "shim.h"

constexpr size_t STACK_BYTES = 32 << 10;  // kernels keep little on their stacks; the page below each is closed

enum State : unsigned char { READY, AT_BARRIER, AT_WARP, DONE };

struct Block;
struct Fiber {
  cuda_shim::Place place;  // first: `visible.self` points here
  Block* block;
  Context context;
  unsigned char* stack;    // its lowest usable byte
  cuda_shim::u64 value, result;  // what a warp primitive was given and what it returns
  unsigned index, mask;
  int kind, argument, width;
  State state;
};
static_assert(offsetof(Fiber, place) == 0);

struct Block {
  std::vector<Fiber> fibers;
  unsigned char* shared_map = nullptr;  // | closed … | room | closed … |: where the room begins
  unsigned char* shared = nullptr;
  size_t shared_room = 0;
  unsigned alive = 0, arrived = 0, exited = 0;
  int barrier_kind = 0, barrier_count = 0;
};

struct Launch {
  void (*entry)(void**);
  void** args;
  const char* name;
  unsigned threads, resident;
  size_t shared_bytes;
  int order;   // how the next thread is chosen, see pick()
  bool fine;   // whether other threads may run before any load or store
};
extern Launch launch;

Fiber* current();
[[noreturn]] void fail(const char* format, ...);  // ends the launch with a message; runs on a fiber
void let_others_run();
unsigned below(unsigned n);  // a random number of the launch's seed
