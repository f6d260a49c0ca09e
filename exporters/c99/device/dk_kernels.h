/* Integer kernels of deploykit. C99, no heap, no floating point, no library calls.
 *
 * Tensors are runs of int8_t; images are [height][width][channels]. What is constant about an operation is in one
 * structure, so a call is kernel(&constants, input, output). Sums are 32 bits wide: deploykit has proven, from the
 * actual weights, that they stay within. */
#ifndef DK_KERNELS_H
#define DK_KERNELS_H

#include <stdint.h>

#if (-1 >> 1) != -1
#error "these kernels need a compiler that shifts negative numbers arithmetically, as nearly all do"
#endif

#define DK_AXES 6

/* How int32 sums are brought to the scale of an int8 result: one factor per channel, see dk_rescale.h. */
typedef struct {
    const int32_t *multiplier;
    const int8_t *shift;
} dk_rescale_t;

typedef struct {
    int32_t height, width, channels;
    int32_t out_height, out_width, out_channels;
    int32_t kernel_height, kernel_width;
    int32_t stride_y, stride_x, dilation_y, dilation_x, pad_top, pad_left;
    int32_t groups;
    const int32_t *bias; /* [out] */
    dk_rescale_t rescale;
    int32_t x_zero, y_zero, low, high;
} dk_conv_t;

typedef struct {
    int32_t rows, in, out;
    const int32_t *bias;
    dk_rescale_t rescale;
    int32_t x_zero, y_zero, low, high;
} dk_dense_t;

/* Two operands, broadcast to one shape: a stride of 0 repeats. */
typedef struct {
    int32_t shape[DK_AXES], a_strides[DK_AXES], b_strides[DK_AXES];
} dk_pair_t;

typedef struct {
    dk_pair_t pair;
    dk_rescale_t a_rescale, b_rescale, y_rescale;
    int32_t lift, offset, subtract;
    int32_t a_zero, b_zero, y_zero, low, high;
} dk_add_t;

typedef struct {
    dk_pair_t pair;
    dk_rescale_t rescale;
    int32_t offset;
    int32_t a_zero, b_zero, y_zero, low, high;
} dk_multiply_t;

typedef struct {
    int32_t height, width, channels;
    int32_t out_height, out_width;
    int32_t kernel_height, kernel_width;
    int32_t stride_y, stride_x, dilation_y, dilation_x;
    int32_t pad_top, pad_left, pad_bottom, pad_right;
    int32_t counts_padding; /* average pools: padding takes part in the mean */
    int32_t x_zero;
} dk_pool_t;

typedef struct {
    int32_t outer, n, inner;
    dk_rescale_t rescale;
    int32_t offset, x_zero, y_zero;
} dk_mean_t;

typedef struct {
    int32_t outer, n, inner;
    const uint32_t *exponentials; /* [256] */
    uint32_t one;
    int32_t y_zero;
} dk_softmax_t;

/* Elements moved from one arrangement to another. */
typedef struct {
    int32_t shape[DK_AXES], x_strides[DK_AXES], y_strides[DK_AXES];
} dk_copy_t;

typedef struct {
    int32_t width, channels, out_height, out_width;
    const uint16_t *rows;    /* [out_height] */
    const uint16_t *columns; /* [out_width] */
} dk_resize_t;

/* weights are [out][kernel_height][kernel_width][channels / groups]; of dk_dense: [out][in]. They come by themselves
 * because they may lie in the arena, where dk_decode.h has put them. */
void dk_conv(const dk_conv_t *p, const int8_t *weights, const int8_t *x, int8_t *y);
void dk_depthwise(const dk_conv_t *p, const int8_t *weights, const int8_t *x, int8_t *y);
void dk_conv_transpose(const dk_conv_t *p, const int8_t *weights, const int8_t *x, int8_t *y);
void dk_dense(const dk_dense_t *p, const int8_t *weights, const int8_t *x, int8_t *y);
void dk_add(const dk_add_t *p, const int8_t *a, const int8_t *b, int8_t *y);
void dk_multiply(const dk_multiply_t *p, const int8_t *a, const int8_t *b, int8_t *y);
void dk_max_pool(const dk_pool_t *p, const int8_t *x, int8_t *y);
void dk_average_pool(const dk_pool_t *p, const int8_t *x, int8_t *y);
void dk_mean(const dk_mean_t *p, const int8_t *x, int8_t *y);
void dk_softmax(const dk_softmax_t *p, const int8_t *x, int8_t *y);
/* values is [channels][256]; x is [count / channels / inner][channels][inner] */
void dk_table(const int8_t *values, int32_t channels, int32_t inner, int32_t count, const int8_t *x, int8_t *y);
void dk_copy(const dk_copy_t *p, const int8_t *x, int8_t *y);
void dk_fill(int32_t count, int8_t value, int8_t *y);
void dk_resize(const dk_resize_t *p, const int8_t *x, int8_t *y);

/* The position of the largest of count scores, the first of equals. */
int32_t dk_argmax(const int8_t *scores, int32_t count);

#endif
