/* Rescaling as TensorFlow Lite Micro does it: factor = multiplier * 2^-31 * 2^-shift, rounded twice. */
#ifndef DK_RESCALE_H
#define DK_RESCALE_H

#include "dk_kernels.h"

static inline int32_t dk_rescale(int32_t x, const dk_rescale_t *p, int32_t channel)
{
    const int32_t shift = p->shift[channel];
    const int32_t left = shift < 0 ? -shift : 0;
    const int32_t right = shift > 0 ? shift : 0;
    /* rounded at bit 31, half up; x shifted left is proven to fit */
    const int64_t product = (int64_t)(x * (INT32_C(1) << left)) * p->multiplier[channel];
    const int32_t high = (int32_t)((product + (INT64_C(1) << 30)) >> 31);
    /* rounded at bit `right`, half away from zero */
    const int32_t mask = (int32_t)((UINT32_C(1) << right) - 1u);
    const int32_t rest = high & mask;
    const int32_t threshold = (mask >> 1) + (high < 0 ? 1 : 0);
    return (high >> right) + (rest > threshold ? 1 : 0);
}

/* total / count, halves away from zero */
static inline int32_t dk_divide(int32_t total, int32_t count)
{
    return total > 0 ? (total + count / 2) / count : (total - count / 2) / count;
}

#endif
