// segment_means: the mean of every segment of every row, summed in float64.
#include "interface.cuh"

namespace qt {

// One warp per segment and row. Reads each value once, writes one mean. The lanes' sums are added in a fixed order.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    segment_means_kernel(const T* values, int64_t size, const int32_t* cu_seqlens, int64_t segments, float* out) {
  const int64_t segment = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (segment >= segments) return;
  const int64_t row = blockIdx.y;
  const int64_t first = cu_seqlens[segment], last = cu_seqlens[segment + 1];
  double sum = 0;
  // bounds that the contract excludes must not become reads out of bounds
  for (int64_t i = (first > 0 ? first : 0) + threadIdx.x % 32; i < last && i < size; i += 32)
    sum += double(values[row * size + i]);
  for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  if (threadIdx.x % 32 == 0) out[row * segments + segment] = float(sum / double(last - first));
}

}  // namespace qt

int qt_cuda_segment_means(const void* values, int32_t dtype, int64_t rows, int64_t size, const int32_t* cu_seqlens,
                          int64_t segments, float* out, qt_target target) {
  using namespace qt;
  if (dtype != QT_FLOAT32 && dtype != QT_FLOAT64)
    return fail(QT_BAD_DTYPE, "values has dtype %d; accepted: 0 (float32), 1 (float64)", int(dtype));
  QT_RETURN_IF_FAILED(check_size(rows, "rows", 0, 65535));
  QT_RETURN_IF_FAILED(check_size(size, "size", 0, INT32_MAX));
  QT_RETURN_IF_FAILED(check_size(segments, "segments", 0, INT32_MAX));
  if (rows == 0 || segments == 0) return QT_OK;
  if (size) QT_RETURN_IF_FAILED(check_pointer(values, "values", uintptr_t(stats_bytes(dtype))));
  QT_RETURN_IF_FAILED(check_pointer(cu_seqlens, "cu_seqlens", 4));
  QT_RETURN_IF_FAILED(check_pointer(out, "out", 4));
  const OnDevice device(target.device);
  QT_RETURN_IF_FAILED(device.status());
  const dim3 grid(unsigned((segments + kWarps - 1) / kWarps), unsigned(rows));
  if (dtype == QT_FLOAT64)
    return launch(segment_means_kernel<double>, grid, kThreads, target, "segment_means",
                  static_cast<const double*>(values), size, cu_seqlens, segments, out);
  return launch(segment_means_kernel<float>, grid, kThreads, target, "segment_means",
                static_cast<const float*>(values), size, cu_seqlens, segments, out);
}
