/* Runs the golden vectors and says whether every byte is right. The exit code is 0 only then. */
#include <stdio.h>

#include "golden.h"
#include "model.h"

static int8_t arena[MODEL_ARENA_BYTES];

int main(void)
{
    int32_t wrong = 0, compared = 0;
    for (int32_t sample = 0; sample < GOLDEN_COUNT; sample++) {
        for (int32_t i = 0; i < MODEL_ARENA_BYTES; i++) {
            arena[i] = (int8_t)(i * 37 + sample); /* nothing may depend on what was there */
        }
        for (int32_t k = 0; k < GOLDEN_INPUTS; k++) {
            const golden_t *input = &golden_inputs[k];
            for (int32_t i = 0; i < input->count; i++) {
                arena[input->offset + i] = input->data[sample * input->count + i];
            }
        }
        model_run(arena);
        for (int32_t k = 0; k < GOLDEN_OUTPUTS; k++) {
            const golden_t *output = &golden_outputs[k];
            for (int32_t i = 0; i < output->count; i++) {
                const int8_t expected = output->data[sample * output->count + i];
                const int8_t found = arena[output->offset + i];
                compared++;
                if (found != expected && wrong++ < 10) {
                    printf("sample %ld, output %s, element %ld: %d, expected %d\n", (long)sample, output->name,
                           (long)i, found, expected);
                }
            }
        }
    }
    printf("%s: %ld of %ld values differ (%d samples, arena %ld bytes)\n", wrong ? "FAIL" : "pass", (long)wrong,
           (long)compared, GOLDEN_COUNT, (long)MODEL_ARENA_BYTES);
    return wrong ? 1 : 0;
}
