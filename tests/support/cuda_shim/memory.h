// What memory.cpp offers to the rest of the runtime.
#pragma once

#include <cstddef>
#include <cstdint>

struct Range { uintptr_t begin, end; };

// The live allocation that holds `address`, or an empty range.
Range allocation_of(uintptr_t address);

// What an address is, in words, for an error message.
extern "C" void cuda_shim_describe(const void* address, char* out, size_t size);
