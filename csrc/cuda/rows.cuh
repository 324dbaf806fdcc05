// How a block finds its part of a row of logits, and how threads merge their partial rows.
#pragma once

#include "qtuning_cuda.h"
#include "vector.cuh"

namespace qt {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
// Blocks that fill a multiprocessor: 2048 threads, or 1536 on consumer GPUs (sm_86, sm_89, sm_120).
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ % 100 != 0 || __CUDA_ARCH__ >= 1200)
constexpr int kResident = 6;
#else
constexpr int kResident = 8;
#endif
constexpr unsigned kTrip = 16 * kThreads;  // bytes that a block reads when each thread takes one vector

// Vectors of a row by a uniform address and a 32-bit offset of the thread: one register and one addition per trip.
QT_FUNCTION const uint4* vector_at(const char* begin, unsigned offset) {
  return reinterpret_cast<const uint4*>(begin + offset);
}
QT_FUNCTION uint4* vector_at(char* begin, unsigned offset) { return reinterpret_cast<uint4*>(begin + offset); }

struct Rows {
  char* data;
  int64_t stride_a, stride_c;  // bytes

  __device__ char* at(unsigned a, unsigned c) const { return data + a * stride_a + c * stride_c; }
};

struct Labels {
  const void* data;
  int64_t ignore_index;
  bool wide;  // int64

  __device__ int64_t operator[](unsigned row) const {
    return wide ? static_cast<const int64_t*>(data)[row] : static_cast<const int32_t*>(data)[row];
  }
};

// A row as full 16-byte vectors at aligned addresses, and the few elements before and behind them. Odd vocabularies and
// strides leave rows unaligned; so all of them are read and written 128 bits at a time, and nothing outside the row.
template <typename T>
struct Span {
  int before;   // elements in front of the first vector
  int vectors;  // of the row
  int first, last;  // vectors of this block: [first, last)
  int edges;    // elements outside the vectors, for this block

  // `spare` leaves that many vectors at the end to the edges.
  __device__ Span(const char* row, int vocabulary, int spare = 0) {
    constexpr int width = kWidth<T>;
    const int lead = int(reinterpret_cast<uintptr_t>(row) & 15) / int(sizeof(T));
    before = (width - lead) & (width - 1);
    if (before > vocabulary) before = vocabulary;
    vectors = (vocabulary - before) / width - spare;
    if (vectors < 0) vectors = 0;
    edges = blockIdx.y == 0 ? vocabulary - vectors * width : 0;
    const int share = (vectors + int(gridDim.y) - 1) / int(gridDim.y);
    first = int(blockIdx.y) * share;
    if (first > vectors) first = vectors;
    last = first + share < vectors ? first + share : vectors;
  }

  // the element of the row that this thread handles outside the vectors; meaningful for threadIdx.x < edges
  __device__ int edge() const {
    const int i = int(threadIdx.x);
    return i < before ? i : i + vectors * kWidth<T>;
  }

  // Whether this thread is the one that handles element i of the row.
  __device__ bool owns(int i) const {
    const int inside = i - before;
    if (inside >= 0 && inside < vectors * kWidth<T>) {
      const int vector = inside / kWidth<T>;
      return vector >= first && vector < last && (vector - first) % kThreads == int(threadIdx.x);
    }
    return int(threadIdx.x) < edges && edge() == i;
  }
};

template <typename R>
__device__ __forceinline__ OnlineStats<R> shuffle_xor(OnlineStats<R> s, int distance) {
  return {__shfl_xor_sync(0xffffffffu, s.row_max, distance), __shfl_xor_sync(0xffffffffu, s.sum_exp, distance),
          __shfl_xor_sync(0xffffffffu, s.sum_shifted_exp, distance)};
}

template <typename R>
__device__ __forceinline__ OnlineStats<R> merge_warp(OnlineStats<R> s, int lanes = 32) {
  for (int distance = lanes / 2; distance; distance /= 2) s = merge(s, shuffle_xor(s, distance));
  return s;
}

// The statistics of all threads of the block, valid in its first warp. Always in the same order.
template <typename R>
__device__ __forceinline__ OnlineStats<R> merge_block(OnlineStats<R> s) {
  __shared__ OnlineStats<R> parts[kWarps];
  s = merge_warp(s);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = s;
  __syncthreads();
  if (threadIdx.x < 32) s = merge_warp(parts[threadIdx.x % kWarps], kWarps);
  return s;
}

}  // namespace qt
