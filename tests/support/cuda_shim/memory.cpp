// Device memory that notices misuse: every allocation lies between two stretches that no one may touch, is poisoned
// when fresh, carries canaries up to those stretches, and is closed (not unmapped) for a while when freed.
//
//   | closed … | canary … canary | data, 256-aligned … | canary to the next 256 bytes | closed … |
//
// So a read or write far outside faults at once; a write just outside breaks a canary, which cuda_shim_check finds.
#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>

namespace {
constexpr size_t ALIGNMENT = 256;       // what cudaMalloc promises
constexpr size_t CLOSED = 1 << 20;      // on either side; address space costs no memory, while it is closed
constexpr size_t QUARANTINE_BYTES = (size_t)16 << 30;
constexpr size_t QUARANTINE_PIECES = 2048;
constexpr unsigned char CANARY = 0xC5;

struct Allocation {
  unsigned char* mapping;
  size_t mapped, bytes;
};
std::map<uintptr_t, Allocation> live;
std::deque<Allocation> quarantine;
size_t quarantined = 0;

size_t page() { return (size_t)sysconf(_SC_PAGESIZE); }
size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

bool all_canary(const unsigned char* begin, const unsigned char* end) {
  static unsigned char* const pattern = (unsigned char*)memset(new unsigned char[4096], CANARY, 4096);
  for (; begin < end; begin += 4096) {
    size_t const left = (size_t)(end - begin);
    if (memcmp(begin, pattern, left < 4096 ? left : 4096)) return false;
  }
  return true;
}

bool intact(uintptr_t data, const Allocation& a) {
  const unsigned char* const begin = (const unsigned char*)data;
  return all_canary(a.mapping + CLOSED, begin) && all_canary(begin + a.bytes, a.mapping + a.mapped - CLOSED);
}
}  // namespace

Range allocation_of(uintptr_t address) {
  auto it = live.upper_bound(address);
  if (it == live.begin()) return {0, 0};
  --it;
  Range const found = {it->first, it->first + it->second.bytes};
  return address < found.end ? found : Range{0, 0};
}

extern "C" {

void* cuda_shim_alloc(size_t bytes, int poison) {
  size_t const room = round_up(bytes ? bytes : 1, ALIGNMENT);
  size_t const inner = round_up(room, page());
  size_t const mapped = inner + 2 * CLOSED;
  void* const raw = mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  unsigned char* const mapping = (unsigned char*)raw;
  if (mprotect(mapping + CLOSED, inner, PROT_READ | PROT_WRITE)) return nullptr;
  unsigned char* const data = mapping + CLOSED + inner - room;
  memset(mapping + CLOSED, CANARY, inner);
  memset(data, poison, bytes);
  live[(uintptr_t)data] = {mapping, mapped, bytes};
  return data;
}

// 0: freed; 1: not the start of a live allocation; 2: freed, and its surroundings had been written to.
int cuda_shim_free(void* data) {
  auto const it = live.find((uintptr_t)data);
  if (it == live.end()) return 1;
  Allocation const a = it->second;
  bool const sound = intact(it->first, a);
  live.erase(it);
  madvise(a.mapping, a.mapped, MADV_DONTNEED);
  mprotect(a.mapping, a.mapped, PROT_NONE);
  quarantine.push_back(a);
  quarantined += a.mapped;
  while (quarantined > QUARANTINE_BYTES || quarantine.size() > QUARANTINE_PIECES) {
    quarantined -= quarantine.front().mapped;
    munmap(quarantine.front().mapping, quarantine.front().mapped);
    quarantine.pop_front();
  }
  return sound ? 0 : 2;
}

// The address of the first live allocation whose surroundings were written to, or null.
void* cuda_shim_check() {
  for (auto const& [data, a] : live)
    if (!intact(data, a)) return (void*)data;
  return nullptr;
}

// Whether [address, address + bytes) lies within one live allocation.
int cuda_shim_owns(const void* address, size_t bytes) {
  Range const found = allocation_of((uintptr_t)address);
  return found.end && (uintptr_t)address + bytes <= found.end;
}

void cuda_shim_describe(const void* address, char* out, size_t size) {
  uintptr_t const at = (uintptr_t)address;
  for (auto const& [data, a] : live)
    if (at >= (uintptr_t)a.mapping && at < (uintptr_t)a.mapping + a.mapped) {
      long long const offset = (long long)(at - data);
      snprintf(out, size, "byte %lld of an allocation of %zu bytes", offset, a.bytes);
      return;
    }
  for (auto const& a : quarantine)
    if (at >= (uintptr_t)a.mapping && at < (uintptr_t)a.mapping + a.mapped) {
      snprintf(out, size, "inside a freed allocation of %zu bytes", a.bytes);
      return;
    }
  snprintf(out, size, "address %p, in no allocation", address);
}

}  // extern "C"
