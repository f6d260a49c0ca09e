/* Integer kernels of deploykit, one per operation, written to be read. dk_rescale.h holds the rounding rule. */
#include "dk_kernels.h"
#include "dk_rescale.h"

static inline int8_t dk_clamp(int32_t value, int32_t low, int32_t high)
{
    return (int8_t)(value < low ? low : value > high ? high : value);
}

static inline int32_t dk_is_inside(int32_t position, int32_t size)
{
    return position >= 0 && position < size;
}

/* y[i][j][o] = bias[o] + sum of (x - zero) * weights[o]; what lies outside the image adds nothing. */
void dk_conv(const dk_conv_t *p, const int8_t *weights, const int8_t *x, int8_t *y)
{
    const int32_t part = p->channels / p->groups;
    const int32_t share = p->out_channels / p->groups;
    const int32_t x_zero = p->x_zero;
    for (int32_t i = 0; i < p->out_height; i++) {
        for (int32_t j = 0; j < p->out_width; j++) {
            const int32_t top = i * p->stride_y - p->pad_top;
            const int32_t left = j * p->stride_x - p->pad_left;
            const int8_t *filter = weights;
            for (int32_t o = 0; o < p->out_channels; o++) {
                const int8_t *group = x + o / share * part;
                int32_t sum = p->bias[o];
                for (int32_t ky = 0; ky < p->kernel_height; ky++) {
                    const int32_t row = top + ky * p->dilation_y;
                    for (int32_t kx = 0; kx < p->kernel_width; kx++, filter += part) {
                        const int32_t column = left + kx * p->dilation_x;
                        if (!dk_is_inside(row, p->height) || !dk_is_inside(column, p->width)) {
                            continue;
                        }
                        const int8_t *pixel = group + (row * p->width + column) * p->channels;
                        for (int32_t c = 0; c < part; c++) {
                            sum += (pixel[c] - x_zero) * filter[c];
                        }
                    }
                }
                *y++ = dk_clamp(dk_rescale(sum, &p->rescale, o) + p->y_zero, p->low, p->high);
            }
        }
    }
}

/* dk_conv where every output channel reads one input channel. */
void dk_depthwise(const dk_conv_t *p, const int8_t *weights, const int8_t *x, int8_t *y)
{
    const int32_t repeat = p->out_channels / p->channels;
    const int32_t taps = p->kernel_height * p->kernel_width;
    for (int32_t i = 0; i < p->out_height; i++) {
        for (int32_t j = 0; j < p->out_width; j++) {
            const int32_t top = i * p->stride_y - p->pad_top;
            const int32_t left = j * p->stride_x - p->pad_left;
            for (int32_t o = 0; o < p->out_channels; o++) {
                const int8_t *filter = weights + o * taps;
                const int8_t *channel = x + o / repeat;
                int32_t sum = p->bias[o];
                for (int32_t ky = 0; ky < p->kernel_height; ky++) {
                    const int32_t row = top + ky * p->dilation_y;
                    for (int32_t kx = 0; kx < p->kernel_width; kx++, filter++) {
                        const int32_t column = left + kx * p->dilation_x;
                        if (dk_is_inside(row, p->height) && dk_is_inside(column, p->width)) {
                            sum += (channel[(row * p->width + column) * p->channels] - p->x_zero) * *filter;
                        }
                    }
                }
                *y++ = dk_clamp(dk_rescale(sum, &p->rescale, o) + p->y_zero, p->low, p->high);
            }
        }
    }
}

/* y[i][j] gathers what x[(i + pad - k * dilation) / stride] would have scattered, where the division is exact. */
void dk_conv_transpose(const dk_conv_t *p, const int8_t *weights, const int8_t *x, int8_t *y)
{
    const int32_t part = p->channels / p->groups;
    const int32_t share = p->out_channels / p->groups;
    for (int32_t i = 0; i < p->out_height; i++) {
        for (int32_t j = 0; j < p->out_width; j++) {
            const int8_t *filter = weights;
            for (int32_t o = 0; o < p->out_channels; o++) {
                const int8_t *group = x + o / share * part;
                int32_t sum = p->bias[o];
                for (int32_t ky = 0; ky < p->kernel_height; ky++) {
                    const int32_t down = i + p->pad_top - ky * p->dilation_y;
                    const int32_t row = down / p->stride_y;
                    for (int32_t kx = 0; kx < p->kernel_width; kx++, filter += part) {
                        const int32_t across = j + p->pad_left - kx * p->dilation_x;
                        const int32_t column = across / p->stride_x;
                        if (down < 0 || across < 0 || row * p->stride_y != down || column * p->stride_x != across
                            || row >= p->height || column >= p->width) {
                            continue;
                        }
                        const int8_t *pixel = group + (row * p->width + column) * p->channels;
                        for (int32_t c = 0; c < part; c++) {
                            sum += (pixel[c] - p->x_zero) * filter[c];
                        }
                    }
                }
                *y++ = dk_clamp(dk_rescale(sum, &p->rescale, o) + p->y_zero, p->low, p->high);
            }
        }
    }
}

void dk_dense(const dk_dense_t *p, const int8_t *weights, const int8_t *x, int8_t *y)
{
    for (int32_t row = 0; row < p->rows; row++, x += p->in) {
        const int8_t *filter = weights;
        for (int32_t o = 0; o < p->out; o++, filter += p->in) {
            int32_t sum = p->bias[o];
            for (int32_t i = 0; i < p->in; i++) {
                sum += (x[i] - p->x_zero) * filter[i];
            }
            *y++ = dk_clamp(dk_rescale(sum, &p->rescale, o) + p->y_zero, p->low, p->high);
        }
    }
}

/* Where the element number `index` of a result lies in an operand. */
static int32_t dk_position(int32_t index, const int32_t *shape, const int32_t *strides)
{
    int32_t position = 0;
    for (int32_t axis = DK_AXES - 1; axis >= 0; axis--) {
        position += index % shape[axis] * strides[axis];
        index /= shape[axis];
    }
    return position;
}

static int32_t dk_count(const int32_t *shape)
{
    int32_t count = 1;
    for (int32_t axis = 0; axis < DK_AXES; axis++) {
        count *= shape[axis];
    }
    return count;
}

void dk_add(const dk_add_t *p, const int8_t *a, const int8_t *b, int8_t *y)
{
    const int32_t row = p->pair.shape[DK_AXES - 1];
    const int32_t a_step = p->pair.a_strides[DK_AXES - 1], b_step = p->pair.b_strides[DK_AXES - 1];
    const int32_t lift = INT32_C(1) << p->lift;
    for (int32_t start = 0, count = dk_count(p->pair.shape); start < count; start += row) {
        const int8_t *left = a + dk_position(start, p->pair.shape, p->pair.a_strides);
        const int8_t *right = b + dk_position(start, p->pair.shape, p->pair.b_strides);
        for (int32_t i = 0; i < row; i++, left += a_step, right += b_step) {
            const int32_t first = dk_rescale((*left - p->a_zero) * lift, &p->a_rescale, 0);
            const int32_t second = dk_rescale((*right - p->b_zero) * lift, &p->b_rescale, 0);
            const int32_t sum = (p->subtract ? first - second : first + second) + p->offset;
            *y++ = dk_clamp(dk_rescale(sum, &p->y_rescale, 0) + p->y_zero, p->low, p->high);
        }
    }
}

void dk_multiply(const dk_multiply_t *p, const int8_t *a, const int8_t *b, int8_t *y)
{
    const int32_t row = p->pair.shape[DK_AXES - 1];
    const int32_t a_step = p->pair.a_strides[DK_AXES - 1], b_step = p->pair.b_strides[DK_AXES - 1];
    for (int32_t start = 0, count = dk_count(p->pair.shape); start < count; start += row) {
        const int8_t *left = a + dk_position(start, p->pair.shape, p->pair.a_strides);
        const int8_t *right = b + dk_position(start, p->pair.shape, p->pair.b_strides);
        for (int32_t i = 0; i < row; i++, left += a_step, right += b_step) {
            const int32_t product = (*left - p->a_zero) * (*right - p->b_zero) + p->offset;
            *y++ = dk_clamp(dk_rescale(product, &p->rescale, 0) + p->y_zero, p->low, p->high);
        }
    }
}

void dk_max_pool(const dk_pool_t *p, const int8_t *x, int8_t *y)
{
    for (int32_t i = 0; i < p->out_height; i++) {
        for (int32_t j = 0; j < p->out_width; j++) {
            for (int32_t c = 0; c < p->channels; c++) {
                int8_t largest = INT8_MIN;
                for (int32_t ky = 0; ky < p->kernel_height; ky++) {
                    const int32_t row = i * p->stride_y - p->pad_top + ky * p->dilation_y;
                    for (int32_t kx = 0; kx < p->kernel_width; kx++) {
                        const int32_t column = j * p->stride_x - p->pad_left + kx * p->dilation_x;
                        if (dk_is_inside(row, p->height) && dk_is_inside(column, p->width)) {
                            const int8_t value = x[(row * p->width + column) * p->channels + c];
                            largest = value > largest ? value : largest;
                        }
                    }
                }
                *y++ = largest;
            }
        }
    }
}

void dk_average_pool(const dk_pool_t *p, const int8_t *x, int8_t *y)
{
    for (int32_t i = 0; i < p->out_height; i++) {
        for (int32_t j = 0; j < p->out_width; j++) {
            for (int32_t c = 0; c < p->channels; c++) {
                int32_t sum = 0, count = 0;
                for (int32_t ky = 0; ky < p->kernel_height; ky++) {
                    const int32_t row = i * p->stride_y - p->pad_top + ky;
                    for (int32_t kx = 0; kx < p->kernel_width; kx++) {
                        const int32_t column = j * p->stride_x - p->pad_left + kx;
                        if (dk_is_inside(row, p->height) && dk_is_inside(column, p->width)) {
                            sum += x[(row * p->width + column) * p->channels + c];
                            count++;
                        } else if (p->counts_padding && row < p->height + p->pad_bottom
                                   && column < p->width + p->pad_right) {
                            sum += p->x_zero;
                            count++;
                        }
                    }
                }
                *y++ = dk_clamp(dk_divide(sum, count), INT8_MIN, INT8_MAX);
            }
        }
    }
}

void dk_mean(const dk_mean_t *p, const int8_t *x, int8_t *y)
{
    for (int32_t i = 0; i < p->outer; i++, x += p->n * p->inner) {
        for (int32_t k = 0; k < p->inner; k++) {
            int32_t sum = p->offset;
            for (int32_t j = 0; j < p->n; j++) {
                sum += x[j * p->inner + k] - p->x_zero;
            }
            *y++ = dk_clamp(dk_rescale(sum, &p->rescale, 0) + p->y_zero, INT8_MIN, INT8_MAX);
        }
    }
}

/* Each group is read whole before it is written, so y may be x. */
void dk_softmax(const dk_softmax_t *p, const int8_t *x, int8_t *y)
{
    for (int32_t i = 0; i < p->outer; i++) {
        for (int32_t k = 0; k < p->inner; k++) {
            const int32_t start = i * p->n * p->inner + k;
            int32_t largest = INT8_MIN;
            for (int32_t j = 0; j < p->n; j++) {
                const int32_t value = x[start + j * p->inner];
                largest = value > largest ? value : largest;
            }
            uint32_t sum = 0;
            for (int32_t j = 0; j < p->n; j++) {
                sum += p->exponentials[largest - x[start + j * p->inner]];
            }
            for (int32_t j = 0; j < p->n; j++) {
                const uint32_t exponential = p->exponentials[largest - x[start + j * p->inner]];
                const uint32_t share = (exponential * p->one + sum / 2u) / sum;
                y[start + j * p->inner] = dk_clamp((int32_t)share + p->y_zero, INT8_MIN, INT8_MAX);
            }
        }
    }
}

void dk_table(const int8_t *values, int32_t channels, int32_t inner, int32_t count, const int8_t *x, int8_t *y)
{
    for (int32_t i = 0; i < count;) {
        for (int32_t c = 0; c < channels; c++) {
            for (int32_t k = 0; k < inner; k++, i++) {
                y[i] = values[c * 256 + x[i] + 128];
            }
        }
    }
}

void dk_copy(const dk_copy_t *p, const int8_t *x, int8_t *y)
{
    const int32_t row = p->shape[DK_AXES - 1];
    const int32_t x_step = p->x_strides[DK_AXES - 1], y_step = p->y_strides[DK_AXES - 1];
    for (int32_t start = 0, count = dk_count(p->shape); start < count; start += row) {
        const int8_t *from = x + dk_position(start, p->shape, p->x_strides);
        int8_t *to = y + dk_position(start, p->shape, p->y_strides);
        for (int32_t i = 0; i < row; i++) {
            to[i * y_step] = from[i * x_step];
        }
    }
}

void dk_fill(int32_t count, int8_t value, int8_t *y)
{
    for (int32_t i = 0; i < count; i++) {
        y[i] = value;
    }
}

void dk_resize(const dk_resize_t *p, const int8_t *x, int8_t *y)
{
    for (int32_t i = 0; i < p->out_height; i++) {
        for (int32_t j = 0; j < p->out_width; j++) {
            const int8_t *pixel = x + (p->rows[i] * p->width + p->columns[j]) * p->channels;
            for (int32_t c = 0; c < p->channels; c++) {
                *y++ = pixel[c];
            }
        }
    }
}

int32_t dk_argmax(const int8_t *scores, int32_t count)
{
    int32_t best = 0;
    for (int32_t i = 1; i < count; i++) {
        best = scores[i] > scores[best] ? i : best;
    }
    return best;
}
