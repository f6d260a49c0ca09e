/* Weights that lie coded in flash. C99, no heap, no floating point, no library calls; model.c includes it.
 *
 * As in deploykit's container .dkz, a weight is zeros that are counted and values that are not, both in canonical
 * Huffman codes of 12 bits at most; or values alone. Here each of the two streams is one lane:
 *
 *   4 bytes             how many values are coded; behind the last one all weights are zero
 *   table of the gaps   how many zeros come before a value, 2 bytes each; without a code: there are no gaps
 *   table of values     1 byte each
 *   the rest            16-bit words: a stream takes the next one before it decodes, if it has fewer than 16 bits
 *
 * A table is the length of its longest code, 1 byte; how many codes have 1, 2, .. bits, 2 bytes each; and what they
 * mean, the shortest code first. Lowest bytes come first; bits of a word are read from the highest on. */
#ifndef DK_DECODE_H
#define DK_DECODE_H

#include <stdint.h>

#define DK_LONGEST_CODE 12

typedef struct {
    const uint8_t *at, *end;
} dk_bytes_t;

typedef struct {
    const uint8_t *counts, *meanings;
    int32_t longest;
    int32_t have; /* bits, the next one is the highest */
    uint32_t bits;
} dk_stream_t;

static inline uint32_t dk_two(const uint8_t *from)
{
    return (uint32_t)from[0] | (uint32_t)from[1] << 8;
}

/* Where `count` bytes lie, which are then behind us; 0 if there are not as many. */
static const uint8_t *dk_take(dk_bytes_t *bytes, uint32_t count)
{
    const uint8_t *at = bytes->at;
    if (count > (uint32_t)(bytes->end - at)) {
        return 0;
    }
    bytes->at += count;
    return at;
}

/* A stream with the table that comes next, whose meanings have `width` bytes. 0: fine. */
static int32_t dk_open(dk_stream_t *stream, dk_bytes_t *bytes, uint32_t width)
{
    const uint8_t *longest = dk_take(bytes, 1);
    if (!longest || *longest > DK_LONGEST_CODE) {
        return 1;
    }
    stream->longest = *longest;
    stream->have = 0;
    stream->bits = 0;
    stream->counts = dk_take(bytes, 2u * *longest);
    uint32_t codes = 0;
    for (int32_t i = 0; stream->counts && i < stream->longest; i++) {
        codes += dk_two(stream->counts + 2 * i);
    }
    stream->meanings = stream->counts ? dk_take(bytes, width * codes) : 0;
    return stream->meanings ? 0 : 1;
}

/* The place of the next symbol among the meanings; below 0 if there is none. The codes of a length are consecutive
 * numbers, the first of them follows from the shorter ones: what lies beyond the last is longer. */
static int32_t dk_next(dk_stream_t *stream, dk_bytes_t *bytes)
{
    if (stream->have < 16) {
        const uint8_t *word = dk_take(bytes, 2);
        if (!word) {
            return -1;
        }
        stream->bits |= dk_two(word) << (16 - stream->have);
        stream->have += 16;
    }
    int32_t beyond = 0, place = 0;
    for (int32_t i = 0; i < stream->longest; i++) {
        const int32_t count = (int32_t)dk_two(stream->counts + 2 * i);
        beyond = beyond * 2 + (int32_t)(stream->bits >> 31);
        stream->bits <<= 1;
        stream->have--;
        if (beyond < count) {
            return place + beyond;
        }
        beyond -= count;
        place += count;
    }
    return -1;
}

/* Writes `count` weights. 0: all is well; 1: the bytes are damaged, and no more than `count` weights were written. */
static int32_t dk_decode(const uint8_t *coded, uint32_t size, int32_t count, int8_t *weights)
{
    dk_bytes_t bytes = {coded, coded + size};
    dk_stream_t gaps, values;
    const uint8_t *many = dk_take(&bytes, 4);
    if (!many || dk_open(&gaps, &bytes, 2) || dk_open(&values, &bytes, 1)) {
        return 1;
    }
    int32_t i = 0;
    for (uint32_t left = dk_two(many) | dk_two(many + 2) << 16; left > 0; left--) {
        int32_t zeros = 0;
        if (gaps.longest > 0) {
            const int32_t gap = dk_next(&gaps, &bytes);
            if (gap < 0) {
                return 1;
            }
            zeros = (int32_t)dk_two(gaps.meanings + 2 * gap);
        }
        const int32_t value = dk_next(&values, &bytes);
        if (value < 0 || zeros >= count - i) {
            return 1;
        }
        while (zeros-- > 0) {
            weights[i++] = 0;
        }
        weights[i++] = (int8_t)values.meanings[value];
    }
    while (i < count) {
        weights[i++] = 0;
    }
    return bytes.at != bytes.end;
}

#endif
