// mbarriers: phases that end when so many arrivals and so many bytes have come, as the PTX ISA documents them.
#pragma once

#include <unordered_map>

#include "shared.h"

namespace emulator {

class Barriers {
 public:
  Barriers(Order& order, Shared& shared) : order_(order), shared_(shared) {}

  void init(u64 address, u32 count, int warp) {
    if (count == 0 || count >= 1u << 20) {
      fault("mbarrier.init with a count of %u", count);
    }
    Barrier& barrier = made_[address];
    if (barrier.live) {
      fault("mbarrier.init of one that is in use");
    }
    shared_.start_barrier(address, warp);
    const int actor = barrier.actor ? barrier.actor : MOST_WARPS + static_cast<int>(made_.size()) - 1;
    if (actor >= MOST_ACTORS) {
      fault("more than %d mbarriers", MOST_ACTORS - MOST_WARPS);
    }
    barrier = {true, actor, count, count, 0, 0, barrier.ticks, {}, {}};
  }
  void invalidate(u64 address, int warp) {
    Barrier& barrier = find(address, warp);
    if (barrier.bytes || barrier.pending != barrier.count) {
      fault("mbarrier.inval in the middle of a phase");
    }
    barrier.live = false;
    shared_.end_barrier(address, warp);
  }

  // bytes: that this phase waits for beside the arrivals.
  void arrive(u64 address, u32 count, i64 bytes, int warp) {
    Barrier& barrier = find(address, warp);
    if (count == 0 || count > barrier.pending) {
      fault("mbarrier: %u arrive where %u are expected", count, barrier.pending);
    }
    barrier.bytes += bytes;
    order_.release(warp, barrier.arriving);
    barrier.pending -= count;
    end_phase(barrier);
  }
  // The actor and the tick of what a copy brings now.
  std::pair<int, u32> bring(u64 address, i64 bytes) {
    const auto found = made_.find(address);
    if (found == made_.end() || !found->second.live) {
      fault("a TMA copy ends at an mbarrier that is gone");
    }
    Barrier& barrier = found->second;
    const std::pair<int, u32> mark = {barrier.actor, barrier.ticks + 1};
    barrier.bytes -= bytes;
    end_phase(barrier);
    return mark;
  }
  // Whether the phase of that parity has ended; then the warp has seen what was released in it.
  bool wait(u64 address, u32 parity, int warp) {
    Barrier& barrier = find(address, warp);
    if ((barrier.phase & 1) == (parity & 1)) {
      return false;
    }
    order_.acquire(warp, barrier.ended);
    return true;
  }
  bool ready(u64 address, u32 parity) const {
    return (made_.at(address).phase & 1) != (parity & 1);
  }
  void check(u64 address, int warp) {
    find(address, warp);
  }

 private:
  struct Barrier {
    bool live;
    int actor;
    u32 count, pending;
    i64 bytes;
    u32 phase;  // that goes on, from 0
    u32 ticks;  // phases ended, over all lives
    Clock arriving, ended;
  };

  Barrier& find(u64 address, int warp) {
    const auto found = made_.find(address);
    if (found == made_.end() || !found->second.live) {
      fault("no mbarrier at shared byte %llu", static_cast<unsigned long long>(address));
    }
    if (!shared_.knows(address, warp)) {
      fault("an mbarrier is used without a barrier after its mbarrier.init");
    }
    return found->second;
  }
  void end_phase(Barrier& barrier) {
    if (barrier.pending || barrier.bytes) {
      return;
    }
    barrier.arriving.at[barrier.actor] = ++barrier.ticks;
    barrier.ended = barrier.arriving;
    barrier.arriving = {};
    barrier.pending = barrier.count;
    ++barrier.phase;
  }

  Order& order_;
  Shared& shared_;
  std::unordered_map<u64, Barrier> made_;
};

}  // namespace emulator
