// Matrix products, at once (mma) or under way until their wait (wgmma).
#include "interpreter.h"

namespace emulator {

// While a wgmma is under way: nobody touches what it writes, but for a further one, nor changes what it reads.
void Interpreter::check_registers() {
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
  switch (in_->op) {
    case MMA_F16: multiply<F16>(d, a, b, c); break;
    case MMA_BF16: multiply<BF16>(d, a, b, c); break;
    default: multiply<TF32>(d, a, b, c);
  }
}

void Interpreter::start_multiply() {
  need_all("wgmma");
  Warp& warp = *warp_;
  const int results = in_->targets;
  const bool from_memory = in_->number == results + 3;
  const int registers = from_memory ? results : results + 4;
  for (int i = 0; i < registers; ++i) {
    const u32 fences = warp.results[operands_[i]] ? 0 : warp.written[operands_[i]] + 1;  // that it is behind, at least
    if (fences > warp.wgmma_fences) {
      fault("wgmma uses a register that was written after the last wgmma.fence");
    }
    if (fences == warp.wgmma_fences) {
      program_.reached[warp.last_fence] |= SENSITIVE;
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
void Interpreter::finish_multiplies(size_t left) {
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
