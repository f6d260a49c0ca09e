"""Weights that stay coded in flash: the compiled decoder against numpy, damage, and whole networks bit for bit."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tflite_graphs import Node, graph, quantized

from deploykit import targets
from deploykit.coding import huffman
from deploykit.coding.symbols import pieces, symbols
from deploykit.core.errors import DeploykitError
from deploykit.core.figures import file_size
from deploykit.core.target import Target
from deploykit.exporters import to_c99
from deploykit.exporters.c99.budget import footprint
from deploykit.exporters.c99.coded import code, with_coded_weights
from deploykit.exporters.c99.lower import lower
from deploykit.exporters.c99.memory import plan
from deploykit.exporters.c99.options import options
from deploykit.exporters.c99.program import Product, Program, reads
from deploykit.hub.graph import Hub

CC = next((cc for cc in ("cc", "gcc", "clang") if shutil.which(cc)), "")
if not CC:
    pytest.skip("no C compiler: what the c99 exporter writes is not run here", allow_module_level=True)

MCU, FPGA = targets.load("cortex-m4"), targets.load("fpga-int8")
STRICT = ["-std=c99", "-Wall", "-Wextra", "-Wconversion", "-pedantic", "-Werror"]
DEVICE = Path(to_c99.__file__).parent / "c99" / "device"
EDGE = 16
"""Bytes before and behind the weights that must not be touched."""
Decode = Callable[[NDArray[np.uint8], int], tuple[int, NDArray[np.int8]]]


@pytest.fixture(scope="module")
def decode(tmp_path_factory: pytest.TempPathFactory) -> Decode:
    """The compiled decoder: bytes and how many weights; whether it refused, and the weights."""
    folder = tmp_path_factory.mktemp("decoder")
    signature = "int32_t decode(const uint8_t *coded, uint32_t size, int32_t count, int8_t *weights)"
    body = f"{signature};\n{signature} {{ return dk_decode(coded, size, count, weights); }}\n"
    (folder / "decoder.c").write_text(f'#include "dk_decode.h"\n{body}')
    command = [
        CC,
        *STRICT,
        "-O2",
        "-shared",
        "-fPIC",
        f"-I{DEVICE}",
        "-o",
        f"{folder}/decoder.so",
        f"{folder}/decoder.c",
    ]
    subprocess.run(command, check=True)
    function = ctypes.CDLL(str(folder / "decoder.so")).decode
    function.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int32, ctypes.c_void_p]

    def run(coded: NDArray[np.uint8], count: int) -> tuple[int, NDArray[np.int8]]:
        room = np.full(count + 2 * EDGE, 0x55, np.int8)
        refused = function(coded.ctypes.data, coded.size, count, room.ctypes.data + EDGE)
        assert (room[:EDGE] == 0x55).all() and (room[EDGE + count :] == 0x55).all()
        return refused, room[EDGE : EDGE + count]

    return run


def drawn(shape: tuple[int, ...], zeros: float, many: int, seed: int, steep: float = 0.1) -> NDArray[np.int8]:
    """Weights of ``many`` values, the first ones often, with a share of zeros."""
    random = np.random.default_rng(seed)
    book = random.permutation(np.arange(-128, 128).astype(np.int8))[:many]
    share = (1 - steep) ** np.arange(many)
    found = random.choice(book, shape, p=share / share.sum())
    return np.where(random.random(shape) < zeros, np.int8(0), found)


# ------------------------------------------------------------------ one weight


@settings(max_examples=150, deadline=None)
@given(
    shape=st.lists(st.integers(1, 12), min_size=1, max_size=4).map(tuple),
    zeros=st.one_of(st.floats(0.0, 1.0), st.sampled_from([0.0, 0.9, 0.99, 1.0])),
    many=st.integers(1, 256), steep=st.sampled_from([0.0, 0.1, 0.5, 0.9]), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_what_numpy_codes_the_compiled_decoder_gives_back(
    decode: Decode, shape: tuple[int, ...], zeros: float, many: int, steep: float, seed: int
) -> None:
    weights = drawn(shape, zeros, many, seed, steep)
    refused, found = decode(code(weights), weights.size)
    assert not refused
    np.testing.assert_array_equal(found, weights.ravel())


CORNERS = {
    "one weight": np.array([-128], np.int8),
    "one weight, which is zero": np.zeros(1, np.int8),
    "all zeros": np.zeros(5000, np.int8),
    "one value, no zeros": np.full(5000, 7, np.int8),
    "all values, none more often": np.arange(256).astype(np.uint8).view(np.int8).repeat(9),
    "one value behind more zeros than a gap counts": np.eye(1, 70_000, 69_999, np.int8)[0],
    "zeros behind the last value": np.eye(1, 70_000, 3, np.int8)[0],
    "long streams": drawn((40_000,), 0.9, 200, 0),
    "codes of twelve bits": drawn((40_000,), 0.0, 40, 1, 0.7),
}


@pytest.mark.parametrize("weights", CORNERS.values(), ids=CORNERS)
def test_corners_come_back_too(decode: Decode, weights: NDArray[np.int8]) -> None:
    refused, found = decode(code(weights), weights.size)
    assert not refused
    np.testing.assert_array_equal(found, weights)


def test_zeros_take_next_to_nothing_and_pruned_weights_a_fraction() -> None:
    assert code(CORNERS["all zeros"]).size == 6
    assert code(CORNERS["long streams"]).size < 0.22 * 40_000
    assert code(drawn((4000,), 0.0, 256, 0, 0.0)).size > 4000, "what is as good as random does not get smaller"


@pytest.mark.parametrize("zeros", [0.0, 0.8])
def test_a_short_weight_has_the_words_of_a_block_of_the_container(zeros: float) -> None:
    weights = drawn((2000,), zeros, 50, 2)
    found = symbols(weights.view(np.uint8), huffman)
    tables = [huffman.table(np.bincount(stream)) for stream in found.streams]
    words = huffman.encode(found.streams, tables)
    assert bool(found.gap_bits) == (zeros > 0) and code(weights).tobytes().endswith(words)
    streams = huffman.decode(words, tables, [len(stream) for stream in found.streams])
    back = np.concatenate(list(pieces(replace(found, streams=tuple(streams)), 2000)))
    np.testing.assert_array_equal(back.view(np.int8), weights)


# ------------------------------------------------------------------ damage


def damaged(coded: NDArray[np.uint8], random: np.random.Generator) -> NDArray[np.uint8]:
    """Some bytes are others, mostly in front where the tables are; some are missing; or there are more."""
    found = coded.copy()
    front = min(found.size, 60) if random.random() < 0.7 else found.size
    for at in random.integers(0, front, random.integers(1, 4)):
        found[at] = random.choice(np.array([0, 1, 255, random.integers(0, 256)]))
    kind = random.random()
    if kind < 0.25:
        return found[: random.integers(0, found.size + 1)].copy()
    return np.append(found, random.integers(0, 256, 7).astype(np.uint8)) if kind < 0.35 else found


def some_damaged(count: int) -> list[tuple[NDArray[np.uint8], int]]:
    random = np.random.default_rng(5)
    weights = [drawn((n,), zeros, many, n) for n in (1, 30, 3000) for zeros in (0.0, 0.9, 1.0) for many in (1, 9, 250)]
    whole = [(code(own), own.size) for own in weights]
    return [(damaged(*(whole[i % len(whole)][0], random)), whole[i % len(whole)][1]) for i in range(count)]


def test_damaged_bytes_are_refused_or_give_other_weights_but_write_nowhere_else(decode: Decode) -> None:
    refused = [decode(coded, count)[0] for coded, count in some_damaged(3000)]
    assert 1500 < sum(refused) < 3000


@pytest.mark.parametrize("cut", [0, 3, 4, 5, 6, 20, -1, -2])
def test_what_is_cut_off_is_refused(decode: Decode, cut: int) -> None:
    coded = code(drawn((3000,), 0.9, 30, 0))
    assert decode(coded[:cut].copy(), 3000)[0] == 1


def test_more_or_fewer_weights_than_there_is_room_for_are_refused(decode: Decode) -> None:
    coded = code(drawn((3000,), 0.0, 30, 0))
    assert decode(coded, 2999)[0] == 1
    assert decode(np.append(coded, np.zeros(2, np.uint8)), 3000)[0] == 1, "words that nobody asked for"


MAIN = """
#include <stdio.h>
#include <stdlib.h>
#include "dk_decode.h"

int main(void)
{
    uint32_t sizes[2];
    while (fread(sizes, sizeof sizes, 1, stdin) == 1) {
        uint8_t *coded = malloc(sizes[0]); /* as large as they are, so that the sanitizer sees the next byte */
        int8_t *weights = malloc(sizes[1]);
        if (fread(coded, 1, sizes[0], stdin) != sizes[0]) {
            return 1;
        }
        printf("%d", (int)dk_decode(coded, sizes[0], (int32_t)sizes[1], weights));
        free(coded);
        free(weights);
    }
    return 0;
}
"""


def test_the_sanitizers_find_nothing_in_damaged_bytes(tmp_path: Path) -> None:
    (tmp_path / "main.c").write_text(MAIN)
    sanitized = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    command = [CC, *STRICT, "-O1", "-g", *sanitized, f"-I{DEVICE}", "-o", f"{tmp_path}/main", f"{tmp_path}/main.c"]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode != 0:
        pytest.skip(f"this compiler has no sanitizers: {built.stderr.splitlines()[0]}")
    tried = some_damaged(4000)
    fed = b"".join(np.array([own.size, count], np.uint32).tobytes() + own.tobytes() for own, count in tried)
    ran = subprocess.run([tmp_path / "main"], input=fed, capture_output=True)
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert len(ran.stdout) == 4000 and set(ran.stdout) == {ord("0"), ord("1")}


# ------------------------------------------------------------------ whole networks


def pruned(seed: int, *shape: int, keep: float = 0.1) -> NDArray[np.float32]:
    """Normal weights, the smallest of them zero."""
    found = np.random.default_rng(seed).normal(size=shape).astype(np.float32) / np.float32(np.prod(shape[1:]) ** 0.5)
    found[np.abs(found) < np.quantile(np.abs(found), 1 - keep)] = 0
    return found


def pruned_hub(target: Target, keep: float = 0.1) -> Hub:
    """Every kernel that has weights, with weights worth coding."""
    nodes: list[Node] = [
        ("Conv", ["x", "a"], ["c"], {"pads": [1, 1, 1, 1]}),
        ("Relu", ["c"], ["r"], {}),
        ("Conv", ["r", "d"], ["e"], {"group": 32, "pads": [2, 2, 2, 2]}),
        ("Conv", ["e", "g"], ["h"], {"group": 2, "strides": [2, 2]}),
        ("ConvTranspose", ["h", "t"], ["u"], {"strides": [2, 2]}),
        ("MaxPool", ["u"], ["p"], {"kernel_shape": [2, 2], "strides": [2, 2]}),
        ("Flatten", ["p"], ["f"], {}),
        ("Gemm", ["f", "m", "b"], ["y"], {"transB": 1}),
    ]
    constants = {
        "a": pruned(1, 32, 4, 3, 3, keep=keep), "d": pruned(2, 32, 1, 5, 5, keep=keep),
        "g": pruned(3, 48, 16, 3, 3, keep=keep), "t": pruned(4, 48, 16, 2, 2, keep=keep),
        "m": pruned(5, 10, 144, keep=keep), "b": pruned(6, 10, keep=1.0),
    }  # fmt: skip
    fed = {"x": np.random.default_rng(0).normal(size=(8, 4, 8, 8)).astype(np.float32)}
    return replace(quantized(graph(nodes, {"x": (4, 8, 8)}, constants), fed, target.quant), samples=fed)


def asking(target: Target, **more: Any) -> Target:
    return replace(target, options={**target.options, "weights": "coded", **more})


def program(hub: Hub) -> Program:
    assert hub.quantized is not None
    return lower(hub.quantized, "tflm_double").program


@pytest.mark.parametrize("target", [MCU, FPGA], ids=lambda t: t.name)
def test_a_network_with_coded_weights_computes_what_it_computes_with_plain_ones(target: Target, tmp_path: Path) -> None:
    hub, found, files = pruned_hub(target), list[NDArray[Any]](), []
    for own in (target, asking(target)):
        folder = tmp_path / str(len(found))
        folder.mkdir()
        (file,) = to_c99.export({"int8": hub}, own, folder)
        (check,) = to_c99.checks(hub, own, folder, file)
        assert check.passed and check.value == 0.0
        found.append(to_c99.load(folder / file.path)(hub.samples)["y"])
        files.append(file)
    np.testing.assert_array_equal(found[0], found[1])
    assert np.unique(found[0]).size > 20
    plain, coded = (json.loads((tmp_path / name / "model.json").read_text()) for name in "01")
    text = (tmp_path / "1" / "model.c").read_text()
    assert text.count("(void)dk_decode(") == 5, "every kernel with weights"
    assert coded["constant_bytes"] < 0.6 * plain["constant_bytes"]
    assert (files[1].bytes or 0) < (files[0].bytes or 0)
    assert coded["decoded_bytes"] == 32 * 4 * 9 + 32 * 25 + 48 * 16 * 9 + 48 * 32 * 2 + 1440
    assert coded["largest_decoded_bytes"] == 48 * 16 * 9 < coded["arena_bytes"]
    assert plain["coded_bytes"] == plain["decoded_bytes"] == plain["largest_decoded_bytes"] == 0
    assert "dk_decode.h" in files[1].parts and "dk_decode.h" not in files[0].parts
    assert not (tmp_path / "0" / "dk_decode.h").exists()
    (note,) = (n for n in files[1].notes if n.startswith("Coded weights"))
    assert f"{file_size(coded['coded_bytes'])} stored, 13.4 kB decoded" in note and "6.91 kB at most" in note
    assert note in (tmp_path / "1" / "FIRMWARE.md").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with coded weights."""
    made = tmp_path_factory.mktemp("coded")
    to_c99.export({"int8": pruned_hub(MCU)}, asking(MCU), made)
    return made


def selftest(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    sources = [str(folder / name) for name in ("selftest.c", "model.c", "dk_kernels.c")]
    command = [CC, *STRICT, *flags, "-o", str(folder / "selftest"), *sources]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("flags", [["-O2"], ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]])
def test_it_compiles_without_a_warning_and_runs_its_golden_vectors_clean(folder: Path, flags: list[str]) -> None:
    built = selftest(folder, *flags)
    if built.returncode != 0 and len(flags) > 1:
        pytest.skip(f"this compiler has no sanitizers: {built.stderr.splitlines()[0]}")
    assert (built.returncode, built.stderr) == (0, "")
    ran = subprocess.run([str(folder / "selftest")], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "") and ran.stdout.startswith("pass: 0 of "), ran.stdout


def test_a_damaged_weight_fails_the_self_test(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    source = (broken / "model.c").read_text()
    fewer = re.sub(r"(_coded\[\d+\] = \{\n    )\d+u,\d+u", r"\g<1>9u,0u", source, count=1)  # values
    (broken / "model.c").write_text(fewer)
    assert selftest(broken).returncode == 0
    ran = subprocess.run([str(broken / "selftest")], capture_output=True, text=True)
    assert ran.returncode == 1 and "FAIL" in ran.stdout


def test_the_decoder_calls_no_library(folder: Path, tmp_path: Path) -> None:
    if not shutil.which("nm"):
        pytest.skip("no nm: undefined symbols are not listed here")
    command = [CC, "-std=c99", "-O3", "-ffreestanding", "-c", "-o", f"{tmp_path}/model.o", f"{folder}/model.c"]
    subprocess.run(command, check=True)
    listed = subprocess.run(["nm", "-u", tmp_path / "model.o"], capture_output=True, text=True, check=True).stdout
    assert [name for name in listed.split() if name != "U" and not name.startswith("dk_")] == []


def test_a_folder_without_its_decoder_is_not_complete(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "dk_decode.h").unlink()
    with pytest.raises(DeploykitError, match=r"not complete.*dk_decode\.h"):
        to_c99.load(tmp_path / "copy" / "model.c")


# ------------------------------------------------------------------ memory and budgets


def test_decoded_weights_lie_where_nothing_else_is_needed_while_their_layer_runs() -> None:
    made = with_coded_weights(program(pruned_hub(MCU)))
    arena, alone = plan(made), plan(replace(made, coded={}))
    last = {tensor: i for i, op in enumerate(made.operations) for tensor in reads(op)}
    seen = 0
    for i, op in enumerate(made.operations):
        if isinstance(op, Product) and op in made.coded:
            start, stop = arena.offsets[op], arena.offsets[op] + op.weights.nbytes
            alive = [o.y for o in made.operations[:i] if last.get(o.y, -1) >= i] + [op.x, op.y]
            taken = [(arena.offsets[t], arena.offsets[t] + t.size) for t in alive]
            assert stop <= arena.bytes and all(stop <= a or b <= start for a, b in taken)
            seen += 1
    assert seen == 5
    largest = max(op.weights.nbytes for op in made.coded)
    assert alone.bytes < arena.bytes <= alone.bytes + largest, "the largest layer, less what else is free by then"


def test_the_budget_counts_what_is_stored_and_what_is_decoded() -> None:
    made = with_coded_weights(program(pruned_hub(MCU)))
    plain, coded = (footprint(p, plan(p), synthesis=False) for p in (replace(made, coded={}), made))
    weights = sum(op.weights.nbytes for op in made.coded)
    assert plain.constants - coded.constants == weights - coded.coded
    assert coded.code - plain.code == 436 + 5 * 24
    assert coded.ram > plain.ram and coded.flash < plain.flash


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"ram_bytes": 9000}, ["RAM: 9.65 kB of 9.00 kB", "Layer h_node", "6.91 kB of decoded weights", '"plain"']),
        ({"flash_bytes": 5000}, ["flash", "of 5.00 kB", "Layer h_node needs most"]),
    ],
)
def test_a_budget_that_is_exceeded_is_refused_naming_the_decoded_weights(
    budget: dict[str, int], said: list[str], tmp_path: Path
) -> None:
    with pytest.raises(DeploykitError) as refused:
        to_c99.export({"int8": pruned_hub(MCU)}, asking(MCU, **budget), tmp_path)
    assert all(part in str(refused.value) for part in said), str(refused.value)
    assert not list(tmp_path.iterdir())


def test_coded_weights_fit_where_plain_ones_do_not(tmp_path: Path) -> None:
    small = {"flash_bytes": 12_000}
    with pytest.raises(DeploykitError, match="does not fit"):
        to_c99.export({"int8": pruned_hub(MCU)}, replace(MCU, options={**MCU.options, **small}), tmp_path)
    to_c99.export({"int8": pruned_hub(MCU)}, asking(MCU, **small), tmp_path)


def test_weights_that_do_not_get_smaller_stay_plain_and_the_note_says_so(tmp_path: Path) -> None:
    """Uniform numbers have no structure; little ones do not pay the decoder."""
    fed = {"x": np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)}
    for name, (out, low) in {"a": (64, -1.0), "b": (2, 1.0)}.items():
        weights = np.random.default_rng(1).uniform(low, 1, (64, out)).astype(np.float32)
        hub = quantized(graph([("MatMul", ["x", "w"], ["y"], {})], {"x": (64,)}, {"w": weights}), fed)
        (tmp_path / name).mkdir()
        (file,) = to_c99.export({"int8": hub}, asking(MCU), tmp_path / name)
        assert "No weights are coded: with the decoder they would not be smaller." in file.notes
        assert "dk_decode" not in (tmp_path / name / "model.c").read_text()


def test_how_weights_lie_is_plain_or_coded_and_plain_unless_asked(tmp_path: Path) -> None:
    wrong = replace(MCU, options={**MCU.options, "weights": "zipped"})
    with pytest.raises(DeploykitError, match=r"target cortex-m4 \[options\].*zipped"):
        to_c99.export({"int8": pruned_hub(MCU)}, wrong, tmp_path)
    assert not list(tmp_path.iterdir())
    assert options(MCU).weights == options(FPGA).weights == "plain"


def test_equal_networks_give_equal_bytes(folder: Path, tmp_path: Path) -> None:
    to_c99.export({"int8": pruned_hub(MCU)}, asking(MCU), tmp_path)
    made, again = ({p.name: p.read_bytes() for p in where.iterdir()} for where in (folder, tmp_path))
    assert all(made[name] == data for name, data in again.items())
