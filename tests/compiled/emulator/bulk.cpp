// Instructions on mbarriers, and TMA.
#include "interpreter.h"

namespace emulator {

// False: a wait whose phase has not ended.
bool Interpreter::mbarrier() {
  Block& block = *block_;
  const int warp = warp_->index;
  if (in_->op == MBARRIER_WAIT) {
    need_all("mbarrier.try_wait");
    const int lane = __builtin_ctz(active_);
    const u64 at = address(1, lane);
    const u32 parity = operand<u32>(2)[lane];
    block.barriers.check(at, warp);
    note(SENSITIVE, block.barriers.ready(at, parity) ? 0 : ALL);
    if (!block.barriers.wait(at, parity, warp)) {
      warp_->awaits = true;
      warp_->awaited = at;
      warp_->parity = parity;
      return false;
    }
    set_predicate(0, ALL);
    return true;
  }
  for (u32 left = active_; left; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    const u64 at = address(0, lane);
    switch (in_->op) {
      case MBARRIER_INIT: block.barriers.init(at, operand<u32>(1)[lane], warp); break;
      case MBARRIER_INVAL: block.barriers.invalidate(at, warp); break;
      case MBARRIER_EXPECT: block.barriers.arrive(at, 1, operand<u32>(1)[lane], warp); break;
      default: block.barriers.arrive(at, in_->number > 1 ? operand<u32>(1)[lane] : 1, 0, warp);
    }
  }
  return true;
}

// Operands: to, the tensor map (a parameter's place), the mbarrier, the corner, innermost first.
void Interpreter::start_bulk() {
  for (u32 left = active_; left; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    BulkCopy copy;
    const u64 map = operand<u64>(1)[lane];
    if (map % 64 || map + 128 > param_bytes_) {
      fault("TMA by a tensor map that is no parameter");
    }
    std::memcpy(&copy.map, params_ + map, sizeof copy.map);
    if (copy.map.magic != TensorMap::MAGIC || static_cast<int>(copy.map.rank) != in_->number - 3) {
      fault("TMA by a tensor map of another rank, or none");
    }
    copy.to = operand<u32>(0)[lane];
    copy.barrier = operand<u32>(2)[lane];
    if (copy.to % 128) {
      fault("TMA to byte %llu, which is not aligned to 128", static_cast<unsigned long long>(copy.to));
    }
    for (u32 i = 0; i < copy.map.rank; ++i) {
      copy.corner[i] = operand<i32>(3 + static_cast<int>(i))[lane];
    }
    block_->barriers.check(copy.barrier, warp_->index);
    copy.chunks([this](u64 to, u64 from) {
      block_->shared.start_bulk(to, 16, warp_->index);
      if (from) {
        global_.read(from, 16, actor(), false);
      }
    });
    block_->bulk_copies.push_back(copy);
  }
}

void Interpreter::finish_bulk(Block& block, size_t which) {
  const BulkCopy copy = block.bulk_copies[which];
  block.bulk_copies.erase(block.bulk_copies.begin() + static_cast<i64>(which));
  const auto [actor, tick] = block.barriers.bring(copy.barrier, static_cast<i64>(copy.bytes()));
  copy.chunks([&block, actor = actor, tick = tick](u64 to, u64 from) {
    u8 data[16] = {};
    if (from) {
      std::memcpy(data, reinterpret_cast<const void*>(from), 16);
    }
    block.shared.end_bulk(to, data, 16, actor, tick);
  });
}

}  // namespace emulator
