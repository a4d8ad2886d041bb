// The order in which a warp's instructions run: lanes part and meet, branches, barriers, waits.
#include "interpreter.h"

namespace emulator {

// Lanes that wait for others at the same place join them; the lowest place is next.
void Interpreter::next_group() {
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

// The warps of a block that a barrier waited for go on.
void Interpreter::leave_barrier(Block& block, const std::vector<int>& group) {
  block.order.meet(group);
  View all;
  bool acquired = false;
  for (int index : group) {
    acquired |= block.warps[index].acquired;
  }
  for (int index : group) {
    Warp& warp = block.warps[index];
    if (acquired) {
      join(all, warp.view);
    }
    warp.others.insert(warp.others.end(), warp.waiting.begin(), warp.waiting.end());
    warp.waiting.clear();
    warp.waiting_mask = 0;
  }
  for (int index : group) {
    if (acquired) {
      block.warps[index].view = all;
      block.warps[index].acquired = false;
    }
  }
}

// Operand: the index; behind it lies, for each value that it may have, a label's place.
void Interpreter::branch_indexed() {
  Warp& warp = *warp_;
  const u32* index = operand<u32>(0);
  warp.mask &= ~active_;
  for (u32 left = active_; left; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    if (index[lane] >= in_->immediate) {
      fault("brx.idx to label %u of %d", index[lane], static_cast<int>(in_->immediate));
    }
    warp.others.push_back({operands_[1 + index[lane]], 1u << lane});
  }
  next_group();
}

// Registers a thread may use; those that another warp gave back are waited for. False: not yet there.
bool Interpreter::change_registers() {
  need_all("setmaxnreg");
  Warp& warp = *warp_;
  const u32 number = static_cast<u32>(in_->immediate);
  if (warp.allowed == 0) {
    return true;  // the block does not say how many it starts with
  }
  if (number % 8 || number < 24 || number > 256) {
    fault("setmaxnreg to %u", number);
  }
  if (in_->op == REGISTERS_DEC ? number > warp.allowed : number < warp.allowed) {
    fault("setmaxnreg from %u to %u", warp.allowed, number);
  }
  if (in_->op == REGISTERS_INC && number - warp.allowed > block_->free_registers) {
    warp.wanted = number - warp.allowed;
    return false;
  }
  block_->free_registers += warp.allowed - number;
  warp.allowed = number;
  warp.wanted = 0;
  return true;
}

Stop Interpreter::run(Block& block, Warp& warp, u64 quantum) {
  block_ = &block;
  warp_ = &warp;
  warp.awaits = false;
  if (warp.mask == 0) {
    next_group();
  }
  for (u64 left = quantum; left > 0; --left) {
    pc = warp.pc;
    in_ = &program_.code[pc];
    operands_ = &program_.operands[in_->operands];
    ++executed;
    note(CAME, ALL);
    ++warp.pc;
    active_ = warp.mask;
    if (in_->guard >= 0) {
      active_ &= *warp.at<u32>(in_->guard) ^ (in_->negated ? ALL : 0);
      note(GUARD_TRUE, active_);
      note(GUARD_FALSE, warp.mask & ~active_);
    }
    if (program_.wgmma) {
      check_registers();
      for (int i = 0; i < in_->targets; ++i) {
        if (in_->op < WGMMA_F16 || in_->op > WGMMA_TF32) {
          warp.written[operands_[i]] = warp.wgmma_fences;
        }
      }
    }
    if (active_ == 0) {
      continue;
    }
    switch (in_->op) {
      case LABEL:
        if (!warp.others.empty()) {
          --warp.pc;
          next_group();
          ++warp.pc;
        }
        break;
      case BRA: {
        const auto target = static_cast<i32>(in_->immediate);
        if (active_ == warp.mask) {
          warp.pc = target;
        } else {
          warp.mask &= ~active_;
          warp.others.push_back({target, active_});
        }
        break;
      }
      case RET:
        warp.live &= ~active_;
        warp.mask &= ~active_;
        if (warp.live == 0 && !(warp.copies.empty() && warp.copy_groups.empty())) {
          fault("a warp ends while its cp.async are under way");
        }
        if (warp.live == 0 && !(warp.multiplies.empty() && warp.multiply_groups.empty())) {
          fault("a warp ends while its wgmma are under way");
        }
        if (warp.mask == 0) {
          next_group();
        }
        if (warp.mask == 0) {
          return warp.live ? Stop::WAIT : Stop::END;
        }
        break;
      case TRAP: fault("trap");
      case BAR_ALIGNED: need_all("bar.sync"); [[fallthrough]];
      case BAR:
        if (warp.waiting_mask && warp.barrier != in_->immediate) {
          fault("lanes of a warp wait at two barriers");
        }
        warp.barrier = in_->immediate;
        warp.waiting.push_back({warp.pc, active_});
        warp.waiting_mask |= active_;
        warp.mask &= ~active_;
        if (warp.mask == 0) {
          next_group();
        }
        if (warp.mask == 0) {
          return Stop::WAIT;
        }
        break;
      case BAR_WARP:
        if (*operand<u32>(0) & warp.live & ~active_) {
          fault("bar.warp.sync by lanes %08x", active_);
        }
        break;
      case SHFL_IDX: case SHFL_UP: case SHFL_DOWN: case SHFL_BFLY: shuffle(); break;
      case REDUX_ADD: case REDUX_MIN_S32: case REDUX_MAX_S32: case REDUX_OR: reduce(); break;
      case BALLOT: ballot(); break;
      case LD_PARAM: case LD_GLOBAL: case LD_SHARED: load_lanes(); break;
      case ST_GLOBAL: case ST_SHARED: store_lanes(); break;
      case ATOM_ADD: case LD_ACQUIRE: change_lanes(); break;
      case CP_ASYNC: copy_async(); break;
      case CP_COMMIT:
        need_all("cp.async.commit_group");
        warp.copy_groups.push_back(std::move(warp.copies));
        warp.copies.clear();
        break;
      case CP_WAIT: finish_copies(); break;
      case LDMATRIX: matrices_to_registers(false); break;
      case LDMATRIX_TRANS: matrices_to_registers(true); break;
      case STMATRIX: registers_to_matrices(false); break;
      case STMATRIX_TRANS: registers_to_matrices(true); break;
      case MMA_F16: case MMA_BF16: case MMA_TF32: multiply_now(); break;
      case WGMMA_F16: case WGMMA_BF16: case WGMMA_TF32: start_multiply(); break;
      case WGMMA_FENCE:
        ++warp.wgmma_fences;
        warp.last_fence = pc;
        break;
      case WGMMA_COMMIT:
        warp.multiply_groups.push_back(std::move(warp.multiplies));
        warp.multiplies.clear();
        break;
      case WGMMA_WAIT:
        note(SENSITIVE, warp.multiply_groups.size() > static_cast<size_t>(in_->immediate));
        finish_multiplies(static_cast<size_t>(in_->immediate));
        break;
      case PROXY_FENCE: block.order.fence(warp.index); break;
      case MBARRIER_INIT: case MBARRIER_INVAL: case MBARRIER_ARRIVE: case MBARRIER_EXPECT: case MBARRIER_WAIT:
        if (!mbarrier()) {
          --warp.pc;
          return Stop::WAIT;
        }
        break;
      case TMA_LOAD: start_bulk(); break;
      case ELECT:
        need_all("elect.sync");
        lanes<u32, u32>([this](u32) { return __builtin_ctz(active_); });
        set_predicate(1, active_ & -active_);
        break;
      case BRANCH_INDEXED: branch_indexed(); break;
      case REGISTERS_INC: case REGISTERS_DEC:
        if (!change_registers()) {
          --warp.pc;
          return Stop::WAIT;
        }
        break;
      case NOTHING: break;
      default: arithmetic();
    }
  }
  return Stop::QUANTUM;
}

}  // namespace emulator
