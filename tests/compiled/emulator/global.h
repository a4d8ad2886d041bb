// Global memory, each byte with a note of who wrote and who read it last.
//
// Order between blocks: a release by one and an acquire of what it wrote by the other. Two accesses that no such chain
// orders, one of them a write, are an error, and so is touching bytes that belong to no tensor.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <unordered_map>
#include <vector>

#include "order.h"

namespace emulator {

// When something happened, by the block's tick (order.h).
struct Stamp {
  u32 tick;
  u32 block : 23, warp : 6, some : 1, atomic : 1, several : 1;
};
static_assert(sizeof(Stamp) == 8);

// What of a block another one has seen: all up to `barrier`, of one warp all up to `tick`.
struct Seen {
  i64 barrier = -1, tick = -1;
  int warp = -1;

  void add(const Seen& more) {
    barrier = more.barrier > barrier ? more.barrier : barrier;
    if (more.tick > tick) {
      tick = more.tick;
      warp = more.warp;
    }
  }
};
using View = std::vector<Seen>;  // by block

inline void join(View& view, const View& more) {
  if (view.size() < more.size()) {
    view.resize(more.size());
  }
  for (size_t i = 0; i < more.size(); ++i) {
    view[i].add(more[i]);
  }
}

// Who accesses global memory: a warp of a block.
struct Actor {
  int block, warp;
  u32 tick;
  i64 known;          // the tick up to which it has seen what every warp of the block did
  const Clock* seen;  // of the block
  const View* view;   // of other blocks

  Stamp stamp() const {
    return {tick, static_cast<u32>(block), static_cast<u32>(warp), 1, 0, 0};
  }
  bool after(const Stamp& s) const {
    if (static_cast<int>(s.block) == block) {
      return static_cast<int>(s.warp) == warp || s.tick <= seen->at[s.warp];
    }
    if (s.block >= view->size()) {
      return false;
    }
    const Seen& of = (*view)[s.block];
    return s.tick <= of.barrier || (static_cast<int>(s.warp) == of.warp && s.tick <= of.tick);
  }
};

struct Range {  // one storage; as Python passes it
  u64 begin, size;
  const u8* belongs;  // for each byte, whether it is an element of a tensor that the kernel was given
};

class Global {
 public:
  Global(const Range* ranges, int count) {
    for (int i = 0; i < count; ++i) {
      regions_.push_back({ranges[i], std::unique_ptr<Stamp, Free>(zeroed(ranges[i].size)),
                          std::unique_ptr<Stamp, Free>(zeroed(ranges[i].size)), false});
    }
  }

  const u8* read(u64 address, u32 size, const Actor& who, bool constant) {
    Region& region = find(address, size);
    const u64 at = address - region.range.begin;
    Stamp *written = region.written.get() + at, *read = region.read.get() + at;
    if (region.touched) {
      for (u32 i = 0; i < size; ++i) {
        if (written[i].some) {
          if (constant) {
            fault("ld.global.nc of an address that the kernel writes");
          }
          after_writes(address + i, written[i], who, "read");
        }
      }
    }
    const Stamp mine = who.stamp();
    for (u32 i = 0; i < size; ++i) {
      Stamp next = mine;
      next.several = read[i].some && (read[i].several || read[i].block != mine.block || read[i].warp != mine.warp) &&
                     !(read[i].several ? false : who.after(read[i]));
      read[i] = next;
    }
    return reinterpret_cast<const u8*>(address);
  }

  void write(u64 address, const void* from, u32 size, const Actor& who) {
    Region& region = find(address, size);
    region.touched = true;
    const u64 at = address - region.range.begin;
    Stamp *written = region.written.get() + at, *read = region.read.get() + at;
    for (u32 i = 0; i < size; ++i) {
      if (written[i].some) {
        after_writes(address + i, written[i], who, "written");
      }
      if (read[i].some && (read[i].several || !who.after(read[i]))) {
        fault("global memory is written unordered with a read by block %u, warp %u", u32{read[i].block},
              u32{read[i].warp});
      }
      written[i] = who.stamp();
    }
    std::memcpy(reinterpret_cast<void*>(address), from, size);
  }

  // An atomic addition (or, without `addend`, an atomic read) of 32 bits; what an acquire lets the warp see is joined
  // to `view`.
  u32 atomic(u64 address, const u32* addend, bool acquire, bool release, const Actor& who, View& view) {
    Region& region = find(address, 4);
    Stamp *written = region.written.get() + (address - region.range.begin),
          *read = region.read.get() + (address - region.range.begin);
    if (written->some && !written->atomic) {
      after_writes(address, *written, who, "changed");
    }
    if (read->some && addend && (read->several || !who.after(*read))) {
      fault("global memory is changed unordered with a read by block %u, warp %u", u32{read->block}, u32{read->warp});
    }
    Atomic& place = atomics_[address];
    u32 before;
    std::memcpy(&before, reinterpret_cast<const void*>(address), 4);
    if (acquire) {
      join(view, place.released);
    }
    if (addend) {
      const u32 after = before + *addend;
      std::memcpy(reinterpret_cast<void*>(address), &after, 4);
      region.touched = true;
      Stamp mark = who.stamp();
      mark.atomic = 1;
      std::fill_n(written, 4, mark);
      place.changes.push_back(who.stamp());
    }
    if (release) {
      join(place.released, *who.view);
      if (place.released.size() <= static_cast<size_t>(who.block)) {
        place.released.resize(who.block + 1);
      }
      place.released[who.block].add({who.known, who.tick, who.warp});
    }
    return before;
  }

 private:
  struct Free {
    void operator()(Stamp* p) const {
      std::free(p);
    }
  };
  struct Region {
    Range range;
    std::unique_ptr<Stamp, Free> written, read;
    bool touched;  // written by this launch
  };
  struct Atomic {
    View released;
    std::vector<Stamp> changes;
  };

  static Stamp* zeroed(u64 count) {
    return static_cast<Stamp*>(std::calloc(count, sizeof(Stamp)));
  }

  Region& find(u64 address, u32 size) {
    if (address % size) {
      fault("global memory: an address is not aligned to %u bytes", size);
    }
    if (!(last_ < regions_.size() && contains(regions_[last_].range, address, size))) {
      for (last_ = 0; last_ < regions_.size() && !contains(regions_[last_].range, address, size); ++last_) {
      }
    }
    if (last_ == regions_.size()) {
      outside(address);
    }
    Region& region = regions_[last_];
    const u8* belongs = region.range.belongs + (address - region.range.begin);
    u8 all = 1;
    for (u32 i = 0; i < size; ++i) {
      all &= belongs[i];
    }
    if (!all) {
      fault("global memory: byte %llu of a storage of %llu is no element of a tensor that the kernel was given",
            static_cast<unsigned long long>(address - region.range.begin),
            static_cast<unsigned long long>(region.range.size));
    }
    return region;
  }
  static bool contains(const Range& range, u64 address, u32 size) {
    return address >= range.begin && address + size <= range.begin + range.size;
  }
  [[noreturn]] void outside(u64 address) const {
    for (const Region& region : regions_) {
      const auto past = static_cast<i64>(address - region.range.begin);
      if (past > -65536 && past < static_cast<i64>(region.range.size) + 65536) {
        fault("global memory: byte %lld of a storage of %llu", static_cast<long long>(past),
              static_cast<unsigned long long>(region.range.size));
      }
    }
    fault("global memory: address %#llx is far from every tensor", static_cast<unsigned long long>(address));
  }

  void after_writes(u64 address, const Stamp& written, const Actor& who, const char* what) {
    if (!written.atomic) {
      if (!who.after(written)) {
        fault("global memory is %s unordered with a write by block %u, warp %u", what, u32{written.block},
              u32{written.warp});
      }
      return;
    }
    for (const Stamp& change : atomics_[address & ~u64{3}].changes) {
      if (!who.after(change)) {
        fault("global memory is %s unordered with an atomic by block %u, warp %u", what, u32{change.block},
              u32{change.warp});
      }
    }
  }

  std::vector<Region> regions_;
  std::unordered_map<u64, Atomic> atomics_;
  size_t last_ = 0;
};

}  // namespace emulator
