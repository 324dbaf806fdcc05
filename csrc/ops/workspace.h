// Memory that outlives a call. glibc returns blocks above its threshold to the system, and faulting them in again
// costs more than the arithmetic done on them.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace qt {

// A block taken from the process-wide pool for the life of this object; any number of threads may hold one.
class Workspace {
 public:
  explicit Workspace(size_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // The next `count` elements, aligned to a cache line. The caller has asked for enough in the constructor.
  template <typename T>
  T* take(int64_t count) {
    return static_cast<T*>(take_bytes(static_cast<size_t>(count) * sizeof(T)));
  }
  void* take_bytes(size_t bytes);

 private:
  char* base_;
  size_t capacity_;
  size_t used_ = 0;
};

// What take() needs for so many bytes.
constexpr size_t padded(size_t bytes) { return (bytes + 63) / 64 * 64; }

int64_t workspace_bytes_held();  // by the pool, in use or not; for tests

}  // namespace qt
