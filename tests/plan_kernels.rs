//! The plan's table of kernels against the kernels: threads and shared memory as nvcc sees them. Skipped without an nvcc.

use cut_cross_entropy::plan::KERNELS;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

fn nvcc() -> Option<PathBuf> {
    let roots = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os).map(|r| PathBuf::from(r).join("bin"));
    let path = env::var_os("PATH").map(|p| env::split_paths(&p).collect::<Vec<_>>()).unwrap_or_default();
    roots.chain(path).chain([PathBuf::from("/usr/local/cuda/bin")]).map(|f| f.join("nvcc")).find(|f| f.is_file())
}

/// A copy of `kernels/` in which each use of shared memory leaves its size in the PTX.
fn marked_copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("writable");
    for entry in fs::read_dir(from).expect("readable") {
        let path = entry.expect("readable").path();
        let target = to.join(path.file_name().expect("a name"));
        if path.is_dir() {
            marked_copy(&path, &target);
            continue;
        }
        let text = fs::read_to_string(&path).expect("UTF-8");
        let declaration = "unsigned char dynamic_smem[];";
        let mark = format!("{declaration} asm volatile(\"// sizeof %0\" :: \"n\"(sizeof(T)));");
        fs::write(target, text.replace(declaration, &mark)).expect("writable");
    }
}

/// Threads and shared memory of each entry point.
fn compiled(nvcc: &Path) -> HashMap<String, (u32, u32)> {
    let folder = env::temp_dir().join(format!("cce-kernels-{}", std::process::id()));
    marked_copy(&Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels"), &folder);
    let files = fs::read_dir(&folder).expect("readable").map(|entry| entry.expect("readable").path());
    let kernels: Vec<_> = files.filter(|path| path.extension().is_some_and(|e| e == "cu")).collect();
    let found = std::thread::scope(|scope| {
        let folder = &folder;
        let compile = |path: &PathBuf| entry_points(&ptx(nvcc, folder, path));
        let threads: Vec<_> = kernels.iter().map(|path| scope.spawn(move || compile(path))).collect();
        threads.into_iter().flat_map(|t| t.join().expect("compiles")).collect()
    });
    fs::remove_dir_all(&folder).expect("removable");
    found
}

fn ptx(nvcc: &Path, folder: &Path, kernel: &Path) -> String {
    let arch = if kernel.to_string_lossy().contains("_sm90") { "compute_90a" } else { "compute_80" };
    let ptx = kernel.with_extension("ptx");
    let mut command = Command::new(nvcc);
    command.args(["-ptx", "-std=c++17", "-arch", arch, "-I"]).arg(folder).arg("-o").args([ptx.as_path(), kernel]);
    let done = command.output().expect("runs");
    assert!(done.status.success(), "{}: {}", kernel.display(), String::from_utf8_lossy(&done.stderr));
    fs::read_to_string(&ptx).expect("UTF-8")
}

fn entry_points(ptx: &str) -> HashMap<String, (u32, u32)> {
    let mut found = HashMap::new();
    let mut name = String::new();
    for line in ptx.lines() {
        let first_number = |text: &str| text.split([',', ' ']).find_map(|word| word.parse::<u32>().ok());
        if let Some(rest) = line.strip_prefix(".visible .entry ") {
            name = rest.trim_end_matches('(').to_string();
            found.insert(name.clone(), (0, 0));
        } else if let Some(rest) = line.strip_prefix(".maxntid ") {
            found.get_mut(&name).expect("in an entry").0 = first_number(rest).expect("a number");
        } else if let Some((_, rest)) = line.split_once("// sizeof ") {
            let entry = found.get_mut(&name).expect("in an entry");
            entry.1 = entry.1.max(first_number(rest).expect("a number"));
        }
    }
    found
}

#[test]
fn threads_and_shared_memory_are_those_of_the_kernels() {
    let Some(nvcc) = nvcc() else {
        assert!(env::var_os("REQUIRE_NVCC").is_none(), "REQUIRE_NVCC is set, but there is no nvcc");
        eprintln!("skipped: no nvcc");
        return;
    };
    let mut compiled = compiled(&nvcc);
    for kernel in KERNELS {
        let variants = kernel.entry_points();
        let found: Vec<_> =
            variants.iter().map(|v| compiled.remove(v.as_ref()).unwrap_or_else(|| panic!("no kernel {v}"))).collect();
        assert!(found.iter().all(|(threads, _)| *threads == kernel.threads), "{}: {found:?}", kernel.stem);
        let shared = found.iter().map(|(_, shared)| *shared).max();
        assert_eq!(shared, Some(kernel.shared), "{}", kernel.stem);
    }
    assert!(compiled.is_empty(), "kernels that no plan knows: {:?}", compiled.keys());
}
