// triage_rank: stage 1 as a ranking, exactly as qtuning_kernels/reference_policy.py defines it.
#include "interface.cuh"
#include "order.cuh"

namespace qt {

constexpr int kMostThreads = 1024;
constexpr int kSamples = QT_TRIAGE_MAX_POOL / kMostThreads;  // per thread
constexpr int64_t kAlphaMaxPercent = 49;                     // the bisection's upper end, α <= 0.49

struct Triage {
  const float *ppl, *entropy;
  int size, k;
  int padded;  // size rounded up to a power of two
  int8_t *quadrant, *role;
  uint8_t *keep, *supplemented;
  int64_t* kept_index;
  float* alpha;
};

// Bitonic, ascending; n is a power of two. The whole block takes part.
__device__ void sort_block(uint64_t* keys, int n) {
  for (int size = 2; size <= n; size *= 2) {
    for (int distance = size / 2; distance; distance /= 2) {
      __syncthreads();
      for (int pair = int(threadIdx.x); pair < n / 2; pair += int(blockDim.x)) {
        const int i = 2 * pair - (pair & (distance - 1));
        const uint64_t low = keys[i], high = keys[i + distance];
        if ((low > high) == ((i & size) == 0)) keys[i] = high, keys[i + distance] = low;
      }
    }
  }
  __syncthreads();
}

// How many of the n ascending keys are below `key`.
__device__ int count_below(const uint64_t* keys, int n, uint64_t key) {
  int first = 0, last = n;
  while (first < last) {
    const int middle = (first + last) / 2;
    if (keys[middle] < key)
      first = middle + 1;
    else
      last = middle;
  }
  return first;
}

// The high and low keys of one axis for this thread's samples, and their min-max.
struct Axis {
  int high[kSamples], low[kSamples];
  float normalised[kSamples];
};

__device__ void rank_axis(Axis& axis, const Triage& in, const float* x, const bool (&eligible)[kSamples], int count,
                          uint64_t* keys) {
  const int never = 2 * in.size + 2;
  __syncthreads();
#pragma unroll
  for (int s = 0, i = int(threadIdx.x); s < kSamples && i < in.padded; ++s, i += int(blockDim.x))
    keys[i] = i < in.size && eligible[s] ? ascending_key(x[i]) : UINT64_MAX;
  sort_block(keys, in.padded);
  const float lowest = count ? from_ascending_key(uint32_t(keys[0])) : 0;
  const float span = count ? rounded_sum(from_ascending_key(uint32_t(keys[count - 1])), -lowest) : 0;
#pragma unroll
  for (int s = 0, i = int(threadIdx.x); s < kSamples && i < in.size; ++s, i += int(blockDim.x)) {
    axis.high[s] = axis.low[s] = never;
    axis.normalised[s] = 0;
    if (!eligible[s]) continue;
    const uint64_t key = ascending_key(x[i]);
    const int lower = count_below(keys, count, key), higher = count - count_below(keys, count, key + 1);
    if (100ll * higher <= kAlphaMaxPercent * count) axis.high[s] = 2 * higher;
    if (lower < higher && (100ll * lower < kAlphaMaxPercent * count || lower == 0)) axis.low[s] = 2 * lower + 1;
    if (span > 0) axis.normalised[s] = rounded_quotient(rounded_sum(x[i], -lowest), span);
  }
}

// One block. Sorts each axis and then the samples by (key, score downwards, index) as one 64-bit number.
__global__ void __launch_bounds__(kMostThreads) triage_rank_kernel(const Triage in) {
  __shared__ uint64_t keys[QT_TRIAGE_MAX_POOL];
  __shared__ int shared_count, shared_kept;
  const int never = 2 * in.size + 2;
  if (threadIdx.x == 0) shared_count = shared_kept = 0;
  __syncthreads();
  bool eligible[kSamples];
#pragma unroll
  for (int s = 0, i = int(threadIdx.x); s < kSamples && i < in.size; ++s, i += int(blockDim.x)) {
    eligible[s] = isfinite(in.ppl[i]) && isfinite(in.entropy[i]);
    if (eligible[s]) atomicAdd(&shared_count, 1);
  }
  __syncthreads();
  const int count = shared_count;
  Axis error, uncertainty;
  rank_axis(error, in, in.ppl, eligible, count, keys);
  rank_axis(uncertainty, in, in.entropy, eligible, count, keys);

  __syncthreads();
  int key[kSamples], corner[kSamples];
#pragma unroll
  for (int s = 0, i = int(threadIdx.x); s < kSamples && i < in.padded; ++s, i += int(blockDim.x)) {
    keys[i] = UINT64_MAX;
    if (i >= in.size) continue;
    const int q2 = error.high[s] > uncertainty.low[s] ? error.high[s] : uncertainty.low[s];
    const int q4 = error.low[s] > uncertainty.high[s] ? error.low[s] : uncertainty.high[s];
    key[s] = q2 < q4 ? q2 : q4;
    corner[s] = q2 < q4 || (q2 == q4 && error.normalised[s] > uncertainty.normalised[s]) ? 2 : 4;
    float score = fabsf(rounded_sum(error.normalised[s], -uncertainty.normalised[s]));
    if (score != score) score = INFINITY;  // an axis whose span overflows
    const uint64_t sort_key = uint64_t(eligible[s] ? key[s] : never + 1);
    keys[i] = sort_key << 44 | uint64_t(~bit_cast<uint32_t>(score)) << 12 | uint64_t(i);
  }
  sort_block(keys, in.padded);

  const int64_t last_key = 2 * (kAlphaMaxPercent * count / 100) + 1;
  const int64_t kth_key = int64_t(keys[in.k - 1] >> 44);
  const int64_t kappa = kth_key < last_key ? kth_key : last_key;
#pragma unroll
  for (int s = 0, i = int(threadIdx.x); s < kSamples && i < in.size; ++s, i += int(blockDim.x)) {
    const bool noise = error.high[s] <= kappa && uncertainty.high[s] <= kappa;
    const bool redundant = error.low[s] <= kappa && uncertainty.low[s] <= kappa;
    in.quadrant[i] = int8_t(key[s] <= kappa ? corner[s] : noise ? 1 : redundant ? 3 : 0);
    in.role[i] = 0;
    in.keep[i] = in.supplemented[i] = 0;
  }
  if (threadIdx.x == 0) {
    const float alpha_max = 0.49f;
    const float alpha = kth_key > last_key ? alpha_max : rounded_quotient(float(kappa), float(2 * count));
    *in.alpha = alpha < alpha_max ? alpha : alpha_max;
  }
  // by rank: this thread looks after other samples than above, so what it needs is fetched by index
  __syncthreads();
  uint64_t ranked[kSamples];
#pragma unroll
  for (int s = 0, rank = int(threadIdx.x); s < kSamples && rank < in.k; ++s, rank += int(blockDim.x)) ranked[s] = keys[rank];
  __syncthreads();
  for (int i = int(threadIdx.x); i < in.padded; i += int(blockDim.x)) keys[i] = UINT64_MAX;
  __syncthreads();
#pragma unroll
  for (int s = 0, rank = int(threadIdx.x); s < kSamples && rank < in.k; ++s, rank += int(blockDim.x)) {
    // ineligible samples come last, and are kept by nobody
    if (int(ranked[s] >> 44) == never + 1) continue;
    keys[rank] = ranked[s] & 0xfff;
    in.keep[ranked[s] & 0xfff] = 1;
    atomicAdd(&shared_kept, 1);
  }
  sort_block(keys, in.padded);
  for (int i = int(threadIdx.x); i < in.k; i += int(blockDim.x))
    in.kept_index[i] = i < shared_kept ? int64_t(keys[i]) : in.size;
#pragma unroll
  for (int s = 0, i = int(threadIdx.x); s < kSamples && i < in.size; ++s, i += int(blockDim.x)) {
    if (!in.keep[i]) continue;
    in.role[i] = int8_t(corner[s]);
    in.supplemented[i] = key[s] == never;
  }
}

}  // namespace qt

int qt_cuda_triage_rank(const float* ppl, const float* entropy, int64_t size, int64_t k, int8_t* quadrant, int8_t* role,
                        uint8_t* keep, int64_t* kept_index, uint8_t* supplemented, float* alpha, qt_target target) {
  using namespace qt;
  QT_RETURN_IF_FAILED(check_size(size, "size", 1, QT_TRIAGE_MAX_POOL));
  QT_RETURN_IF_FAILED(check_size(k, "k", 1, size));
  QT_RETURN_IF_FAILED(check_pointer(ppl, "ppl", 4));
  QT_RETURN_IF_FAILED(check_pointer(entropy, "entropy", 4));
  QT_RETURN_IF_FAILED(check_pointer(quadrant, "quadrant", 1));
  QT_RETURN_IF_FAILED(check_pointer(role, "role", 1));
  QT_RETURN_IF_FAILED(check_pointer(keep, "keep", 1));
  QT_RETURN_IF_FAILED(check_pointer(kept_index, "kept_index", 8));
  QT_RETURN_IF_FAILED(check_pointer(supplemented, "supplemented", 1));
  QT_RETURN_IF_FAILED(check_pointer(alpha, "alpha", 4));
  const OnDevice device(target.device);
  QT_RETURN_IF_FAILED(device.status());
  int padded = 1;
  while (padded < size) padded *= 2;
  const int threads = padded < 32 ? 32 : padded > kMostThreads ? kMostThreads : padded;
  const Triage in = {ppl, entropy, int(size), int(k), padded, quadrant, role, keep, supplemented, kept_index, alpha};
  return launch(triage_rank_kernel, dim3(1), threads, target, "triage_rank", in);
}
