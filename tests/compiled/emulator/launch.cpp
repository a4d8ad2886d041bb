// What Python calls: a program is made once and launched on a grid, in an order that a seed chooses.
//
// Seed 0: blocks one after the other, warps in turn, each until a barrier. Seed 1: the same, both from the last one.
// Others: blocks in a random order, some of them resident at once, and warps of theirs in random order for a random
// number of instructions. What TMA copies arrives when no warp can go on without it, with even seeds of those also earlier.

#include <exception>
#include <numeric>
#include <random>

#include "interpreter.h"

namespace emulator {

struct Launch {  // as ../emulator.py lays it out
  i32 grid, threads;
  i32 resident;  // blocks that are there at once; 0: as the seed says
  u32 seed;
  i32 unfenced, registers;  // whether wgmma may read what no proxy fence follows; a thread's at first, 0: not said
  u64 shared_bytes, param_bytes, ranges;
  const u8* params;
  const Range* range;
  u64 limit;  // instructions of a warp, after which the launch is given up
  const i32* special;  // slots of tid.x, ctaid.x, nctaid.x, ntid.x, laneid, envreg1, envreg2; -1: not used
  u64 grid_barrier;    // the address that envreg1 (high) and envreg2 (low) give
};

namespace {

void start(const Program& program, const Launch& launch, Block& block, int index) {
  Warp& warp = block.warps[index];
  warp.index = index;
  warp.registers.resize(program.slots);
  std::memset(warp.registers.data(), 0xff, program.slots * sizeof(Line));
  const int threads = std::min(LANES, launch.threads - index * LANES);
  warp.allowed = static_cast<u32>(launch.registers);
  warp.mask = warp.live = threads == LANES ? ALL : (1u << threads) - 1;
  if (program.wgmma) {
    warp.results.resize(program.slots);
    warp.sources.resize(program.slots);
    warp.written.resize(program.slots);
  }
  for (size_t i = 0; i < program.constants.size(); i += 2) {
    const u64 slot = program.constants[i] >> 1;
    for (int lane = 0; lane < LANES; ++lane) {
      if (program.constants[i] & 1) {
        warp.at<u64>(static_cast<i32>(slot))[lane] = program.constants[i + 1];
      } else {
        warp.at<u32>(static_cast<i32>(slot))[lane] = static_cast<u32>(program.constants[i + 1]);
      }
    }
  }
  for (int lane = 0; lane < LANES; ++lane) {
    const u32 values[] = {static_cast<u32>(index * LANES + lane), static_cast<u32>(block.index),
                          static_cast<u32>(launch.grid), static_cast<u32>(launch.threads), static_cast<u32>(lane),
                          static_cast<u32>(launch.grid_barrier >> 32), static_cast<u32>(launch.grid_barrier)};
    for (int i = 0; i < 7; ++i) {
      if (launch.special[i] >= 0) {
        warp.at<u32>(launch.special[i])[lane] = values[i];
      }
    }
  }
}

class Scheduler {
 public:
  Scheduler(const Program& program, const Launch& launch, Global& global)
      : program_(program), launch_(launch), random_(launch.seed),
        interpreter_(program, global, launch.params, static_cast<u32>(launch.param_bytes)) {
    order_.resize(launch.grid);
    std::iota(order_.begin(), order_.end(), 0);
    if (launch.seed == 1) {
      std::reverse(order_.begin(), order_.end());
    } else if (launch.seed > 1) {
      std::shuffle(order_.begin(), order_.end(), random_);
    }
    resident_ = launch.resident ? launch.resident : launch.seed > 1 ? 4 : 1;
  }

  void run() {
    size_t next = 0;
    while (next < order_.size() || !blocks_.empty()) {
      while (next < order_.size() && blocks_.size() < static_cast<size_t>(resident_)) {
        add(order_[next++]);
      }
      step();
    }
  }

  const Interpreter& interpreter() const {
    return interpreter_;
  }
  std::string where;

 private:
  void add(int index) {
    const int warps = (launch_.threads + LANES - 1) / LANES;
    blocks_.push_back(std::make_unique<Block>(index, launch_.shared_bytes, warps, launch_.unfenced != 0));
    for (int i = 0; i < warps; ++i) {
      start(program_, launch_, *blocks_.back(), i);
    }
  }

  // One warp that can run, for a while; or a copy by TMA arrives.
  void step() {
    const bool random = launch_.seed > 1;
    std::vector<std::pair<size_t, int>> runnable, copies;
    for (size_t b = 0; b < blocks_.size(); ++b) {
      Block& block = *blocks_[b];
      for (Warp& warp : block.warps) {
        if (block.can_run(warp)) {
          runnable.push_back({b, warp.index});
        }
      }
      for (size_t i = 0; i < block.bulk_copies.size(); ++i) {
        copies.push_back({b, static_cast<int>(i)});
      }
    }
    if (!copies.empty() && (runnable.empty() || (random && launch_.seed % 2 == 0 && random_() % 8 == 0))) {
      const size_t which = random ? random_() % copies.size() : launch_.seed == 1 ? copies.size() - 1 : 0;
      where = "";
      interpreter_.finish_bulk(*blocks_[copies[which].first], static_cast<size_t>(copies[which].second));
      return;
    }
    if (runnable.empty()) {
      where = "";
      fault("the threads wait for one another");
    }
    size_t which = launch_.seed == 1 ? runnable.size() - 1 : 0;
    if (random) {
      which = random_() % runnable.size();
    } else if (launch_.resident > 1) {
      which = turn_++ % runnable.size();
    }
    Block& block = *blocks_[runnable[which].first];
    Warp& warp = block.warps[runnable[which].second];
    where = "block " + std::to_string(block.index) + ", warp " + std::to_string(warp.index);
    const u64 quantum = random ? 1 + random_() % 400 : launch_.resident > 1 ? 2000 : ~u64{0};
    const Stop stop = interpreter_.run(block, warp, std::min(quantum, launch_.limit + 1));
    if (interpreter_.executed > launch_.limit) {
      fault("no end after %llu instructions", static_cast<unsigned long long>(launch_.limit));
    }
    if (stop != Stop::QUANTUM) {
      meet(block);
    }
    if (stop == Stop::END && block.done()) {
      if (!block.bulk_copies.empty()) {
        fault("a block ends while its TMA copies are under way");
      }
      blocks_.erase(blocks_.begin() + static_cast<i64>(runnable[which].first));
    }
  }

  // If all the threads that a barrier is for have come to it, or, where it is for all, ended, they go on.
  void meet(Block& block) {
    for (const Warp& first : block.warps) {
      if (!first.at_barrier()) {
        continue;
      }
      std::vector<int> group;
      i64 came = 0, missing = 0;
      for (const Warp& warp : block.warps) {
        const bool here = warp.at_barrier() && (warp.barrier & 255) == (first.barrier & 255);
        if (here && warp.barrier != first.barrier) {
          fault("barrier %lld is waited at for another number of threads", static_cast<long long>(first.barrier & 255));
        }
        if (here) {
          group.push_back(warp.index);
          came += LANES;
        } else {
          missing += !warp.done();
        }
      }
      const i64 wanted = first.barrier >> 8;
      if (wanted && came > wanted) {
        fault("barrier %lld is for %lld threads, and more come", static_cast<long long>(first.barrier & 255),
              static_cast<long long>(wanted));
      }
      if (wanted ? came == wanted : missing == 0) {
        interpreter_.leave_barrier(block, group);
      }
    }
  }

  const Program& program_;
  const Launch& launch_;
  std::mt19937 random_;
  Interpreter interpreter_;
  std::vector<int> order_;
  std::vector<std::unique_ptr<Block>> blocks_;
  int resident_;
  size_t turn_ = 0;
};

}  // namespace
}  // namespace emulator

using namespace emulator;

extern "C" {

Program* emulator_program(const Instruction* code, u64 instructions, const i32* operands, u64 operand_count,
                          const u64* constants, u64 constant_words, i32 slots, i32 wgmma) {
  auto* program = new Program;
  program->code.assign(code, code + instructions);
  program->operands.assign(operands, operands + operand_count);
  program->constants.assign(constants, constants + constant_words);
  program->slots = slots;
  program->wgmma = wgmma != 0;
  program->reached.resize(instructions);
  return program;
}

const u8* emulator_reached(const Program* program) {
  return program->reached.data();
}

void emulator_free(Program* program) {
  delete program;
}

// The instructions executed, or -1: then `error` says why and `at` is the instruction's number.
i64 emulator_launch(const Program* program, const Launch* launch, char* error, u64 error_size, i32* at) {
  Global global(launch->range, static_cast<int>(launch->ranges));
  Scheduler scheduler(*program, *launch, global);
  try {
    scheduler.run();
  } catch (const std::exception& problem) {
    *at = scheduler.where.empty() ? -1 : scheduler.interpreter().pc;
    std::snprintf(error, error_size, "%s%s%s", problem.what(), scheduler.where.empty() ? "" : ", ",
                  scheduler.where.c_str());
    return -1;
  }
  return static_cast<i64>(scheduler.interpreter().executed);
}

}  // extern "C"
