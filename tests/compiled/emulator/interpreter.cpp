#include "interpreter.h"

namespace emulator {

namespace {

constexpr u32 HALF_MASK = 0xffff;

i32 divide(i32 a, i32 b) {
  return b == 0 ? -1 : static_cast<i32>(static_cast<i64>(a) / b);
}
i32 remainder(i32 a, i32 b) {
  return b == 0 ? a : static_cast<i32>(static_cast<i64>(a) % b);
}

u32 to_half(float x) {
  const u32 sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (std::isnan(x)) {
    return 0x7fff;
  }
  if (size >= 65520) {
    return sign | 0x7c00;
  }
  if (size < 0x1p-14f) {
    return sign | static_cast<u32>(std::lrint(size * 0x1p24f));
  }
  const u32 bits = as_bits(size) - (112u << 23);
  return sign | (bits + 0xfff + (bits >> 13 & 1)) >> 13;
}
u32 to_bfloat16(float x) {
  const u32 bits = as_bits(x);
  return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

u32 field(u32 value, u32 position, u32 length, bool is_signed) {
  position &= 255;
  length &= 255;
  if (length == 0) {
    return 0;
  }
  const u32 sign_at = std::min(position + length - 1, 31u);
  const u32 sign = is_signed && (value >> sign_at & 1) ? ALL : 0;
  const u32 mask = length >= 32 ? ALL : (1u << length) - 1;
  return position >= 32 ? sign : ((value >> position) & mask) | (sign & ~(position + length > 32 ? ALL >> position : mask));
}

template <typename T>
T insert(T bits, T into, u32 position, u32 length) {
  constexpr u32 WIDTH = 8 * sizeof(T);
  position &= 255;
  length &= 255;
  if (position >= WIDTH || length == 0) {
    return into;
  }
  const T mask = (length >= WIDTH ? ~T{0} : (T{1} << length) - 1) << position;
  return (into & ~mask) | ((bits << position) & mask);
}

}  // namespace

#define CASE(op, ...) \
  case op:            \
    __VA_ARGS__;      \
    break

void Interpreter::comparison() {
  switch (in_->op) {
    CASE(SETP_EQ_S16, compare<u32>([](u32 a, u32 b) { return (a & HALF_MASK) == (b & HALF_MASK); }));
    CASE(SETP_NE_S16, compare<u32>([](u32 a, u32 b) { return (a & HALF_MASK) != (b & HALF_MASK); }));
    CASE(SETP_EQ_B32, compare<u32>(std::equal_to<>()));
    CASE(SETP_NE_B32, compare<u32>(std::not_equal_to<>()));
    CASE(SETP_LT_S32, compare<i32>(std::less<>()));
    CASE(SETP_LE_S32, compare<i32>(std::less_equal<>()));
    CASE(SETP_GT_S32, compare<i32>(std::greater<>()));
    CASE(SETP_GE_S32, compare<i32>(std::greater_equal<>()));
    CASE(SETP_LT_U32, compare<u32>(std::less<>()));
    CASE(SETP_LE_U32, compare<u32>(std::less_equal<>()));
    CASE(SETP_GT_U32, compare<u32>(std::greater<>()));
    CASE(SETP_GE_U32, compare<u32>(std::greater_equal<>()));
    CASE(SETP_EQ_B64, compare<u64>(std::equal_to<>()));
    CASE(SETP_NE_B64, compare<u64>(std::not_equal_to<>()));
    CASE(SETP_LT_S64, compare<i64>(std::less<>()));
    CASE(SETP_LE_S64, compare<i64>(std::less_equal<>()));
    CASE(SETP_GT_S64, compare<i64>(std::greater<>()));
    CASE(SETP_GE_S64, compare<i64>(std::greater_equal<>()));
    CASE(SETP_LT_U64, compare<u64>(std::less<>()));
    CASE(SETP_LE_U64, compare<u64>(std::less_equal<>()));
    CASE(SETP_GT_U64, compare<u64>(std::greater<>()));
    CASE(SETP_GE_U64, compare<u64>(std::greater_equal<>()));
    CASE(SETP_EQ_F32, compare<float>(std::equal_to<>()));
    CASE(SETP_NE_F32, compare<float>([](float a, float b) { return a < b || a > b; }));
    CASE(SETP_LT_F32, compare<float>(std::less<>()));
    CASE(SETP_LE_F32, compare<float>(std::less_equal<>()));
    CASE(SETP_GT_F32, compare<float>(std::greater<>()));
    CASE(SETP_GE_F32, compare<float>(std::greater_equal<>()));
    CASE(SETP_EQU_F32, compare<float>([](float a, float b) { return !(a < b || a > b); }));
    CASE(SETP_NEU_F32, compare<float>(std::not_equal_to<>()));
    CASE(SETP_LTU_F32, compare<float>([](float a, float b) { return !(a >= b); }));
    CASE(SETP_LEU_F32, compare<float>([](float a, float b) { return !(a > b); }));
    CASE(SETP_GTU_F32, compare<float>([](float a, float b) { return !(a <= b); }));
    CASE(SETP_GEU_F32, compare<float>([](float a, float b) { return !(a < b); }));
    CASE(SETP_NUM_F32, compare<float>([](float a, float b) { return a == a && b == b; }));
    CASE(SETP_NAN_F32, compare<float>([](float a, float b) { return a != a || b != b; }));
    CASE(SETP_GT_BF16, compare<u32>([](u32 a, u32 b) { return bfloat16(a) > bfloat16(b); }));
    CASE(SETP_GT_F16, compare<u32>([](u32 a, u32 b) { return half(a & HALF_MASK) > half(b & HALF_MASK); }));
    CASE(SETP_GT_BF16X2, compare_pairs(high<BF16>, low<BF16>));
    CASE(SETP_GT_F16X2, compare_pairs(high<F16>, low<F16>));
    default: fault("no such instruction");
  }
}

void Interpreter::arithmetic() {
  switch (in_->op) {
    CASE(MOV_B32, lanes<u32, u32>([](u32 a) { return a; }));
    CASE(MOV_B64, lanes<u64, u64>([](u64 a) { return a; }));
    CASE(MOV_PRED, set_predicate(0, *operand<u32>(1)));
    CASE(CVT_S32_S8, lanes<i32, u32>([](u32 a) { return static_cast<int8_t>(a); }));
    CASE(CVT_S16_S8, lanes<u32, u32>([](u32 a) { return static_cast<u32>(static_cast<int8_t>(a)) & HALF_MASK; }));
    CASE(CVT_S32_S16, lanes<i32, u32>([](u32 a) { return static_cast<int16_t>(a); }));
    CASE(CVT_U32_U8, lanes<u32, u32>([](u32 a) { return a & 255; }));
    CASE(CVT_U32_U16, lanes<u32, u32>([](u32 a) { return a & HALF_MASK; }));
    CASE(CVT_U64_U32, lanes<u64, u32>([](u32 a) { return a; }));
    CASE(CVT_S64_S32, lanes<i64, i32>([](i32 a) { return a; }));
    CASE(CVT_U32_U64, lanes<u32, u64>([](u64 a) { return a; }));
    CASE(CVT_S64_LOW, lanes<i64, u64>([](u64 a) { return static_cast<i32>(a); }));
    CASE(PACK_B16, lanes<u32, u32, u32>([](u32 a, u32 b) { return (a & HALF_MASK) | b << 16; }));
    CASE(CVT_F32_F16, lanes<float, u32>([](u32 a) { return half(a & HALF_MASK); }));
    CASE(CVT_F32_BF16, lanes<float, u32>(bfloat16));
    CASE(CVT_F16_F32, lanes<u32, float>(to_half));
    CASE(CVT_BF16_F32, lanes<u32, float>(to_bfloat16));
    CASE(CVT_F16X2_F32, lanes<u32, float, float>([](float a, float b) { return to_half(a) << 16 | to_half(b); }));
    CASE(CVT_BF16X2_F32,
         lanes<u32, float, float>([](float a, float b) { return to_bfloat16(a) << 16 | to_bfloat16(b); }));
    CASE(CVT_TF32_F32, lanes<u32, u32>([](u32 a) {
           const bool finite = (a & 0x7f800000) != 0x7f800000;
           return finite ? (a + 0x1000) & 0xffffe000 : a;
         }));
    CASE(CVT_F32_S32, lanes<float, i32>([](i32 a) { return static_cast<float>(a); }));
    CASE(CVT_F32_U32, lanes<float, u32>([](u32 a) { return static_cast<float>(a); }));
    CASE(CVT_S32_F32, lanes<i32, float>([](float a) { return static_cast<i32>(a); }));
    CASE(ADD_B16, lanes<u32, u32, u32>([](u32 a, u32 b) { return (a + b) & HALF_MASK; }));
    CASE(ADD_B32, lanes<u32, u32, u32>(std::plus<>()));
    CASE(ADD_B64, lanes<u64, u64, u64>(std::plus<>()));
    CASE(ADD_F32, lanes<float, float, float>(std::plus<>()));
    CASE(SUB_B16, lanes<u32, u32, u32>([](u32 a, u32 b) { return (a - b) & HALF_MASK; }));
    CASE(SUB_B32, lanes<u32, u32, u32>(std::minus<>()));
    CASE(SUB_B64, lanes<u64, u64, u64>(std::minus<>()));
    CASE(SUB_F32, lanes<float, float, float>(std::minus<>()));
    CASE(MUL_B16, lanes<u32, u32, u32>([](u32 a, u32 b) { return (a * b) & HALF_MASK; }));
    CASE(MUL_B32, lanes<u32, u32, u32>(std::multiplies<>()));
    CASE(MUL_B64, lanes<u64, u64, u64>(std::multiplies<>()));
    CASE(MUL_F32, lanes<float, float, float>(std::multiplies<>()));
    CASE(MUL_WIDE_S32, lanes<i64, i32, i32>([](i64 a, i64 b) { return a * b; }));
    CASE(MUL_WIDE_U32, lanes<u64, u32, u32>([](u64 a, u64 b) { return a * b; }));
    CASE(MUL_HI_S32, lanes<i32, i32, i32>([](i64 a, i64 b) { return a * b >> 32; }));
    CASE(MUL_HI_U32, lanes<u32, u32, u32>([](u64 a, u64 b) { return a * b >> 32; }));
    CASE(MAD_B32, lanes<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return a * b + c; }));
    CASE(MAD_B64, lanes<u64, u64, u64, u64>([](u64 a, u64 b, u64 c) { return a * b + c; }));
    CASE(MAD_WIDE_S32, lanes<i64, i32, i32, i64>([](i64 a, i64 b, i64 c) { return a * b + c; }));
    CASE(MAD_WIDE_U32, lanes<u64, u32, u32, u64>([](u64 a, u64 b, u64 c) { return a * b + c; }));
    CASE(FMA_F32, lanes<float, float, float, float>([](float a, float b, float c) { return std::fma(a, b, c); }));
    CASE(DIV_F32, lanes<float, float, float>(std::divides<>()));
    CASE(DIV_S32, lanes<i32, i32, i32>(divide));
    CASE(DIV_U32, lanes<u32, u32, u32>([](u32 a, u32 b) { return b == 0 ? ALL : a / b; }));
    CASE(DIV_S64, lanes<i64, i64, i64>([](i64 a, i64 b) { return b == 0 ? -1 : a / b; }));
    CASE(DIV_U64, lanes<u64, u64, u64>([](u64 a, u64 b) { return b == 0 ? ~u64{0} : a / b; }));
    CASE(REM_S32, lanes<i32, i32, i32>(remainder));
    CASE(REM_U32, lanes<u32, u32, u32>([](u32 a, u32 b) { return b == 0 ? a : a % b; }));
    CASE(REM_S64, lanes<i64, i64, i64>([](i64 a, i64 b) { return b == 0 ? a : a % b; }));
    CASE(REM_U64, lanes<u64, u64, u64>([](u64 a, u64 b) { return b == 0 ? a : a % b; }));
    CASE(MIN_S32, lanes<i32, i32, i32>([](i32 a, i32 b) { return a < b ? a : b; }));
    CASE(MIN_U32, lanes<u32, u32, u32>([](u32 a, u32 b) { return a < b ? a : b; }));
    CASE(MIN_S64, lanes<i64, i64, i64>([](i64 a, i64 b) { return a < b ? a : b; }));
    CASE(MIN_U64, lanes<u64, u64, u64>([](u64 a, u64 b) { return a < b ? a : b; }));
    CASE(MIN_F32, lanes<float, float, float>([](float a, float b) { return a < b || b != b ? a : b; }));
    CASE(MAX_S32, lanes<i32, i32, i32>([](i32 a, i32 b) { return a > b ? a : b; }));
    CASE(MAX_U32, lanes<u32, u32, u32>([](u32 a, u32 b) { return a > b ? a : b; }));
    CASE(MAX_S64, lanes<i64, i64, i64>([](i64 a, i64 b) { return a > b ? a : b; }));
    CASE(MAX_U64, lanes<u64, u64, u64>([](u64 a, u64 b) { return a > b ? a : b; }));
    CASE(MAX_F32, lanes<float, float, float>([](float a, float b) { return a > b || b != b ? a : b; }));
    CASE(MAX_RELU_S32, lanes<i32, i32, i32>([](i32 a, i32 b) { return std::max({a, b, 0}); }));
    CASE(AND_B32, lanes<u32, u32, u32>(std::bit_and<>()));
    CASE(AND_B64, lanes<u64, u64, u64>(std::bit_and<>()));
    CASE(OR_B32, lanes<u32, u32, u32>(std::bit_or<>()));
    CASE(OR_B64, lanes<u64, u64, u64>(std::bit_or<>()));
    CASE(XOR_B32, lanes<u32, u32, u32>(std::bit_xor<>()));
    CASE(XOR_B64, lanes<u64, u64, u64>(std::bit_xor<>()));
    CASE(NOT_B16, lanes<u32, u32>([](u32 a) { return ~a & HALF_MASK; }));
    CASE(NOT_B32, lanes<u32, u32>(std::bit_not<>()));
    CASE(NOT_B64, lanes<u64, u64>(std::bit_not<>()));
    CASE(AND_PRED, set_predicate(0, *operand<u32>(1) & *operand<u32>(2)));
    CASE(OR_PRED, set_predicate(0, *operand<u32>(1) | *operand<u32>(2)));
    CASE(XOR_PRED, set_predicate(0, *operand<u32>(1) ^ *operand<u32>(2)));
    CASE(NOT_PRED, set_predicate(0, ~*operand<u32>(1)));
    CASE(NEG_S32, lanes<u32, u32>([](u32 a) { return 0 - a; }));
    CASE(NEG_S64, lanes<u64, u64>([](u64 a) { return 0 - a; }));
    CASE(NEG_F32, lanes<u32, u32>([](u32 a) { return a ^ 0x80000000; }));
    CASE(ABS_S32, lanes<u32, u32>([](u32 a) { return a >> 31 ? 0 - a : a; }));
    CASE(ABS_F32, lanes<u32, u32>([](u32 a) { return a & 0x7fffffff; }));
    CASE(SHL_B16, lanes<u32, u32, u32>([](u32 a, u32 b) { return b > 15 ? 0 : (a << b) & HALF_MASK; }));
    CASE(SHL_B32, lanes<u32, u32, u32>([](u32 a, u32 b) { return b > 31 ? 0 : a << b; }));
    CASE(SHL_B64, lanes<u64, u64, u32>([](u64 a, u32 b) { return b > 63 ? 0 : a << b; }));
    CASE(SHR_S16, lanes<u32, u32, u32>([](u32 a, u32 b) {
           return static_cast<u32>(static_cast<int16_t>(a) >> std::min(b, 15u)) & HALF_MASK;
         }));
    CASE(SHR_S32, lanes<i32, i32, u32>([](i32 a, u32 b) { return a >> (b > 31 ? 31 : b); }));
    CASE(SHR_S64, lanes<i64, i64, u32>([](i64 a, u32 b) { return a >> (b > 63 ? 63 : b); }));
    CASE(SHR_U32, lanes<u32, u32, u32>([](u32 a, u32 b) { return b > 31 ? 0 : a >> b; }));
    CASE(SHR_U64, lanes<u64, u64, u32>([](u64 a, u32 b) { return b > 63 ? 0 : a >> b; }));
    CASE(BFE_S32, lanes<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return field(a, b, c, true); }));
    CASE(BFE_U32, lanes<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return field(a, b, c, false); }));
    CASE(BFI_B32, lanes<u32, u32, u32, u32, u32>(insert<u32>));
    CASE(BFI_B64, lanes<u64, u64, u64, u32, u32>(insert<u64>));
    CASE(PRMT_B32, permute_bytes());
    CASE(POPC_B32, lanes<u32, u32>([](u32 a) { return __builtin_popcount(a); }));
    CASE(POPC_B64, lanes<u32, u64>([](u64 a) { return __builtin_popcountll(a); }));
    CASE(BREV_B32, lanes<u32, u32>([](u32 a) {
           u32 result = 0;
           for (int i = 0; i < 32; ++i) {
             result |= (a >> i & 1) << (31 - i);
           }
           return result;
         }));
    CASE(BFIND_SHIFTAMT_U32, lanes<u32, u32>([](u32 a) { return a ? __builtin_clz(a) : ALL; }));
    CASE(SELP_B32, select<u32>());
    CASE(SELP_B64, select<u64>());
    CASE(EX2_F32, lanes<float, float>([](float a) { return std::exp2(a); }));
    CASE(LG2_F32, lanes<float, float>([](float a) { return std::log2(a); }));
    CASE(RCP_F32, lanes<float, float>([](float a) { return 1 / a; }));
    CASE(SQRT_F32, lanes<float, float>([](float a) { return std::sqrt(a); }));
    CASE(RSQRT_F32, lanes<float, float>([](float a) { return 1 / std::sqrt(a); }));
    default: comparison();
  }
}

Stop Interpreter::run(Block& block, Warp& warp, u64 quantum) {
  block_ = &block;
  warp_ = &warp;
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
          return warp.live ? Stop::BARRIER : Stop::END;
        }
        break;
      case TRAP: fault("trap");
      case BAR_ALIGNED: need_all("bar.sync"); [[fallthrough]];
      case BAR:
        warp.waiting.push_back({warp.pc, active_});
        warp.waiting_mask |= active_;
        warp.mask &= ~active_;
        if (warp.mask == 0) {
          next_group();
        }
        if (warp.mask == 0) {
          return Stop::BARRIER;
        }
        break;
      case BAR_WARP:
        if (*operand<u32>(0) & warp.live & ~active_) {
          fault("bar.warp.sync by lanes %08x", active_);
        }
        break;
      case SHFL_IDX: case SHFL_UP: case SHFL_DOWN: case SHFL_BFLY: shuffle(); break;
      case REDUX_ADD: case REDUX_MIN_S32: case REDUX_MAX_S32: case REDUX_OR: {
        need_all("redux");
        const i32* from = operand<i32>(1);
        i32 all = in_->op == REDUX_MIN_S32 ? INT32_MAX : in_->op == REDUX_MAX_S32 ? INT32_MIN : 0;
        for (int lane = 0; lane < LANES; ++lane) {
          if (active_ >> lane & 1) {
            const i32 x = from[lane];
            all = in_->op == REDUX_ADD ? static_cast<i32>(static_cast<u32>(all) + static_cast<u32>(x))
                  : in_->op == REDUX_MIN_S32 ? std::min(all, x)
                  : in_->op == REDUX_MAX_S32 ? std::max(all, x) : (all | x);
          }
        }
        lanes<i32, i32>([all](i32) { return all; });
        break;
      }
      case BALLOT: {
        const u32 members = operand<u32>(2)[__builtin_ctz(active_)];
        if (members & warp.live & ~active_) {
          fault("vote.sync for lanes %08x by lanes %08x", members, active_);
        }
        const u32 votes = *operand<u32>(1) & active_ & members;
        lanes<u32, u32>([votes](u32) { return votes; });
        break;
      }
      case LD_PARAM: case LD_GLOBAL: case LD_SHARED:
        for (int lane = 0; lane < LANES; ++lane) {
          if (active_ >> lane & 1) {
            const u64 from = address(in_->count, lane);
            const u32 size = in_->size * in_->count;
            if (in_->op == LD_SHARED) {
              load(block.shared.read(from, size, warp.index), lane);
            } else if (in_->op == LD_GLOBAL) {
              load(global_.read(from, size, actor(), in_->flags & CONSTANT), lane);
            } else if (from + size > param_bytes_) {
              fault("ld.param past the parameters");
            } else {
              load(params_ + from, lane);
            }
          }
        }
        break;
      case ST_GLOBAL: case ST_SHARED:
        for (int lane = 0; lane < LANES; ++lane) {
          if (active_ >> lane & 1) {
            u8 data[32];
            gather(data, lane, 1);
            const u64 to = address(0, lane);
            const u32 size = in_->size * in_->count;
            if (in_->op == ST_SHARED) {
              block.shared.write(to, data, size, warp.index);
            } else {
              global_.write(to, data, size, actor());
            }
          }
        }
        break;
      case ATOM_ADD: case LD_ACQUIRE:
        for (int lane = 0; lane < LANES; ++lane) {
          if (active_ >> lane & 1) {
            const bool adds = in_->op == ATOM_ADD;
            const u32 addend = adds ? operand<u32>(2)[lane] : 0;
            const u64 at = address(1, lane);
            operand<u32>(0)[lane] = global_.atomic(
                at, adds ? &addend : nullptr, in_->flags & ACQUIRE, in_->flags & RELEASE, actor(), warp.view);
            warp.acquired |= (in_->flags & ACQUIRE) != 0;
            block.tick += (in_->flags & RELEASE) != 0;
          }
        }
        break;
      case UNPACK_B16: {
        u32 *low = operand<u32>(0), *high = operand<u32>(1);
        const u32* both = operand<u32>(2);
        for (int lane = 0; lane < LANES; ++lane) {
          if (active_ >> lane & 1) {
            const u32 bits = both[lane];
            low[lane] = bits & HALF_MASK;
            high[lane] = bits >> 16;
          }
        }
        break;
      }
      case CP_ASYNC: copy_async(); break;
      case CP_COMMIT:
        need_all("cp.async.commit_group");
        warp.copy_groups.push_back(std::move(warp.copies));
        warp.copies.clear();
        break;
      case CP_WAIT:  // immediate: how many groups may be under way still; -1: none, nor what is not committed
        need_all("cp.async.wait");
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
            block.shared.end_copy(copy.to, data, copy.size, warp.index);
          }
          warp.copy_groups.erase(warp.copy_groups.begin());
        }
        break;
      case LDMATRIX: matrices_to_registers(false); break;
      case LDMATRIX_TRANS: matrices_to_registers(true); break;
      case STMATRIX: registers_to_matrices(false); break;
      case STMATRIX_TRANS: registers_to_matrices(true); break;
      case MMA_F16: multiply_now<F16>(); break;
      case MMA_BF16: multiply_now<BF16>(); break;
      case MMA_TF32: multiply_now<TF32>(); break;
      case WGMMA_F16: case WGMMA_BF16: case WGMMA_TF32: start_multiply(); break;
      case WGMMA_FENCE: ++warp.wgmma_fences; break;
      case WGMMA_COMMIT:
        warp.multiply_groups.push_back(std::move(warp.multiplies));
        warp.multiplies.clear();
        break;
      case WGMMA_WAIT:
        note(SENSITIVE, warp.multiply_groups.size() > static_cast<size_t>(in_->immediate));
        finish_multiplies(static_cast<size_t>(in_->immediate));
        break;
      case PROXY_FENCE: block.shared.proxy_fence(warp.index); break;
      default: arithmetic();
    }
  }
  return Stop::QUANTUM;
}

}  // namespace emulator
