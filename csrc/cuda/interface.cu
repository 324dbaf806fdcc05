#include "interface.cuh"

#include <stdarg.h>
#include <stdio.h>

#include <algorithm>

namespace qt {
namespace {
thread_local char message[512] = "no call has failed";
constexpr int kMostSplits = 32;
constexpr int64_t kLeastSplitBytes = 32 * 1024;
constexpr int kBlocksPerMultiprocessor = 8;  // 256 threads with 32 registers each
}  // namespace

int fail(int status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  return status;
}

int cuda_status(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return QT_OK;
  cudaGetLastError();  // a refused launch must not be reported again by someone else's next call
  return fail(QT_CUDA_ERROR, "%s: CUDA says: %s (%s)", what, cudaGetErrorString(error), cudaGetErrorName(error));
}

int check_pointer(const void* pointer, const char* name, uintptr_t alignment) {
  if (!pointer) return fail(QT_NULL_POINTER, "%s is NULL; accepted: a device pointer", name);
  if (reinterpret_cast<uintptr_t>(pointer) % alignment)
    return fail(QT_BAD_ALIGNMENT, "%s is at %p; accepted: a multiple of %d bytes", name, pointer, int(alignment));
  return QT_OK;
}

int check_size(int64_t value, const char* name, int64_t least, int64_t most) {
  if (value < least || value > most)
    return fail(QT_BAD_SIZE, "%s is %lld; accepted: %lld to %lld", name, (long long)value, (long long)least,
                (long long)most);
  return QT_OK;
}

int item_bytes(int32_t dtype) {
  switch (dtype) {
    case QT_FLOAT32:
      return 4;
    case QT_FLOAT64:
      return 8;
    case QT_BFLOAT16:
    case QT_FLOAT16:
      return 2;
    default:
      return 0;
  }
}

int check_logits(const qt_logits* logits, const char* name) {
  if (!logits) return fail(QT_NULL_POINTER, "%s is NULL; accepted: a qt_logits", name);
  if (!item_bytes(logits->dtype))
    return fail(QT_BAD_DTYPE, "%s.dtype is %d; accepted: 0 (float32), 1 (float64), 2 (bfloat16), 3 (float16)", name,
                int(logits->dtype));
  const int64_t most = INT32_MAX;
  QT_RETURN_IF_FAILED(check_size(logits->size_a, "size_a", 0, most));
  QT_RETURN_IF_FAILED(check_size(logits->size_c, "size_c", 0, most));
  QT_RETURN_IF_FAILED(check_size(rows_of(*logits), "size_a * size_c", 0, most));
  // a thread's offset within its row has 32 bits, and room for the trip beyond the end
  const int64_t longest = std::min(most, int64_t(UINT32_MAX) / item_bytes(logits->dtype)) - 2 * int64_t(kTrip);
  QT_RETURN_IF_FAILED(check_size(logits->vocabulary, "vocabulary", 1, longest));
  if (logits->stride_a < 0 || logits->stride_c < 0)
    return fail(QT_BAD_STRIDE, "%s has strides %lld, %lld; accepted: 0 or more elements", name,
                (long long)logits->stride_a, (long long)logits->stride_c);
  if (rows_of(*logits)) QT_RETURN_IF_FAILED(check_pointer(logits->data, name, uintptr_t(item_bytes(logits->dtype))));
  return QT_OK;
}

int check_labels(const qt_labels* labels) {
  if (!labels) return fail(QT_NULL_POINTER, "labels is NULL; accepted: a qt_labels");
  if (labels->bytes != 4 && labels->bytes != 8)
    return fail(QT_BAD_DTYPE, "labels.bytes is %d; accepted: 4 (int32), 8 (int64)", int(labels->bytes));
  return QT_OK;
}

int check_scaling(qt_scaling scaling) {
  if (!(scaling.softcap >= 0))
    return fail(QT_BAD_VALUE, "softcap is %g; accepted: 0 (none) or a positive number", scaling.softcap);
  if (!isfinite(scaling.logit_scale))
    return fail(QT_BAD_VALUE, "logit_scale is %g; accepted: a finite number", scaling.logit_scale);
  return QT_OK;
}

int blocks_per_row(const qt_logits& logits, int multiprocessors) {
  const int64_t wave = int64_t(multiprocessors) * kBlocksPerMultiprocessor;
  const int64_t to_fill = wave / std::max<int64_t>(1, rows_of(logits));
  const int64_t worthwhile = logits.vocabulary * item_bytes(logits.dtype) / kLeastSplitBytes;
  return int(std::max<int64_t>(1, std::min<int64_t>({to_fill, worthwhile, kMostSplits})));
}

int multiprocessors_of(int device, int* count) {
  return cuda_status(cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device),
                     "reading the number of multiprocessors");
}

Rows rows(const qt_logits& logits) {
  const int64_t bytes = item_bytes(logits.dtype);
  return {static_cast<char*>(logits.data), logits.stride_a * bytes, logits.stride_c * bytes};
}

Labels view(const qt_labels& labels) { return {labels.data, labels.ignore_index, labels.bytes == 8}; }

OnDevice::OnDevice(int device) {
  status_ = cuda_status(cudaGetDevice(&before_), "asking for the current device");
  if (status_ == QT_OK && before_ != device)
    status_ = cuda_status(cudaSetDevice(device), "selecting the device");
}

OnDevice::~OnDevice() {
  if (before_ >= 0) cudaSetDevice(before_);
}

}  // namespace qt

extern "C" const char* qt_cuda_error_message(void) { return qt::message; }
