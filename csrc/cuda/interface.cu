#include <stdarg.h>
#include <stdio.h>

#include <algorithm>

#include "interface.cuh"

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

int item_bytes(int32_t dtype) {
  switch (dtype) {
    case QT_FLOAT32:
      return 4;
    case QT_FLOAT64:
      return 8;
    default:
      return 2;
  }
}

int check_logits(const qt_logits& logits, const char* name) {
  const int64_t bytes = item_bytes(logits.dtype), most = INT32_MAX;
  // a thread's offset within its row has 32 bits, and room for the trip beyond the end
  const int64_t longest = std::min(most, int64_t(UINT32_MAX) / bytes) - 2 * int64_t(kTrip);
  if (logits.size_a > most || logits.size_c > most || rows_of(logits) > most || logits.vocabulary > longest)
    return fail(QT_BAD_ARGUMENT, "%s has shape [%lld, %lld, %lld]; accepted: at most %lld rows of at most %lld", name,
                (long long)logits.size_a, (long long)logits.size_c, (long long)logits.vocabulary, (long long)most,
                (long long)longest);
  if (reinterpret_cast<uintptr_t>(logits.data) % bytes)
    return fail(QT_BAD_ARGUMENT, "%s is at %p; accepted: a multiple of %d bytes", name, logits.data, int(bytes));
  return QT_OK;
}

int blocks_per_row(const qt_logits& logits, qt_target target, int* blocks) {
  int multiprocessors = 0;
  QT_RETURN_IF_FAILED(
      cuda_status(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, target.device),
                  "reading the number of multiprocessors"));
  const int64_t wave = int64_t(multiprocessors) * kBlocksPerMultiprocessor;
  const int64_t to_fill = wave / std::max<int64_t>(1, rows_of(logits));
  const int64_t worthwhile = logits.vocabulary * item_bytes(logits.dtype) / kLeastSplitBytes;
  *blocks = int(std::max<int64_t>(1, std::min<int64_t>({to_fill, worthwhile, kMostSplits})));
  return QT_OK;
}

Rows rows(const qt_logits& logits) {
  const int64_t bytes = item_bytes(logits.dtype);
  return {static_cast<char*>(logits.data), logits.stride_a * bytes, logits.stride_c * bytes};
}

Labels view(const qt_labels& labels) { return {labels.data, labels.ignore_index, labels.bytes == 8}; }

OnDevice::OnDevice(int device) {
  status_ = cuda_status(cudaGetDevice(&before_), "asking for the current device");
  if (status_ == QT_OK && before_ != device) status_ = cuda_status(cudaSetDevice(device), "selecting the device");
}

OnDevice::~OnDevice() {
  if (before_ >= 0) cudaSetDevice(before_);
}

}  // namespace qt

extern "C" const char* qt_cuda_error_message(void) { return qt::message; }
