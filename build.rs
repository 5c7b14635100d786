//! Compiles `kernels/` where there is an nvcc, and embeds the result and the sources. Never fails for want of CUDA: what is
//! not compiled here is compiled by NVRTC when it is first used.
//!
//! | variable | effect |
//! |---|---|
//! | `CCE_NVCC` | the nvcc to use; `0`: none |
//! | `CCE_CUDA_ARCHS` | architectures in place of all that this nvcc knows, e.g. `80,90a` |
//! | `CCE_REQUIRE_NVCC` | fail where kernels cannot be compiled now |

use std::error::Error;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{env, fs};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Compute capabilities with machine code of their own; newer ones run the PTX.
const ARCHS: [&str; 6] = ["80", "86", "89", "90", "100", "120"];
const VARIABLES: &str =
    "CCE_NVCC CCE_CUDA_ARCHS CCE_REQUIRE_NVCC NVCC CUDA_HOME CUDA_PATH CUDA_ROOT NVCC_CCBIN PATH DOCS_RS";

fn main() -> Result<()> {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return Ok(());
    }
    println!("cargo::rerun-if-changed=kernels");
    VARIABLES.split(' ').for_each(|name| println!("cargo::rerun-if-env-changed={name}"));

    let mut files = Vec::new();
    walk(&fs::canonicalize("kernels")?, &mut files)?;
    let (kernels, headers): (Vec<_>, Vec<_>) =
        files.into_iter().partition(|f| f.extension().is_some_and(|e| e == "cu"));
    // What `cce bench` measures against, apart from what the library ships.
    println!("cargo::rerun-if-changed=benches/cuda");
    let wanted = env::var_os("CARGO_FEATURE_CUBLAS").is_some();
    let baseline = fs::canonicalize("benches/cuda/baseline.cu").ok().filter(|_| wanted);
    let sources: Vec<PathBuf> = kernels.iter().chain(&baseline).cloned().collect();
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let flag = |name: &str| env::var(name).is_ok_and(|value| !value.is_empty() && value != "0");
    let mut images = match find_nvcc().map(|nvcc| compile_all(&nvcc, &sources, &out)) {
        None if flag("CCE_REQUIRE_NVCC") => return Err("CCE_REQUIRE_NVCC is set, but there is no nvcc".into()),
        Some(Err(error)) if flag("CCE_REQUIRE_NVCC") => return Err(error),
        Some(Ok(images)) => images,
        Some(Err(error)) => {
            let why = error.to_string().replace('\n', " ");
            println!("cargo::warning=CUDA kernels will be compiled when first used: {why}");
            Vec::new()
        }
        None => Vec::new(),
    };
    let of_baseline = images.split_off(kernels.len().min(images.len()));
    let image = of_baseline.first().map_or("None".into(), |path| format!("Some(include_bytes!({path:?}))"));
    fs::write(out.join("baseline.rs"), format!("static IMAGE: Option<&[u8]> = {image};\n"))?;
    fs::write(out.join("kernels.rs"), table(&kernels, &headers, &images)?)?;
    Ok(())
}

/// All files under `folder`, in an order that does not depend on the file system.
fn walk(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let mut entries = fs::read_dir(folder)?.map(|e| Ok(e?.path())).collect::<Result<Vec<_>>>()?;
    entries.sort();
    for path in entries {
        match path.extension().and_then(|e| e.to_str()) {
            _ if path.is_dir() => walk(&path, files)?,
            Some("cu" | "cuh" | "h") => files.push(path),
            _ => {}
        }
    }
    Ok(())
}

fn find_nvcc() -> Option<PathBuf> {
    if env::var_os("DOCS_RS").is_some() || env::var("CCE_NVCC").is_ok_and(|value| value == "0") {
        return None;
    }
    let named = ["CCE_NVCC", "NVCC"].into_iter().filter_map(env::var_os).map(PathBuf::from);
    let roots = ["CUDA_HOME", "CUDA_PATH", "CUDA_ROOT"].into_iter().filter_map(env::var_os).map(PathBuf::from);
    let path = env::var_os("PATH").map(|p| env::split_paths(&p).collect::<Vec<_>>()).unwrap_or_default();
    let usual = ["/usr/local/cuda", "/opt/cuda"].into_iter().map(PathBuf::from);
    let folders = roots.map(|r| r.join("bin")).chain(path).chain(usual.map(|r| r.join("bin")));
    named.chain(folders.map(|f| f.join(format!("nvcc{}", env::consts::EXE_SUFFIX)))).find(|nvcc| nvcc.is_file())
}

/// One fat binary a kernel file, compiled side by side.
fn compile_all(nvcc: &Path, kernels: &[PathBuf], out: &Path) -> Result<Vec<PathBuf>> {
    let known = output(Command::new(nvcc).arg("--list-gpu-arch"))?;
    let archs: Vec<String> = match env::var("CCE_CUDA_ARCHS").ok().filter(|value| !value.is_empty()) {
        Some(list) => list.split(',').map(|arch| arch.trim().to_string()).collect(),
        None => {
            let knows = |arch: &&str| known.lines().any(|line| line == format!("compute_{arch}"));
            ARCHS.into_iter().filter(knows).map(String::from).collect()
        }
    };
    // A third of the size, where nvcc can. Drivers too old to unpack it compile the sources instead.
    let small = output(Command::new(nvcc).arg("--help"))?.contains("--compress-mode");
    let (next, threads) = (AtomicUsize::new(0), env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(4));
    let worker = || {
        while let Some(kernel) = kernels.get(next.fetch_add(1, Ordering::Relaxed)) {
            compile(nvcc, kernel, &image_path(kernel, out), &archs, small).map_err(|e| e.to_string())?;
        }
        Ok::<(), String>(())
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().try_for_each(|w| w.join().unwrap_or_else(|_| Err("a thread panicked".into())))
    })?;
    Ok(kernels.iter().map(|kernel| image_path(kernel, out)).collect())
}

fn image_path(kernel: &Path, out: &Path) -> PathBuf {
    out.join(kernel.file_name().unwrap_or_default()).with_extension("fatbin")
}

fn compile(nvcc: &Path, kernel: &Path, image: &Path, archs: &[String], small: bool) -> Result<()> {
    let mut command = Command::new(nvcc);
    command.args(["--fatbin", "-std=c++17", "-lineinfo", "-I", "kernels", "-o"]).arg(image).arg(kernel);
    command.args(small.then_some("--compress-mode=size"));
    // Instructions that only Hopper has: machine code for it and nothing else.
    if kernel.file_name().is_some_and(|name| name.to_string_lossy().contains("_sm90")) {
        command.arg("-gencode=arch=compute_90a,code=sm_90a");
    } else {
        for arch in archs {
            command.arg(format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
        }
        command.arg("-gencode=arch=compute_80,code=compute_80");
    }
    output(&mut command).map(drop)
}

fn output(command: &mut Command) -> Result<String> {
    let done = command.output().map_err(|e| format!("{}: {e}", command.get_program().display()))?;
    if done.status.success() {
        return Ok(String::from_utf8_lossy(&done.stdout).into_owned());
    }
    Err(format!("{} failed: {}", command.get_program().display(), String::from_utf8_lossy(&done.stderr)).into())
}

/// What `src/cuda/module.rs` includes: the files by their names in `kernels/`.
fn table(kernels: &[PathBuf], headers: &[PathBuf], images: &[PathBuf]) -> Result<String> {
    let root = fs::canonicalize("kernels")?;
    let name = |path: &Path| path.strip_prefix(&root).unwrap_or(path).to_string_lossy().replace('\\', "/");
    let mut text = String::new();
    let mut list = |constant: &str, include: &str, files: &[PathBuf], contents: &[PathBuf]| {
        writeln!(text, "static {constant}] = &[")?;
        for (path, file) in files.iter().zip(contents) {
            writeln!(text, "    ({:?}, {include}!({file:?})),", name(path))?;
        }
        writeln!(text, "];")
    };
    list("SOURCES: &[(&str, &str)", "include_str", kernels, kernels)?;
    list("HEADERS: &[(&str, &str)", "include_str", headers, headers)?;
    list("IMAGES: &[(&str, &[u8])", "include_bytes", kernels, images)?;
    Ok(text)
}
