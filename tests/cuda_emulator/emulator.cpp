// Coroutines for the threads of one block at a time; see cuda_runtime.h.
#include "cuda_runtime.h"

#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <memory>
#include <mutex>
#include <vector>

namespace emulator {

Coordinates current;

namespace {

constexpr size_t kStackBytes = 64 * 1024;

enum class State { READY, AT_BLOCK, AT_WARP, ENDED };

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state = State::READY;
  uint64_t given = 0;
};

std::vector<Thread> threads;
ucontext_t scheduler;
unsigned running;
void (*body)(void*);
void* body_arguments;

void enter() {
  body(body_arguments);
  threads[running].state = State::ENDED;
  swapcontext(&threads[running].context, &scheduler);
}

void wait(State state) {
  const unsigned self = running;
  threads[self].state = state;
  swapcontext(&threads[self].context, &scheduler);
}

// Lets [first, last) go on if all of them that have not ended wait in the same way.
bool release(unsigned first, unsigned last, State waiting) {
  unsigned arrived = 0, alive = 0;
  for (unsigned i = first; i < last; ++i) {
    arrived += threads[i].state == waiting;
    alive += threads[i].state != State::ENDED;
  }
  if (!arrived || arrived != alive) return false;
  for (unsigned i = first; i < last; ++i)
    if (threads[i].state == waiting) threads[i].state = State::READY;
  return true;
}

void run_block(unsigned count) {
  const bool reversed = getenv("QTUNING_EMULATOR_REVERSED") != nullptr;  // the last thread runs first
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    if (!thread.stack) thread.stack.reset(new char[kStackBytes]);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
    thread.state = State::READY;
  }
  for (;;) {
    bool any = false;
    for (unsigned n = 0; n < count; ++n) {
      const unsigned i = reversed ? count - 1 - n : n;
      if (threads[i].state != State::READY) continue;
      any = true;
      running = i;
      current.thread = dim3(i);
      swapcontext(&scheduler, &threads[i].context);
    }
    for (unsigned first = 0; first < count; first += 32)
      any |= release(first, first + 32 < count ? first + 32 : count, State::AT_WARP);
    any |= release(0, count, State::AT_BLOCK);
    if (any) continue;
    for (unsigned i = 0; i < count; ++i) {
      if (threads[i].state == State::ENDED) continue;
      fprintf(stderr, "thread %u of block %u waits for threads that never come\n", i, current.block.x);
      abort();
    }
    return;
  }
}

}  // namespace

void synchronise_block() { wait(State::AT_BLOCK); }

uint64_t exchange(uint64_t value, unsigned from) {
  const unsigned warp = running / 32 * 32;
  threads[running].given = value;
  wait(State::AT_WARP);
  const uint64_t taken = threads[warp + from].given;
  wait(State::AT_WARP);  // nobody gives again before all have taken
  return taken;
}

void run(dim3 grid, dim3 block, void (*kernel)(void*), void* arguments) {
  static std::mutex one_launch_at_a_time;
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  if (threads.size() < block.x) threads = std::vector<Thread>(block.x);
  body = kernel, body_arguments = arguments;
  current.threads = block, current.blocks = grid;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      current.block = dim3(x, y);
      run_block(block.x);
    }
  }
}

}  // namespace emulator
