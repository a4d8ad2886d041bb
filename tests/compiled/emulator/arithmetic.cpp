// Functions of registers alone, lane by lane.
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

void Interpreter::permute_bytes() {
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

void Interpreter::unpack_halves() {
  u32 *low = operand<u32>(0), *high = operand<u32>(1);
  const u32* both = operand<u32>(2);
  for (u32 left = active_; left; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    const u32 bits = both[lane];
    low[lane] = bits & HALF_MASK;
    high[lane] = bits >> 16;
  }
}

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
    CASE(CVT_U16_U64, lanes<u32, u64>([](u64 a) { return a & HALF_MASK; }));
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
    CASE(MUL_WIDE_U16, lanes<u32, u32, u32>([](u32 a, u32 b) { return (a & HALF_MASK) * (b & HALF_MASK); }));
    CASE(MAD_WIDE_U16, lanes<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) {
           return (a & HALF_MASK) * (b & HALF_MASK) + c;
         }));
    CASE(MUL_WIDE_S32, lanes<i64, i32, i32>([](i64 a, i64 b) { return a * b; }));
    CASE(MUL_WIDE_U32, lanes<u64, u32, u32>([](u64 a, u64 b) { return a * b; }));
    CASE(MUL_HI_S32, lanes<i32, i32, i32>([](i64 a, i64 b) { return a * b >> 32; }));
    CASE(MUL_HI_U32, lanes<u32, u32, u32>([](u64 a, u64 b) { return a * b >> 32; }));
    CASE(MUL_HI_U64, lanes<u64, u64, u64>([](u64 a, u64 b) -> u64 {
           return static_cast<unsigned __int128>(a) * b >> 64;
         }));
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
    CASE(UNPACK_B16, unpack_halves());
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

}  // namespace emulator
