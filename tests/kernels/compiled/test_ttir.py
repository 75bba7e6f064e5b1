"""The analysis of Triton's IR, on pieces of IR in Triton's format."""

from __future__ import annotations

import pytest
from ttir import narrow_products

HEAD = """\
#loc = loc("kernel.py":1:0)
module {
  tt.func public @kernel(%x_ptr: !tt.ptr<f32> {tt.divisibility = 16 : i32} loc("x_ptr"(#loc)), \
%stride: i32 loc("stride"(#loc)), %wide: i64 loc("wide"(#loc)), %flag: i1 loc("flag"(#loc))) \
attributes {noinline = false} {
    %c0_i32 = arith.constant 0 : i32 loc(#loc1)
    %c1_i32 = arith.constant 1 : i32 loc(#loc1)
    %c7_i32 = arith.constant 7 : i32 loc(#loc1)
    %c128_i32 = arith.constant 128 : i32 loc(#loc1)
    %c3584_i32 = arith.constant 3584 : i32 loc(#loc1)
    %pid = tt.get_program_id x : i32 loc(#loc2)
    %lanes = tt.make_range {end = 128 : i32, start = 0 : i32} : tensor<128xi32> loc(#loc3)
"""
ADDRESS = "%p = tt.addptr %x_ptr, %place : !tt.ptr<f32>, i32 loc(callsite(#loc4 at #loc5))\n"
LANE_ADDRESS = "%p = tt.addptr %x_ptrs, %place : tensor<128x!tt.ptr<f32>>, tensor<128xi32>\n"
TAIL = "    tt.return loc(#loc6)\n  } loc(#loc)\n} loc(#loc)\n#loc6 = loc(unknown)\n"


def product_names(body: str) -> list[str]:
    """Return the names of the products that reach an address."""
    return [line.split(" ")[0] for line in narrow_products(HEAD + body + TAIL)]


SPLAT = "%x_ptrs = tt.splat %x_ptr : !tt.ptr<f32> -> tensor<128x!tt.ptr<f32>>\n"

NARROW = {
    "program times stride": "%place = arith.muli %pid, %stride : i32 loc(#loc7)\n" + ADDRESS,
    "program times a row's length": "%place = arith.muli %pid, %c3584_i32 : i32\n" + ADDRESS,
    "a power of two, shifted": (
        "%c12_i32 = arith.constant 12 : i32\n%place = arith.shli %pid, %c12_i32 : i32\n" + ADDRESS
    ),
    "an unknown shift": "%place = arith.shli %c1_i32, %stride : i32\n" + ADDRESS,
    "widened too late": (
        "%0 = arith.muli %pid, %stride overflow<nsw> : i32\n"
        "%place = arith.extsi %0 : i32 to i64\n" + ADDRESS
    ),
    "lanes": (
        SPLAT + "%0 = tt.splat %stride : i32 -> tensor<128xi32>\n"
        "%1 = arith.muli %lanes, %0 : tensor<128xi32>\n"
        "%place = arith.addi %1, %lanes : tensor<128xi32>\n" + LANE_ADDRESS
    ),
    "a range times a large constant": (
        SPLAT + "%cst = arith.constant dense<30000000> : tensor<128xi32>\n"
        "%place = arith.muli %lanes, %cst : tensor<128xi32>\n" + LANE_ADDRESS
    ),
    "carried by a loop": (
        "%place = scf.for %i = %c0_i32 to %stride step %c1_i32 iter_args(%sum = %c0_i32) -> (i32)"
        "  : i32 {\n"
        "%0 = arith.muli %i, %stride : i32\n"
        "%1 = arith.addi %sum, %0 : i32\n"
        "scf.yield %1 : i32 loc(#loc8)\n"
        "} {tt.num_stages = 3 : i32} loc(#loc8)\n" + ADDRESS
    ),
    "where a loop starts": (
        "%0 = arith.muli %pid, %stride : i32\n"
        "scf.for %place = %0 to %stride step %c1_i32  : i32 {\n" + ADDRESS + "}\n"
    ),
    "in one branch": (
        "%place = scf.if %flag -> (i32) {\nscf.yield %pid : i32\n} else {\n"
        "%1 = arith.muli %pid, %stride : i32\nscf.yield %1 : i32\n}\n" + ADDRESS
    ),
    "result of while": (
        "%r:2 = scf.while (%a = %c0_i32, %b = %stride) : (i32, i32) -> (i32, i32) {\n"
        "%0 = arith.cmpi slt, %a, %b : i32\nscf.condition(%0) %b, %a : i32, i32\n"
        "} do {\n^bb0(%c: i32, %d: i32):\n"
        "%1 = arith.muli %c, %stride : i32\nscf.yield %d, %1 : i32, i32\n}\n"
        "%place = arith.addi %r#0, %pid : i32\n" + ADDRESS
    ),
    "reduced": (
        "%0 = tt.splat %stride : i32 -> tensor<128xi32>\n"
        "%1 = arith.muli %lanes, %0 : tensor<128xi32>\n"
        '%place = "tt.reduce"(%1) <{axis = 0 : i32}> ({\n'
        "^bb0(%a: i32 loc(unknown), %b: i32 loc(unknown)):\n"
        "%2 = arith.addi %a, %b : i32\ntt.reduce.return %2 : i32\n"
        "}) : (tensor<128xi32>) -> i32\n" + ADDRESS
    ),
    "after a jump": (
        "%0 = arith.muli %pid, %stride : i32\n"
        "cf.cond_br %flag, ^bb1, ^bb2(%0 : i32)\n^bb1:  // pred: ^bb0\ntt.return\n"
        "^bb2(%place: i32):  // pred: ^bb0\n" + ADDRESS
    ),
}

WIDE_OR_SMALL = {
    "64 bits": (
        "%0 = arith.extsi %pid : i32 to i64\n%1 = arith.muli %0, %wide : i64\n"
        "%p = tt.addptr %x_ptr, %1 : !tt.ptr<f32>, i64\n"
    ),
    "a tile's number times its extent": "%place = arith.muli %pid, %c128_i32 : i32\n" + ADDRESS,
    "a tile's number, shifted": "%place = arith.shli %pid, %c7_i32 : i32\n" + ADDRESS,
    "constants and ranges": (
        SPLAT + "%cst = arith.constant dense<3584> : tensor<128xi32>\n"
        "%place = arith.muli %lanes, %cst : tensor<128xi32>\n" + LANE_ADDRESS
    ),
    "a mask of bits": (
        SPLAT + "%cst = arith.constant dense<1> : tensor<128xi32>\n"
        "%place = arith.shli %cst, %lanes : tensor<128xi32>\n" + LANE_ADDRESS
    ),
    "what decides whether to load": (
        "%0 = arith.muli %pid, %stride : i32\n%1 = arith.cmpi slt, %0, %stride : i32\n"
        "%place = arith.select %1, %pid, %c0_i32 : i32\n" + ADDRESS
    ),
    "what is stored": (
        "%0 = arith.muli %pid, %stride : i32\n%place = arith.addi %pid, %c7_i32 : i32\n"
        + ADDRESS
        + "tt.store %p, %0 : !tt.ptr<f32>\n"
    ),
    "an index that was loaded from such a place is judged there": (
        "%0 = arith.extsi %pid : i32 to i64\n"
        "%1 = tt.addptr %x_ptr, %0 : !tt.ptr<i32>, i64\n"
        "%place = tt.load %1 : !tt.ptr<i32>\n" + ADDRESS
    ),
    "a name used again by a later region": (
        "scf.if %flag {\n%0 = arith.muli %pid, %stride : i32\n}\n"
        "scf.if %flag {\n%0 = arith.addi %pid, %stride : i32\n"
        "%p = tt.addptr %x_ptr, %0 : !tt.ptr<f32>, i32\n}\n"
    ),
    "other results of the same loop": (
        "%r:2 = scf.for %i = %c0_i32 to %stride step %c1_i32 iter_args(%a = %c0_i32, "
        "%b = %c0_i32) -> (i32, i32)  : i32 {\n"
        "%0 = arith.muli %i, %stride : i32\nscf.yield %0, %i : i32, i32\n}\n"
        "%p = tt.addptr %x_ptr, %r#1 : !tt.ptr<f32>, i32\n"
    ),
}


@pytest.mark.parametrize("body", [pytest.param(v, id=k) for k, v in NARROW.items()])
def test_finds_the_product(body: str) -> None:
    assert len(product_names(body)) == 1


@pytest.mark.parametrize("body", [pytest.param(v, id=k) for k, v in WIDE_OR_SMALL.items()])
def test_accepts_wide_or_small_products(body: str) -> None:
    assert product_names(body) == []


def test_finds_all_in_order() -> None:
    body = (
        "%a = arith.muli %pid, %stride : i32\n%b = arith.muli %a, %stride : i32\n"
        "%place = arith.addi %b, %a : i32\n"
    )
    assert product_names(body + ADDRESS) == ["%a", "%b"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("%0 = tt.call @helper(%pid) : (i32) -> i32\n", "calls are not followed"),
        (
            "%0 = tt.make_tensor_descriptor %x_ptr, [%stride], [%wide] : !tt.ptr<f32>, "
            "!tt.tensordesc<tensor<8xf32>>\n",
            "descriptors are not followed",
        ),
        ("%0 = arith.addi %pid, %nothing : i32\n", "%nothing is used before"),
        ("scf.if %flag {\n", "a region is not closed"),
    ],
)
def test_raises_for_unsupported_ir(body: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        product_names(body)
