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

enum class Stop { QUANTUM, WAIT, END };

class Interpreter {
 public:
  Interpreter(const Program& program, Global& global, const u8* params, u32 param_bytes)
      : program_(program), global_(global), params_(params), param_bytes_(param_bytes) {
  }

  i32 pc = 0;         // of the instruction that runs
  u64 executed = 0;

  Stop run(Block& block, Warp& warp, u64 quantum);
  void leave_barrier(Block& block, const std::vector<int>& group);
  void finish_bulk(Block& block, size_t which);

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
    return {block_->index, warp_->index, block_->order.tick, block_->order.known(warp_->index),
            &block_->order.seen(warp_->index), &warp_->view};
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
  void load_lanes();
  void store_lanes();
  void change_lanes();
  void shuffle();
  void reduce();
  void ballot();
  void copy_async();
  void finish_copies();
  void start_bulk();
  bool mbarrier();
  void branch_indexed();
  bool change_registers();
  void matrices_to_registers(bool transposed);
  void registers_to_matrices(bool transposed);
  void multiply_now();
  void start_multiply();
  void finish_multiplies(size_t left);
  void permute_bytes();
  void unpack_halves();
  void arithmetic();
  void comparison();
};

}  // namespace emulator
