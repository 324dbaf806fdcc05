#include "workspace.h"

#include <stdlib.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <mutex>
#include <new>
#include <stdexcept>
#include <vector>

namespace qt {
namespace {

struct Block {
  char* base;
  size_t capacity;
};

constexpr size_t kMaxIdle = 2;               // blocks kept while nobody uses them
constexpr size_t kHugePage = size_t(2) << 20;

std::mutex mutex;
std::vector<Block> idle;
int64_t held = 0;

}  // namespace

Workspace::Workspace(size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex);
  size_t best = idle.size();
  for (size_t i = 0; i < idle.size(); ++i) {
    if (idle[i].capacity >= bytes && (best == idle.size() || idle[i].capacity < idle[best].capacity)) best = i;
  }
  if (best < idle.size()) {
    base_ = idle[best].base;
    capacity_ = idle[best].capacity;
    idle.erase(idle.begin() + best);
    return;
  }
  const size_t unit = bytes >= kHugePage ? kHugePage : 4096;
  capacity_ = (bytes + unit - 1) / unit * unit;
  if (capacity_ == 0) capacity_ = unit;
  base_ = static_cast<char*>(aligned_alloc(unit, capacity_));
  if (!base_) throw std::bad_alloc();
#if defined(__linux__)
  if (unit == kHugePage) madvise(base_, capacity_, MADV_HUGEPAGE);  // fewer page faults; only a hint
#endif
  held += static_cast<int64_t>(capacity_);
}

Workspace::~Workspace() {
  std::lock_guard<std::mutex> lock(mutex);
  idle.push_back({base_, capacity_});
  if (idle.size() <= kMaxIdle) return;
  size_t smallest = 0;
  for (size_t i = 1; i < idle.size(); ++i) {
    if (idle[i].capacity < idle[smallest].capacity) smallest = i;
  }
  held -= static_cast<int64_t>(idle[smallest].capacity);
  free(idle[smallest].base);
  idle.erase(idle.begin() + smallest);
}

void* Workspace::take_bytes(size_t bytes) {
  void* taken = base_ + used_;
  used_ += padded(bytes);
  if (used_ > capacity_) throw std::logic_error("workspace too small");
  return taken;
}

int64_t workspace_bytes_held() {
  std::lock_guard<std::mutex> lock(mutex);
  return held;
}

}  // namespace qt
