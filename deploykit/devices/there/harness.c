/* Runs a network of the c99 exporter on a device with a C library and a clock.
 *
 *   harness answer SAMPLES INPUT... -- OUTPUT...    int8 samples on stdin, their outputs on stdout
 *   harness time RUNS                               nanoseconds of each call: elapsed, on the processor
 *
 * INPUT and OUTPUT are offset:count of a tensor in the arena, from model.json. */
#define _POSIX_C_SOURCE 200112L
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "model.h"

static int8_t arena[MODEL_ARENA_BYTES];

static double now(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static int measure(long runs)
{
    for (long i = -3; i < runs; i++) { /* three to warm up */
        const double worked = now(CLOCK_PROCESS_CPUTIME_ID), begin = now(CLOCK_MONOTONIC);
        model_run(arena);
        const double end = now(CLOCK_MONOTONIC), done = now(CLOCK_PROCESS_CPUTIME_ID);
        if (i >= 0) {
            printf("%.0f %.0f\n", end - begin, done - worked);
        }
    }
    return 0;
}

static int answer(long samples, int count, char **ports)
{
    for (long sample = 0; sample < samples; sample++) {
        int k = 0, reading = 1;
        for (; k < count; k++) {
            if (strcmp(ports[k], "--") == 0) {
                model_run(arena);
                reading = 0;
                continue;
            }
            char *rest;
            const size_t offset = strtoul(ports[k], &rest, 10), size = strtoul(rest + 1, NULL, 10);
            const size_t moved = reading ? fread(arena + offset, 1, size, stdin) : fwrite(arena + offset, 1, size, stdout);
            if (moved != size) {
                fprintf(stderr, reading ? "the samples ended early\n" : "cannot write the outputs\n");
                return 1;
            }
        }
    }
    return fflush(stdout) != 0;
}

int main(int argc, char **argv)
{
    if (argc >= 3 && strcmp(argv[1], "time") == 0) {
        return measure(atol(argv[2]));
    }
    if (argc >= 4 && strcmp(argv[1], "answer") == 0) {
        return answer(atol(argv[2]), argc - 3, argv + 3);
    }
    return 2;
}
