// The part of the CUDA runtime that csrc/cuda uses, for a host compiler: kernels run on the CPU, block after block.
//
// Each thread of a block is a coroutine. It runs until it reaches __syncthreads() or a shuffle and goes on when all
// the threads concerned have arrived, so that what they exchange is what a GPU would exchange. A barrier that not all
// threads reach ends the process with a message instead of hanging.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

typedef struct CUstream_st* cudaStream_t;
enum cudaError_t { cudaSuccess = 0 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace emulator {

struct Coordinates {
  dim3 thread, block, threads, blocks;
};
extern Coordinates current;

void synchronise_block();
// Hands each thread of the warp the 8 bytes that lane `from` of it gave.
uint64_t exchange(uint64_t value, unsigned from);
void run(dim3 grid, dim3 block, void (*kernel)(void*), void* arguments);

template <typename V>
V exchange_value(V value, unsigned from) {
  static_assert(sizeof(V) <= 8, "");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = exchange(bits, from);
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emulator

inline const dim3& threadIdx = emulator::current.thread;
inline const dim3& blockIdx = emulator::current.block;
inline const dim3& blockDim = emulator::current.threads;
inline const dim3& gridDim = emulator::current.blocks;

inline void __syncthreads() { emulator::synchronise_block(); }
template <typename V>
V __shfl_xor_sync(unsigned, V value, int distance) {
  return emulator::exchange_value(value, threadIdx.x % 32 ^ unsigned(distance));
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaSuccess"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
// few, so that small tests have rows enough for one block each, and yet more than one block for a single row
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 4, cudaSuccess; }

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... given) {
  auto call = [&] { kernel(Parameters(given)...); };
  emulator::run(config->gridDim, config->blockDim, [](void* f) { (*static_cast<decltype(call)*>(f))(); }, &call);
  return cudaSuccess;
}
