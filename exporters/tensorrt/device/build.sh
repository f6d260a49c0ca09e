#!/bin/sh
# Builds the TensorRT engine on this device; see BUILD.md.
cd "$(dirname "$0")" && exec python3 build.py "$@"
