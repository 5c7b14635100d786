#!/usr/bin/env python3
"""Plants one bug at a time in a copy of the repository and runs the test that must catch it.

    python3 tests/mutants.py             all mutants
    python3 tests/mutants.py sum bias    those whose name contains one of the words
    python3 tests/mutants.py --table     the list as a Markdown table, nothing is run
    python3 tests/mutants.py --check     runs nothing: does every text still occur once, and is the list in CONTRIBUTING.md this one?

Needs nothing but Python and cargo. A mutant is one replacement in one file; its old text must occur exactly once, so
that a mutant that no longer applies is an error and not a survivor. A mutant that does not compile is an error too.
Exit status 0: every mutant was caught by its test, and every test passes without it.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from pathlib import Path

Mutant = namedtuple("Mutant", "name file old new test")

MUTANTS = [
    Mutant("running maximum starts at 0", "src/cpu/softmax_state.rs",
           "            max: f32::NEG_INFINITY,", "            max: 0.0,",
           "hazards h05_running_maximum_starts_below_everything"),
    Mutant("sum not rescaled when the maximum rises", "src/cpu/softmax_state.rs",
           "self.sum *= scale;", "",
           "hazards h05_running_maximum_starts_below_everything"),
    Mutant("nll as lse - z_target", "src/cpu/softmax_state.rs",
           "((self.max as f64 - self.target_logit as f64) + self.log_sum()) as f32", "self.lse() - self.target_logit",
           "hazards h04_common_offset_does_not_cancel"),
    Mutant("entropy statistic not moved with the maximum", "src/cpu/softmax_state.rs",
           "(self.weighted + self.sum * step) * scale", "self.weighted * scale",
           "conformance cpu::matches_the_oracle_under_every_option"),
    Mutant("ragged last tile of the vocabulary left out", "src/cpu/forward.rs",
           "let width = (tiles * VOCAB_TILE).min(vocab - first_class);",
           "let width = (tiles * VOCAB_TILE).min((vocab - first_class) / VOCAB_TILE * VOCAB_TILE);",
           "hazards h01_padded_columns_do_not_leak_into_the_log_sum_exp"),
    Mutant("bias added twice", "src/cpu/forward.rs",
           "*z = z.mul_add(self.scale, *b)", "*z = z.mul_add(self.scale, 2.0 * *b)",
           "hazards h03_bias_and_scale_enter_once_however_long_the_contraction"),
    Mutant("Weyl step of the wrong sign in the capture", "src/cpu/forward.rs",
           "*offset = class_offset(k as u32);", "*offset = class_offset(k as u32).wrapping_neg();",
           "filter kept_entries_are_those_of_the_definition_with_the_value_of_the_definition"),
    Mutant("seed ignored", "src/filter.rs",
           "let key = mix(seed.wrapping_add(0x9E37_79B9_7F4A_7C15));",
           "let key = mix((seed & 0).wrapping_add(0x9E37_79B9_7F4A_7C15));",
           "filter seed_and_token_choose_the_kept_set"),
    Mutant("high half of the seed ignored", "src/filter.rs",
           "let key = mix(seed.wrapping_add(0x9E37_79B9_7F4A_7C15));",
           "let key = mix((seed as u32 as u64).wrapping_add(0x9E37_79B9_7F4A_7C15));",
           "filter seed_and_token_choose_the_kept_set"),
    Mutant("random numbers not uniform", "src/filter.rs",
           "(state as f32 + 0.5) * (1.0 / 4_294_967_296.0)", "((state as f32 + 0.5) * (1.0 / 4_294_967_296.0)).sqrt()",
           "filter every_entry_is_uniform_over_seeds_and_over_tokens"),
    Mutant("kept value p instead of max(p, eps)", "src/cpu/candidates.rs",
           "p.max(eps)", "p.max(0.0 * eps)",
           "filter mean_over_seeds_converges_to_the_exact_gradient_at_the_square_root_rate"),
    Mutant("one-hot dropped where the target is filtered", "src/cpu/candidates.rs",
           "(e.class == target) | passes(e.logit, eps * filter", "passes(e.logit, eps * filter",
           "hazards h08_a_filtered_rare_target_keeps_its_gradient"),
    Mutant("bound of the capture too high", "src/cpu/candidates.rs",
           "const SLACK: f32 = 1.0 - 1e-4;", "const SLACK: f32 = 1.25;",
           "filter kept_entries_are_those_of_the_definition_with_the_value_of_the_definition"),
    Mutant("candidates not tested again with the final log-sum-exp", "src/cpu/candidates.rs",
           "s.probability(logit) >= least", "s.probability(logit) >= least || logit.is_finite()",
           "conformance cpu::matches_the_oracle_on_every_distribution"),
    Mutant("overflowed rows dropped", "src/cpu/backward.rs",
           "self.blocks[block].overflowed[at]", "self.blocks[block].overflowed[at] && self.blocks.is_empty()",
           "filter a_row_that_outgrows_its_space_is_exact_not_wrong"),
    Mutant("softcap derivative dropped on the sparse path", "src/cpu/columns.rs",
           "gradient * map.softcap_derivative(logit)\n}", "gradient * map.softcap_derivative(logit * 0.0)\n}",
           "hazards h10_softcap_derivative_order_and_masks"),
    Mutant("softcap derivative dropped on the exact path", "src/cpu/exact.rs",
           "*z = gradient * map.softcap_derivative(*z);", "*z = gradient;",
           "hazards h10_softcap_derivative_order_and_masks"),
    Mutant("row distance of an exact chunk without its padding", "src/cpu/exact.rs",
           "rows.len(), width, stride);\n                products.add", "rows.len(), width, width);\n                products.add",
           "conformance cpu::matches_the_oracle_on_every_shape"),
    Mutant("bf16 products: last element of an odd row left out", "src/cpu/bf16/mod.rs",
           "pairs.chain(last.iter().map(bits))", "pairs.chain(last[..0].iter().map(bits))",
           "conformance cpu::matches_the_oracle_in_every_dtype"),
    Mutant("bf16 products: neighbours of one operand swapped", "src/cpu/bf16/mod.rs",
           "*pair = bits(low) | bits(high) << 16", "*pair = bits(high) | bits(low) << 16",
           "conformance cpu::matches_the_oracle_in_every_dtype"),
    Mutant("bf16 products: lanes of a transposed block in the wrong order", "src/cpu/bf16/simd.rs",
           "columns[j + 4] = _mm512_shuffle_i32x4::<0x88>(odd, odd_2);", "columns[j + 4] = _mm512_shuffle_i32x4::<0xd8>(odd, odd_2);",
           "conformance cpu::matches_the_oracle_in_every_dtype"),
    Mutant("bf16 products: a row's end not masked", "src/cpu/bf16/simd.rs",
           "(1 << rest.len()) - 1 }", "u32::MAX >> (32 - rest.len().max(1)).saturating_sub(1) }",
           "conformance cpu::matches_the_oracle_in_every_dtype"),
    Mutant("bf16 products: second group of columns over the first", "src/cpu/bf16/mod.rs",
           "let first = (group * GROUP + k) * RIGHT;", "let first = k * RIGHT;",
           "hazards h06_long_sums_are_not_accumulated_in_16_bits"),
    Mutant("bf16 products: tokens beyond the first thousand overwrite dC", "src/cpu/exact_products.rs",
           "bf16::multiply(dst, first > 0, left", "bf16::multiply(dst, first > usize::MAX - 1, left",
           "hazards h06_long_sums_are_not_accumulated_in_16_bits"),
    Mutant("bf16 products: chunks of dE overwrite", "src/cpu/exact_products.rs",
           "bf16::multiply(dst, true, left", "bf16::multiply(dst, false, left",
           "hazards h06_long_sums_are_not_accumulated_in_16_bits"),
    Mutant("bf16 products: logit gradients rounded though gradients are written in f32", "src/cpu/exact.rs",
           "let narrow = !d_embeddings.is_f32() && !columns.classifier.is_f32();", "let narrow = true;",
           "hazards h06_long_sums_are_not_accumulated_in_16_bits"),
    Mutant("logit scale missing in dC", "src/cpu/columns.rs",
           "*c = e.gradient * self.map.scale();", "*c = e.gradient;",
           "conformance cpu::matches_the_oracle_under_every_option"),
    Mutant("last column of dC not written", "src/cpu/columns.rs",
           "let end = (start + SHARED_COLUMNS).min(classes.len());",
           "let end = (start + SHARED_COLUMNS).min(classes.len() - 1);",
           "conformance cpu::matches_the_oracle_on_every_shape"),
    Mutant("smoothing's dense part missing in dbias", "src/cpu/columns.rs",
           "sum as f32 - spread", "sum as f32 - 0.0 * spread",
           "conformance cpu::matches_the_oracle_under_every_option"),
    Mutant("entropy term of the wrong sign", "src/cpu/coefficients.rs",
           "self.softmax - self.entropy * (", "self.softmax + self.entropy * (",
           "conformance cpu::matches_the_oracle_under_every_option"),
    Mutant("z-loss gradient without its factor 2", "src/cpu/coefficients.rs",
           "d_losses * 2.0 * options.z_loss", "d_losses * options.z_loss",
           "hazards h11_z_loss_goes_with_every_reduction_and_other_upstreams"),
    Mutant("per-token upstream ignored", "src/cpu/coefficients.rs",
           "(d_loss + at(&upstream.losses))", "(d_loss + 0.0 * at(&upstream.losses))",
           "hazards h16_per_token_upstream_enters_before_the_sum_over_tokens"),
    Mutant("mean's denominator without class weights", "src/cpu/mod.rs",
           "* problem.class_weight(r.class as usize) as f64)", "* (problem.class_weight(r.class as usize) as f64).powi(0))",
           "conformance cpu::matches_the_oracle_under_every_option"),
    Mutant("mean over nothing is NaN", "src/cpu/mod.rs",
           "if denominator == 0.0 { 0.0 } else { (sum / denominator) as f32 }", "(sum / denominator) as f32",
           "hazards h12_mean_over_nothing_is_zero_with_zero_gradients"),
    Mutant("evaluation captures all the same", "src/cpu/mod.rs",
           "options.capture && any_gradient", "any_gradient",
           "memory memory_is_what_the_plan_says"),
    Mutant("blocks so small that the product is summed in another order", "src/cpu/plan.rs",
           "let most = (rows / (MIN_ROWS + 8)).max(1);", "let most = (rows / 16).max(1);",
           "determinism every_output_is_bitwise_equal_on_long_contractions_and_narrow_last_tiles"),
    Mutant("chunks of the exact path as wide as there are threads", "src/cpu/plan.rs",
           "let (few, many) = EXACT_GROUPS;", "let (few, many) = (1, EXACT_GROUPS.1.min(rayon::current_num_threads()));",
           "determinism every_output_is_bitwise_equal_on_ragged_sizes"),
    Mutant("shared tiles scanned from the last to the first", "src/cpu/forward.rs",
           "for columns in &columns {", "for columns in columns.iter().rev() {",
           "determinism every_output_is_bitwise_equal_on_ragged_sizes"),
    Mutant("rows of a shared block scanned by two threads", "src/cpu/plan.rs",
           "let part = |index| token_block(rows, self.blocks * parts, index);",
           "let part = |index: usize| token_block(rows, self.blocks * parts, index / 2 * 2);",
           "determinism every_output_is_bitwise_equal_on_ragged_sizes"),
    Mutant("narrow products left to gemm", "src/cpu/matmul.rs",
           "if n * MIN_ROWS < ROWS_BY_ROWS &&", "if n > usize::MAX - 1 &&",
           "determinism every_output_is_bitwise_equal_on_long_contractions_and_narrow_last_tiles"),
    Mutant("row distance of a copy without its padding", "src/cpu/rows.rs",
           "_ => View::new(copy, rows, self.columns, plan::row_stride(self.columns)),",
           "_ => View::new(copy, rows, self.columns, self.columns),",
           "conformance cpu::matches_the_oracle_in_every_dtype"),
    Mutant("row stride ignored", "src/cpu/rows.rs",
           "&self.data[row * self.row_stride..]", "&self.data[row * self.columns..]",
           "hazards h15_unaligned_bases_and_different_row_strides"),
    Mutant("accumulating sinks overwrite", "src/cpu/sink.rs",
           ".for_each(|(s, v)| *s += v)", ".for_each(|(s, v)| *s = *v)",
           "properties accumulating_sinks_add_and_overwriting_sinks_forget"),
    Mutant("zero rows not written", "src/cpu/sink.rs",
           "RowSink::F32(s) => s[range].fill(0.0),", "RowSink::F32(_) => {}",
           "conformance cpu::matches_the_oracle_on_every_shape"),
    Mutant("sparse sums rounded to bf16 on the way", "src/cpu/vector.rs",
           "acc[k] = c3.mul_add(r3[k].to_f32(), sum);",
           "acc[k] = half::bf16::from_f32(c3.mul_add(r3[k].to_f32(), sum)).to_f32();",
           "conformance cpu::matches_the_oracle_on_every_shape"),
    Mutant("shift off by one at the end of a sequence", "src/problem.rs",
           "+ self.options.shift < seq_len)", "+ self.options.shift <= seq_len && token + self.options.shift < self.shape.tokens)",
           "hazards h17_shift_stays_inside_sequences_and_composes_with_ignored_tokens"),
    Mutant("target V passes validation", "src/memory.rs",
           "|t| t >= values.vocab)", "|t| t > values.vocab)",
           "validation targets_and_weights_name_index_and_value"),
    Mutant("frozen classifier's gradient allocated", "src/backend.rs",
           "wanted.then(|| backend.allocate(", "(wanted || tensor == \"d_classifier\").then(|| backend.allocate(",
           "memory memory_is_what_the_plan_says"),
    Mutant("oracle: entropy left out of the gradient's bracket", "src/reference.rs",
           "p * (z - lse + entropy)", "p * (z - lse)",
           "oracle finite_differences_of_every_option_and_every_upstream"),
    Mutant("comparison that NaN passes", "tests/common/compare.rs",
           "let passes = error <= allowed;", "let passes = !(error > allowed);",
           "compare_self a_nan_or_negative_tolerance_lets_nothing_through"),
]

REPOSITORY = Path(__file__).resolve().parent.parent


def cargo(copy, test, *more):
    binary, name = test.split()
    command = ["cargo", "test", "--quiet", "--test", binary, *more, "--", "--exact", name]
    # A folder of its own: cargo tells two checkouts apart by modification times alone, so that in a shared one the
    # next build of this repository could take a mutant's library for its own.
    target = Path(os.environ.get("CARGO_TARGET_DIR", REPOSITORY / "target")) / "mutants"
    environment = dict(os.environ, RUST_BACKTRACE="0", CARGO_TARGET_DIR=str(target))
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)


def ran_one(result):
    return "running 1 test" in result.stdout


def apply(copy, mutant):
    path = copy / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        return None
    path.write_text(text.replace(mutant.old, mutant.new))
    return text


def judge(copy, mutant):
    """'caught', 'SURVIVED', or why the mutant says nothing."""
    original = apply(copy, mutant)
    if original is None:
        return "ERROR: its old text does not occur exactly once"
    try:
        built = cargo(copy, mutant.test, "--no-run")
        if built.returncode != 0:
            return "ERROR: does not compile\n" + built.stderr[-800:]
        result = cargo(copy, mutant.test)
        if not ran_one(result):
            return "ERROR: the test did not run\n" + result.stdout[-400:]
        return "SURVIVED" if result.returncode == 0 else "caught"
    finally:
        (copy / mutant.file).write_text(original)


def table():
    lines = ["| planted bug | file | caught by |", "|---|---|---|"]
    for m in MUTANTS:
        binary, name = m.test.split()
        lines.append(f"| {m.name} | `{m.file}` | `{binary}`: `{name}` |")
    return "\n".join(lines) + "\n"


def check():
    stale = [f"{m.file}: not once {m.old!r}, of: {m.name}" for m in MUTANTS if (REPOSITORY / m.file).read_text().count(m.old) != 1]
    if not (REPOSITORY / "CONTRIBUTING.md").read_text().endswith("\n\n" + table()):
        stale.append("CONTRIBUTING.md does not end with what --table prints")
    if f"{len(MUTANTS)} planted bugs" not in (REPOSITORY / "README.md").read_text():
        stale.append(f"README.md does not say that there are {len(MUTANTS)} planted bugs")
    print("\n".join(stale) or f"{len(MUTANTS)} mutants, every text occurs once, and CONTRIBUTING.md and README.md say so")
    sys.exit(bool(stale))


def main(words):
    if words == ["--table"]:
        return print(table(), end="")
    if words == ["--check"]:
        check()
    chosen = [m for m in MUTANTS if not words or any(w in m.name for w in words)]
    flags = Path("/proc/cpuinfo")
    if not flags.exists() or "avx512_bf16" not in flags.read_text():
        print("skipped, as this processor does not multiply bf16:", *[m.name for m in chosen if m.name.startswith("bf16")], sep="\n  ")
        chosen = [m for m in chosen if not m.name.startswith("bf16")]
    files = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.split()
    failures = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder)
        for file in files:
            if (REPOSITORY / file).is_file():
                (copy / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(REPOSITORY / file, copy / file)
        for test in sorted({m.test for m in chosen}):
            result = cargo(copy, test)
            if result.returncode != 0 or not ran_one(result):
                failures += 1
                print(f"without a mutant: {test}: fails or does not run\n{result.stdout[-600:]}{result.stderr[-600:]}")
        for mutant in chosen:
            start = time.time()
            verdict = judge(copy, mutant)
            failures += verdict != "caught"
            print(f"{verdict:9} {time.time() - start:5.0f} s  {mutant.name}  ({mutant.test})", flush=True)
    print(f"{len(chosen)} mutants, {failures} not caught" if failures else f"{len(chosen)} mutants, all caught")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main(sys.argv[1:])
