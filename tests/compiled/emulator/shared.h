// Shared memory of a block, each byte with a note of who wrote it and when each warp read it last (order.h).
//
// Two accesses that nothing orders, one of them a write, are an error. So is reading what nobody wrote or a copy still
// under way, and touching an mbarrier by anything but its own instructions.
#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>

#include "order.h"

namespace emulator {

enum class State : u8 { HERE, COPYING, BULK_COPYING, BARRIER };  // by cp.async, by TMA

struct Written {
  u32 tick;         // 0: never written
  u16 proxy_fences; // that the writer had executed
  u8 actor;         // a warp; for what TMA brought, the mbarrier that counted it
  State state;
};

class Shared {
 public:
  Shared(size_t size, Order& order, bool unfenced)
      : order_(order), bytes_(size, 0xff), written_(size),
        read_(static_cast<u32*>(std::calloc(size * order.warps() + 1, sizeof(u32)))), unfenced_(unfenced) {}

  const u8* read(u64 address, u32 size, int warp) {
    check(address, size);
    for (u64 i = address; i < address + size; ++i) {
      const Written& w = written_[i];
      if (w.tick == 0 || w.state != State::HERE || !order_.after(warp, w.actor, w.tick)) {
        bad_read(i, w);
      }
    }
    std::fill_n(reads(warp) + address, size, order_.tick);
    return &bytes_[address];
  }

  void write(u64 address, const void* from, u32 size, int warp) {
    may_write(address, size, warp, State::HERE, static_cast<const u8*>(from));
    std::memcpy(&bytes_[address], from, size);
  }

  // A cp.async starts (its target holds nothing of use until it ends) and ends, at the wait for it.
  void start_copy(u64 address, u32 size, int warp) {
    may_write(address, size, warp, State::COPYING, nullptr);
    std::memset(&bytes_[address], 0xff, size);
  }
  void end_copy(u64 address, const void* from, u32 size, int warp) {
    std::fill_n(&written_[address], size, note(warp, State::HERE));
    std::memcpy(&bytes_[address], from, size);
  }

  // The same by TMA: it ends in the phase `tick` of the mbarrier `actor`. What it overwrites is behind a proxy fence.
  void start_bulk(u64 address, u32 size, int warp) {
    for (u64 i = address; i < std::min<u64>(address + size, written_.size()); ++i) {
      if (written_[i].tick && written_[i].state == State::HERE && order_.after(warp, written_[i].actor, written_[i].tick)) {
        check_proxy(i, warp, "TMA overwrites");
      }
    }
    may_write(address, size, warp, State::BULK_COPYING, nullptr);
    std::memset(&bytes_[address], 0xff, size);
  }
  void end_bulk(u64 address, const void* from, u32 size, int actor, u32 tick) {
    std::fill_n(&written_[address], size, Written{tick, 0, static_cast<u8>(actor), State::HERE});
    std::memcpy(&bytes_[address], from, size);
  }

  void start_barrier(u64 address, int warp) {
    may_write(address, 8, warp, State::BARRIER, nullptr);
  }
  void end_barrier(u64 address, int warp) {
    std::fill_n(&written_[address], 8, note(warp, State::HERE));
  }
  // Whether the warp comes after whoever made the mbarrier.
  bool knows(u64 address, int warp) const {
    return order_.after(warp, written_[address].actor, written_[address].tick);
  }

  // As `read`, by wgmma, which reads through the async proxy: between a write by a thread and it there is a proxy fence.
  const u8* read_async(u64 address, u32 size, int warp) {
    const u8* data = read(address, size, warp);
    for (u64 i = address; i < address + size; ++i) {
      if (i == address || std::memcmp(&written_[i], &written_[i - 1], sizeof(Written)) != 0) {
        check_proxy(i, warp, "wgmma reads");
      }
    }
    return data;
  }

 private:
  struct Free {
    void operator()(u32* p) const {
      std::free(p);
    }
  };

  u32* reads(int warp) {
    return read_.get() + warp * bytes_.size();
  }
  Written note(int warp, State state) const {
    return {order_.tick, order_.fences(warp), static_cast<u8>(warp), state};
  }

  void check(u64 address, u32 size) const {
    if (address + size > bytes_.size() || address + size < address) {
      fault("shared memory: byte %lld of %zu", static_cast<long long>(address), bytes_.size());
    }
    if (address % size) {
      fault("shared memory: byte %lld is not aligned to %u", static_cast<long long>(address), size);
    }
  }

  void check_proxy(u64 i, int warp, const char* what) const {
    const Written& w = written_[i];
    if (!unfenced_ && w.actor < MOST_WARPS && !order_.fenced(warp, w.actor, w.tick, w.proxy_fences)) {
      fault("%s shared byte %llu, written by warp %d through the generic proxy, without fence.proxy.async", what,
            static_cast<unsigned long long>(i), w.actor);
    }
  }

  // data: null for what comes later. Warps that hold the same values may write them to the same place.
  void may_write(u64 address, u32 size, int warp, State state, const u8* data) {
    check(address, size);
    for (u64 i = address; i < address + size; ++i) {
      const Written& w = written_[i];
      if (w.state != State::HERE) {
        bad_write(i, w);
      }
      const bool same = data && data[i - address] == bytes_[i];
      if (w.tick && !order_.after(warp, w.actor, w.tick) && !same) {
        bad_write(i, w);
      }
    }
    for (int other = 0; other < order_.warps(); ++other) {
      const u32 seen = order_.seen(warp).at[other];
      const u32* read = reads(other) + address;
      for (u32 i = 0; other != warp && i < size; ++i) {
        const Written& w = written_[address + i];
        const bool again = data && w.tick && !order_.after(warp, w.actor, w.tick);  // the same value, as found above
        if (read[i] > seen && !again) {
          fault("shared byte %llu is written without a barrier after warp %d read it",
                static_cast<unsigned long long>(address + i), other);
        }
      }
    }
    std::fill_n(&written_[address], size, note(warp, state));
  }

  [[noreturn]] void bad_read(u64 i, const Written& w) const {
    const auto byte = static_cast<unsigned long long>(i);
    if (w.tick == 0) {
      fault("shared byte %llu is read before it was written", byte);
    }
    if (w.state == State::BARRIER) {
      fault("shared byte %llu is read, which is part of an mbarrier", byte);
    }
    if (w.state == State::BULK_COPYING) {
      fault("shared byte %llu is read while a TMA copy to it is under way", byte);
    }
    if (w.state == State::COPYING) {
      fault("shared byte %llu is read while a cp.async of warp %d to it is under way", byte, w.actor);
    }
    if (w.actor >= MOST_WARPS) {
      fault("shared byte %llu is read without a wait for the phase in which TMA brought it", byte);
    }
    fault("shared byte %llu is read without a barrier after warp %d wrote it", byte, w.actor);
  }
  [[noreturn]] void bad_write(u64 i, const Written& w) const {
    const auto byte = static_cast<unsigned long long>(i);
    if (w.state == State::BARRIER) {
      fault("shared byte %llu is written, which is part of an mbarrier", byte);
    }
    if (w.state == State::BULK_COPYING) {
      fault("shared byte %llu is written while a TMA copy to it is under way", byte);
    }
    if (w.state == State::COPYING) {
      fault("shared byte %llu is written while a cp.async of warp %d to it is under way", byte, w.actor);
    }
    if (w.actor >= MOST_WARPS) {
      fault("shared byte %llu is written without a wait for the phase in which TMA brought it", byte);
    }
    fault("shared byte %llu is written without a barrier after warp %d wrote it", byte, w.actor);
  }

  Order& order_;
  std::vector<u8> bytes_;
  std::vector<Written> written_;
  std::unique_ptr<u32, Free> read_;  // for each warp, by byte: the tick at which it read it last
  bool unfenced_;                    // nobody asks for proxy fences
};

}  // namespace emulator
