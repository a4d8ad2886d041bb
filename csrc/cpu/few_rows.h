// The kernels of few_rows.cpp, which prefill.cpp hands such problems.
#pragma once

#include "attention.h"

namespace eah::cpu::CPU_CAPABILITY {

constexpr int64_t FEW_ROWS = 8;

Statistics few_rows_statistics;
Attend few_rows_attend;

}  // namespace eah::cpu::CPU_CAPABILITY
