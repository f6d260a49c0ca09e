/* Rescaling by powers of two: factor = 2^-shift. Half of the step is in the bias already, so a shift rounds half up. */
#ifndef DK_RESCALE_H
#define DK_RESCALE_H

#include "dk_kernels.h"

static inline int32_t dk_rescale(int32_t x, const dk_rescale_t *p, int32_t channel)
{
    const int32_t shift = p->shift[channel];
    if (p->multiplier) { /* a mean over a number of elements that is no power of two */
        const int32_t down = shift + 31;
        return (int32_t)(((int64_t)x * p->multiplier[channel] + (INT64_C(1) << (down - 1))) >> down);
    }
    return shift < 0 ? x * (INT32_C(1) << -shift) : x >> shift;
}

/* total / count, half up */
static inline int32_t dk_divide(int32_t total, int32_t count)
{
    const int32_t raised = total + count / 2;
    const int32_t quotient = raised / count;
    return quotient - (quotient * count > raised ? 1 : 0);
}

#endif
