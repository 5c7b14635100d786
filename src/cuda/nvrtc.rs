//! CUDA C++ to machine code at run time, kept on disk: for builds without nvcc, and for devices that the build did not know.

use crate::{Error, Result};
use libloading::{Library, Symbol};
use std::ffi::{CStr, CString, OsString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::{env, fs, process};

/// A source file and the headers that it may include.
#[derive(Debug, Clone, Copy)]
pub(super) struct Program<'a> {
    pub name: &'a str,
    pub source: &'a str,
    pub headers: &'a [(&'a str, &'a str)],
}

/// Machine code of a program for one architecture, and where it is kept.
#[derive(Debug)]
pub(super) struct Cached {
    path: Option<PathBuf>,
}

fn failed(call: &'static str, reason: String) -> Error {
    Error::Device { call: call.into(), reason }
}

impl Program<'_> {
    fn options(arch: u32) -> [String; 3] {
        [
            format!("--gpu-architecture=sm_{arch}{}", if arch == 90 { "a" } else { "" }),
            "-std=c++17".into(),
            "-lineinfo".into(),
        ]
    }

    /// The place of this program's code for `arch` in the cache.
    pub fn cached(&self, arch: u32) -> Result<Cached> {
        let (major, minor) = Nvrtc::get()?.version()?;
        let mut hash = Hash::default();
        hash.add(format!("{major}.{minor}").as_bytes());
        Self::options(arch).iter().for_each(|option| hash.add(option.as_bytes()));
        hash.add(self.source.as_bytes());
        self.headers.iter().for_each(|(name, text)| [name, text].iter().for_each(|s| hash.add(s.as_bytes())));
        let stem = self.name.replace(['/', '.'], "_");
        Ok(Cached { path: cache_folder().map(|folder| folder.join(format!("{stem}-sm_{arch}-{}.cubin", hash.hex()))) })
    }

    /// Compiles for `arch`, e.g. 86.
    pub fn compile(&self, arch: u32) -> Result<Vec<u8>> {
        Nvrtc::get()?.compile(self, &Self::options(arch))
    }
}

impl Cached {
    pub fn read(&self) -> Option<Vec<u8>> {
        fs::read(self.path.as_ref()?).ok().filter(|code| !code.is_empty())
    }

    /// Keeps `code`. Where that is not possible, the next process compiles again.
    pub fn write(&self, code: &[u8]) {
        static SERIAL: AtomicU32 = AtomicU32::new(0);
        let Some(path) = &self.path else { return };
        let Some(folder) = path.parent() else { return };
        // Renaming is atomic: no reader sees half a file, whoever else writes the same one.
        let temporary = folder.join(format!(".{}-{}", process::id(), SERIAL.fetch_add(1, Ordering::Relaxed)));
        let done = fs::create_dir_all(folder)
            .and_then(|()| fs::write(&temporary, code))
            .and_then(|()| fs::rename(&temporary, path));
        if done.is_err() {
            let _ = fs::remove_file(&temporary);
        }
    }
}

/// `CCE_CACHE_DIR` (empty: keep nothing), else the user's cache folder.
fn cache_folder() -> Option<PathBuf> {
    let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    match env::var_os("CCE_CACHE_DIR") {
        Some(folder) => Some(PathBuf::from(folder)).filter(|f| !f.as_os_str().is_empty()),
        None => Some(set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")))?.join("cut-cross-entropy")),
    }
}

/// Two FNV-1a hashes side by side: 128 bits, the same in every build.
struct Hash([u64; 2]);

impl Default for Hash {
    fn default() -> Self {
        Hash([0xCBF2_9CE4_8422_2325, 0x6C62_272E_07BB_0142])
    }
}

impl Hash {
    fn add(&mut self, bytes: &[u8]) {
        let length = (bytes.len() as u64).to_le_bytes();
        for byte in length.iter().chain(bytes) {
            self.0[0] = (self.0[0] ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01B3);
            self.0[1] = (self.0[1].rotate_left(5) ^ u64::from(*byte)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        }
    }
    fn hex(&self) -> String {
        format!("{:016x}{:016x}", self.0[0], self.0[1])
    }
}

type Handle = *mut c_void;
type Text = *const c_char;

/// NVRTC, opened by hand: cudarc's own loader panics where it does not find it, and does not look beyond bare names.
struct Nvrtc(Library);

impl Nvrtc {
    fn get() -> Result<&'static Nvrtc> {
        static NVRTC: OnceLock<Result<Nvrtc>> = OnceLock::new();
        NVRTC.get_or_init(Nvrtc::open).as_ref().map_err(Clone::clone)
    }

    fn open() -> Result<Nvrtc> {
        let names: &[&str] = if cfg!(windows) {
            &["nvrtc64_130_0.dll", "nvrtc64_120_0.dll"]
        } else {
            &["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]
        };
        for name in names {
            if let Ok(library) = open(Path::new(name)) {
                return Ok(Nvrtc(library));
            }
        }
        for folder in library_folders() {
            for name in names {
                let path = folder.join(name);
                if !path.is_file() {
                    continue;
                }
                // Some packages of NVRTC do not say where its second library is: load that one first.
                for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
                    let name = entry.file_name().to_string_lossy().into_owned();
                    if name.starts_with("libnvrtc-builtins.so") {
                        open(&entry.path()).map(std::mem::forget).ok();
                    }
                }
                if let Ok(library) = open(&path) {
                    return Ok(Nvrtc(library));
                }
            }
        }
        Err(failed(
            "nvrtc",
            "this build holds no machine code for this device, and libnvrtc, which would compile it, is nowhere to be \
             found: install CUDA's NVRTC, set CUDA_HOME, or build where nvcc is"
                .into(),
        ))
    }

    fn symbol<T>(&self, name: &'static str) -> Result<Symbol<'_, T>> {
        // SAFETY: each caller asks for the type that NVRTC's header declares for `name`.
        unsafe { self.0.get(name.as_bytes()) }.map_err(|_| failed(name, "this libnvrtc is too old to have it".into()))
    }

    fn version(&self) -> Result<(c_int, c_int)> {
        let function = self.symbol::<unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int>("nvrtcVersion")?;
        let (mut major, mut minor) = (0, 0);
        // SAFETY: writes the two numbers.
        let code = unsafe { function(&mut major, &mut minor) };
        if code == 0 { Ok((major, minor)) } else { Err(failed("nvrtcVersion", format!("error {code}"))) }
    }

    fn compile(&self, program: &Program<'_>, options: &[String]) -> Result<Vec<u8>> {
        type Create = unsafe extern "C" fn(*mut Handle, Text, Text, c_int, *const Text, *const Text) -> c_int;
        let create = self.symbol::<Create>("nvrtcCreateProgram")?;
        let compile =
            self.symbol::<unsafe extern "C" fn(Handle, c_int, *const Text) -> c_int>("nvrtcCompileProgram")?;
        let destroy = self.symbol::<unsafe extern "C" fn(*mut Handle) -> c_int>("nvrtcDestroyProgram")?;

        let c_string = |text: &str| CString::new(text).map_err(|e| failed("nvrtcCreateProgram", e.to_string()));
        let c_strings = |texts: Vec<&str>| texts.into_iter().map(c_string).collect::<Result<Vec<CString>>>();
        let pointers = |strings: &[CString]| strings.iter().map(|s| s.as_ptr()).collect::<Vec<Text>>();
        let (source, name) = (c_string(program.source)?, c_string(program.name)?);
        // A header is found under the name that the directive gives: from the root of `kernels/`, or, between
        // neighbours, without the folder. A name may be given once.
        let nested = program.headers.iter().filter_map(|(name, text)| Some((name.rsplit_once('/')?.1, *text)));
        let (names, texts): (Vec<&str>, Vec<&str>) = program.headers.iter().copied().chain(nested).unzip();
        let (names, texts, options) =
            (c_strings(names)?, c_strings(texts)?, c_strings(options.iter().map(String::as_str).collect())?);
        let (names_at, texts_at, options_at) = (pointers(&names), pointers(&texts), pointers(&options));

        let mut handle: Handle = std::ptr::null_mut();
        // SAFETY: every pointer is to a string that outlives the program, the arrays have the lengths given.
        let code = unsafe {
            create(
                &mut handle,
                source.as_ptr(),
                name.as_ptr(),
                names.len() as c_int,
                texts_at.as_ptr(),
                names_at.as_ptr(),
            )
        };
        if code != 0 {
            return Err(failed("nvrtcCreateProgram", format!("error {code}")));
        }
        // SAFETY: the program was created and is not destroyed yet.
        let code = unsafe { compile(handle, options.len() as c_int, options_at.as_ptr()) };
        let result = if code == 0 {
            self.bytes(handle, "nvrtcGetCUBINSize", "nvrtcGetCUBIN")
        } else {
            let log = self.bytes(handle, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog").unwrap_or_default();
            let log =
                CStr::from_bytes_until_nul(&log).map(|log| log.to_string_lossy().into_owned()).unwrap_or_default();
            Err(failed("nvrtcCompileProgram", format!("{}: error {code}: {log}", program.name)))
        };
        // SAFETY: the last use of the program.
        unsafe { destroy(&mut handle) };
        result
    }

    /// What a pair of functions, size and content, says of a program.
    fn bytes(&self, program: Handle, size: &'static str, content: &'static str) -> Result<Vec<u8>> {
        let get_size = self.symbol::<unsafe extern "C" fn(Handle, *mut usize) -> c_int>(size)?;
        let get = self.symbol::<unsafe extern "C" fn(Handle, *mut c_char) -> c_int>(content)?;
        let mut len = 0;
        // SAFETY: the program is alive; writes one number.
        let code = unsafe { get_size(program, &mut len) };
        if code != 0 {
            return Err(failed(size, format!("error {code}")));
        }
        let mut bytes = vec![0_u8; len];
        // SAFETY: the program is alive, and the buffer has the size just asked for.
        let code = unsafe { get(program, bytes.as_mut_ptr().cast()) };
        if code == 0 { Ok(bytes) } else { Err(failed(content, format!("error {code}"))) }
    }
}

fn open(path: &Path) -> std::result::Result<Library, libloading::Error> {
    // SAFETY: the initialisers of NVRTC's libraries may run at any time and on any thread.
    unsafe { Library::new(path) }
}

/// Where toolkits and Python's packages put NVRTC.
fn library_folders() -> Vec<PathBuf> {
    let set = |name: &str| env::var_os(name).filter(|v: &OsString| !v.is_empty()).map(PathBuf::from);
    let mut folders = Vec::new();
    let roots = ["CUDA_HOME", "CUDA_PATH", "CUDA_ROOT"].into_iter().filter_map(set);
    for root in roots.chain(["/usr/local/cuda", "/opt/cuda"].map(PathBuf::from)) {
        folders.extend(["lib64", "lib", "bin"].map(|name| root.join(name)));
    }
    for root in ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(set) {
        for python in fs::read_dir(root.join("lib")).into_iter().flatten().flatten() {
            let packages = python.path().join("site-packages/nvidia");
            folders.extend(["cu13/lib", "cuda_nvrtc/lib"].map(|name| packages.join(name)));
        }
    }
    folders
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_tells_apart_what_differs() {
        let hash = |parts: &[&str]| {
            let mut hash = Hash::default();
            parts.iter().for_each(|p| hash.add(p.as_bytes()));
            hash.hex()
        };
        assert_ne!(hash(&["ab", "c"]), hash(&["a", "bc"]));
        assert_ne!(hash(&["abc"]), hash(&["abd"]));
        assert_eq!(hash(&["abc"]).len(), 32);
    }
}
