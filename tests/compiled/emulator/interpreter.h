// Executes one warp: a switch over the instructions, each a loop over 32 lanes.
//
// Lanes that part at a branch run one group at a time, that with the lowest address first, and join where they meet.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <utility>

#include "matrix.h"

namespace emulator {

enum class Stop { QUANTUM, BARRIER, END };

class Interpreter {
 public:
  Interpreter(const Program& program, Global& global, const u8* params, u32 param_bytes)
      : program_(program), global_(global), params_(params), param_bytes_(param_bytes) {
  }

  i32 pc = 0;         // of the instruction that runs
  u64 executed = 0;

  Stop run(Block& block, Warp& warp, u64 quantum);
  void leave_barrier(Block& block);

 private:
  const Program& program_;
  Global& global_;
  const u8* params_;
  u32 param_bytes_;
  Block* block_ = nullptr;
  Warp* warp_ = nullptr;
  const Instruction* in_ = nullptr;
  const i32* operands_ = nullptr;
  u32 active_ = 0;

  template <typename T>
  T* operand(int i) {
    return warp_->at<T>(operands_[i]);
  }

  // Operand 0 of every active lane becomes f of the further operands, of types S.
  template <typename D, typename... S, typename F>
  void lanes(F f) {
    lanes_of<D, S...>(f, std::index_sequence_for<S...>());
  }
  template <typename D, typename... S, typename F, size_t... I>
  void lanes_of(F f, std::index_sequence<I...>) {
    D* to = operand<D>(0);
    const std::tuple<const S*...> from = {operand<S>(static_cast<int>(I) + 1)...};
    if (active_ == ALL) {
#pragma GCC ivdep
      for (int lane = 0; lane < LANES; ++lane) {
        to[lane] = static_cast<D>(f(std::get<I>(from)[lane]...));
      }
    } else {
      for (u32 left = active_; left; left &= left - 1) {
        const int lane = __builtin_ctz(left);
        to[lane] = static_cast<D>(f(std::get<I>(from)[lane]...));
      }
    }
  }

  void note(Reached flag, u32 where) {
    program_.reached[pc] |= where ? flag : 0;
  }
  void set_predicate(int i, u32 value) {
    u32* to = operand<u32>(i);
    *to = (*to & ~active_) | (value & active_);
  }
  template <typename S, typename F>
  void compare(F f) {
    const S *a = operand<S>(1), *b = operand<S>(2);
    u32 all = 0, equal = 0;
    for (int lane = 0; lane < LANES; ++lane) {
      all |= static_cast<u32>(f(a[lane], b[lane])) << lane;
      equal |= static_cast<u32>(a[lane] == b[lane]) << lane;
    }
    note(SENSITIVE, equal & active_);
    set_predicate(0, all);
  }
  // Predicate 0 of the lower halves, 1 of the upper ones.
  void compare_pairs(float (*upper)(u32), float (*lower)(u32)) {
    const u32 *a = operand<u32>(2), *b = operand<u32>(3);
    u32 of_lower = 0, of_upper = 0;
    for (int lane = 0; lane < LANES; ++lane) {
      of_lower |= static_cast<u32>(lower(a[lane]) > lower(b[lane])) << lane;
      of_upper |= static_cast<u32>(upper(a[lane]) > upper(b[lane])) << lane;
    }
    set_predicate(0, of_lower);
    set_predicate(1, of_upper);
  }
  template <typename S>
  void select() {
    const u32 which = *operand<u32>(3);
    S* to = operand<S>(0);
    const S *a = operand<S>(1), *b = operand<S>(2);
    note(TOOK_FIRST, which & active_);
    note(TOOK_SECOND, ~which & active_);
    for (int lane = 0; lane < LANES; ++lane) {
      if (active_ >> lane & 1) {
        to[lane] = which >> lane & 1 ? a[lane] : b[lane];
      }
    }
  }

  Actor actor() const {
    return {block_->index, warp_->index, block_->tick, block_->barrier, &warp_->view};
  }
  u64 address(int i, int lane) {
    const u64 base = in_->flags & WIDE_ADDRESS ? operand<u64>(i)[lane] : operand<u32>(i)[lane];
    return in_->flags & WIDE_ADDRESS ? base + in_->immediate : static_cast<u32>(base + in_->immediate);
  }

  void need_all(const char* what) const {
    if (active_ != warp_->live) {
      fault("%s is executed by lanes %08x of the warp's %08x", what, active_, warp_->live);
    }
  }
  void check_registers();
  void next_group();
  void load(const u8* from, int lane);
  void gather(u8* to, int lane, int first);
  void load_shared();
  void shuffle();
  void permute_bytes();
  void copy_async();
  void matrices_to_registers(bool transposed);
  void registers_to_matrices(bool transposed);
  template <int KIND>
  void multiply_now();
  void start_multiply();
  void finish_multiplies(size_t left);
  void arithmetic();
  void comparison();
};

// Lanes that wait for others at the same place join them; the lowest place is next.
inline void Interpreter::next_group() {
  Warp& warp = *warp_;
  if (warp.mask) {
    warp.others.push_back({warp.pc, warp.mask});
    warp.mask = 0;
  }
  if (warp.others.empty()) {
    return;
  }
  i32 lowest = warp.others[0].pc;
  for (const Group& group : warp.others) {
    lowest = std::min(lowest, group.pc);
  }
  size_t kept = 0;
  for (const Group& group : warp.others) {
    if (group.pc == lowest) {
      warp.mask |= group.mask;
    } else {
      warp.others[kept++] = group;
    }
  }
  warp.others.resize(kept);
  warp.pc = lowest;
}

inline void Interpreter::leave_barrier(Block& block) {
  ++block.shared.epoch;
  block.barrier = block.tick++;
  View all;
  bool acquired = false;
  for (const Warp& warp : block.warps) {
    acquired |= warp.acquired;
  }
  for (Warp& warp : block.warps) {
    if (acquired) {
      join(all, warp.view);
    }
    warp.others.insert(warp.others.end(), warp.waiting.begin(), warp.waiting.end());
    warp.waiting.clear();
    warp.waiting_mask = 0;
  }
  for (Warp& warp : block.warps) {
    if (acquired) {
      warp.view = all;
      warp.acquired = false;
    }
  }
}

// While a wgmma is under way: nobody touches what it writes, but for a further one, nor changes what it reads.
inline void Interpreter::check_registers() {
  const bool multiplies = in_->op >= WGMMA_F16 && in_->op <= WGMMA_TF32;
  for (int i = 0; i < in_->number; ++i) {
    if (warp_->results[operands_[i]] && !(multiplies && i < in_->targets)) {
      fault("a register is touched that a wgmma under way writes");
    }
    if (i < in_->targets && warp_->sources[operands_[i]]) {
      fault("a register is changed that a wgmma under way reads");
    }
  }
}

inline void Interpreter::load(const u8* from, int lane) {
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

inline void Interpreter::gather(u8* to, int lane, int first) {
  for (int e = 0; e < in_->count; ++e) {
    const u64 value = in_->flags & WIDE_REGISTER ? operand<u64>(first + e)[lane] : operand<u32>(first + e)[lane];
    std::memcpy(to + e * in_->size, &value, in_->size);
  }
}

inline void Interpreter::shuffle() {
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

inline void Interpreter::permute_bytes() {
  lanes<u32, u32, u32, u32>([](u32 a, u32 b, u32 selector) {
    const u64 both = a | static_cast<u64>(b) << 32;
    u32 result = 0;
    for (int i = 0; i < 4; ++i) {
      const u32 which = selector >> 4 * i & 15;
      u32 byte = static_cast<u32>(both >> 8 * (which & 7)) & 255;
      if (which & 8) {
        byte = byte & 128 ? 255 : 0;
      }
      result |= byte << 8 * i;
    }
    return result;
  });
}

// Operands: to, from, and how many bytes to read (of `size`); the rest are zeros.
inline void Interpreter::copy_async() {
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

// Matrix m's row r is at the address of lane 8 m + r; lane l holds two elements of row l / 4, or of column l / 4.
inline void Interpreter::matrices_to_registers(bool transposed) {
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

inline void Interpreter::registers_to_matrices(bool transposed) {
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

template <int KIND>
void Interpreter::multiply_now() {
  need_all("mma");
  u32* d[4];
  const u32 *a[4], *b[2], *c[4];
  for (int i = 0; i < 4; ++i) {
    d[i] = operand<u32>(i);
    a[i] = operand<u32>(4 + i);
    c[i] = operand<u32>(10 + i);
  }
  b[0] = operand<u32>(8);
  b[1] = operand<u32>(9);
  multiply<KIND>(d, a, b, c);
}

inline void Interpreter::start_multiply() {
  need_all("wgmma");
  Warp& warp = *warp_;
  const int results = in_->targets;
  const bool from_memory = in_->number == results + 3;
  const int registers = from_memory ? results : results + 4;
  for (int i = 0; i < registers; ++i) {
    if (warp.written[operands_[i]] >= warp.wgmma_fences && !warp.results[operands_[i]]) {
      fault("wgmma uses a register that was written after the last wgmma.fence");
    }
  }
  const Multiply work = {in_, from_memory ? *operand<u64>(results) : 0, *operand<u64>(in_->number - 2),
                         (*operand<u32>(in_->number - 1) & 1) != 0};
  // Reads it all now as well, which checks that it may, and at the wait, where the product is made.
  static thread_local float scratch_a[16][16], scratch_b[16][256];
  const int columns = static_cast<int>(in_->immediate), first = warp.index % 4 * 16;
  const bool tf32_operands = in_->op == WGMMA_TF32;
  if (from_memory) {
    tf32_operands ? load_matrix<TF32>(block_->shared, warp.index, work.a, in_->size & 1, first, 16, scratch_a)
                  : load_matrix<F16>(block_->shared, warp.index, work.a, in_->size & 1, first, 16, scratch_a);
  }
  tf32_operands ? load_matrix<TF32>(block_->shared, warp.index, work.b, in_->size & 2, 0, columns, scratch_b)
                : load_matrix<F16>(block_->shared, warp.index, work.b, in_->size & 2, 0, columns, scratch_b);
  for (int i = 0; i < registers; ++i) {
    ++(i < results ? warp.results : warp.sources)[operands_[i]];
  }
  warp.multiplies.push_back(work);
}

// Until only `left` groups are under way.
inline void Interpreter::finish_multiplies(size_t left) {
  Warp& warp = *warp_;
  while (warp.multiply_groups.size() > left) {
    for (const Multiply& work : warp.multiply_groups.front()) {
      const Instruction& in = *work.instruction;
      const i32* operands = &program_.operands[in.operands];
      switch (in.op) {
        case WGMMA_F16: multiply_async<F16>(block_->shared, warp, work, operands); break;
        case WGMMA_BF16: multiply_async<BF16>(block_->shared, warp, work, operands); break;
        default: multiply_async<TF32>(block_->shared, warp, work, operands);
      }
      const int registers = in.number == in.targets + 3 ? in.targets : in.targets + 4;
      for (int i = 0; i < registers; ++i) {
        --(i < in.targets ? warp.results : warp.sources)[operands[i]];
        if (i < in.targets) {
          warp.written[operands[i]] = 0;
        }
      }
    }
    warp.multiply_groups.erase(warp.multiply_groups.begin());
  }
}

}  // namespace emulator
