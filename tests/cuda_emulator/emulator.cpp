// The threads of a grid as fibers of one CPU thread, in an order that a test chooses.
//
// A fiber runs until it has to wait: for its warp, its block or the whole grid. The last to come lets them all run on.
// Orders that a GPU may have, so that a missing barrier shows as another result:
//   0  every thread in turn, first come first served: all advance together;
//   1  last come first served, from the last thread: one warp runs as far ahead as barriers let it;
//   2+ random, from that seed.
// Asynchronous copies happen at once in even orders, in odd ones only when their thread waits for them.

#include "ptx.cuh"

#include <csetjmp>
#include <deque>
#include <memory>
#include <string>
#include <ucontext.h>
#include <vector>

namespace emulator {

Index thread, block, grid;

namespace {

constexpr size_t STACK = 128 * 1024;
constexpr int CANARY = 256;  // bytes beyond shared memory that nobody may write

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

struct Fiber {
  int block, thread;
  bool started = false, done = false;
  jmp_buf state;
  ucontext_t start;
  std::vector<Copy> copies;
};

// Those that wait for one another: `size` fibers.
struct Meeting {
  int size = 0;
  Kind kind = SYNC_WARP;
  std::vector<Fiber*> waiting;
};

struct Warp : Meeting {
  alignas(16) unsigned char in[32 * 128], out[32 * 128];
};

struct Grid {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Meeting> blocks;
  Meeting all;
  std::vector<std::vector<uint4>> shared;
  std::deque<Fiber*> ready;
  void (*body)(const void*);
  const void* arguments;
  int threads;
  std::string problem;
};

int wanted_blocks = 4, order = 0;
uint64_t random_state;
Grid* now;
Fiber* current;
jmp_buf scheduler;

uint64_t random_number() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

void do_copy(const Copy& copy) {
  if (copy.valid) {
    std::memcpy(copy.to, copy.from, 16);
  } else {
    std::memset(copy.to, 0, 16);
  }
}

void back_to_scheduler() {
  if (_setjmp(current->state) == 0) {
    _longjmp(scheduler, 1);
  }
}

void fiber_main() {
  now->body(now->arguments);
  if (!current->copies.empty()) {
    now->problem = "a thread ended without waiting for its copies";
  }
  current->done = true;
  _longjmp(scheduler, 1);
}

// Runs the current fiber until it waits or ends.
void resume() {
  if (_setjmp(scheduler) == 0) {
    if (current->started) {
      _longjmp(current->state, 1);
    }
    current->started = true;
    setcontext(&current->start);
  }
}

// The back of `ready` is next.
Fiber* next_fiber() {
  std::deque<Fiber*>& ready = now->ready;
  if (order >= 2) {
    std::swap(ready[random_number() % ready.size()], ready.back());
  }
  Fiber* fiber = ready.back();
  ready.pop_back();
  return fiber;
}

// Makes the fibers runnable, in the order they are to run.
void release(std::vector<Fiber*>& fibers) {
  std::deque<Fiber*>& ready = now->ready;
  if (order == 1) {
    ready.insert(ready.end(), fibers.begin(), fibers.end());
  } else {
    ready.insert(ready.begin(), fibers.rbegin(), fibers.rend());
  }
  fibers.clear();
}

void wait_in(Meeting& meeting) {
  meeting.waiting.push_back(current);
  if (static_cast<int>(meeting.waiting.size()) == meeting.size) {
    release(meeting.waiting);
  }
  back_to_scheduler();
}

Warp& my_warp() {
  return now->warps[current->block * (now->threads / 32) + current->thread / 32];
}

}  // namespace

void in_warp(
    Kind kind, const void* in, size_t in_size, void* out, size_t out_size, void (*together)(const void*, void*)) {
  Warp& warp = my_warp();
  const int lane = current->thread % 32;
  if (!warp.waiting.empty() && warp.kind != kind) {
    now->problem = "the lanes of a warp do different things together";
  }
  warp.kind = kind;
  std::memcpy(warp.in + lane * in_size, in, in_size);
  if (warp.waiting.size() == 31) {
    together(warp.in, warp.out);
  }
  wait_in(warp);
  std::memcpy(out, warp.out + lane * out_size, out_size);
}

void in_block() {
  wait_in(now->blocks[current->block]);
}
void in_grid() {
  wait_in(now->all);
}
void* shared_memory() {
  return now->shared[current->block].data();
}

void copy_async(void* to, const void* from, bool valid) {
  if (order % 2 == 0) {
    do_copy({to, from, valid});
  } else {
    current->copies.push_back({to, from, valid});
  }
}
void wait_for_copies() {
  for (const Copy& copy : current->copies) {
    do_copy(copy);
  }
  current->copies.clear();
}

int resident_blocks() {
  return wanted_blocks;
}

const char* run(void (*body)(const void*), const void* arguments, int64_t blocks, int threads, size_t shared_bytes) {
  Grid launch;
  now = &launch;
  random_state = 88172645463325252ull + order;
  launch.body = body;
  launch.arguments = arguments;
  launch.threads = threads;
  launch.fibers.resize(blocks * threads);
  launch.warps.resize(blocks * threads / 32);
  launch.blocks.resize(blocks);
  launch.all.size = static_cast<int>(blocks * threads);
  for (Warp& warp : launch.warps) {
    warp.size = 32;
  }
  for (Meeting& meeting : launch.blocks) {
    meeting.size = threads;
  }
  uint4 poison;
  std::memset(&poison, 0xff, sizeof poison);
  launch.shared.assign(blocks, std::vector<uint4>((shared_bytes + CANARY) / 16, poison));
  const std::unique_ptr<char[]> stacks(new char[launch.fibers.size() * STACK]);
  std::vector<Fiber*> all;
  for (size_t i = 0; i < launch.fibers.size(); ++i) {
    Fiber& fiber = launch.fibers[i];
    fiber.block = static_cast<int>(i / threads);
    fiber.thread = static_cast<int>(i % threads);
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = stacks.get() + i * STACK;
    fiber.start.uc_stack.ss_size = STACK;
    makecontext(&fiber.start, fiber_main, 0);
    all.push_back(&fiber);
  }
  grid.x = static_cast<int>(blocks);
  release(all);

  size_t left = launch.fibers.size();
  while (!launch.ready.empty() && launch.problem.empty()) {
    current = next_fiber();
    thread.x = current->thread;
    block.x = current->block;
    resume();
    left -= current->done;
  }
  if (launch.problem.empty() && left > 0) {
    launch.problem = "the threads wait for one another";
  }
  for (const auto& memory : launch.shared) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(memory.data());
    for (size_t i = shared_bytes; i < memory.size() * 16; ++i) {
      if (bytes[i] != 0xff) {
        launch.problem = "written beyond shared memory";
      }
    }
  }
  static std::string problem;
  problem = launch.problem;
  return problem.empty() ? nullptr : problem.c_str();
}

float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float x;
  if (exponent == 31) {
    x = fraction ? NAN : INFINITY;
  } else {
    x = std::ldexp(static_cast<float>(exponent ? fraction + 1024 : fraction), (exponent ? exponent : 1) - 25);
  }
  return bits >> 15 ? -x : x;
}

uint16_t float_to_half(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (std::isnan(x)) {
    return 0x7fff;
  }
  if (size >= 65520) {
    return sign | 0x7c00;
  }
  int exponent;
  std::frexp(size, &exponent);  // size = f * 2^exponent, f in [0.5, 1)
  const int scale = size == 0 || exponent < -13 ? -13 : exponent;
  const long units = std::lrint(std::ldexp(size, 11 - scale));  // of the last place, to even; 2048 carries over
  return sign | static_cast<uint16_t>(units + (scale + 13) * 1024);
}

uint16_t float_to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return std::isnan(x) ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace emulator

// For the tests: the number of blocks that fit at once, and the order of the threads.
extern "C" __attribute__((visibility("default"))) void eah_emulate(int blocks, int order) {
  emulator::wanted_blocks = blocks;
  emulator::order = order;
}

// bindings_cuda.cpp asks torch for it.
extern "C" __attribute__((visibility("default"))) int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
