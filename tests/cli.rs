//! The `cce` binary, end to end: what goes in, what comes out, and what is left behind when something is wrong.

use cut_cross_entropy::{
    CceOptions, Cpu, GradientDType, GradientFilter, GradientRequest, HostBuffer, Inputs, Matrix, Reduction, Upstream,
    cce_forward_backward,
};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView, serialize};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const TOKENS: usize = 24;
const HIDDEN: usize = 10;
const VOCAB: usize = 300;

fn cce(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cce")).args(args).output().expect("the binary runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

/// Raw tensors of a file: name, dtype, shape, little-endian bytes.
type Tensors = Vec<(&'static str, Dtype, Vec<usize>, Vec<u8>)>;

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn values(seed: u32, len: usize, scale: f32) -> Vec<f32> {
    (0..len as u32).map(|i| scale * ((i * 7 + seed * 131) as f32 * 0.618).sin()).collect()
}

fn targets() -> Vec<i64> {
    (0..TOKENS as i64).map(|i| if i % 7 == 3 { -100 } else { i * 37 % VOCAB as i64 }).collect()
}

/// What every test starts from.
fn basic() -> Tensors {
    let targets = targets().iter().flat_map(|t| t.to_le_bytes()).collect();
    vec![
        ("embeddings", Dtype::F32, vec![TOKENS, HIDDEN], floats(&values(1, TOKENS * HIDDEN, 1.5))),
        ("classifier", Dtype::F32, vec![VOCAB, HIDDEN], floats(&values(2, VOCAB * HIDDEN, 1.0))),
        ("targets", Dtype::I64, vec![TOKENS], targets),
    ]
}

fn full() -> Tensors {
    let weights = |seed, len| values(seed, len, 0.5).iter().map(|w| w + 0.75).collect::<Vec<f32>>();
    let mut tensors = basic();
    tensors.push(("bias", Dtype::F32, vec![VOCAB], floats(&values(3, VOCAB, 0.5))));
    tensors.push(("class_weights", Dtype::F32, vec![VOCAB], floats(&weights(4, VOCAB))));
    tensors.push(("token_weights", Dtype::F32, vec![TOKENS], floats(&weights(5, TOKENS))));
    tensors
}

fn replace(tensors: &mut Tensors, name: &'static str, dtype: Dtype, shape: Vec<usize>, bytes: Vec<u8>) {
    tensors.retain(|t| t.0 != name);
    tensors.push((name, dtype, shape, bytes));
}

fn serialized(tensors: &Tensors) -> Vec<u8> {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (*name, TensorView::new(*dtype, shape.clone(), bytes).expect("a consistent tensor"))
    });
    serialize(views, None).expect("serializable")
}

/// A directory with an input file in it.
struct Setting {
    directory: tempfile::TempDir,
}

impl Setting {
    fn new(tensors: &Tensors) -> Self {
        Self::with_bytes(&serialized(tensors))
    }

    fn with_bytes(bytes: &[u8]) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        std::fs::write(directory.path().join("in.safetensors"), bytes).expect("written");
        Setting { directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn run(&self, flags: &[&str]) -> Output {
        let (input, output) = (self.path("in.safetensors"), self.path("out.safetensors"));
        let files = ["run", "--input", utf8(&input), "--output", utf8(&output)];
        cce(&[&files, flags].concat())
    }

    fn files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.directory.path()).expect("readable");
        let mut names: Vec<String> =
            entries.map(|e| e.expect("an entry").file_name().into_string().expect("UTF-8")).collect();
        names.sort();
        names
    }

    /// A successful run; the output file's bytes.
    fn output(&self, flags: &[&str]) -> Vec<u8> {
        let result = self.run(flags);
        assert!(result.status.success(), "{flags:?}: {}", text(&result.stderr));
        assert_eq!(self.files(), ["in.safetensors", "out.safetensors"], "nothing but the output appears");
        std::fs::read(self.path("out.safetensors")).expect("the output")
    }

    /// A run that must fail: exit code 2, one line that contains `message`, and nothing left behind.
    fn refused(&self, flags: &[&str], message: &str) {
        assert_refused(&self.run(flags), message);
        assert_eq!(self.files(), ["in.safetensors"], "{message}");
    }
}

fn utf8(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

fn assert_refused(result: &Output, message: &str) {
    let stderr = text(&result.stderr);
    assert_eq!(result.status.code(), Some(2), "{message}: {stderr}");
    assert_eq!(stderr.lines().count(), 1, "one line: {stderr}");
    assert!(stderr.starts_with("error: ") && stderr.contains(message), "`{message}` not in: {stderr}");
    assert!(result.stdout.is_empty());
}

fn tensor_f32(file: &[u8], name: &str) -> Option<Vec<f32>> {
    let file = SafeTensors::deserialize(file).expect("a safetensors file");
    let tensor = file.tensor(name).ok()?;
    Some(match tensor.dtype() {
        Dtype::F32 => tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        Dtype::BF16 => {
            tensor.data().chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
        }
        other => panic!("{name} has dtype {other:?}"),
    })
}

/// The library's answer must be the file's, bit for bit.
fn assert_same_as_library(file: &[u8], inputs: &Inputs<'_>, options: &CceOptions, upstream: &Upstream<'_>) {
    let (forward, gradients) = cce_forward_backward(&Cpu, inputs, options, upstream).expect("legal");
    let widened = |g: &Option<HostBuffer>| g.as_ref().map(HostBuffer::to_f32_vec);
    let expected = [
        ("loss", Some(vec![forward.loss])),
        ("losses", Some(forward.losses.clone())),
        ("lse", Some(forward.lse.clone())),
        ("entropy", forward.entropy.clone()),
        ("d_embeddings", widened(&gradients.d_embeddings)),
        ("d_classifier", widened(&gradients.d_classifier)),
        ("d_bias", widened(&gradients.d_bias)),
    ];
    for (name, expected) in expected {
        assert_eq!(tensor_f32(file, name), expected, "{name}");
    }
    assert!(forward.loss.is_finite() && forward.loss > 0.0);
}

#[test]
fn a_plain_run_equals_the_library() {
    let (e, c, y) = (values(1, TOKENS * HIDDEN, 1.5), values(2, VOCAB * HIDDEN, 1.0), targets());
    let inputs = Inputs::new(Matrix::new(&e, TOKENS, HIDDEN), Matrix::new(&c, VOCAB, HIDDEN), &y);
    let file = Setting::new(&basic()).output(&[]);
    assert_same_as_library(&file, &inputs, &CceOptions::default(), &Upstream::default());
    let parsed = SafeTensors::deserialize(&file).expect("a safetensors file");
    let shape = |name| parsed.tensor(name).expect(name).shape().to_vec();
    assert_eq!(shape("loss"), Vec::<usize>::new());
    assert_eq!(shape("losses"), [TOKENS]);
    assert_eq!(shape("d_embeddings"), [TOKENS, HIDDEN]);
    assert_eq!(shape("d_classifier"), [VOCAB, HIDDEN]);
}

#[test]
fn every_flag_reaches_the_library() {
    let tensors = full();
    let decode = |name: &str| -> Vec<f32> {
        let bytes = &tensors.iter().find(|t| t.0 == name).expect(name).3;
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    };
    let (e, c, y) = (decode("embeddings"), decode("classifier"), targets());
    let (bias, class_weights, token_weights) = (decode("bias"), decode("class_weights"), decode("token_weights"));
    let plain: Inputs<'_> = Inputs {
        bias: Some((&bias).into()),
        class_weights: Some((&class_weights).into()),
        token_weights: Some((&token_weights).into()),
        ..Inputs::new(Matrix::new(&e, TOKENS, HIDDEN), Matrix::new(&c, VOCAB, HIDDEN), &y)
    };
    let setting = Setting::new(&tensors);
    let default = CceOptions::default();
    let request = GradientRequest::default();
    let cases: Vec<(&[&str], CceOptions)> = vec![
        (&["--backend", "cpu"], default),
        (&["--filter", "exact"], CceOptions { filter: GradientFilter::Exact, ..default }),
        (
            &["--filter", "unbiased", "--eps", "2^-6", "--seed", "5"],
            CceOptions { filter: GradientFilter::Unbiased { eps: 1.0 / 64.0, seed: 5 }, ..default },
        ),
        (
            &["--filter", "threshold", "--eps", "0.02"],
            CceOptions { filter: GradientFilter::Threshold { eps: 0.02 }, ..default },
        ),
        (&["--reduction", "sum"], CceOptions { reduction: Reduction::Sum, ..default }),
        (&["--softcap", "3"], CceOptions { softcap: Some(3.0), ..default }),
        (&["--logit-scale", "0.5"], CceOptions { logit_scale: 0.5, ..default }),
        (&["--label-smoothing", "0.1"], CceOptions { label_smoothing: 0.1, ..default }),
        (&["--z-loss", "0.01"], CceOptions { z_loss: 0.01, ..default }),
        (&["--entropy"], CceOptions { entropy: true, ..default }),
        (&["--metrics"], CceOptions { metrics: true, ..default }),
        (
            &["--grad-dtype", "f32"],
            CceOptions { gradients: GradientRequest { dtype: GradientDType::F32, ..request }, ..default },
        ),
        (&["--no-d-embeddings"], CceOptions { gradients: GradientRequest { embeddings: false, ..request }, ..default }),
        (&["--no-d-classifier"], CceOptions { gradients: GradientRequest { classifier: false, ..request }, ..default }),
    ];
    for (flags, options) in cases {
        assert_same_as_library(&setting.output(flags), &plain, &options, &Upstream::default());
    }
    let shifted = Inputs { seq_len: Some(12), ..plain };
    let options = CceOptions { shift: 1, ..default };
    let file = setting.output(&["--shift", "1", "--seq-len", "12"]);
    assert_same_as_library(&file, &shifted, &options, &Upstream::default());

    let zero = y.iter().map(|&t| if t == -100 { 0 } else { t }).collect::<Vec<i64>>();
    let mut tensors = tensors.clone();
    replace(&mut tensors, "targets", Dtype::I64, vec![TOKENS], zero.iter().flat_map(|t| t.to_le_bytes()).collect());
    let ignoring = Inputs { targets: (&zero).into(), ..plain };
    let options = CceOptions { ignore_index: 0, ..default };
    let file = Setting::new(&tensors).output(&["--ignore-index", "0"]);
    assert_same_as_library(&file, &ignoring, &options, &Upstream::default());
}

#[test]
fn reduction_none_takes_d_losses_or_ones() {
    let (e, c, y) = (values(1, TOKENS * HIDDEN, 1.5), values(2, VOCAB * HIDDEN, 1.0), targets());
    let inputs = Inputs::new(Matrix::new(&e, TOKENS, HIDDEN), Matrix::new(&c, VOCAB, HIDDEN), &y);
    let options = CceOptions { reduction: Reduction::None, ..CceOptions::default() };
    let ones = vec![1.0_f32; TOKENS];
    let file = Setting::new(&basic()).output(&["--reduction", "none"]);
    assert_same_as_library(&file, &inputs, &options, &Upstream::losses(&ones));

    let d_losses = values(9, TOKENS, 2.0);
    let mut tensors = basic();
    tensors.push(("d_losses", Dtype::F32, vec![TOKENS], floats(&d_losses)));
    let setting = Setting::new(&tensors);
    setting.refused(&[], "d_losses");
    let file = setting.output(&["--reduction", "none"]);
    assert_same_as_library(&file, &inputs, &options, &Upstream::losses(&d_losses));
}

#[test]
fn other_dtypes_of_targets_and_embeddings_work() {
    let expected = Setting::new(&basic()).output(&["--ignore-index", "-100"]);
    let i32s: Vec<u8> = targets().iter().flat_map(|&t| (t as i32).to_le_bytes()).collect();
    let mut tensors = basic();
    replace(&mut tensors, "targets", Dtype::I32, vec![TOKENS], i32s);
    assert_eq!(Setting::new(&tensors).output(&[]), expected);
    // The unsigned image of -100 does not exist, so another value marks the skipped ones.
    let u32s = |mark: u32| targets().iter().flat_map(|&t| u32::try_from(t).unwrap_or(mark).to_le_bytes()).collect();
    replace(&mut tensors, "targets", Dtype::U32, vec![TOKENS], u32s(u32::MAX));
    assert_eq!(Setting::new(&tensors).output(&["--ignore-index", "4294967295"]), expected);

    let halves = |values: Vec<f32>| values.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect();
    let mut tensors = basic();
    let (e, c) = (halves(values(1, TOKENS * HIDDEN, 1.5)), halves(values(2, VOCAB * HIDDEN, 1.0)));
    replace(&mut tensors, "embeddings", Dtype::BF16, vec![TOKENS, HIDDEN], e);
    replace(&mut tensors, "classifier", Dtype::BF16, vec![VOCAB, HIDDEN], c);
    let setting = Setting::new(&tensors);
    let dtype =
        |file: &[u8]| SafeTensors::deserialize(file).expect("a file").tensor("d_classifier").expect("dC").dtype();
    assert_eq!(dtype(&setting.output(&[])), Dtype::BF16);
    assert_eq!(dtype(&setting.output(&["--grad-dtype", "f32"])), Dtype::F32);
}

/// A header padded by one byte puts every tensor at an odd offset.
#[test]
fn unaligned_tensors_are_read() {
    let aligned = serialized(&basic());
    let header = u64::from_le_bytes(aligned[..8].try_into().expect("8 bytes")) as usize;
    let mut odd = ((header + 1) as u64).to_le_bytes().to_vec();
    odd.extend_from_slice(&aligned[8..8 + header]);
    odd.push(b' ');
    odd.extend_from_slice(&aligned[8 + header..]);
    assert_eq!(Setting::with_bytes(&odd).output(&[]), Setting::with_bytes(&aligned).output(&[]));
}

#[test]
fn json_has_every_key_and_stays_valid_without_finite_numbers() {
    let parse = |result: &Output| -> serde_json::Value {
        assert!(result.status.success(), "{}", text(&result.stderr));
        assert_eq!(text(&result.stdout).lines().count(), 1);
        serde_json::from_slice(&result.stdout).expect("valid JSON")
    };
    let object = parse(&Setting::new(&basic()).run(&["--json", "--metrics"]));
    for key in ["loss", "forward_ms", "backward_ms", "workspace_bytes", "kept_entries", "kept_mass", "accuracy"] {
        assert!(object[key].is_number(), "{key} in {object}");
    }
    assert!(object.as_object().expect("an object").contains_key("peak_rss_bytes"));
    assert_eq!(object["backend"], "cpu");
    assert_eq!(object["dtype"], "f32");
    assert_eq!([&object["tokens"], &object["vocab"], &object["hidden"]], [TOKENS, VOCAB, HIDDEN]);

    let mut tensors = basic();
    let nans = floats(&vec![f32::NAN; TOKENS * HIDDEN]);
    replace(&mut tensors, "embeddings", Dtype::F32, vec![TOKENS, HIDDEN], nans);
    assert!(parse(&Setting::new(&tensors).run(&["--json"]))["loss"].is_null());
    let frozen = ["--json", "--no-d-embeddings", "--no-d-classifier"];
    assert!(parse(&Setting::new(&basic()).run(&frozen))["backward_ms"].is_null());
}

#[test]
fn bad_files_are_refused_in_one_line_and_leave_nothing() {
    let good = serialized(&basic());
    Setting::with_bytes(&good[..good.len() - 3]).refused(&[], "truncated");
    Setting::with_bytes(&good[..5]).refused(&[], "not a safetensors file");
    Setting::with_bytes(&[0xFF; 64]).refused(&[], "not a safetensors file");
    Setting::with_bytes(b"\x08\0\0\0\0\0\0\0{\n\n[\n}\n ").refused(&[], "not a safetensors header");
    Setting::with_bytes(&[&good[..], b"x"].concat()).refused(&[], "overlong");

    let edited = |edit: &dyn Fn(&mut Tensors)| {
        let mut tensors = full();
        edit(&mut tensors);
        Setting::new(&tensors)
    };
    for name in ["embeddings", "classifier", "targets"] {
        edited(&|t| t.retain(|t| t.0 != name)).refused(&[], &format!("no tensor `{name}`"));
    }
    let doubles = vec![0; TOKENS * HIDDEN * 8];
    edited(&|t| replace(t, "embeddings", Dtype::F64, vec![TOKENS, HIDDEN], doubles.clone())).refused(&[], "F64");
    edited(&|t| replace(t, "classifier", Dtype::BF16, vec![VOCAB, HIDDEN], vec![0; VOCAB * HIDDEN * 2]))
        .refused(&[], "classifier has dtype bf16");
    edited(&|t| replace(t, "targets", Dtype::F32, vec![TOKENS], vec![0; TOKENS * 4]))
        .refused(&[], "targets has dtype f32");
    edited(&|t| replace(t, "bias", Dtype::I32, vec![VOCAB], vec![0; VOCAB * 4])).refused(&[], "bias has dtype i32");
    edited(&|t| replace(t, "classifier", Dtype::F32, vec![VOCAB, 9], vec![0; VOCAB * 9 * 4])).refused(&[], "hidden");
    edited(&|t| replace(t, "embeddings", Dtype::F32, vec![TOKENS * HIDDEN], vec![0; TOKENS * HIDDEN * 4]))
        .refused(&[], "expected a matrix");
    edited(&|t| replace(t, "targets", Dtype::I64, vec![TOKENS, 1], vec![0; TOKENS * 8]))
        .refused(&[], "expected a vector");
    edited(&|t| replace(t, "targets", Dtype::I64, vec![TOKENS - 1], vec![0; TOKENS * 8 - 8]))
        .refused(&[], "targets is [23]");
    edited(&|t| replace(t, "bias", Dtype::F32, vec![3], vec![0; 12])).refused(&[], "bias is [3]");
    edited(&|t| replace(t, "token_weights", Dtype::F32, vec![TOKENS], floats(&[f32::NAN; TOKENS])))
        .refused(&[], "token_weights[0] is NaN");
    let beyond: Vec<u8> = (0..TOKENS as i64).flat_map(|_| (VOCAB as i64).to_le_bytes()).collect();
    edited(&|t| replace(t, "targets", Dtype::I64, vec![TOKENS], beyond.clone())).refused(&[], "targets[0] is 300");
}

#[test]
fn bad_options_and_paths_are_refused_in_one_line_and_leave_nothing() {
    let setting = Setting::new(&basic());
    #[cfg(not(feature = "cuda"))]
    setting.refused(&["--backend", "cuda"], "no CUDA backend");
    #[cfg(feature = "cuda")]
    if let Err(reason) = cut_cross_entropy::cuda::device_count() {
        setting.refused(&["--backend", "cuda"], &reason.to_string());
    }
    setting.refused(&["--softcap", "-1"], "softcap");
    setting.refused(&["--label-smoothing", "1.5"], "label_smoothing");
    setting.refused(&["--eps", "0"], "eps");
    setting.refused(&["--shift", "1", "--seq-len", "5"], "sequence");

    let output = setting.path("out.safetensors");
    let missing = setting.path("missing.safetensors");
    let run = |input: &Path, output: &Path| cce(&["run", "--input", utf8(input), "--output", utf8(output)]);
    assert_refused(&run(&missing, &output), "missing.safetensors");
    assert_refused(&run(setting.directory.path(), &output), "error");
    let input = setting.path("in.safetensors");
    assert_refused(&run(&input, &setting.path("no/such/out.safetensors")), "cannot write");
    assert_refused(&run(&input, setting.directory.path()), "is a directory");
    assert_eq!(setting.files(), ["in.safetensors"]);
}

#[test]
fn a_failed_run_keeps_the_old_output_and_a_good_one_replaces_it() {
    let setting = Setting::new(&basic());
    let first = setting.output(&[]);
    assert_refused(&setting.run(&["--softcap", "-1"]), "softcap");
    assert_eq!(std::fs::read(setting.path("out.safetensors")).expect("still there"), first);
    assert_ne!(setting.output(&["--reduction", "sum"]), first);
    assert_eq!(setting.output(&[]), first, "the same bytes every time");
}

#[test]
fn an_empty_batch_is_a_loss_of_zero() {
    let mut tensors = basic();
    replace(&mut tensors, "embeddings", Dtype::F32, vec![0, HIDDEN], Vec::new());
    replace(&mut tensors, "targets", Dtype::I64, vec![0], Vec::new());
    let file = Setting::new(&tensors).output(&[]);
    assert_eq!(tensor_f32(&file, "loss"), Some(vec![0.0]));
    assert_eq!(tensor_f32(&file, "d_classifier"), Some(vec![0.0; VOCAB * HIDDEN]));
}

#[test]
fn verify_passes_and_fails_on_no_case() {
    let result = cce(&["verify", "--only", "softcap"]);
    let stdout = text(&result.stdout);
    assert!(result.status.success(), "{stdout}");
    assert!(stdout.lines().filter(|l| l.starts_with("ok ")).count() >= 12 && !stdout.contains("FAIL"), "{stdout}");
    assert_eq!(cce(&["verify", "--only", "no such case"]).status.code(), Some(1));
}

#[test]
fn bench_verifies_and_writes_csv_and_svg() {
    let directory = tempfile::tempdir().expect("a directory");
    let (csv, svg) = (directory.path().join("out.csv"), directory.path().join("out.svg"));
    let shape = ["--tokens", "40", "--vocab", "900", "--hidden", "32", "--shape", "gpt2", "--rounds", "1"];
    let files = ["--csv", utf8(&csv), "--chart", utf8(&svg), "--gradient-error", "--seeds", "2"];
    let methods = ["--methods", "unbiased,exact,threshold,baseline"];
    let result = cce(&[&["bench"], &shape[..], &files[..], &methods[..]].concat());
    let stdout = text(&result.stdout);
    assert!(result.status.success(), "{stdout}{}", text(&result.stderr));
    assert_eq!(stdout.matches("verified").count(), 8, "{stdout}");
    assert!(stdout.contains("peak MiB") && stdout.contains("mean/(err/√K)"), "{stdout}");
    let csv = std::fs::read_to_string(csv).expect("a table");
    let columns = csv.lines().next().expect("a header").split(',').count();
    assert_eq!(csv.lines().count(), 1 + 2 * 4 * 3);
    assert!(csv.lines().all(|l| l.split(',').count() == columns), "{csv}");
    let rounds = std::fs::read_to_string(directory.path().join("out-rounds.csv")).expect("a table");
    assert!(rounds.lines().count() == 1 + 2 * 4 && rounds.lines().all(|l| l.split(',').count() == 14), "{rounds}");
    let svg = std::fs::read_to_string(svg).expect("a chart");
    assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>") && svg.contains("materialising"));
}

#[test]
fn bench_makes_rows_that_keep_as_many_entries_as_asked() {
    let shape = ["--shape", "gpt2", "--tokens", "64", "--vocab", "3000", "--hidden", "64", "--dtype", "f32"];
    let bench =
        |kept| cce(&[&["bench", "--rounds", "0", "--methods", "unbiased", "--kept", kept], &shape[..]].concat());
    let result = bench("20,400,900");
    let stdout = text(&result.stdout);
    assert!(result.status.success(), "{stdout}{}", text(&result.stderr));
    let kept: Vec<f64> = stdout
        .lines()
        .filter_map(|line| line.split_once("entries a row: ")?.1.split(' ').next()?.parse().ok())
        .collect();
    for (kept, asked) in kept.iter().zip([20.0, 400.0, 900.0]) {
        assert!((kept / asked - 1.0).abs() < 0.4, "{stdout}"); // of 32 rows of these 64
    }
    assert_eq!((kept.len(), stdout.matches("verified").count()), (3, 3), "{stdout}");
    // No softmax keeps more than 1 / ε.
    let refused = bench("1100");
    assert!(!refused.status.success() && text(&refused.stderr).contains("1100"), "{}", text(&refused.stderr));
}

#[test]
fn bench_takes_a_file_and_refuses_unknown_shapes() {
    let setting = Setting::new(&basic());
    let input = setting.path("in.safetensors");
    let result = cce(&["bench", "--input", utf8(&input), "--rounds", "1", "--eps", "2^-6"]);
    assert!(result.status.success(), "{}{}", text(&result.stdout), text(&result.stderr));
    let ignored = targets().iter().filter(|&&target| target < 0).count();
    let surveyed = format!("N={TOKENS} V=300 D=10 f32");
    let stdout = text(&result.stdout);
    assert!(
        stdout.contains(&surveyed) && stdout.contains(&format!("{ignored} of {TOKENS} tokens ignored")),
        "{stdout}"
    );
    let refused = cce(&["bench", "--profile", "--input", utf8(&input)]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(text(&refused.stderr).contains("--profile is for --backend cuda"), "{}", text(&refused.stderr));
    let refused = cce(&["bench", "--shape", "no_such_model"]);
    assert_eq!(refused.status.code(), Some(2));
    assert_eq!(text(&refused.stderr).lines().count(), 1);
}

#[test]
fn generated_inputs_are_the_benchmarks_own() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("inputs.safetensors");
    let shape = ["--shape", "gpt2", "--tokens", "40", "--vocab", "900", "--hidden", "32"];
    let (softcap, ignored) = (["--softcap", "30"], ["--ignored", "0.4"]);
    let generate = ["generate", "--dtype", "f32", "--output", utf8(&file)];
    let generated = cce(&[&generate, &shape[..], &softcap[..], &ignored[..]].concat());
    assert!(generated.status.success(), "{}", text(&generated.stderr));
    let survey = text(&generated.stdout);
    let survey = survey.lines().last().expect("a survey");
    assert!(survey.ends_with(" of 40 tokens ignored") && !survey.contains("; 0 of"), "{survey}");
    let rounds = ["--rounds", "0", "--methods", "unbiased,exact,evaluation,baseline"];
    for input in [&["--input", utf8(&file)][..], &[&["--dtype", "f32"], &shape[..], &ignored[..]].concat()] {
        let result = cce(&[&["bench"], input, &softcap[..], &rounds[..]].concat());
        let stdout = text(&result.stdout);
        assert!(result.status.success() && stdout.contains(survey), "{stdout}{}", text(&result.stderr));
        assert_eq!(stdout.matches("verified").count(), 4, "{stdout}");
    }
}

/// T, the baseline where the build had an nvcc, and the check of all: by the driver and cuBLAS that the emulator stands in for.
#[cfg(all(feature = "cublas", target_os = "linux"))]
#[test]
fn bench_runs_on_the_emulated_gpu_and_keeps_to_small_shapes() {
    let directory = tempfile::tempdir().expect("a directory");
    let csv = directory.path().join("out.csv");
    let bench = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cce"));
        command.args(["bench", "--backend", "cuda", "--shape", "gpt2"]).args(arguments);
        let libraries = cut_cross_entropy_emulator::library_dir();
        command.env("LD_LIBRARY_PATH", libraries).env("EMU_CHECK", "0").output().expect("the binary runs")
    };
    let shape = ["--tokens", "33", "--vocab", "300", "--hidden", "24", "--dtype", "bf16", "--softcap", "0,30"];
    let methods = ["--methods", "unbiased,exact,threshold,evaluation,baseline", "--rounds", "1", "--csv", utf8(&csv)];
    let result = bench(&[&shape[..], &methods[..], &["--ignored", "0.3"]].concat());
    let stdout = text(&result.stdout);
    assert!(result.status.success() && stdout.contains(" ignored 0.3: N=33 "), "{stdout}{}", text(&result.stderr));
    let baselines = 2 - stdout.matches("skipped materialising").count();
    assert_eq!(stdout.matches("verified").count(), 2 * 4 + baselines, "{stdout}");
    let csv = std::fs::read_to_string(csv).expect("a table");
    let columns = csv.lines().next().expect("a header").split(',').count();
    assert!(csv.lines().all(|l| l.split(',').count() == columns) && csv.contains("(emulated)"), "{csv}");

    let csv = directory.path().join("profiled.csv");
    let profile = ["--methods", "unbiased,evaluation", "--rounds", "2", "--profile", "--csv", utf8(&csv)];
    let result = bench(&[&shape[..8], &profile[..]].concat());
    let stdout = text(&result.stdout);
    assert!(result.status.success() && stdout.contains("launches of evaluation"), "{stdout}{}", text(&result.stderr));
    let launches = std::fs::read_to_string(directory.path().join("profiled-launches.csv")).expect("a table");
    let columns = launches.lines().next().expect("a header").split(',').count();
    assert!(launches.lines().all(|l| l.split(',').count() == columns), "{launches}");
    let of = |method: &str, kernel: &str| launches.lines().any(|l| l.contains(&format!(",{method},{kernel},false,")));
    assert!(of("unbiased 2^-10", "lce_filter") && of("evaluation", "lce_reduce_loss"), "{launches}");
    assert!(!of("evaluation", "lce_filter"), "{launches}");

    let refused = bench(&[]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(text(&refused.stderr).contains("the emulated GPU is for checking"), "{}", text(&refused.stderr));
}

#[test]
fn info_prints_version_backends_and_the_plan() {
    let stdout =
        text(&cce(&["info", "--tokens", "512", "--vocab", "32000", "--hidden", "256", "--dtype", "f32"]).stdout);
    for part in [env!("CARGO_PKG_VERSION"), "backend cpu", "N=512 V=32000 D=256 f32", "workspace", "token blocks"] {
        assert!(stdout.contains(part), "{part}: {stdout}");
    }
    let stdout = text(&cce(&["info", "--shape", "gemma2_2b"]).stdout);
    assert!(stdout.contains("N=8192 V=256000 D=2304 bf16"), "{stdout}");
    assert!(text(&cce(&["info"]).stdout).contains("llama3_8b"));
}

#[test]
fn the_plan_for_a_gpu_that_is_not_there_follows_the_choice_of_kernels() {
    let info = |kernels| cce(&["info", "--shape", "gemma2_2b", "--device", "h200", "--kernels", kernels]);
    for (kernels, parts) in [
        ("auto", ["hopper: clusters of 2, lead 2", "lce_forward_sm90_cluster_bf16"]),
        ("hopper:cluster=off,lead=3", ["hopper: no clusters, lead 3", "lce_forward_sm90_bf16"]),
        ("portable", ["tiles of 128 classes", "2 blocks a multiprocessor (f32: 1), or 66 clusters"]),
    ] {
        let stdout = text(&info(kernels).stdout);
        assert!(parts.iter().all(|part| stdout.contains(part)), "{kernels}: {stdout}");
    }
    let refused = info("hopper:lead=4");
    assert_eq!(refused.status.code(), Some(2));
    assert!(text(&refused.stderr).contains("a lead is 0 to 3 steps"), "{}", text(&refused.stderr));
}

/// As in `cce info | head -1`: no panic, no message, the status that shells give a broken pipe; and a file that was asked for
/// is complete.
#[test]
fn a_reader_that_is_gone_ends_every_command_quietly() {
    let setting = Setting::new(&basic());
    let whole = setting.output(&[]);
    let [input, output, generated] =
        ["in", "again", "generated"].map(|name| setting.path(&format!("{name}.safetensors")));
    let run = ["run", "--input", utf8(&input), "--output", utf8(&output)];
    let shape = ["--shape", "gpt2", "--tokens", "40", "--vocab", "900", "--hidden", "32"];
    let ends = |arguments: &[&str]| {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let result = Command::new(env!("CARGO_BIN_EXE_cce")).args(arguments).stdout(writer).output().expect("it runs");
        assert_eq!((result.status.code(), text(&result.stderr)), (Some(141), String::new()), "{arguments:?}");
    };
    ends(&["info"]);
    ends(&run);
    assert_eq!(std::fs::read(&output).expect("the output"), whole);
    ends(&[&run[..], &["--json"]].concat());
    ends(&["verify", "--only", "softcap"]);
    ends(&[&["bench", "--rounds", "1"], &shape[..]].concat());
    ends(&[&["generate", "--output", utf8(&generated)], &shape[..]].concat());
    assert!(std::fs::read(&generated).is_ok_and(|file| tensor_f32(&file, "classifier").is_some()));
}

/// Each option has its text beside it or on the line below.
#[test]
fn help_documents_every_option() {
    for command in ["info", "run", "verify", "bench", "generate"] {
        let help = text(&cce(&[command, "-h"]).stdout);
        let lines: Vec<&str> = help.lines().map(str::trim).collect();
        let options: Vec<usize> = (0..lines.len()).filter(|&k| lines[k].starts_with('-')).collect();
        assert!(options.len() >= 3, "{help}");
        for k in options {
            let beside = lines[k].split_once("  ").map(|(_, text)| text.trim());
            let below = lines.get(k + 1).filter(|line| !line.starts_with('-'));
            let description = beside.or(below.copied()).unwrap_or("");
            assert!(description.len() > 8, "{command}: `{}` has no text", lines[k]);
        }
    }
}
