// Who has seen what within a block: vector clocks.
//
// The block's tick rises with every release. What a warp does carries the tick; another warp comes after it once it has
// joined what the first one released later: at a barrier, or through an mbarrier. An mbarrier is an actor of its own,
// whose ticks are its phases: what the copies that it counts bring is seen by those who waited for that phase.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "fault.h"

namespace emulator {

constexpr int MOST_WARPS = 32, MOST_ACTORS = 64;

struct Clock {
  std::array<u32, MOST_ACTORS> at{};

  void join(const Clock& other) {
    for (int i = 0; i < MOST_ACTORS; ++i) {
      at[i] = std::max(at[i], other.at[i]);
    }
  }
};

class Order {
 public:
  explicit Order(int warps) : seen_(warps), fenced_(warps), fences_(warps), known_(warps) {}

  u32 tick = 1;

  int warps() const {
    return static_cast<int>(seen_.size());
  }
  const Clock& seen(int warp) const {
    return seen_[warp];
  }
  bool after(int warp, int actor, u32 when) const {
    return actor == warp || when <= seen_[warp].at[actor];
  }
  // The tick up to which the warp has seen what every one did.
  u32 known(int warp) const {
    return known_[warp];
  }

  void release(int warp, Clock& into) {
    into.join(seen_[warp]);
    into.at[warp] = tick++;
  }
  void acquire(int warp, const Clock& from) {
    seen_[warp].join(from);
    known_[warp] = *std::min_element(seen_[warp].at.begin(), seen_[warp].at.begin() + warps());
  }
  void meet(const std::vector<int>& group) {
    Clock all;
    for (int warp : group) {
      all.join(seen_[warp]);
      all.at[warp] = tick;
    }
    ++tick;
    for (int warp : group) {
      acquire(warp, all);
    }
  }

  // Proxy fences: how many a warp has executed, and whether one lies between a write that a warp has seen, or that is
  // its own, and now: of the writer before it released, or of the warp itself after it had seen the write.
  u16 fences(int warp) const {
    return static_cast<u16>(fences_[warp].size());
  }
  void fence(int warp) {
    fences_[warp].push_back(tick);
    fenced_[warp] = seen_[warp];
  }
  bool fenced(int warp, int writer, u32 when, u16 fences_before) const {
    const std::vector<u32>& theirs = fences_[writer];
    const bool by_writer = theirs.size() > fences_before && after(warp, writer, theirs[fences_before]);
    return by_writer || (writer != warp && fenced_[warp].at[writer] >= when);
  }

 private:
  std::vector<Clock> seen_, fenced_;  // by warp; what it had seen at its last proxy fence
  std::vector<std::vector<u32>> fences_;
  std::vector<u32> known_;
};

}  // namespace emulator
