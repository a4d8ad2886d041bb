// The kernels of few_rows.cpp, to which prefill.cpp hands over what they do faster.
#pragma once

#include "attention.h"

namespace eah::cpu::CPU_CAPABILITY {

// With one map for all heads, up to 8 rows. With a map for each head, the heads that share a KV head also share the
// price of packing it for the products of prefill.cpp, which take 8 rows at once: those win from 5 rows on, as measured.
inline bool takes_few_rows(const Problem& p, bool shared) {
  return p.q_len <= 4 || (p.q_len <= 8 && (shared || p.heads / p.kv_heads <= 2));
}

// Of batch row b: image (Skv); mean (Hq, Skv), zeros; lse (Hq, Sq) or null.
void few_rows_statistics(const Problem& p, int64_t b, const bool* image, float* mean, float* lse);

// Of batch row b, with the map of `head`, or each head's own where it is -1.
void few_rows_attend(const Problem& p, int64_t b, const Values& values, int64_t head, const View& output);

}  // namespace eah::cpu::CPU_CAPABILITY
