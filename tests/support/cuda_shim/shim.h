// The part of CUDA's device language that our kernels may use, for g++: forced in front of a .cu file.
//
// Whatever makes one thread wait for another, or that others can see happening (barriers, warp primitives, atomics), is
// a call into scheduler.cpp, which may run other threads first; so is, for some seeds, any load or store (access.cpp).
// No standard header is included, as NVRTC has none: a kernel that needs one fails here too.
#pragma once

#define CUDA_SHIM 1
#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)  // checked by the launcher, which reads it from the source

using size_t = decltype(sizeof(0));

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x, y, z; };
struct alignas(4) uchar4 { unsigned char x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) longlong2 { long long x, y; };
struct alignas(16) ulonglong2 { unsigned long long x, y; };
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace cuda_shim {
using u64 = unsigned long long;
struct Place { uint3 thread, block; };  // the first member of every fiber
struct Visible { Place* self; dim3 grid, block; };
extern Visible visible;  // of the running thread

enum Barrier { SYNC, COUNT, AND, OR };
enum Warp { SYNCWARP, BALLOT, ANY, ALL, SHFL, SHFL_UP, SHFL_DOWN, SHFL_XOR };

int barrier(int kind, int predicate);
u64 warp(int kind, unsigned mask, u64 value, int argument, int width);
void before_atomic(const volatile void* address, unsigned bytes, const void* caller);  // others may run first
unsigned char* dynamic_shared();
[[noreturn]] void trap(const char* what);

template <class T> u64 bits(T value) {
  u64 out = 0;
  __builtin_memcpy(&out, &value, sizeof(T));
  return out;
}
template <class T> T from_bits(u64 value) {
  T out;
  __builtin_memcpy(&out, &value, sizeof(T));
  return out;
}
template <class T> T same(T value) { return value; }
}  // namespace cuda_shim

#define threadIdx (::cuda_shim::visible.self->thread)
#define blockIdx (::cuda_shim::visible.self->block)
#define blockDim (::cuda_shim::visible.block)
#define gridDim (::cuda_shim::visible.grid)
#define warpSize 32
#define DYNAMIC_SHARED(name) unsigned char* const name = ::cuda_shim::dynamic_shared()

inline void __syncthreads() { cuda_shim::barrier(cuda_shim::SYNC, 0); }
inline int __syncthreads_count(int p) { return cuda_shim::barrier(cuda_shim::COUNT, p); }
inline int __syncthreads_and(int p) { return cuda_shim::barrier(cuda_shim::AND, p); }
inline int __syncthreads_or(int p) { return cuda_shim::barrier(cuda_shim::OR, p); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __trap() { cuda_shim::trap("__trap()"); }

inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_shim::warp(cuda_shim::SYNCWARP, mask, 0, 0, 32); }
inline unsigned __ballot_sync(unsigned mask, int p) {
  return (unsigned)cuda_shim::warp(cuda_shim::BALLOT, mask, p != 0, 0, 32);
}
inline int __any_sync(unsigned mask, int p) { return (int)cuda_shim::warp(cuda_shim::ANY, mask, p != 0, 0, 32); }
inline int __all_sync(unsigned mask, int p) { return (int)cuda_shim::warp(cuda_shim::ALL, mask, p != 0, 0, 32); }

#define CUDA_SHIM_SHUFFLE(NAME, KIND, T, A)                                                       \
  inline T NAME(unsigned mask, T value, A argument, int width = 32) {                             \
    return cuda_shim::from_bits<T>(                                                               \
        cuda_shim::warp(cuda_shim::KIND, mask, cuda_shim::bits(value), (int)argument, width));    \
  }
#define CUDA_SHIM_SHUFFLES(T)                              \
  CUDA_SHIM_SHUFFLE(__shfl_sync, SHFL, T, int)             \
  CUDA_SHIM_SHUFFLE(__shfl_up_sync, SHFL_UP, T, unsigned)  \
  CUDA_SHIM_SHUFFLE(__shfl_down_sync, SHFL_DOWN, T, unsigned) \
  CUDA_SHIM_SHUFFLE(__shfl_xor_sync, SHFL_XOR, T, int)
CUDA_SHIM_SHUFFLES(int)
CUDA_SHIM_SHUFFLES(unsigned)
CUDA_SHIM_SHUFFLES(long long)
CUDA_SHIM_SHUFFLES(unsigned long long)
CUDA_SHIM_SHUFFLES(float)
CUDA_SHIM_SHUFFLES(double)

// Without the calls before each access, at which other threads may run.
#define CUDA_SHIM_UNDIVIDED __attribute__((no_sanitize_thread, noinline))

// The overloads are CUDA's: a type that CUDA has no atomic for does not compile here either.
#define CUDA_SHIM_ATOMIC(NAME, T, EXPRESSION)              \
  CUDA_SHIM_UNDIVIDED inline T NAME(T* address, T value) { \
    cuda_shim::before_atomic(address, sizeof(T), __builtin_return_address(0)); \
    T const old = *address;                                \
    *address = (EXPRESSION);                               \
    return old;                                            \
  }
#define CUDA_SHIM_ATOMIC_3(NAME, EXPRESSION)               \
  CUDA_SHIM_ATOMIC(NAME, int, EXPRESSION)                  \
  CUDA_SHIM_ATOMIC(NAME, unsigned, EXPRESSION)             \
  CUDA_SHIM_ATOMIC(NAME, unsigned long long, EXPRESSION)
CUDA_SHIM_ATOMIC_3(atomicExch, value)
CUDA_SHIM_ATOMIC_3(atomicOr, old | value)
CUDA_SHIM_ATOMIC_3(atomicAnd, old & value)
CUDA_SHIM_ATOMIC_3(atomicXor, old ^ value)
CUDA_SHIM_ATOMIC_3(atomicMin, value < old ? value : old)
CUDA_SHIM_ATOMIC_3(atomicMax, value > old ? value : old)
CUDA_SHIM_ATOMIC(atomicMin, long long, value < old ? value : old)
CUDA_SHIM_ATOMIC(atomicMax, long long, value > old ? value : old)
CUDA_SHIM_ATOMIC(atomicAdd, int, (int)((unsigned)old + (unsigned)value))
CUDA_SHIM_ATOMIC(atomicAdd, unsigned, old + value)
CUDA_SHIM_ATOMIC(atomicAdd, unsigned long long, old + value)
CUDA_SHIM_ATOMIC(atomicAdd, float, old + value)
CUDA_SHIM_ATOMIC(atomicSub, int, (int)((unsigned)old - (unsigned)value))
CUDA_SHIM_ATOMIC(atomicSub, unsigned, old - value)
CUDA_SHIM_ATOMIC(atomicExch, float, value)
#define CUDA_SHIM_CAS(T)                                   \
  CUDA_SHIM_UNDIVIDED inline T atomicCAS(T* address, T expected, T desired) { \
    cuda_shim::before_atomic(address, sizeof(T), __builtin_return_address(0)); \
    T const old = *address;                                \
    if (old == expected) *address = desired;               \
    return old;                                            \
  }
CUDA_SHIM_CAS(int)
CUDA_SHIM_CAS(unsigned)
CUDA_SHIM_CAS(unsigned long long)

template <class T> inline T __ldg(const T* address) { return *address; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((cuda_shim::u64)a * b >> 32); }
inline unsigned __brev(unsigned x) {
  unsigned out = 0;
  for (int i = 0; i < 32; ++i) out |= (x >> i & 1u) << (31 - i);
  return out;
}
inline unsigned __float_as_uint(float x) { return cuda_shim::from_bits<unsigned>(cuda_shim::bits(x)); }
inline int __float_as_int(float x) { return cuda_shim::from_bits<int>(cuda_shim::bits(x)); }
inline float __uint_as_float(unsigned x) { return cuda_shim::from_bits<float>(cuda_shim::bits(x)); }
inline float __int_as_float(int x) { return cuda_shim::from_bits<float>(cuda_shim::bits(x)); }
inline float __fadd_rn(float a, float b) { return a + b; }  // never fused: -ffp-contract=off
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline bool isfinite(float x) { return __builtin_isfinite(x); }
inline bool isnan(float x) { return __builtin_isnan(x); }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline float fabsf(float x) { return __builtin_fabsf(x); }
inline float fminf(float a, float b) { return __builtin_fminf(a, b); }
inline float fmaxf(float a, float b) { return __builtin_fmaxf(a, b); }
#define CUDA_SHIM_MIN_MAX(T)                               \
  inline T min(T a, T b) { return b < a ? b : a; }         \
  inline T max(T a, T b) { return a < b ? b : a; }
CUDA_SHIM_MIN_MAX(int)
CUDA_SHIM_MIN_MAX(unsigned)
CUDA_SHIM_MIN_MAX(long long)
CUDA_SHIM_MIN_MAX(unsigned long long)
CUDA_SHIM_MIN_MAX(float)
