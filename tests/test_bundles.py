"""The compiler's schedule of a Pallas kernel is read, and the kernel costs what it issues."""

import pytest

from collective_matmul import hardware
from collective_matmul.inspect import bundles, overlap_report


def loop(label="LB", start="0", step="1", bound="386", test="ge", region=9, comment=""):
    """A prologue of 3 bundles, a loop of 4, an epilogue of 2."""
    return f"""= control target key start
LB: loop body
= control target key end

     0   :  {{ %s5_s0 = inlined_call_operand.hbm [shape: bf16[64,256]] /* for operand 0. */ }}
   0x1   :  {{ %s20_s3 = smov.u32 {start} /* copy for cssa */ }} /* Start region 4 */
   0x2   :  {{ %12 = vsyncpa [#allocation4], 0 }} /* End region 4 */
   0x3 {label}: > {{ %s30_s4 = sphi %s20_s3, %s33_s5 /* phi copy */{comment} }} /* Start region 9 */
   0x4   : > {{ %s32_s6 = sadd.s32 {step}, %s30_s4 ;;  %276 = sbr.rel (%p7_p3) target = $region40 }}
   0x5   : > {{ %p9_p1 = scmp.{test}.s32.totalorder %s32_s6, {bound} /* loop exit test */ }}
   0x6   : > {{ %s33_s5 = smov.u32 %s32_s6  ;;  %23 = sbr.rel (!%p9_p1) target = $region{region} }}
   0x7   :  {{ %13 = vsyncpa [#allocation4], 1 }}
   0x8 PF:  {{}} /* exit bundle: %k = custom-call(%a) */
"""


def test_a_loop_counts_as_often_as_it_runs():
    found = bundles.parse(loop())
    assert (found.bundles, found.why) == (9, "")
    assert found.loops == (bundles.Loop(3, 6, 386),)
    assert found.loops[0].bundles == 4
    assert found.cycles == 3 + 386 * 4 + 2


@pytest.mark.parametrize(
    ("start", "step", "bound", "trips"),
    [("3", "1", "16", 13), ("1", "3", "15", 5), ("4294967295", "2", "4", 3), ("0", "1", "1", 1)],
)
def test_trips_follow_from_the_counter(start, step, bound, trips):
    (found,) = bundles.parse(loop(start=start, step=step, bound=bound)).loops
    assert found.trips == trips


def test_a_counter_may_be_spilled():
    kept = "%9 = sst [smem:[#allocation1_spill]] %s32_s6  ;;  %s33_s5 = sld "
    text = loop().replace("%s33_s5 = smov.u32 %s32_s6", f"{kept}[smem:[#allocation1_spill]]")
    assert bundles.parse(text).cycles == bundles.parse(loop()).cycles


def test_what_a_comment_says_is_no_bundle():
    text = loop(comment=" /* base_bounds: (128, 1)\nstrides: {16, 1} ;; %s20_s3 = smov.u32 7 */")
    assert bundles.parse(text).cycles == bundles.parse(loop()).cycles


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"bound": "%s99_s9"}, "how often the loop at bundle 0x3 runs"),
        ({"start": "%s99_s9"}, "how often the loop at bundle 0x3 runs"),
        ({"test": "lt"}, "how often the loop at bundle 0x3 runs"),
        ({"step": "4294967295"}, "how often the loop at bundle 0x3 runs"),
        ({"region": 7}, "where the loop at bundle 0x3 ends"),
    ],
)
def test_what_cannot_be_read_is_never_guessed(change, why):
    found = bundles.parse(loop(**change))
    assert (found.cycles, found.why) == (None, why)


# A kernel of grid (8,), whose body is a loop of 16 around one of 5, as libtpu wrote it for v4. Most
# of its bundles are left out, and of the others all that does not concern the loops.
NESTED = """
     0   :  { %s1424_s0 = inlined_call_operand.hbm [shape: bf16[16384,128], index: 0, kind: input] }
   0x2   :  { %12 = sbr.rel (%p558_p0) target = $region4 }
   0x8   :  { %s1410_s10 = smov.u32 0 /* copy for cssa */ } /* End region 106 */
   0x9 LB: > { %s1252_s10 = sphi %s1410_s10, %s1964_s10 /* phi copy */ } /* Start region 111 */
   0xa   : > { %s1429_s13 = sadd.s32 1, %s1252_s10 /* copy for cssa */ }
  0x2b   : > { %110 = sbr.rel (%p107_p3) target = $region28 }
  0x31   : > { %s1545_s18 = smov.u32 0 /* copy for cssa */ } /* Start region 95 */
  0x39 LB: >> { %s1598_s3 = smov.u32 0 /* copy for cssa */  ;;  %s1320_s18 = sphi %s1545_s18, \
%s142_s18 /* phi copy */ } /* Start region 100 :: Start region 84 :: End region 84 */
  0x3a LB: >>> { %s164_s3 = sadd.s32 1, %s1388_s3 /* copy for cssa */  ;;  \
%s1388_s3 = sphi %s1598_s3, %s164_s3 /* phi copy */ } /* Start region 89 :: Start region 44 */
  0x3b   : >>> { %p1713_p8 = scmp.ge.s32.totalorder %s164_s3, 5 /* loop exit test */ }
  0x3c   : >>> { %s142_s18 = sadd.s32 (%p1713_p8), 1, %s1320_s18 /* copy for cssa */ }
  0x3d   : >>> { %p1770_p9 = scmp.ge.s32.totalorder (%p1713_p8), %s142_s18, 16 }
  0x73   : >>> { %163 = sbr.rel (!%p1713_p8) target = $region89 } /* End region 89 */
  0x7a   : >> { %141 = sbr.rel (!%p1770_p9) target = $region100 }
  0x8a PF: > { %p713_p12 = scmp.ge.s32.totalorder %s1252_s10, 2 } /* Start/End empty region 28 */
  0x8e   : > { %p21_p6 = scmp.ge.s32.totalorder %s1429_s13, 10 /* loop exit test */ }
  0x90   : > { %s1964_s10 = smov.u32 %s1429_s13  ;;  %23 = sbr.rel (!%p21_p6) target = $region111 }
  0x96 PF:  {} /* exit bundle: %nest2.1 = custom-call(%param.1) */
"""


def test_loops_within_loops_multiply():
    found = bundles.parse(NESTED)
    assert [(each.bundles, each.trips) for each in found.loops] == [(5, 5), (7, 16), (14, 10)]
    assert found.cycles == 3 + 10 * (7 + 16 * (2 + 5 * 5)) + 1


def test_a_text_without_bundles_is_refused():
    with pytest.raises(ValueError, match="no line of this text is a bundle"):
        bundles.parse("HloModule jit_f")


ESTIMATE = '"cost_estimate":{"flops":"1000000","transcendentals":"0","bytes_accessed":"8192"}'
PROGRAM = f"""HloModule jit_f, is_scheduled=true

ENTRY %main (x: f32[32,32]) -> f32[32,32] {{
  %x = f32[32,32]{{1,0}} parameter(0)
  %a = f32[32,32]{{1,0}} custom-call(%x), custom_call_target="tpu_custom_call", \
backend_config={{"custom_call_config":{{"body":"abc",{ESTIMATE}}}}}
  ROOT %b = f32[32,32]{{1,0}} custom-call(%a), custom_call_target="tpu_custom_call", \
backend_config={{"custom_call_config":{{"body":"def"}}}}
}}
"""


def test_a_report_costs_kernels_by_their_bundles():
    v4 = hardware.chip("v4")
    report = overlap_report(PROGRAM, chip="v4", bundles={"a": 21_000, "b": 10_500})
    assert [(op.name, op.how) for op in report.ops] == [("a", "bundles"), ("b", "bundles")]
    assert [op.seconds for op in report.ops] == pytest.approx([20e-6, 10e-6])
    assert report.flops == 10**6, "what is declared is what reconciles"
    assert report.ops[0].peak_share == pytest.approx(1e6 / 20e-6 / v4.bf16)
    assert not any("declare" in remark for remark in report.remarks)
    bound_by_bytes = overlap_report(PROGRAM, chip="v4", bundles={"a": 1, "b": 1})
    assert bound_by_bytes.ops[0].seconds == pytest.approx(8192 / v4.hbm_bandwidth)
    program = PROGRAM.replace('"flops":"1000000"', '"flops":"1000000000"')
    bound_by_products = overlap_report(program, chip="v4", bundles={"a": 1, "b": 1})
    assert bound_by_products.ops[0].seconds == pytest.approx(1e9 / v4.bf16)


def test_what_is_declared_is_said_to_be_a_lower_bound():
    report = overlap_report(PROGRAM, chip="v4")
    assert [(op.name, op.how) for op in report.ops] == [("a", "declared")]
    (remark,) = (remark for remark in report.remarks if "what they declare" in remark)
    assert "lower bound: a" in remark
    assert [row.what for row in report.uncosted] == ["custom-call tpu_custom_call"]
