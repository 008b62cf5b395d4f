// SPDX-License-Identifier: Apache-2.0
// Division that rounds up, for integers that are not negative.
#pragma once

#include <stdint.h>

#include "sparsebwd/host_device.h"

namespace sparsebwd {

SPARSEBWD_HOST_DEVICE inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
SPARSEBWD_HOST_DEVICE inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace sparsebwd
