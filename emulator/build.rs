//! Builds the emulated driver with g++: the runtime, the repository's kernels and the emulator's example kernels, instrumented, in
//! libcuda.so.1; NVRTC beside it; and the unversioned names that loaders ask for first. An object is kept as long as what went
//! into it stays the same.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::{env, fs, thread};

// Line tables are all that reports need; the rest of -g would triple the time.
// Headers of C++20 take half as long again as those of C++17, and most of the runtime's compilation is headers.
const RUNTIME: &[&str] = &["-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"];
// The compiler tells every load and store to the emulator's own callbacks; no sanitizer library is linked. No contraction: what
// the source says is what is computed, as far as a host can.
const KERNEL: &[&str] = &[
    "-std=c++20",
    "-x",
    "c++",
    "-O1",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fsanitize=thread,undefined",
    // Half of the compilation. A wild pointer is found where it is used, an index by the checks of bounds.
    "-fno-sanitize=pointer-overflow,object-size",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
    "-Wno-tsan",
];

/// One call of the compiler, and the hash of all that it reads.
struct Unit {
    object: PathBuf,
    arguments: Vec<String>,
    key: u64,
}

fn main() {
    if env::var("CARGO_CFG_TARGET_OS").unwrap() != "linux" {
        // An ELF library that goes by the driver's name: the crate is empty elsewhere, and tests say that they are left out.
        return;
    }
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap());
    // What is built does not depend on cargo's profile: EMU_OUT lets several share it.
    println!("cargo::rerun-if-env-changed=EMU_OUT");
    let out = PathBuf::from(env::var_os("EMU_OUT").or_else(|| env::var_os("OUT_DIR")).unwrap());
    let kernels = here.parent().unwrap().join("kernels");
    let libraries = out.join("lib");
    fs::create_dir_all(&libraries).unwrap();
    for watched in ["include", "runtime", "driver", "ptx", "kernels", "build.rs"] {
        println!("cargo::rerun-if-changed={}", here.join(watched).display());
    }
    println!("cargo::rerun-if-changed={}", kernels.display());
    println!("cargo::rerun-if-env-changed=CXX");
    println!("cargo::rustc-env=EMULATOR_LIBRARY_DIR={}", libraries.display());

    let mut headers = Vec::new();
    for folder in ["include", "runtime", "driver", "ptx"] {
        headers.extend(files(&here.join(folder), "hpp"));
    }
    let headers: Vec<String> = headers.iter().map(|h| fs::read_to_string(h).unwrap()).collect();
    let mut units = Vec::new();
    for folder in ["runtime", "driver", "ptx"] {
        for source in files(&here.join(folder), "cpp").into_iter().chain(files(&here.join(folder), "S")) {
            let flags = match (source.extension().unwrap().to_str(), folder) {
                (Some("S"), _) => vec!["-fPIC"],
                // Nobody waits for them.
                (_, "driver") => [RUNTIME, &["-O1"]].concat(),
                _ if source.ends_with("ptx/parser.cpp") => [RUNTIME, &["-O1"]].concat(),
                _ => RUNTIME.to_vec(),
            };
            units.push(unit(&out, folder, &source, &flags, &[], (fs::read(&source).unwrap(), &headers)));
        }
    }
    let includes: Vec<String> = [here.join("include"), kernels.clone(), kernels.join("prim")]
        .iter()
        .map(|p| format!("-I{}", p.display()))
        .collect();
    let baseline = here.parent().unwrap().join("benches/cuda");
    println!("cargo::rerun-if-changed={}", baseline.display());
    let mut kernel = KERNEL.to_vec();
    if env::var("CARGO_CFG_TARGET_ARCH").unwrap() != "x86_64" {
        // A parameter passed by value is aligned to 16 bytes there, a tensor map to 64 on a device.
        kernel.push("-fno-sanitize=alignment");
    }
    for (folder, tag) in [(kernels, "kernel"), (here.join("kernels"), "example"), (baseline, "bench")] {
        for source in files(&folder, "cu") {
            let expanded = preprocess(&source, &includes);
            let found = find_kernels(&expanded);
            let wrapper = out.join(format!("{tag}-{}.cpp", source.file_stem().unwrap().to_str().unwrap()));
            let exports: String = found.iter().map(|k| k.export()).collect();
            let text = format!("#include \"{}\"\n#include \"export.hpp\"\n{exports}", source.display());
            write_if_changed(&wrapper, &text);
            units.push(unit(&out, tag, &wrapper, &kernel, &includes, (expanded, text)));
        }
    }
    compile(&units);

    let objects = |names: &'static [&str], of: bool| {
        let listed = move |u: &&Unit| names.iter().any(|name| u.object.ends_with(name)) == of;
        units.iter().filter(listed).map(|u| u.object.clone())
    };
    // Libraries of one object; all others make the driver.
    static ALONE: [&str; 2] = ["driver-nvrtc.o", "driver-cublas.o"];
    link(&libraries, "libcuda.so.1", objects(&ALONE, false), None);
    link(&libraries, "libnvrtc.so.13", objects(&ALONE[..1], true), None);
    link(&libraries, "libcublas.so.13", objects(&ALONE[1..], true), None);
    // What depends on a library answers for its symbols too.
    for (name, on) in [
        ("libcuda.so", "libcuda.so.1"),
        ("libnvrtc.so", "libnvrtc.so.13"),
        ("libnvrtc.so.12", "libnvrtc.so.13"),
        ("libcublas.so", "libcublas.so.13"),
    ] {
        link(&libraries, name, std::iter::empty(), Some(on));
    }
}

fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(folder)
        .map(|entries| {
            entries.map(|e| e.unwrap().path()).filter(|p| p.extension().is_some_and(|e| e == extension)).collect()
        })
        .unwrap_or_default();
    found.sort();
    found
}

fn write_if_changed(path: &Path, text: &str) {
    if fs::read_to_string(path).is_ok_and(|old| old == text) {
        return;
    }
    fs::write(path, text).unwrap();
}

fn compiler() -> Command {
    cc::Build::new()
        .cpp(true)
        .opt_level(0)
        .debug(false)
        .warnings(false)
        .no_default_flags(true)
        .cargo_metadata(false)
        .get_compiler()
        .to_command()
}

fn run(mut command: Command) -> Vec<u8> {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?} failed:\n{said}");
    for line in said.lines().filter(|l| l.contains("warning:")) {
        println!("cargo::warning={line}");
    }
    output.stdout
}

fn unit(out: &Path, tag: &str, source: &Path, flags: &[&str], includes: &[String], content: impl Hash) -> Unit {
    let object = out.join(format!("{tag}-{}.o", source.file_stem().unwrap().to_str().unwrap()));
    let mut arguments: Vec<String> = flags.iter().map(|f| f.to_string()).chain(includes.iter().cloned()).collect();
    arguments.extend(["-c".into(), source.display().to_string(), "-o".into(), object.display().to_string()]);
    let mut hasher = DefaultHasher::new();
    (&arguments, content).hash(&mut hasher);
    Unit { object, arguments, key: hasher.finish() }
}

fn compile(units: &[Unit]) {
    let stamp = |u: &Unit| u.object.with_extension("key");
    let stale = |u: &&Unit| !u.object.exists() || fs::read_to_string(stamp(u)).ok() != Some(u.key.to_string());
    for u in units {
        // mutants.py compiles a changed kernel in the same way.
        write_if_changed(&u.object.with_extension("arguments"), &u.arguments.join("\n"));
    }
    let queue = Mutex::new(units.iter().filter(stale).collect::<Vec<_>>());
    let jobs = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(2);
    thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                loop {
                    let Some(unit) = queue.lock().unwrap().pop() else { break };
                    let mut command = compiler();
                    command.args(&unit.arguments);
                    run(command);
                    fs::write(stamp(unit), unit.key.to_string()).unwrap();
                }
            });
        }
    });
}

fn link(folder: &Path, name: &str, objects: impl Iterator<Item = PathBuf>, on: Option<&str>) {
    let mut command = compiler();
    // Written beside and renamed: a process may have the old one mapped.
    let fresh = folder.join(format!("{name}.new"));
    command.args(["-shared", "-Wl,-Bsymbolic", &format!("-Wl,-soname,{name}"), "-o"]).arg(&fresh).args(objects);
    if let Some(on) = on {
        command.args(["-Wl,--no-as-needed", "-Wl,-rpath,$ORIGIN"]).arg(folder.join(on));
    } else {
        command.args(["-ldl", "-lpthread"]);
    }
    run(command);
    fs::rename(fresh, folder.join(name)).unwrap();
}

fn preprocess(source: &Path, includes: &[String]) -> String {
    let mut command = compiler();
    command.args(["-std=c++20", "-x", "c++", "-E", "-DEMU_SCAN"]).args(includes).arg(source);
    String::from_utf8_lossy(&run(command)).into_owned()
}

#[derive(Default)]
struct Kernel {
    name: String,
    bounds: String,
    cluster: String,
}

impl Kernel {
    fn export(&self) -> String {
        let Kernel { name, bounds, cluster } = self;
        let export = format!("EMU_EXPORT({name}, {bounds});\n");
        if cluster.is_empty() { export } else { export + &format!("EMU_CLUSTER({name}, {cluster});\n") }
    }
}

/// The kernels in preprocessed text, macros expanded: `__global__ void __cluster_dims__(c) __launch_bounds__(b) name(`.
fn find_kernels(text: &str) -> Vec<Kernel> {
    let text: String = text.lines().filter(|l| !l.starts_with('#')).flat_map(|l| [l, "\n"]).collect();
    let mut found = Vec::new();
    for after in text.split("__global__").skip(1) {
        let mut rest = after.trim_start();
        let mut kernel = Kernel::default();
        while let Some(open) = rest.find('(') {
            let name = rest[..open].split_whitespace().last().unwrap_or_default();
            let (inside, behind) = parenthesised(&rest[open..]);
            let inside = inside.split_whitespace().collect::<Vec<_>>().join(" ");
            match name {
                "__launch_bounds__" => kernel.bounds = inside,
                "__cluster_dims__" => kernel.cluster = inside,
                _ => {
                    kernel.name = name.into();
                    found.push(kernel);
                    break;
                }
            }
            rest = behind;
        }
    }
    found
}

/// `(inside) behind`
fn parenthesised(text: &str) -> (&str, &str) {
    let mut depth = 0;
    for (at, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return (&text[1..at], &text[at + 1..]);
        }
    }
    panic!("no closing parenthesis after __global__");
}
