// TMA: a tile of a tensor in global memory, copied to shared memory, what lies outside the tensor as zeros.
#pragma once

#include "global.h"
#include "mbarriers.h"

namespace emulator {

// Stands for the 128 bytes of a CUtensorMap, whose contents are the driver's secret; ../tensor_maps.py writes it.
struct TensorMap {
  u64 magic, base;
  u32 rank, element;      // bytes
  u32 swizzle, fill_nan;  // bytes of a swizzled line: 0, 32, 64 or 128
  u32 size[5], box[5];    // innermost first
  u64 stride[4];          // bytes, of the dimensions but the innermost
  static constexpr u64 MAGIC = 0x70616d726f736e65;
};
static_assert(sizeof(TensorMap) <= 128);

struct BulkCopy {
  TensorMap map;
  i32 corner[5];
  u64 to, barrier;

  u64 bytes() const {
    u64 all = map.element;
    for (u32 i = 0; i < map.rank; ++i) {
      all *= map.box[i];
    }
    return all;
  }

  // For each 16 bytes of the target: f(its address, the address that they come from or 0 outside the tensor).
  template <typename F>
  void chunks(F f) const {
    const u32 line = map.box[0] * map.element;
    for (u64 done = 0; done < bytes(); done += 16) {
      u64 rest = done / line;
      const i64 first = corner[0] + static_cast<i64>(done % line / map.element);
      bool inside = first >= 0 && first + 16 / map.element <= map.size[0];
      i64 from = static_cast<i64>(map.base) + first * map.element;
      for (u32 i = 1; i < map.rank; ++i) {
        const i64 at = corner[i] + static_cast<i64>(rest % map.box[i]);
        rest /= map.box[i];
        inside &= at >= 0 && at < map.size[i];
        from += at * static_cast<i64>(map.stride[i - 1]);
      }
      const u64 plain = to + done;
      const u64 lines = map.swizzle / 16;  // 16-byte columns that trade places
      f(lines ? plain ^ ((plain >> 7 & (lines - 1)) << 4) : plain, inside ? static_cast<u64>(from) : 0);
    }
  }
};

}  // namespace emulator
