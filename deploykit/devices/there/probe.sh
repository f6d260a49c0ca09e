# Says what this machine is: one line "key<tab>value" each. POSIX sh, as it is on routers and phones too.
# $1: folder for deploykit's files (may be empty); $2: Python interpreter (may be empty).

say() { if [ -n "$2" ]; then printf '%s\t%s\n' "$1" "$2"; fi; }
first() { for f in "$@"; do if [ -r "$f" ]; then tr -d '\000' < "$f" 2>/dev/null | head -n 1; return; fi; done; }
property() { command -v getprop > /dev/null 2>&1 && getprop "$1"; }

say machine "$(uname -m)"
say kernel "$(uname -s) $(uname -r)"
if [ -r /etc/os-release ]; then say system "$(. /etc/os-release; echo "$PRETTY_NAME")"; fi
release=$(property ro.build.version.release)
if [ -n "$release" ]; then say system "Android $release"; fi
say board "$(first /proc/device-tree/model /sys/class/dmi/id/product_name)"
say board "$(property ro.product.model)"
say cpu "$(grep -m 1 'model name' /proc/cpuinfo 2>/dev/null | cut -d : -f 2 | sed 's/^ *//')"
say cpu "$(LC_ALL=C lscpu 2>/dev/null | grep -m 1 'Model name' | cut -d : -f 2 | sed 's/^ *//')"
say cpu "$(property ro.soc.model)"
say cores "$(getconf _NPROCESSORS_ONLN 2>/dev/null || nproc 2>/dev/null)"
say memory_kb "$(grep MemTotal /proc/meminfo 2>/dev/null | tr -dc 0-9)"
for f in /sys/devices/system/cpu/cpu[0-9]*/cpufreq; do
    say clock_khz "$(first "$f/scaling_cur_freq")"
    say clock_max_khz "$(first "$f/cpuinfo_max_freq")"
    say governor "$(first "$f/scaling_governor")"
done
for f in /sys/class/thermal/thermal_zone*; do say "temperature $(first "$f/type")" "$(first "$f/temp")"; done
if command -v nvpmodel > /dev/null 2>&1; then say power_mode "$(nvpmodel -q 2>/dev/null < /dev/null | head -n 1)"; fi

PATH=$PATH:/usr/src/tensorrt/bin:/opt/tensorrt/bin:/data/local/tmp
for tool in cc gcc clang make trtexec benchmark_model; do say "tool $tool" "$(command -v $tool)"; done

folder=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/deploykit}
if trouble=$(mkdir -p "$folder" 2>&1) && [ -w "$folder" ]; then
    folder=$(cd "$folder" && pwd)
    say folder "$folder"
    say free_kb "$(df -Pk "$folder" 2>/dev/null | tail -n 1 | awk '{print $4}')"
else
    say trouble "${trouble:-$folder is not writable}"
fi

python=$(command -v "${2:-python3}")
if [ -n "$python" ]; then
    say python "$python"
    "$python" - <<'END'
import importlib, sys
print("python_version\t%d.%d.%d" % sys.version_info[:3])
def version(package, module):
    if sys.version_info >= (3, 8):
        return importlib.import_module("importlib.metadata").version(package)
    return getattr(importlib.import_module(module), "__version__", "?")
for package, module in (
    ("numpy", "numpy"), ("onnxruntime", "onnxruntime"), ("onnxruntime-gpu", "onnxruntime"),
    ("ai-edge-litert", "ai_edge_litert"), ("tflite-runtime", "tflite_runtime"), ("openvino", "openvino"),
    ("tensorrt", "tensorrt"),
):
    try:
        print("package %s\t%s" % (package, version(package, module)))
    except Exception:
        pass
END
fi
exit 0
