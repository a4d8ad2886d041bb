// A lowered program and the state of what runs it. ../lowering.py writes programs: names and layouts here are read there.
#pragma once

#include "bulk.h"

namespace emulator {

constexpr int LANES = 32;
constexpr u32 ALL = 0xffffffffu;

// The suffix is the type; B: the sign does not matter. A 16-bit register is kept zero-extended.
enum Op : u16 {
  LABEL, BRA, RET, TRAP, BAR_ALIGNED, BAR, BAR_WARP,
  MOV_B32, MOV_B64, MOV_PRED, CVT_S32_S8, CVT_S16_S8, CVT_S32_S16, CVT_U32_U8, CVT_U32_U16, CVT_U64_U32, CVT_S64_S32, CVT_U32_U64, CVT_U16_U64, CVT_S64_LOW, PACK_B16, UNPACK_B16,
  CVT_F32_F16, CVT_F32_BF16, CVT_F16_F32, CVT_BF16_F32, CVT_F16X2_F32, CVT_BF16X2_F32, CVT_TF32_F32,
  CVT_F32_S32, CVT_F32_U32, CVT_S32_F32,
  ADD_B16, ADD_B32, ADD_B64, ADD_F32, SUB_B16, SUB_B32, SUB_B64, SUB_F32, MUL_B16, MUL_B32, MUL_B64, MUL_F32,
  MUL_WIDE_U16, MAD_WIDE_U16, MUL_WIDE_S32, MUL_WIDE_U32, MUL_HI_S32, MUL_HI_U32, MUL_HI_U64, MAD_B32, MAD_B64, MAD_WIDE_S32, MAD_WIDE_U32, FMA_F32, DIV_F32,
  DIV_S32, DIV_U32, DIV_S64, DIV_U64, REM_S32, REM_U32, REM_S64, REM_U64,
  MIN_S32, MIN_U32, MIN_S64, MIN_U64, MIN_F32, MAX_S32, MAX_U32, MAX_S64, MAX_U64, MAX_F32, MAX_RELU_S32,
  AND_B32, AND_B64, OR_B32, OR_B64, XOR_B32, XOR_B64, NOT_B16, NOT_B32, NOT_B64, AND_PRED, OR_PRED, XOR_PRED, NOT_PRED,
  NEG_S32, NEG_S64, NEG_F32, ABS_S32, ABS_F32, SHL_B16, SHL_B32, SHL_B64, SHR_S16, SHR_S32, SHR_S64, SHR_U32, SHR_U64,
  BFE_S32, BFE_U32, BFI_B32, BFI_B64, PRMT_B32, POPC_B32, POPC_B64, BREV_B32, BFIND_SHIFTAMT_U32,
  SELP_B32, SELP_B64, EX2_F32, LG2_F32, RCP_F32, SQRT_F32, RSQRT_F32,
  SETP_EQ_S16, SETP_NE_S16, SETP_EQ_B32, SETP_NE_B32, SETP_LT_S32, SETP_LE_S32, SETP_GT_S32, SETP_GE_S32,
  SETP_LT_U32, SETP_LE_U32, SETP_GT_U32, SETP_GE_U32, SETP_EQ_B64, SETP_NE_B64,
  SETP_LT_S64, SETP_LE_S64, SETP_GT_S64, SETP_GE_S64, SETP_LT_U64, SETP_LE_U64, SETP_GT_U64, SETP_GE_U64,
  SETP_EQ_F32, SETP_NE_F32, SETP_LT_F32, SETP_LE_F32, SETP_GT_F32, SETP_GE_F32,
  SETP_EQU_F32, SETP_NEU_F32, SETP_LTU_F32, SETP_LEU_F32, SETP_GTU_F32, SETP_GEU_F32, SETP_NUM_F32, SETP_NAN_F32,
  SETP_GT_BF16, SETP_GT_F16, SETP_GT_BF16X2, SETP_GT_F16X2,
  SHFL_IDX, SHFL_UP, SHFL_DOWN, SHFL_BFLY, REDUX_ADD, REDUX_MIN_S32, REDUX_MAX_S32, REDUX_OR, BALLOT,
  LD_PARAM, LD_GLOBAL, ST_GLOBAL, LD_SHARED, ST_SHARED, ATOM_ADD, LD_ACQUIRE,
  CP_ASYNC, CP_COMMIT, CP_WAIT, LDMATRIX, LDMATRIX_TRANS, STMATRIX, STMATRIX_TRANS, MMA_F16, MMA_BF16, MMA_TF32,
  WGMMA_F16, WGMMA_BF16, WGMMA_TF32, WGMMA_FENCE, WGMMA_COMMIT, WGMMA_WAIT, PROXY_FENCE,
  MBARRIER_INIT, MBARRIER_INVAL, MBARRIER_ARRIVE, MBARRIER_EXPECT, MBARRIER_WAIT, TMA_LOAD, ELECT, BRANCH_INDEXED,
  REGISTERS_INC, REGISTERS_DEC, NOTHING,
};

// Of an access to memory, in Instruction::flags: how the loaded value is extended, the width of registers, the order.
enum Flags : u8 { SIGNED = 1, CONSTANT = 2, WIDE_ADDRESS = 4, WIDE_REGISTER = 8, ACQUIRE = 16, RELEASE = 32 };

struct Instruction {
  u16 op;
  u8 size, count;  // bytes of an element, elements
  u8 flags, targets;  // targets: how many of the operands, the first ones, are written
  u8 negated, unused = 0;  // whether the guard is negated
  i32 guard;       // a predicate's slot, or -1
  i32 operands, number;  // in Program::operands: slots of the register file, 32 words each
  i64 immediate;   // an offset in memory, a branch's target, a count
};
static_assert(sizeof(Instruction) == 32);

// What happened at an instruction so far. SENSITIVE: a comparison's two sides were equal in a lane, a shuffle brought a
// lane another value than its own, a wait had something to wait for, a wgmma.fence a register that was written before.
enum Reached : u8 { CAME = 1, SENSITIVE = 2, GUARD_TRUE = 4, GUARD_FALSE = 8, TOOK_FIRST = 16, TOOK_SECOND = 32 };

struct Program {
  std::vector<Instruction> code;
  std::vector<i32> operands;
  std::vector<u64> constants;  // pairs: a slot, and the 64 bits to put there in every lane
  int slots;
  bool wgmma;
  mutable std::vector<u8> reached;  // by instruction, of Reached
};

struct Group {  // lanes at one place of the program
  i32 pc;
  u32 mask;
};

struct Copy {
  u64 to;
  u64 from;
  u8 size, valid;
};

struct Multiply {  // a wgmma under way
  const Instruction* instruction;
  u64 a, b;  // descriptors; a: of none when A comes from registers
  bool adds;
};

struct alignas(64) Line {
  u32 lane[LANES];
};

struct Warp {
  int index;
  std::vector<Line> registers;
  i32 pc = 0;
  u32 mask, live;               // the lanes that run now; those that have not ended
  std::vector<Group> others;    // lanes that wait to run, in another place
  std::vector<Group> waiting;   // lanes at a barrier
  u32 waiting_mask = 0;
  i64 barrier = 0;              // which one: its number, and from bit 8 on how many threads it is for, 0 for all
  bool awaits = false;          // an mbarrier's phase
  u64 awaited = 0;
  u32 parity = 0;
  u32 allowed = 0, wanted = 0;  // registers a thread, where the block gives them out; more that it waits for
  std::vector<Copy> copies;     // since the last commit
  std::vector<std::vector<Copy>> copy_groups;
  std::vector<Multiply> multiplies;
  std::vector<std::vector<Multiply>> multiply_groups;
  std::vector<u16> results, sources;  // by slot: wgmmas under way that write it, that read it
  std::vector<u32> written;           // by slot: wgmma fences before it was last written, by anything but a wgmma
  u32 wgmma_fences = 0;
  i32 last_fence = 0;                 // where the last of these is
  View view;                          // of other blocks
  bool acquired = false;              // since its last barrier

  bool done() const {
    return live == 0;
  }
  bool at_barrier() const {
    return live != 0 && waiting_mask == live;
  }
  template <typename T>
  T* at(i32 slot) {
    return reinterpret_cast<T*>(&registers[slot]);
  }
};

struct Block {
  int index;
  Order order;
  Shared shared;
  Barriers barriers;
  std::vector<BulkCopy> bulk_copies;  // under way
  std::vector<Warp> warps;
  u32 free_registers = 0;  // by a warp's: that no warp holds

  Block(int index, size_t shared_bytes, int warps, bool unfenced)
      : index(index), order(warps), shared(shared_bytes, order, unfenced), barriers(order, shared), warps(warps) {}

  bool can_run(const Warp& warp) const {
    return !warp.done() && !warp.at_barrier() && warp.wanted <= free_registers &&
           !(warp.awaits && !barriers.ready(warp.awaited, warp.parity));
  }
  bool done() const {
    for (const Warp& warp : warps) {
      if (!warp.done()) {
        return false;
      }
    }
    return true;
  }
};

}  // namespace emulator
