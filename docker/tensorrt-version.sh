#!/bin/sh
# Prints the version of the TensorRT library that this image's Triton runs engines with, like 11.2.1.
set -eu
[ $# -gt 0 ] || set -- /usr/lib /usr/local /opt
library="$(find "$@" -name 'libnvinfer.so.*.*.*' 2>/dev/null | sort | head -n 1)"
if [ -z "$library" ]; then
  echo "error: no libnvinfer.so here: this is not NVIDIA's full tritonserver image (tag ending in -py3)" >&2
  exit 1
fi
echo "${library##*/libnvinfer.so.}"
