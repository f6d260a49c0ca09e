"""The c99 exporter's folder: builds without a warning, runs clean, fits, refuses what has no integer form."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tflite_graphs import Node, graph, quantized, reference, steps

from deploykit import targets
from deploykit.core.artifact import Port
from deploykit.core.data import DataSet, Preprocess
from deploykit.core.errors import DeploykitError
from deploykit.core.target import Target
from deploykit.exporters import to_c99
from deploykit.exporters.c99 import program
from deploykit.exporters.c99.compiled import Compiled
from deploykit.exporters.c99.execute import execute
from deploykit.exporters.c99.golden import golden
from deploykit.exporters.c99.lower import lower
from deploykit.exporters.c99.memory import plan
from deploykit.exporters.c99.names import identifier
from deploykit.exporters.c99.program import Program, Quant, Tensor, reads
from deploykit.exporters.c99.spell import port_names
from deploykit.hub.graph import Hub
from deploykit.hub.pixels import take_pixels
from deploykit.hub.quantize import quantize
from deploykit.pipeline import calibrate

CC = next((cc for cc in ("cc", "gcc", "clang") if shutil.which(cc)), "")
if not CC:
    pytest.skip("no C compiler: what the c99 exporter writes is not run here", allow_module_level=True)

MCU, FPGA = targets.load("cortex-m4"), targets.load("fpga-int8")
STRICT = ["-std=c99", "-Wall", "-Wextra", "-Wconversion", "-pedantic", "-Werror"]
SOURCES = ["selftest.c", "model.c", "dk_kernels.c"]


def normal(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def whole_network() -> tuple[list[Node], dict[str, tuple[int, ...]], dict[str, NDArray[Any]]]:
    """Every kernel once: two inputs, two outputs."""
    nodes: list[Node] = [
        ("Conv", ["x", "w"], ["a"], {"pads": [1, 1, 1, 1]}),
        ("Relu", ["a"], ["b"], {}),
        ("Conv", ["b", "d"], ["c"], {"group": 4, "pads": [0, 0, 1, 1], "kernel_shape": [2, 2]}),
        ("Conv", ["c", "g"], ["e"], {"group": 2}),
        ("Add", ["e", "b"], ["f"], {}),
        ("MaxPool", ["f"], ["h"], {"kernel_shape": [2, 2], "strides": [2, 2]}),
        ("AveragePool", ["f"], ["i"], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
        ("Sub", ["h", "i"], ["j"], {}),
        ("ConvTranspose", ["j", "t"], ["k"], {"strides": [2, 2]}),
        ("Resize", ["j", "", "rs"], ["l"], {"mode": "nearest", "coordinate_transformation_mode": "asymmetric",
                                            "nearest_mode": "floor"}),
        ("Concat", ["k", "l"], ["m"], {"axis": 1}),
        ("HardSwish", ["m"], ["n"], {}),
        ("GlobalAveragePool", ["n"], ["o"], {}),
        ("Sigmoid", ["o"], ["p"], {}),
        ("Mul", ["n", "p"], ["q"], {}),
        ("Pad", ["q", "pads"], ["r"], {}),
        ("Slice", ["r", "s0", "s1", "s2", "s3"], ["maps"], {}),
        ("Transpose", ["maps"], ["u"], {"perm": [0, 3, 1, 2]}),
        ("Flatten", ["u"], ["v"], {}),
        ("Gemm", ["v", "fc", "fb"], ["logits"], {"transB": 1}),
        ("Add", ["logits", "z"], ["both"], {}),
        ("Softmax", ["both"], ["y"], {"axis": 1}),
    ]  # fmt: skip
    constants: dict[str, NDArray[Any]] = {
        "w": normal(1, 4, 3, 3, 3), "d": normal(2, 4, 1, 2, 2), "g": normal(3, 4, 2, 1, 1), "t": normal(4, 4, 3, 2, 2),
        "rs": np.array([1, 1, 2, 2], np.float32), "pads": np.array([0, 0, 1, 1, 0, 0, 0, 1], np.int64),
        "s0": np.array([0, 1], np.int64), "s1": np.array([2**40, 9], np.int64), "s2": np.array([2, 3], np.int64),
        "s3": np.array([2, 1], np.int64), "fc": normal(5, 6, 280) / 8, "fb": normal(6, 6),
    }  # fmt: skip
    return nodes, {"x": (3, 8, 8), "z": (6,)}, constants


def whole_hub(target: Target, count: int = 4) -> tuple[Hub, dict[str, NDArray[Any]]]:
    nodes, inputs, constants = whole_network()
    fed = {name: normal(7 + i, count, *shape) for i, (name, shape) in enumerate(inputs.items())}
    made = graph(nodes, inputs, constants, outputs=["y", "maps"])
    return replace(quantized(made, fed, target.quant), samples=fed), fed


def exported(hub: Hub, target: Target, folder: Path) -> Any:
    folder.mkdir(exist_ok=True)
    (file,) = to_c99.export({"int8": hub}, target, folder)
    return file


def build(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [CC, *STRICT, *flags, "-o", str(folder / "selftest"), *(str(folder / s) for s in SOURCES)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module", params=["cortex-m4", "fpga-int8"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = targets.load(request.param)
    made: Path = tmp_path_factory.mktemp("c99")
    exported(whole_hub(target)[0], target, made)
    return made


# ------------------------------------------------------------------ the C itself


def test_it_compiles_without_a_warning_and_reproduces_the_golden_vectors(folder: Path) -> None:
    built = build(folder, "-O2")
    assert (built.returncode, built.stderr) == (0, "")
    ran = subprocess.run([str(folder / "selftest")], capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout.startswith("pass: 0 of "), ran.stdout


def test_the_sanitizers_find_nothing(folder: Path) -> None:
    built = build(folder, "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    if built.returncode != 0:
        pytest.skip(f"this compiler has no sanitizers: {built.stderr.splitlines()[0]}")
    ran = subprocess.run([str(folder / "selftest")], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_no_library_function_is_called_and_only_one_function_is_left_to_the_kernels(folder: Path) -> None:
    if not shutil.which("nm"):
        pytest.skip("no nm: undefined symbols are not listed here")
    for source in ("model.c", "dk_kernels.c"):
        compiled = folder / f"{source}.o"
        command = [CC, "-std=c99", "-O3", "-ffreestanding", "-c", "-o", str(compiled), str(folder / source)]
        subprocess.run(command, check=True)
        listed = subprocess.run(["nm", "-u", str(compiled)], capture_output=True, text=True, check=True).stdout
        assert [name for name in listed.split() if name != "U" and not name.startswith("dk_")] == []
        text = (folder / source).read_text()
        assert not re.search(r"\b(float|double)\b", text)


def test_a_wrong_byte_fails_the_self_test(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    lines = (broken / "model.c").read_text().replace(".y_zero = ", ".y_zero = 1 + ", 1)
    (broken / "model.c").write_text(lines)
    assert build(broken).returncode == 0
    ran = subprocess.run([str(broken / "selftest")], capture_output=True, text=True)
    assert ran.returncode == 1 and "FAIL" in ran.stdout


def test_the_makefile_runs_the_self_test(folder: Path, tmp_path: Path) -> None:
    if not shutil.which("make"):
        pytest.skip("no make: the Makefile is not run here")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    ran = subprocess.run(["make", "test"], cwd=copy, capture_output=True, text=True)
    assert ran.returncode == 0 and "pass: 0 of" in ran.stdout, ran.stderr


def test_make_compiles_again_for_another_compiler_or_other_flags(folder: Path, tmp_path: Path) -> None:
    if not shutil.which("make"):
        pytest.skip("no make: the Makefile is not run here")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)

    def made(*given: str) -> str:
        return subprocess.run(["make", *given], cwd=copy, capture_output=True, text=True, check=True).stdout

    made("test")
    assert "-O1 -DBOARD" in made("CFLAGS=-O1 -DBOARD", "libmodel.a")
    assert "-O1" not in made("CFLAGS=-O1 -DBOARD", "libmodel.a")
    assert "pass: 0 of" in made("test")


def snippet(folder: Path) -> str:
    """The C of FIRMWARE.md, its statements in a function."""
    code = (folder / "FIRMWARE.md").read_text().partition("```c\n")[2].partition("```")[0]
    head, _, body = code.partition("int8_t *input")
    return f"{head}int32_t answer(void);\nint32_t answer(void) {{\nint8_t *input{body}(void)input;\nreturn best;\n}}\n"


def test_the_snippet_of_the_guide_compiles_without_a_warning(tmp_path: Path) -> None:
    exported(whole_hub(MCU)[0], MCU, tmp_path)
    (tmp_path / "main.c").write_text(snippet(tmp_path))
    built = subprocess.run([CC, *STRICT, "-c", "-o", tmp_path / "main.o", tmp_path / "main.c"], capture_output=True)
    assert (built.returncode, built.stderr) == (0, b"")
    assert "-ffreestanding" in (tmp_path / "FIRMWARE.md").read_text()


def test_every_target_gets_the_guide_and_the_compiler_of_its_own_device(tmp_path: Path) -> None:
    guides = {}
    for name in ("cortex-m4", "cortex-m7", "fpga-int8"):
        target = targets.load(name)
        file = exported(whole_hub(target)[0], target, tmp_path / name)
        guides[name] = "\n".join(
            [(tmp_path / name / part).read_text() for part in ("FIRMWARE.md", "Makefile")] + list(file.notes)
        )
        assert "@" not in re.sub(r"\$@|\t@echo", "", guides[name])
    assert "AR=arm-none-eabi-ar" in guides["cortex-m4"] and "-mcpu=cortex-m4" in guides["cortex-m4"]
    assert "-mcpu=cortex-m7" in guides["cortex-m7"] and "-mcpu=cortex-m4" not in guides["cortex-m7"]
    assert "synthesized" in guides["fpga-int8"]
    assert not re.search("firmware|Cortex|stack|flash", guides["fpga-int8"], re.IGNORECASE)


def test_cmake_builds_it_and_ctest_runs_the_self_test(folder: Path, tmp_path: Path) -> None:
    if not shutil.which("cmake") or not (shutil.which("make") or shutil.which("ninja")):
        pytest.skip("no cmake: the CMakeLists.txt is not run here")
    build_folder = tmp_path / "build"
    for command in (
        ["cmake", "-S", str(folder), "-B", str(build_folder)],
        ["cmake", "--build", str(build_folder)],
        ["ctest", "--test-dir", str(build_folder)],
    ):
        ran = subprocess.run(command, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "100% tests passed" in ran.stdout


def test_the_float_helpers_of_the_header_round_as_the_exporter_does(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "main.c").write_text(
        '#define MODEL_FLOAT_HELPERS\n#include "model.h"\n#include <stdio.h>\nint main(void) {\n'
        "  for (int i = -700; i <= 700; i++) printf(\"%d\\n\", model_quantize((float)i * 0.25f, 0.5f, 3));\n"
        "  return model_dequantize(5, 0.5f, 3) == 1.0f ? 0 : 1;\n}\n"
    )  # fmt: skip
    program = tmp_path / "main"
    subprocess.run([CC, *STRICT, f"-I{folder}", "-o", program, tmp_path / "main.c"], check=True)
    ran = subprocess.run([program], capture_output=True, text=True)
    expected = np.clip(np.rint(np.arange(-700, 701) / 2) + 3, -128, 127).astype(int)
    assert ran.returncode == 0 and [int(line) for line in ran.stdout.split()] == expected.tolist()


def test_equal_inputs_give_equal_bytes(folder: Path, tmp_path: Path) -> None:
    target = FPGA if "floor" in (folder / "model.json").read_text() else MCU
    exported(whole_hub(target)[0], target, tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name


# ------------------------------------------------------------------ names, inputs, outputs


def test_names_that_are_no_identifiers_become_some_and_stay_apart() -> None:
    taken: set[str | None] = set()
    names = ["int", "a/b", "a.b", "7up", "", "Größe", "_x", "model_run", "x" * 100, "x" * 99]
    made = [identifier(name, taken) for name in names]
    assert made[:7] == ["n_int", "a_b", "a_b_2", "n_7up", "n", "Gr_e", "x"]
    assert len(set(made)) == len(made) and all(name.isidentifier() and len(name) < 50 for name in made)


def test_a_macro_is_in_capitals_whatever_the_tensor_is_called() -> None:
    ports = [Tensor(name, (1,), Quant(1.0, 0)) for name in ("2nd é*/ x", "n_2nd x", "7")]
    names = port_names([program.Port(t.name, t, (1,), (0,), True) for t in ports])
    assert names == [name.upper() for name in names] and len(set(names)) == 3


def test_a_network_with_hostile_names_compiles(tmp_path: Path) -> None:
    nodes: list[Node] = [
        ("Conv", ["x*/", "w"], ["int"], {}),
        ("Relu", ["int"], ["7/return"], {}),
        ("Conv", ["7/return", "v"], ["7.return"], {}),
        ("Add", ["7.return", 'x"\\??/'], ["while"], {}),
    ]
    inputs = {"x*/": (2, 3, 3), 'x"\\??/': (2, 3, 3)}
    fed = {name: normal(i, 3, *shape) for i, (name, shape) in enumerate(inputs.items())}
    made = graph(nodes, inputs, {"w": normal(3, 2, 2, 1, 1), "v": normal(4, 2, 2, 1, 1)}, outputs=["while"])
    hub = replace(quantized(made, fed), samples=fed)
    file = exported(hub, MCU, tmp_path)
    built = build(tmp_path)
    assert (built.returncode, built.stderr) == (0, "")
    found = to_c99.load(tmp_path / file.path)(fed)
    assert np.abs(found["while"] - reference(hub.bytes, fed)["while"]).max() <= 2.01 * steps(hub, "while")


def test_two_inputs_and_two_outputs_come_and_go_by_name(folder: Path) -> None:
    target = FPGA if "floor" in (folder / "model.json").read_text() else MCU
    hub, fed = whole_hub(target)
    expected = reference(hub.bytes, fed)
    found = to_c99.load(folder / "model.c")(fed)
    assert set(found) == {"y", "maps"}
    for name, array in found.items():
        assert array.shape == expected[name].shape
        assert np.square(array - expected[name]).sum() < 0.01 * np.square(expected[name]).sum(), name


def test_an_output_that_is_also_an_input_or_comes_twice_is_copied(tmp_path: Path) -> None:
    nodes: list[Node] = [("Conv", ["x", "w"], ["c"], {}), ("Identity", ["c"], ["d"], {})]
    fed = {"x": normal(0, 3, 2, 4, 4)}
    hub = quantized(graph(nodes, {"x": (2, 4, 4)}, {"w": normal(1, 2, 2, 1, 1)}, outputs=["c", "d"]), fed)
    found = to_c99.load(tmp_path / exported(hub, MCU, tmp_path).path)(fed)
    np.testing.assert_array_equal(found["c"], found["d"])


def test_pixels_go_in_as_they_are(tmp_path: Path) -> None:
    """uint8 images [n, h, w, c]; the first operation moves them to int8, the rest is the hub's."""
    nodes: list[Node] = [("Conv", ["x", "w", "b"], ["c"], {"pads": [1, 1, 1, 1]}), ("Relu", ["c"], ["y"], {})]
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3)).astype(np.uint8)
    real = (pixels.transpose(0, 3, 1, 2) / np.float32(127.5) - 1).astype(np.float32)
    hub = quantized(graph(nodes, {"x": (3, 6, 6)}, {"w": normal(1, 4, 3, 3, 3), "b": normal(2, 4)}), {"x": real})
    prepared = Preprocess(scale=1 / 127.5, mean=(1.0, 1.0, 1.0), std=(1.0, 1.0, 1.0))
    taken = take_pixels(hub, prepared, ["x"], fold=True)
    folded, notes = taken.hub, taken.notes
    assert not notes
    file = exported(replace(folded, samples={"x": pixels}), MCU, tmp_path)
    assert '"dtype": "uint8"' in (tmp_path / "model.json").read_text()
    assert file.inputs == (Port("x", (1, 6, 6, 3), "uint8"),), "a rule with a zero point would move every pixel"
    header = (tmp_path / "model.h").read_text()
    assert "(int8_t)pixel" in header and "MODEL_INPUT_X_ZERO" not in header and "MODEL_OUTPUT_Y_ZERO" in header
    found = to_c99.load(tmp_path / file.path)({"x": pixels})["y"]
    assert np.abs(found - reference(folded.bytes, {"x": pixels})["y"]).max() <= 1.01 * steps(folded)


def test_a_float_front_of_pixels_becomes_one_table_per_channel(tmp_path: Path) -> None:
    """Power-of-two scales cannot hold a pixel and its zero point: Cast, Mul and Add per channel are computed now."""
    nodes: list[Node] = [("Conv", ["x", "w", "b"], ["c"], {"pads": [1, 1, 1, 1]}), ("Relu", ["c"], ["y"], {})]
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3)).astype(np.uint8)
    mean, std = np.array([0.4, 0.5, 0.6], np.float32), np.array([0.2, 0.3, 0.25], np.float32)
    real = ((pixels / np.float32(255) - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)
    made = graph(nodes, {"x": (3, 6, 6)}, {"w": normal(1, 4, 3, 3, 3), "b": normal(2, 4)})
    hub = quantized(made, {"x": real}, FPGA.quant)
    prepared = Preprocess(scale=1 / 255, mean=tuple(mean.tolist()), std=tuple(std.tolist()))
    fronted = take_pixels(hub, prepared, ["x"], fold=False).hub
    file = exported(replace(fronted, samples={"x": pixels}), FPGA, tmp_path)
    assert "_table, 3, 1, 108" in (tmp_path / "model.c").read_text()
    found = to_c99.load(tmp_path / file.path)({"x": pixels})["y"]
    assert np.abs(found - reference(fronted.bytes, {"x": pixels})["y"]).max() <= 1.01 * steps(fronted)


# ------------------------------------------------------------------ memory and budgets


def overlapping(program: Program) -> list[tuple[str, str]]:
    """Tensors that share bytes while both are needed, found by living through the program once more."""
    made = plan(program)
    last = {tensor: i for i, op in enumerate(program.operations) for tensor in reads(op)}
    last |= {port.tensor: len(program.operations) for port in program.outputs}
    alive = [port.tensor for port in program.inputs]
    clashes = []
    for i, op in enumerate(program.operations):
        alive = [t for t in alive if last.get(t, -1) >= i and t.data is None]
        start, stop = made.offsets[op.y], made.offsets[op.y] + op.y.size
        assert stop <= made.bytes
        for t in alive:
            at = made.offsets[t], made.offsets[t] + t.size
            in_place = last[t] == i and at == (start, stop)
            if at[0] < stop and start < at[1] and not in_place:
                clashes.append((t.name, op.y.name))
        alive.append(op.y)
    return clashes


def test_no_two_tensors_that_are_needed_at_once_share_bytes() -> None:
    hub, _ = whole_hub(MCU)
    assert hub.quantized is not None
    program = lower(hub.quantized, "tflm_double").program
    assert overlapping(program) == []
    made = plan(program)
    assert made.lower_bound <= made.bytes <= 1.25 * made.lower_bound


def residual_hub() -> Hub:
    nodes: list[Node] = [
        ("Conv", ["x", "w"], ["a"], {"pads": [1, 1, 1, 1]}),
        ("Conv", ["a", "v"], ["b"], {"pads": [1, 1, 1, 1]}),
        ("Add", ["a", "b"], ["s"], {}),
        ("Relu", ["s"], ["r"], {}),
        ("ReduceMean", ["r", "axes"], ["m"], {"keepdims": 0}),
        ("Gemm", ["m", "f"], ["y"], {}),
    ]
    constants = {"w": normal(1, 8, 3, 3, 3), "v": normal(2, 8, 8, 3, 3), "f": normal(3, 8, 5)}
    axes = np.array([2, 3], np.int64)
    return quantized(graph(nodes, {"x": (3, 8, 8)}, {**constants, "axes": axes}), {"x": normal(0, 4, 3, 8, 8)})


def test_a_residual_block_takes_two_images_because_the_sum_takes_the_place_of_a_summand() -> None:
    hub = residual_hub()
    assert hub.quantized is not None
    assert plan(lower(hub.quantized, "tflm_double").program).bytes == 2 * 8 * 8 * 8


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"flash_bytes": 1500}, ["flash", "of 1.50 kB", "too much", "Layer b_node needs most", "fewer channels"]),
        (
            {"ram_bytes": 1000},
            ["RAM: 1.28 kB of 1.00 kB, 280 B too much", "Layer b_node needs most", "512 B in and 512 B"],
        ),
    ],
)
def test_a_budget_that_is_exceeded_is_refused_naming_the_layer(
    budget: Mapping[str, int], said: list[str], tmp_path: Path
) -> None:
    small = replace(MCU, options={"rounding": "tflm_double", **budget})
    with pytest.raises(DeploykitError) as refused:
        to_c99.export({"int8": residual_hub()}, small, tmp_path)
    assert all(part in str(refused.value) for part in said), str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_layer_bears_the_name_of_the_operator_with_the_weights_not_of_what_is_fused_with_it() -> None:
    nodes: list[Node] = [
        ("Conv", ["x", "w"], ["a"], {}),
        ("Relu", ["a"], ["r"], {}),
        ("Sigmoid", ["r"], ["s"], {}),
        ("Flatten", ["s"], ["f"], {}),
        ("MatMul", ["f", "v"], ["m"], {}),
        ("Add", ["m", "b"], ["n"], {}),
        ("Relu", ["n"], ["y"], {}),
    ]
    constants = {"w": normal(1, 4, 3, 1, 1), "v": normal(2, 4 * 36, 5), "b": normal(3, 5)}
    hub = quantized(graph(nodes, {"x": (3, 6, 6)}, constants), {"x": normal(0, 4, 3, 6, 6)})
    assert hub.quantized is not None
    program = lower(hub.quantized, "tflm_double").program
    assert [op.layer for op in program.operations] == ["a_node", "s_node", "m_node"]


def test_every_layer_is_one_that_the_model_has() -> None:
    nodes, inputs, _ = whole_network()
    hub, _ = whole_hub(MCU)
    assert hub.quantized is not None
    program = lower(hub.quantized, "tflm_double").program
    assert {op.layer for op in program.operations} <= {f"{outputs[0]}_node" for _, _, outputs, _ in nodes} | set(inputs)


# ------------------------------------------------------------------ refusals


def refusal(nodes: list[Node], inputs: Mapping[str, Any], constants: Mapping[str, Any], tmp_path: Path) -> str:
    made = graph(nodes, inputs, constants)
    fed = {name: normal(i, 4, *shape) for i, (name, shape) in enumerate(inputs.items())}
    with pytest.raises(DeploykitError) as refused:
        to_c99.export({"int8": quantized(made, fed)}, MCU, tmp_path)
    return str(refused.value)


def test_every_operator_without_an_integer_form_is_named_at_once(tmp_path: Path) -> None:
    nodes: list[Node] = [
        ("MatMul", ["x", "w"], ["a"], {}),
        ("LayerNormalization", ["a", "s"], ["n"], {"axis": -1}),
        ("MatMul", ["n", "v"], ["b"], {}),
        ("Transpose", ["b"], ["t"], {"perm": [0, 2, 1]}),
        ("MatMul", ["b", "t"], ["y"], {}),
    ]
    constants = {"w": normal(1, 6, 6), "s": np.ones(6, np.float32), "v": normal(2, 6, 6)}
    said = refusal(nodes, {"x": (4, 6)}, constants, tmp_path)
    assert "n_node (LayerNormalization): " in said
    assert "y_node (MatMul)" in said and "two activations" in said
    assert "choose a target that can run floats" in said
    assert said.count("\n") == 3


def test_a_layer_kept_in_float_is_refused_by_name(tmp_path: Path) -> None:
    nodes: list[Node] = [("Conv", ["x", "w"], ["a"], {}), ("Conv", ["a", "w"], ["y"], {})]
    made = graph(nodes, {"x": (2, 3, 3)}, {"w": normal(1, 2, 2, 1, 1)})
    data = DataSet.of({"x": normal(0, 4, 2, 3, 3)})
    hub = quantize(made, calibrate(made, data), MCU.quant, keep_float=["a_node"])
    with pytest.raises(DeploykitError, match=r"a_node \(Conv\): kept in float on request"):
        to_c99.export({"int8": hub}, MCU, tmp_path)


def test_a_result_far_finer_than_its_summands_is_refused_before_it_overflows(tmp_path: Path) -> None:
    """x - x + tiny: two summands up to 100 000 whose sum lies within 0.001."""
    x = normal(0, 4, 6)
    fed = {"x": x * 1e5, "z": -x * np.float32(1e5)}
    hub = quantized(graph([("Add", ["x", "z"], ["y"], {})], {"x": (6,), "z": (6,)}), fed)
    assert hub.quantized is not None and hub.ranges is not None
    tiny = replace(hub.ranges.tensors["y"], low=-1e-3, high=1e-3)
    ranges = replace(hub.ranges, tensors={**hub.ranges.tensors, "y": tiny})
    with pytest.raises(DeploykitError, match="more than 32 bits hold"):
        to_c99.export({"int8": quantize(hub.graph, ranges, MCU.quant)}, MCU, tmp_path)


def test_sums_that_could_leave_32_bits_are_refused(tmp_path: Path) -> None:
    """70,000 weights of 127 times inputs up to 255 reach 2.27e9."""
    made = graph([("Gemm", ["x", "w"], ["y"], {})], {"x": (70_000,)}, {"w": np.ones((70_000, 1), np.float32)})
    hub = quantized(made, {"x": np.abs(normal(0, 2, 70_000))})
    unlimited = replace(MCU, options={"rounding": "tflm_double"})
    with pytest.raises(DeploykitError, match=r"y_node \(Gemm\): its sums can reach 2\.2.e\+09, more than 32 bits hold"):
        to_c99.export({"int8": hub}, unlimited, tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"options": {"rounding": "floor_folded_half"}}, "needs scale"),
        ({"options": {"rounding": "stochastic"}}, "rounding"),
        ({"options": {}}, "rounding"),
        ({"options": {"rounding": "tflm_double", "ram": 5}}, "ram"),
        ({"options": {"rounding": "tflm_double", "ram_bytes": -1}}, "positive"),
        ({"quant": replace(MCU.quant, bias="float")}, "bias"),
    ],
)
def test_a_target_this_exporter_cannot_serve_is_refused(change: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(DeploykitError, match=said):
        to_c99.export({"int8": residual_hub()}, replace(MCU, **change), tmp_path)


def test_only_int8_is_written_and_it_needs_calibration(tmp_path: Path) -> None:
    hub = residual_hub()
    with pytest.raises(DeploykitError, match=r"does not write fp32 .* it writes int8"):
        to_c99.export({"fp32": hub}, MCU, tmp_path)
    with pytest.raises(DeploykitError, match="give --calib"):
        to_c99.export({"int8": Hub(hub.graph, MCU.quant)}, MCU, tmp_path)


# ------------------------------------------------------------------ running it here


def test_the_check_of_the_compiled_c_passes_and_notices_a_changed_constant(tmp_path: Path) -> None:
    hub = residual_hub()
    file = exported(hub, MCU, tmp_path)
    (check,) = to_c99.checks(hub, MCU, tmp_path, file)
    assert check.passed and check.value == 0.0
    source = (tmp_path / "model.c").read_text()
    (tmp_path / "model.c").write_text(source.replace(".x_zero = ", ".x_zero = 3 + ", 1))
    (check,) = to_c99.checks(hub, MCU, tmp_path, file)
    assert check.passed is False and check.value is not None and check.value > 0


def test_without_samples_the_golden_vectors_are_seeded_random_numbers() -> None:
    hub = residual_hub()
    assert hub.quantized is not None
    program = lower(hub.quantized, "tflm_double").program
    first, second = golden(program, {}), golden(program, {})
    np.testing.assert_array_equal(first.inputs["x"], second.inputs["x"])
    assert len(first.inputs["x"]) == 8 and np.ptp(first.inputs["x"].astype(int)) > 200


def test_u8_and_s8_storage_give_the_same_program() -> None:
    """Scales never change; zero points move by 128."""
    hub = residual_hub()
    signed = quantize(hub.graph, hub.ranges, replace(MCU.quant, activation_signed=True))  # type: ignore[arg-type]
    assert hub.quantized is not None and signed.quantized is not None
    one, other = (lower(h.quantized, "tflm_double").program for h in (hub, signed))  # type: ignore[arg-type]
    fed = {"x": np.random.default_rng(0).integers(-128, 128, (4, 192)).astype(np.int8)}
    np.testing.assert_array_equal(execute(one, fed)["y"], execute(other, fed)["y"])


def test_no_compiler_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = exported(residual_hub(), MCU, tmp_path)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(DeploykitError, match="no C compiler here: install gcc"):
        to_c99.runtime()
    with pytest.raises(DeploykitError, match="no C compiler here"):
        to_c99.load(tmp_path / file.path)


def test_a_folder_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    file = exported(residual_hub(), MCU, tmp_path)
    (tmp_path / "model.c").write_text("this is no C")
    with pytest.raises(DeploykitError, match="cannot compile"):
        to_c99.load(tmp_path / file.path)
    (tmp_path / "dk_rescale.h").unlink()
    with pytest.raises(DeploykitError, match=r"not complete.*dk_rescale\.h"):
        to_c99.load(tmp_path / file.path)
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(DeploykitError, match=r"does not hold model\.c and model\.json"):
        to_c99.load(tmp_path / file.path)


def test_times_here_say_nothing_about_the_board() -> None:
    assert to_c99.runtime().untimed.startswith("needs the board")


def test_the_microcontrollers_share_the_hub_of_the_phone() -> None:
    assert MCU.quant == targets.load("cortex-m7").quant == targets.load("mobile-arm").quant


def test_compiled_networks_keep_nothing_between_samples(tmp_path: Path) -> None:
    hub = residual_hub()
    file = exported(hub, MCU, tmp_path)
    network = Compiled(tmp_path / file.path)
    fed = np.random.default_rng(0).integers(-128, 128, (3, 192)).astype(np.int8)
    together = network.run({"x": fed})["y"]
    alone = [network.run({"x": fed[i : i + 1]})["y"] for i in (2, 0, 1)]
    np.testing.assert_array_equal(together, np.concatenate([alone[1], alone[2], alone[0]]))
