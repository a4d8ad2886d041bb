// Instructions that move data: between lanes, and between registers and memory.
#include "interpreter.h"

namespace emulator {

void Interpreter::load(const u8* from, int lane) {
  for (int e = 0; e < in_->count; ++e) {
    u64 value = 0;
    std::memcpy(&value, from + e * in_->size, in_->size);
    if (in_->flags & SIGNED) {
      const int unused = 64 - 8 * in_->size;
      value = static_cast<u64>(static_cast<i64>(value << unused) >> unused);
    }
    if (in_->flags & WIDE_REGISTER) {
      operand<u64>(e)[lane] = value;
    } else {
      operand<u32>(e)[lane] = static_cast<u32>(value);
    }
  }
}

void Interpreter::gather(u8* to, int lane, int first) {
  for (int e = 0; e < in_->count; ++e) {
    const u64 value = in_->flags & WIDE_REGISTER ? operand<u64>(first + e)[lane] : operand<u32>(first + e)[lane];
    std::memcpy(to + e * in_->size, &value, in_->size);
  }
}

void Interpreter::load_lanes() {
  const u32 size = in_->size * in_->count;
  for (u32 left = active_; left; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    const u64 from = address(in_->count, lane);
    if (in_->op == LD_SHARED) {
      load(block_->shared.read(from, size, warp_->index), lane);
    } else if (in_->op == LD_GLOBAL) {
      load(global_.read(from, size, actor(), in_->flags & CONSTANT), lane);
    } else if (from + size > param_bytes_) {
      fault("ld.param past the parameters");
    } else {
      load(params_ + from, lane);
    }
  }
}

void Interpreter::store_lanes() {
  const u32 size = in_->size * in_->count;
  for (u32 left = active_; left; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    u8 data[32];
    gather(data, lane, 1);
    const u64 to = address(0, lane);
    if (in_->op == ST_SHARED) {
      block_->shared.write(to, data, size, warp_->index);
    } else {
      global_.write(to, data, size, actor());
    }
  }
}

// Atomics, and loads that acquire.
void Interpreter::change_lanes() {
  const bool adds = in_->op == ATOM_ADD;
  for (u32 left = active_; left; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    const u32 addend = adds ? operand<u32>(2)[lane] : 0;
    operand<u32>(0)[lane] = global_.atomic(address(1, lane), adds ? &addend : nullptr, in_->flags & ACQUIRE,
                                           in_->flags & RELEASE, actor(), warp_->view);
    warp_->acquired |= (in_->flags & ACQUIRE) != 0;
    block_->order.tick += (in_->flags & RELEASE) != 0;
  }
}

void Interpreter::shuffle() {
  const bool wants_predicate = in_->targets == 2;
  const int first = in_->targets;
  u32 from[LANES];
  std::memcpy(from, operand<u32>(first), sizeof from);
  const u32 *b = operand<u32>(first + 1), *c = operand<u32>(first + 2), *members = operand<u32>(first + 3);
  u32 predicate = 0;
  for (int lane = 0; lane < LANES; ++lane) {
    if (!(active_ >> lane & 1)) {
      continue;
    }
    if (members[lane] & warp_->live & ~active_) {
      fault("shfl.sync for lanes %08x by lanes %08x", members[lane], active_);
    }
    const int segment = static_cast<int>(c[lane] >> 8 & 31), clamp = static_cast<int>(c[lane] & 31);
    const int most = (lane & segment) | (clamp & ~segment), least = lane & segment;
    const int by = static_cast<int>(b[lane] & 31);
    int source = 0;
    switch (in_->op) {
      case SHFL_IDX: source = least | (by & ~segment); break;
      case SHFL_UP: source = lane - by; break;
      case SHFL_DOWN: source = lane + by; break;
      default: source = lane ^ by;
    }
    const bool inside = in_->op == SHFL_UP ? source >= most : source <= most;
    source = inside ? source : lane;
    if (!(active_ >> source & 1)) {
      fault("shfl.sync from lane %d, which does not take part", source);
    }
    predicate |= static_cast<u32>(inside) << lane;
    operand<u32>(0)[lane] = from[source];
    note(SENSITIVE, from[source] != from[lane]);
  }
  if (wants_predicate) {
    set_predicate(1, predicate);
  }
}

void Interpreter::reduce() {
  need_all("redux");
  const i32* from = operand<i32>(1);
  i32 all = in_->op == REDUX_MIN_S32 ? INT32_MAX : in_->op == REDUX_MAX_S32 ? INT32_MIN : 0;
  for (u32 left = active_; left; left &= left - 1) {
    const i32 x = from[__builtin_ctz(left)];
    all = in_->op == REDUX_ADD ? static_cast<i32>(static_cast<u32>(all) + static_cast<u32>(x))
          : in_->op == REDUX_MIN_S32 ? std::min(all, x)
          : in_->op == REDUX_MAX_S32 ? std::max(all, x) : (all | x);
  }
  lanes<i32, i32>([all](i32) { return all; });
}

void Interpreter::ballot() {
  const u32 members = operand<u32>(2)[__builtin_ctz(active_)];
  if (members & warp_->live & ~active_) {
    fault("vote.sync for lanes %08x by lanes %08x", members, active_);
  }
  const u32 votes = *operand<u32>(1) & active_ & members;
  lanes<u32, u32>([votes](u32) { return votes; });
}

// Operands: to, from, and how many bytes to read (of `size`); the rest are zeros.
void Interpreter::copy_async() {
  for (int lane = 0; lane < LANES; ++lane) {
    if (!(active_ >> lane & 1)) {
      continue;
    }
    const u32 wanted = in_->number > 2 ? operand<u32>(2)[lane] : in_->size;
    if (wanted > in_->size) {
      fault("cp.async of %u bytes out of %d", wanted, in_->size);
    }
    const Copy copy = {operand<u32>(0)[lane] + static_cast<u64>(in_->immediate & 0xffffffff),
                       operand<u64>(1)[lane] + static_cast<u64>(in_->immediate >> 32), in_->size,
                       static_cast<u8>(wanted)};
    block_->shared.start_copy(copy.to, copy.size, warp_->index);
    if (wanted) {
      global_.read(copy.from, wanted, actor(), false);
    }
    warp_->copies.push_back(copy);
  }
}

// Until only as many groups are under way as the immediate says; -1: none, nor what is not committed.
void Interpreter::finish_copies() {
  need_all("cp.async.wait");
  Warp& warp = *warp_;
  if (in_->immediate < 0) {
    warp.copy_groups.push_back(std::move(warp.copies));
    warp.copies.clear();
  }
  while (static_cast<i64>(warp.copy_groups.size()) > std::max<i64>(in_->immediate, 0)) {
    note(SENSITIVE, ALL);
    for (const Copy& copy : warp.copy_groups.front()) {
      u8 data[16] = {};
      if (copy.valid) {
        std::memcpy(data, global_.read(copy.from, copy.valid, actor(), false), copy.valid);
      }
      block_->shared.end_copy(copy.to, data, copy.size, warp.index);
    }
    warp.copy_groups.erase(warp.copy_groups.begin());
  }
}

// Matrix m's row r is at the address of lane 8 m + r; lane l holds two elements of row l / 4, or of column l / 4.
void Interpreter::matrices_to_registers(bool transposed) {
  need_all("ldmatrix");
  for (int m = 0; m < in_->count; ++m) {
    u16 matrix[8][8];
    for (int row = 0; row < 8; ++row) {
      std::memcpy(matrix[row], block_->shared.read(address(in_->count, 8 * m + row), 16, warp_->index), 16);
    }
    u32* to = operand<u32>(m);
    for (int lane = 0; lane < LANES; ++lane) {
      const int outer = lane / 4, inner = 2 * (lane % 4);
      const u32 low = transposed ? matrix[inner][outer] : matrix[outer][inner];
      const u32 high = transposed ? matrix[inner + 1][outer] : matrix[outer][inner + 1];
      to[lane] = low | high << 16;
    }
  }
}

void Interpreter::registers_to_matrices(bool transposed) {
  need_all("stmatrix");
  for (int m = 0; m < in_->count; ++m) {
    const u32* from = operand<u32>(1 + m);
    u16 matrix[8][8];
    for (int lane = 0; lane < LANES; ++lane) {
      const int outer = lane / 4, inner = 2 * (lane % 4);
      (transposed ? matrix[inner][outer] : matrix[outer][inner]) = u16(from[lane]);
      (transposed ? matrix[inner + 1][outer] : matrix[outer][inner + 1]) = u16(from[lane] >> 16);
    }
    for (int row = 0; row < 8; ++row) {
      block_->shared.write(address(0, 8 * m + row), matrix[row], 16, warp_->index);
    }
  }
}

}  // namespace emulator
