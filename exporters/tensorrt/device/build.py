"""Builds, checks and times TensorRT engines on the device, and keeps the fastest one that computes the right thing.

Runs where the bundle lies, with nothing but Python >= 3.6 and trtexec. Exit codes: 0 an engine was kept,
2 something is missing (the message says what), 3 no variant was built that answers as it should.
"""

import argparse
import array
import hashlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from typing import Any, Dict, List, NamedTuple, NoReturn, Optional, Tuple

Version = Tuple[int, ...]
Bundle = Dict[str, Any]

# Which trtexec knows which flag: first version, first version without it. From its sources at 8.2, 8.6, 10.3, 10.13,
# 10.16 and 11.1 (and a log of 8.4 for --memPoolSize).
FLAGS = {
    "--fp16": ((8, 0), (11, 0)),
    "--int8": ((8, 0), (11, 0)),
    "--stronglyTyped": ((10, 0), (11, 0)),  # 11 is always strongly typed
    "--workspace": ((8, 0), (8, 4)),
    "--memPoolSize": ((8, 4), (99, 0)),
    "--buildOnly": ((8, 0), (8, 6)),
    "--skipInference": ((8, 6), (99, 0)),
    "--sparsity=enable": ((8, 0), (11, 0)),
}  # type: Dict[str, Tuple[Version, Version]]

# Highest ONNX operator set each parser reads.
PARSER_OPSETS = (((11, 0), 25), ((10, 13), 24), ((10, 9), 22), ((10, 0), 20), ((8, 4), 17), ((8, 0), 13))

WARMUP_MS = 500
EQUAL_DB = 200.0  # stands for no noise at all


class Plan(NamedTuple):
    """One way to build: the variant's name, which model file, with which flags, for which TensorRT versions."""

    variant: str
    precision: str
    typing: str  # what the file was written for: strong, its types are the kernels'; weak, flags allow more types
    like: str  # the model that computes in the types this plan allows: the noise it may have counts too
    flags: Tuple[str, ...]
    since: Version
    needs: str  # what older ones do not have
    before: Version


PLANS = (
    Plan("fp32", "fp32", "weak", "fp32", (), (8, 0), "", (99, 0)),
    Plan("fp16-weak", "fp32", "weak", "fp16", ("--fp16",), (8, 0), "", (11, 0)),
    Plan("fp16-file", "fp16", "weak", "fp16", ("--fp16",), (8, 4), "float16 weights", (11, 0)),
    Plan("fp16", "fp16", "strong", "fp16", ("--stronglyTyped",), (10, 0), "strong typing", (99, 0)),
    Plan("int8-weak", "int8", "weak", "int8-fp16", ("--int8", "--fp16"), (8, 0), "", (11, 0)),
    Plan("int8-fp16", "int8-fp16", "strong", "int8-fp16", ("--stronglyTyped",), (10, 0), "strong typing", (99, 0)),
    Plan("fp8", "fp8", "strong", "fp8", ("--stronglyTyped",), (10, 2), "fp8 convolutions", (99, 0)),
)


class Result(NamedTuple):
    """What became of one plan. Numbers are None where there is none."""

    variant: str
    median_ms: Optional[float] = None
    p99_ms: Optional[float] = None
    snr_db: Optional[float] = None  # of the output that has most noise
    same: str = ""  # on how many golden samples the best class is that of the float model
    megabytes: Optional[float] = None
    trouble: str = ""

    @property
    def good(self) -> bool:
        """Built, timed and answers as it should."""
        return not self.trouble and self.median_ms is not None


def fail(message: str, code: int = 2) -> NoReturn:
    """Ends the script with a sentence for the user."""
    sys.stderr.write("build.py: {}\n".format(message))
    raise SystemExit(code)


# The bundle


def read_bundle(folder: str) -> Bundle:
    """``bundle.json``, after checking that every file it lists is there and unchanged."""
    path = os.path.join(folder, "bundle.json")
    try:
        with open(path) as file:
            bundle = json.load(file)  # type: Bundle
    except (OSError, ValueError) as error:
        fail("cannot read {}: {}. Copy the whole bundle folder to the device.".format(path, error))
    if bundle.get("format") != "deploykit-tensorrt-2":
        fail("{} has the format {}, this script reads deploykit-tensorrt-2".format(path, bundle.get("format")))
    damaged = [
        name for name, digest in sorted(bundle["sha256"].items()) if sha256(os.path.join(folder, name)) != digest
    ]
    if damaged:
        fail("missing or changed since the export: {}. Copy the bundle again.".format(", ".join(damaged)))
    return bundle


def sha256(path: str) -> Optional[str]:
    """Hex digest of a file, None if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
    except OSError:
        return None
    return digest.hexdigest()


# The device


def find_trtexec(given: Optional[str]) -> str:
    """Path of trtexec: the one given, on PATH, or where JetPack and NVIDIA's containers put it."""
    places = [given] if given else ["trtexec", "/usr/src/tensorrt/bin/trtexec", "/opt/tensorrt/bin/trtexec"]
    for place in places:
        found = shutil.which(place)
        if found:
            return os.path.abspath(found)
    fail(
        "trtexec not found (looked for: {}). On Jetson: sudo apt install tensorrt (it comes with JetPack). "
        "Elsewhere: install TensorRT, then give --trtexec PATH.".format(", ".join(places))
    )


def tensorrt_version(banner: str) -> Version:
    """Version from trtexec's first line: ``[TensorRT v8502]`` is 8.5.2, ``[TensorRT v101300]`` is 10.13.0."""
    match = re.search(r"\[TensorRT v(\d+)\]", banner)
    if not match:
        fail(
            "cannot read the TensorRT version from trtexec's banner. It said: {}".format(
                banner.strip()[:200] or "nothing"
            )
        )
    number = int(match.group(1))
    unit = 10000 if number >= 100000 else 1000
    return number // unit, number % unit // 100, number % 100


def jetson_release() -> str:
    """First line of /etc/nv_tegra_release; empty off Jetson."""
    try:
        with open("/etc/nv_tegra_release") as file:
            return file.readline().strip()
    except OSError:
        return ""


def device_facts(release: str) -> Dict[str, str]:
    """What engine.json says about the machine."""
    facts = {"machine": platform.machine(), "system": platform.platform()}
    if release:
        facts["jetson_linux"] = release
    try:
        with open("/proc/device-tree/model") as file:
            facts["model"] = file.read().strip("\0\n ")
    except OSError:
        pass
    return facts


def default_workspace(release: str, version: Version) -> Optional[int]:
    """MB for the builder: half of what is free where GPU and CPU share memory; else TensorRT's own default.

    Before 8.4 that default was 16 MB, too little for most layers.
    """
    try:
        with open("/proc/meminfo") as file:
            match = re.search(r"MemAvailable:\s+(\d+) kB", file.read())
    except OSError:
        match = None
    if release and match:
        return int(match.group(1)) // 2048
    return None if version >= (8, 4) else 1024


# The command lines


def has(flag: str, version: Version) -> bool:
    """Whether that version's trtexec knows the flag."""
    since, before = FLAGS[flag]
    return since <= version < before


def parser_opset(version: Version) -> int:
    """Highest ONNX operator set that version's parser reads."""
    return next((opset for since, opset in PARSER_OPSETS if version >= since), 0)


def legal_plans(bundle: Bundle, version: Version) -> Tuple[List[Plan], List[str]]:
    """The plans this TensorRT can build, and a sentence for each one it cannot."""
    plans, refused = [], []
    for plan in PLANS:
        model = bundle["models"].get(plan.precision)
        if model is None or model["typing"] != plan.typing:
            continue
        if not plan.since <= version < plan.before:
            missing = plan.needs if version < plan.since else "weak typing"
            refused.append("{}: TensorRT {} has no {}".format(plan.variant, dotted(version), missing))
        elif model["opset"] > parser_opset(version):
            refused.append(
                "{}: {} has ONNX operator set {}, TensorRT {} reads up to {}".format(
                    plan.variant, model["file"], model["opset"], dotted(version), parser_opset(version)
                )
            )
        else:
            plans.append(plan)
    return plans, refused


def shape_flags(bundle: Bundle, names: Tuple[str, ...], batches: Tuple[int, ...]) -> List[str]:
    """``--minShapes=x:1x3x32x32`` and so on; none where the files have fixed shapes."""
    if not bundle["dynamic"]:
        return []
    flags = []
    for name, batch in zip(names, batches):
        shapes = ["{}:{}".format(i["name"], "x".join(map(str, [batch, *i["shape"][1:]]))) for i in bundle["inputs"]]
        flags.append("--{}={}".format(name, ",".join(shapes)))
    return flags


def build_argv(trtexec: str, version: Version, plan: Plan, bundle: Bundle, workspace: Optional[int]) -> List[str]:
    """Builds ``build/VARIANT.engine``."""
    argv = [trtexec, "--onnx={}".format(bundle["models"][plan.precision]["file"])]
    argv.append("--saveEngine={}".format(engine_path(plan)))
    argv += [flag for flag in plan.flags if has(flag, version)]
    if bundle["sparsity"] and has("--sparsity=enable", version):
        argv.append("--sparsity=enable")  # looks for 2:4 zeros; weights without stay dense
    argv += shape_flags(bundle, ("minShapes", "optShapes", "maxShapes"), tuple(bundle["batch"]))
    if workspace is not None:
        by_pool = has("--memPoolSize", version)
        argv.append("--memPoolSize=workspace:{}".format(workspace) if by_pool else "--workspace={}".format(workspace))
    argv += ["--timingCacheFile=build/timing.cache", "--profilingVerbosity=detailed"]
    argv.append("--skipInference" if has("--skipInference", version) else "--buildOnly")
    return argv


def golden_argv(trtexec: str, plan: Plan, bundle: Bundle, number: int) -> List[str]:
    """Runs one golden input once and writes the outputs."""
    files = bundle["golden"][number]["inputs"]
    exported = "build/{}.output.json".format(plan.variant)
    return answer_argv(trtexec, engine_path(plan), bundle, bundle["batch"][1], files, exported)


def answer_argv(
    trtexec: str, engine: str, bundle: Bundle, batch: int, files: Dict[str, str], exported: str
) -> List[str]:
    """Runs an engine once on inputs in raw files, of one batch, and writes the outputs as JSON."""
    loads = ",".join("{}:{}".format(name, files[name]) for name in sorted(files))
    argv = [trtexec, "--loadEngine={}".format(engine), "--loadInputs={}".format(loads)]
    argv += shape_flags(bundle, ("shapes",), (batch,))
    return [*argv, "--exportOutput={}".format(exported), "--iterations=1", "--duration=0", "--warmUp=0"]


def timing_argv(trtexec: str, plan: Plan, bundle: Bundle, runs: int) -> List[str]:
    """Times the engine without copies between host and device, and describes its layers."""
    argv = [trtexec, "--loadEngine={}".format(engine_path(plan))]
    argv += shape_flags(bundle, ("shapes",), (bundle["batch"][1],))
    argv += ["--warmUp={}".format(WARMUP_MS), "--duration=3", "--iterations={}".format(runs)]
    argv += ["--useCudaGraph", "--useSpinWait", "--noDataTransfers"]
    argv += ["--exportTimes=build/{}.times.json".format(plan.variant)]
    return [*argv, "--profilingVerbosity=detailed", "--exportLayerInfo=build/{}.layers.json".format(plan.variant)]


def engine_path(plan: Plan) -> str:
    """Where a plan's engine is built, relative to the bundle."""
    return "build/{}.engine".format(plan.variant)


def dotted(version: Version) -> str:
    """``8.5.2``."""
    return ".".join(map(str, version))


# Running


def run(argv: List[str], folder: str, log: str) -> str:
    """Runs trtexec with its output in a log; returns what went wrong, or nothing."""
    with open(os.path.join(folder, log), "w") as file:
        file.write(" ".join(argv) + "\n")
        file.flush()
        code = subprocess.call(argv, cwd=folder, stdout=file, stderr=subprocess.STDOUT)
    if code == 0:
        return ""
    if code in (-9, 137):
        return "killed, probably out of memory: try --workspace-mb 512 (log: {})".format(log)
    with open(os.path.join(folder, log), errors="replace") as file:
        errors = [line.strip() for line in file if "[E]" in line]
    return "{} (log: {})".format(errors[0][:160] if errors else "trtexec ended with code {}".format(code), log)


def read_times(path: str) -> List[float]:
    """GPU milliseconds of each run after the warm-up, sorted."""
    with open(path) as file:
        trace = json.load(file)
    times = sorted(t["computeMs"] for t in trace if t.get("startComputeMs", WARMUP_MS) >= WARMUP_MS)
    if not times:
        raise ValueError("no timed runs in {}".format(path))
    return times


def read_array(path: str, dtype: str) -> List[float]:
    """Numbers of a raw little-endian file."""
    codes = {"float32": "f", "float64": "d", "int64": "q", "int32": "i", "int8": "b", "uint8": "B", "bool": "B"}
    numbers = array.array(codes[dtype])
    with open(path, "rb") as file:
        numbers.frombytes(file.read())
    if sys.byteorder == "big":
        numbers.byteswap()
    return [float(n) for n in numbers]


def decibels(power: float, noise: float) -> float:
    """Signal to noise from sums of squares, between -200 and 200; what is not a number is noise alone."""
    if not noise < float("inf"):
        return -EQUAL_DB
    if noise == 0.0:
        return EQUAL_DB
    return max(-EQUAL_DB, min(EQUAL_DB, 10.0 * math.log10(max(power, 1e-300) / noise)))


class Answers:
    """What an engine answered to the golden inputs so far, beside the float model's answers."""

    def __init__(self, bundle: Bundle) -> None:
        """Nothing answered yet."""
        self.outputs = bundle["outputs"]
        self.power = {spec["name"]: 0.0 for spec in self.outputs}
        self.noise = dict(self.power)
        self.values = dict.fromkeys(self.power, 0)
        self.rows = []  # type: List[Tuple[List[float], List[float]]]  # class scores of each sample: golden, found

    def add(self, golden: Dict[str, List[float]], found: Dict[str, List[float]]) -> None:
        """One more run.

        Raises:
            ValueError: an output is missing or has another size.
        """
        for position, spec in enumerate(self.outputs):
            name, shape = spec["name"], spec["shape"]
            ours, theirs = golden[name], found.get(name, [])
            if len(ours) != len(theirs):
                raise ValueError("output {} has {} values instead of {}".format(name, len(theirs), len(ours)))
            self.power[name] += sum(g * g for g in ours)
            self.noise[name] += sum((f - g) * (f - g) for f, g in zip(theirs, ours))
            self.values[name] += len(ours)
            if position == 0 and len(shape) == 2 and isinstance(shape[1], int) and shape[1] > 1:
                starts = range(0, len(ours), shape[1])
                self.rows += [(ours[i : i + shape[1]], theirs[i : i + shape[1]]) for i in starts]

    def snr_db(self) -> Dict[str, float]:
        """Signal to noise of each output over all runs."""
        return {name: decibels(self.power[name], self.noise[name]) for name in self.power}

    def same(self) -> str:
        """On how many samples the best class is the float model's; empty where there are no classes."""
        same = sum(best(ours) == best(theirs) for ours, theirs in self.rows)
        return "{}/{}".format(same, len(self.rows)) if self.rows else ""

    def trouble(self, least_db: Dict[str, float]) -> str:
        """What is wrong, given the signal to noise that each output must reach; or nothing."""
        for name, found in sorted(self.snr_db().items()):
            if found < least_db[name]:
                return "output {} has {:.1f} dB of signal to noise, {:.1f} at least".format(name, found, least_db[name])
        if not self.rows:
            return ""
        # noise of the largest power allowed turns a lead of four standard deviations of a difference once in 10,000
        name = self.outputs[0]["name"]
        noise = self.power[name] / self.values[name] / 10.0 ** (least_db[name] / 10.0)
        turned = sum(best(g) != best(f) and lead(g) > 4.0 * math.sqrt(2.0 * noise) for g, f in self.rows)
        return "{} of {} samples lose a class that leads clearly".format(turned, len(self.rows)) if turned else ""


def best(scores: List[float]) -> int:
    """The class with the highest score."""
    return max(range(len(scores)), key=scores.__getitem__)


def lead(scores: List[float]) -> float:
    """By how much the highest score is above the next."""
    first, second = sorted(scores)[:-3:-1]
    return first - second


def answer(plan: Plan, trtexec: str, folder: str, bundle: Bundle, number: int, answers: Answers) -> str:
    """One golden run; returns what went wrong, or nothing."""
    log = "build/{}.golden{}.log".format(plan.variant, number)
    trouble = run(golden_argv(trtexec, plan, bundle, number), folder, log)
    if trouble:
        return trouble
    with open(os.path.join(folder, "build/{}.output.json".format(plan.variant))) as file:
        found = {entry["name"]: [float(v) for v in entry["values"]] for entry in json.load(file)}
    paths = bundle["golden"][number]["outputs"]
    golden = {s["name"]: read_array(os.path.join(folder, paths[s["name"]]), s["dtype"]) for s in bundle["outputs"]}
    answers.add(golden, found)
    return ""


def attempt(plan: Plan, trtexec: str, version: Version, folder: str, bundle: Bundle, args: Any) -> Result:
    """Builds, checks and times one plan."""
    name, models = plan.variant, bundle["models"]
    allowed = [models[p]["least_db"] for p in (plan.precision, plan.like) if p in models]
    least_db = {output: min(each[output] for each in allowed) for output in allowed[0]}
    argv = build_argv(trtexec, version, plan, bundle, args.workspace_mb)
    trouble = run(argv, folder, "build/{}.build.log".format(name))
    if trouble:
        return Result(name, trouble=trouble)
    megabytes = os.path.getsize(os.path.join(folder, engine_path(plan))) / 1e6
    answers = Answers(bundle)
    try:
        for number in range(len(bundle["golden"])):
            trouble = trouble or answer(plan, trtexec, folder, bundle, number, answers)
        if trouble:
            return Result(name, megabytes=megabytes, trouble=trouble)
        snr_db, same, wrong = min(answers.snr_db().values()), answers.same(), answers.trouble(least_db)
        trouble = run(timing_argv(trtexec, plan, bundle, args.runs), folder, "build/{}.time.log".format(name))
        if trouble:
            return Result(name, None, None, snr_db, same, megabytes, trouble)
        times = read_times(os.path.join(folder, "build/{}.times.json".format(name)))
    except (OSError, ValueError, KeyError) as problem:
        return Result(name, megabytes=megabytes, trouble="trtexec's output: {}".format(problem))
    median, p99 = times[len(times) // 2], times[min(len(times) - 1, int(len(times) * 0.99))]
    return Result(name, median, p99, snr_db, same, megabytes, wrong)


def table(results: List[Result], kept: Optional[Result]) -> str:
    """Variant, median, p99, signal to noise, samples with the same best class and size, one line each."""
    line = "{:<10} {:>10} {:>10} {:>7} {:>6} {:>9}  {}"
    lines = [line.format("variant", "median ms", "p99 ms", "SNR dB", "same", "MB", "")]
    for r in results:
        numbers = [r.median_ms, r.p99_ms, r.snr_db, r.megabytes]
        cells = ["-" if n is None else "{:.{}f}".format(n, d) for n, d in zip(numbers, (3, 3, 1, 2))]
        if r.snr_db == EQUAL_DB:
            cells[2] = "equal"
        cells.insert(3, r.same or "-")
        lines.append(line.format(r.variant, *cells, "kept" if r is kept else r.trouble))
    return "\n".join(text.rstrip() for text in lines)


def keep(kept: Result, results: List[Result], folder: str, about: Dict[str, Any]) -> None:
    """Puts the engine in place, then engine.json, so that the one never describes another."""
    target = os.path.join(folder, "engine.json")
    if os.path.exists(target):
        os.remove(target)
    os.replace(os.path.join(folder, "build", kept.variant + ".engine"), os.path.join(folder, "model.engine"))
    about = dict(about, variant=kept.variant, results=[dict(r._asdict()) for r in results])
    with open(target + ".part", "w") as file:
        json.dump(about, file, indent=1, sort_keys=True)
        file.write("\n")
    os.replace(target + ".part", target)


def main(arguments: Optional[List[str]] = None) -> int:
    """The whole way, from the checksums to model.engine."""
    parser = argparse.ArgumentParser(description="Build the TensorRT engine of this bundle on this device.")
    parser.add_argument("--trtexec", help="path of trtexec (default: PATH, then /usr/src/tensorrt/bin)")
    parser.add_argument("--only", choices=[p.variant for p in PLANS], help="build one variant")
    parser.add_argument(
        "--workspace-mb", type=int, help="memory for the builder (default: half of what is free on Jetson)"
    )
    parser.add_argument("--runs", type=int, default=200, help="timed runs at least (default: 200)")
    args = parser.parse_args(arguments)

    folder = os.path.dirname(os.path.abspath(__file__))
    bundle = read_bundle(folder)
    trtexec = find_trtexec(args.trtexec)
    banner = subprocess.run([trtexec, "--help"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout
    version = tensorrt_version(banner.decode("utf-8", "replace"))
    release = jetson_release()
    device = device_facts(release)
    print("{}: {}, TensorRT {}".format(bundle["target"], device.get("model", device["machine"]), dotted(version)))
    oldest, newest = (tuple(map(int, v.split("."))) for v in bundle["tensorrt"])
    if not oldest <= version[:2] <= newest:
        print("note: this bundle was made for TensorRT {} to {}".format(*bundle["tensorrt"]))
    plans, refused = legal_plans(bundle, version)
    for sentence in refused:
        print("skipped {}".format(sentence))
    plans = [p for p in plans if args.only in (None, p.variant)]
    if not plans:
        fail("this TensorRT can build nothing of this bundle", 3)
    if args.workspace_mb is None:
        args.workspace_mb = default_workspace(release, version)

    os.makedirs(os.path.join(folder, "build"), exist_ok=True)
    results = []
    for plan in plans:
        print("building {} ...".format(plan.variant), flush=True)
        results.append(attempt(plan, trtexec, version, folder, bundle, args))
    good = [r for r in results if r.good]
    kept = min(good, key=lambda r: r.median_ms or 0.0) if good else None
    print(table(results, kept))
    if kept is None:
        fail("no variant was built that answers as it should; model.engine was not written. Logs: build/", 3)
    plan = next(p for p in plans if p.variant == kept.variant)
    argv = build_argv(trtexec, version, plan, bundle, args.workspace_mb)
    about = {
        "target": bundle["target"],
        "device": device,
        "tensorrt": dotted(version),
        "argv": argv,
        "batch": bundle["batch"],
    }
    keep(kept, results, folder, about)
    print("kept {} as model.engine".format(kept.variant))
    return 0


if __name__ == "__main__":
    sys.exit(main())
