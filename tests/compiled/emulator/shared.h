// Shared memory of a block, each byte with a note of who wrote and who read it last.
//
// Order within a block: a barrier that all of its warps pass. Two accesses that none orders, one of them a write, are an
// error. So is reading what nobody wrote or a copy still under way.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "fault.h"

namespace emulator {

struct Written {
  u32 epoch;        // barriers that the block had passed; 0: never written
  u16 proxy_fences; // that the writer had executed
  u8 warp;
  u8 in_flight;     // a cp.async that nobody waited for yet
};
struct Read {
  u32 epoch = 0;
  u8 warp = 0;
  u8 several = 0;  // other warps too
};

class Shared {
 public:
  Shared(size_t size, int warps, bool unfenced)
      : bytes_(size, 0xff), written_(size), read_(size), fences_(warps), unfenced_(unfenced) {}

  u32 epoch = 1;

  const u8* read(u64 address, u32 size, int warp) {
    check(address, size);
    for (u64 i = address; i < address + size; ++i) {
      const Written& w = written_[i];
      if (w.epoch == 0 || w.in_flight || (w.epoch == epoch && w.warp != warp)) {
        bad_read(i, w);
      }
    }
    for (u64 i = address; i < address + size; ++i) {
      Read& r = read_[i];
      r.several = r.epoch == epoch && (r.several || r.warp != warp);
      r.epoch = epoch;
      r.warp = static_cast<u8>(warp);
    }
    return &bytes_[address];
  }

  void write(u64 address, const void* from, u32 size, int warp) {
    may_write(address, size, warp, static_cast<const u8*>(from));
    std::memcpy(&bytes_[address], from, size);
  }

  // A cp.async starts (its target holds nothing of use until it ends) and ends, at the wait for it.
  void start_copy(u64 address, u32 size, int warp) {
    may_write(address, size, warp, nullptr);
    std::memset(&bytes_[address], 0xff, size);
  }
  void end_copy(u64 address, const void* from, u32 size, int warp) {
    const Written note = {epoch, fence_count(warp), static_cast<u8>(warp), 0};
    std::fill_n(&written_[address], size, note);
    std::memcpy(&bytes_[address], from, size);
  }

  void proxy_fence(int warp) {
    fences_[warp].push_back(epoch);
  }

  // As `read`, by wgmma, which reads through the async proxy: between a write and it there is a proxy fence, of the
  // writer before the barrier, or of the reader after it.
  const u8* read_async(u64 address, u32 size, int warp) {
    const u8* data = read(address, size, warp);
    for (u64 i = address; i < address + size; ++i) {
      if (i == address || std::memcmp(&written_[i], &written_[i - 1], sizeof(Written)) != 0) {
        const Written& w = written_[i];
        const auto &theirs = fences_[w.warp], &mine = fences_[warp];
        const bool by_writer = theirs.size() > w.proxy_fences && (w.warp == warp || theirs[w.proxy_fences] < epoch);
        if (!unfenced_ && !by_writer && (mine.empty() || mine.back() <= w.epoch)) {
          fault("wgmma reads shared byte %llu, written by warp %d through the generic proxy, without fence.proxy.async",
                static_cast<unsigned long long>(i), w.warp);
        }
      }
    }
    return data;
  }

 private:
  u16 fence_count(int warp) const {
    return static_cast<u16>(fences_[warp].size());
  }

  void check(u64 address, u32 size) const {
    if (address + size > bytes_.size() || address + size < address) {
      fault("shared memory: byte %lld of %zu", static_cast<long long>(address), bytes_.size());
    }
    if (address % size) {
      fault("shared memory: byte %lld is not aligned to %u", static_cast<long long>(address), size);
    }
  }

  // data: null for a copy that starts. Warps that hold the same values may write them to the same place.
  void may_write(u64 address, u32 size, int warp, const u8* data) {
    check(address, size);
    for (u64 i = address; i < address + size; ++i) {
      const Written& w = written_[i];
      const Read& r = read_[i];
      const bool other_wrote = w.epoch == epoch && w.warp != warp;
      if (w.in_flight || other_wrote || (r.epoch == epoch && (r.several || r.warp != warp))) {
        if (w.in_flight || !other_wrote || !data || data[i - address] != bytes_[i]) {
          bad_write(i, w, r);
        }
      }
    }
    const Written note = {epoch, fence_count(warp), static_cast<u8>(warp), data == nullptr};
    std::fill_n(&written_[address], size, note);
  }

  [[noreturn]] void bad_read(u64 i, const Written& w) const {
    const auto byte = static_cast<unsigned long long>(i);
    if (w.epoch == 0) {
      fault("shared byte %llu is read before it was written", byte);
    }
    if (w.in_flight) {
      fault("shared byte %llu is read while a cp.async of warp %d to it is under way", byte, w.warp);
    }
    fault("shared byte %llu is read without a barrier after warp %d wrote it", byte, w.warp);
  }
  [[noreturn]] void bad_write(u64 i, const Written& w, const Read& r) const {
    const auto byte = static_cast<unsigned long long>(i);
    if (w.in_flight) {
      fault("shared byte %llu is written while a cp.async of warp %d to it is under way", byte, w.warp);
    }
    if (w.epoch == epoch) {
      fault("shared byte %llu is written without a barrier after warp %d wrote it", byte, w.warp);
    }
    fault("shared byte %llu is written without a barrier after warp %d read it", byte, r.warp);
  }

  std::vector<u8> bytes_;
  std::vector<Written> written_;
  std::vector<Read> read_;
  std::vector<std::vector<u32>> fences_;  // of each warp: the epochs of its proxy fences
  bool unfenced_;                         // nobody asks for them
};

}  // namespace emulator
