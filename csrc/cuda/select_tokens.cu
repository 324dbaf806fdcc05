// select_tokens: stage 2, the tokens of each segment with the lowest (or highest) neighbour score, exactly as
// qtuning_kernels/reference_policy.py defines it.
#include "interface.cuh"
#include "order.cuh"

namespace qt {

struct Selection {
  const float* ppl;
  int size;
  const int32_t* cu_seqlens;
  const int64_t* num_keep;
  float own, weight;  // 1 - λ and λ, each rounded once
  bool keep_high, neighbor_mean;
  uint8_t* out;
};

// The score of token i of [first, last) as a key whose ascending order is the order of preference.
__device__ uint32_t preference(const Selection& in, int first, int last, int i) {
  const float here = in.ppl[i];
  const float before = i > first ? in.ppl[i - 1] : here, after = i + 1 < last ? in.ppl[i + 1] : here;
  const float both = rounded_sum(before, after);
  const float around = in.neighbor_mean ? rounded_product(both, 0.5f) : both;
  float score = rounded_sum(rounded_product(here, in.own), rounded_product(around, in.weight));
  if (score != score) score = INFINITY;
  return in.keep_high ? ~ascending_key(score) : ascending_key(score);
}

// The sum of `value` over the threads before this one, and over all of them in `total`.
__device__ int scan_block(int value, int* sums, int& total) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  int sum = value;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, sum, distance);
    if (lane >= distance) sum += other;
  }
  __syncthreads();
  if (lane == 31) sums[warp] = sum;
  __syncthreads();
  int before = 0;
  total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += sums[w];
    total += sums[w];
  }
  return before + sum - value;
}

// One block per segment. Four passes of a radix select, 8 bits each, find the last key that is kept; a fifth writes the
// mask and hands what is left of equal keys to the earlier tokens. Reads ppl five times (from cache behind the first).
__global__ void __launch_bounds__(kThreads) select_tokens_kernel(const Selection in) {
  __shared__ int histogram[256];
  __shared__ int sums[kWarps];
  __shared__ uint32_t shared_digit;
  __shared__ int shared_before;
  const int segment = int(blockIdx.x);
  // bounds that the contract excludes must not become accesses out of bounds
  const int first = in.cu_seqlens[segment] > 0 ? in.cu_seqlens[segment] : 0;
  const int last = in.cu_seqlens[segment + 1] < in.size ? in.cu_seqlens[segment + 1] : in.size;
  const int64_t wanted = in.num_keep[segment];
  if (last <= first) return;
  if (wanted <= 0 || wanted >= last - first) {
    for (int i = first + int(threadIdx.x); i < last; i += kThreads) in.out[i] = wanted > 0;
    return;
  }
  int left = int(wanted);  // to be kept among the keys that begin with `prefix`
  uint32_t prefix = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    histogram[threadIdx.x] = 0;
    __syncthreads();
    for (int i = first + int(threadIdx.x); i < last; i += kThreads) {
      const uint32_t key = preference(in, first, last, i);
      if (shift == 24 || key >> (shift + 8) == prefix) atomicAdd(&histogram[key >> shift & 255], 1);
    }
    __syncthreads();
    const int own = histogram[threadIdx.x];
    int total;
    const int before = scan_block(own, sums, total);
    if (before < left && left <= before + own) shared_digit = threadIdx.x, shared_before = before;
    __syncthreads();
    prefix = prefix << 8 | shared_digit;
    left -= shared_before;
    __syncthreads();
  }
  for (int start = first; start < last; start += kThreads) {
    const int i = start + int(threadIdx.x);
    const uint32_t key = i < last ? preference(in, first, last, i) : UINT32_MAX;
    const bool equal = i < last && key == prefix;
    int total;
    const int rank = scan_block(equal, sums, total);
    if (i < last) in.out[i] = key < prefix || (equal && rank < left);
    left -= total < left ? total : left;
  }
}

}  // namespace qt

int qt_cuda_select_tokens(const float* ppl, int64_t size, const int32_t* cu_seqlens, const int64_t* num_keep,
                          int64_t segments, double neighbor_weight, int32_t keep_high, int32_t neighbor_mean,
                          uint8_t* out, qt_target target) {
  using namespace qt;
  QT_RETURN_IF_FAILED(check_size(size, "size", 0, INT32_MAX - kThreads));
  QT_RETURN_IF_FAILED(check_size(segments, "segments", 0, INT32_MAX));
  if (!(neighbor_weight >= 0 && neighbor_weight <= 1))
    return fail(QT_BAD_VALUE, "neighbor_weight is %g; accepted: 0 to 1", neighbor_weight);
  if (size == 0) return QT_OK;
  QT_RETURN_IF_FAILED(check_pointer(ppl, "ppl", 4));
  QT_RETURN_IF_FAILED(check_pointer(out, "out", 1));
  if (segments) QT_RETURN_IF_FAILED(check_pointer(cu_seqlens, "cu_seqlens", 4));
  if (segments) QT_RETURN_IF_FAILED(check_pointer(num_keep, "num_keep", 8));
  const OnDevice device(target.device);
  QT_RETURN_IF_FAILED(device.status());
  // tokens behind the last segment
  QT_RETURN_IF_FAILED(cuda_status(
      cudaMemsetAsync(out, 0, size_t(size), static_cast<cudaStream_t>(target.stream)), "select_tokens (clear)"));
  if (!segments) return QT_OK;
  const Selection in = {ppl,
                        int(size),
                        cu_seqlens,
                        num_keep,
                        float(1.0 - neighbor_weight),
                        float(neighbor_weight),
                        keep_high != 0,
                        neighbor_mean != 0,
                        out};
  return launch(select_tokens_kernel, dim3(unsigned(segments)), kThreads, target, "select_tokens", in);
}
