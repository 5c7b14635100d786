//! The text: Rust sources that cargo has put on this disk, or what `--text` names. No download.

use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// One file of the corpus.
pub struct Document {
    pub text: String,
    pub held_out: bool,
}

/// Files that are neither trivial nor generated tables.
const FILE_BYTES: std::ops::RangeInclusive<u64> = 512..=128 << 10;
/// One file in 20 is held out.
const HELD_OUT_ONE_IN: u64 = 20;
/// Less text than this trains no vocabulary worth the name.
const MIN_BYTES: usize = 1 << 20;

/// Files of the corpus in the order of a hash of their names, up to `max_bytes`: the same files give the same corpus.
pub fn load(text: Option<&Path>, max_bytes: usize) -> Result<Vec<Document>> {
    let mut files = match text {
        Some(path) => text_files(path)?,
        None => crate_sources()?,
    };
    files.sort_by_key(|(name, path)| (fnv1a(name.as_bytes()), path.clone()));
    let mut documents = Vec::new();
    let mut bytes = 0;
    for (name, path) in files {
        let Ok(text) = std::fs::read_to_string(&path) else { continue }; // not UTF-8: not text
        // Another hash than the order's, so that the cap does not decide what is held out.
        let held_out = fnv1a(format!("held out {name}").as_bytes()).is_multiple_of(HELD_OUT_ONE_IN);
        bytes += text.len();
        documents.push(Document { text, held_out });
        if bytes >= max_bytes {
            break;
        }
    }
    if let [single] = &mut documents[..] {
        documents = split_single(std::mem::take(&mut single.text));
    }
    ensure!(
        bytes >= MIN_BYTES && documents.iter().any(|d| d.held_out),
        "{} holds {} KB of text in {} files; at least {} KB are needed. Name a file or a folder with more: --text PATH",
        text.map_or_else(|| "cargo's source cache".into(), |path| path.display().to_string()),
        bytes >> 10,
        documents.len(),
        MIN_BYTES >> 10,
    );
    Ok(documents)
}

/// A single file is cut at lines into 64 pieces, the last of each 20 held out.
fn split_single(text: String) -> Vec<Document> {
    let lines: Vec<&str> = text.split_inclusive('\n').collect();
    let pieces = lines.chunks(lines.len().div_ceil(64).max(1));
    let held_out = |i: usize| (i as u64 + 1).is_multiple_of(HELD_OUT_ONE_IN);
    pieces.enumerate().map(|(i, piece)| Document { text: piece.concat(), held_out: held_out(i) }).collect()
}

/// Name and path of each `.rs` file of each crate in Cargo.lock, as far as cargo has unpacked it.
fn crate_sources() -> Result<Vec<(String, PathBuf)>> {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from).or_else(|| Some(std::env::home_dir()?.join(".cargo")));
    let sources = home.context("no home directory: name a text with --text PATH")?.join("registry/src");
    let registries = std::fs::read_dir(&sources).with_context(|| {
        format!("{} cannot be read, where cargo keeps its sources; name a text: --text PATH", sources.display())
    })?;
    let registries: Vec<PathBuf> = registries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    let mut files = Vec::new();
    for folder in locked_packages().into_values() {
        if let Some(root) = registries.iter().map(|r| r.join(&folder)).find(|root| root.is_dir()) {
            walk(&root, &mut |path| {
                if path.extension().is_some_and(|e| e == "rs") {
                    let inside = path.strip_prefix(&root).unwrap_or(path);
                    files.push((format!("{folder}/{}", inside.display()), path.to_owned()));
                }
            })?;
        }
    }
    Ok(files)
}

/// `name-version` of each package in Cargo.lock: one version each, or held-out files would have twins.
fn locked_packages() -> BTreeMap<&'static str, String> {
    let mut packages = BTreeMap::new();
    let mut name = "";
    for line in include_str!("../../Cargo.lock").lines() {
        if let Some(value) = line.strip_prefix("name = ") {
            name = value.trim_matches('"');
        } else if let Some(version) = line.strip_prefix("version = ") {
            packages.insert(name, format!("{name}-{}", version.trim_matches('"')));
        }
    }
    packages
}

/// The file itself, or every file of readable size in the folder.
fn text_files(path: &Path) -> Result<Vec<(String, PathBuf)>> {
    let metadata = std::fs::metadata(path).with_context(|| format!("--text {}", path.display()))?;
    if metadata.is_file() {
        return Ok(vec![(String::new(), path.to_owned())]);
    }
    let mut files = Vec::new();
    walk(path, &mut |file| {
        files.push((file.strip_prefix(path).unwrap_or(file).display().to_string(), file.to_owned()));
    })?;
    Ok(files)
}

fn walk(folder: &Path, visit: &mut impl FnMut(&Path)) -> Result<()> {
    for entry in std::fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
        let entry = entry?;
        let metadata = entry.metadata()?; // of a link itself: never followed, so no cycles
        if metadata.is_dir() {
            walk(&entry.path(), visit)?;
        } else if metadata.is_file() && FILE_BYTES.contains(&metadata.len()) {
            visit(&entry.path());
        }
    }
    Ok(())
}

/// 64-bit FNV-1a: the same on every machine, unlike the standard library's hasher.
pub fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xCBF2_9CE4_8422_2325, |hash, &b| (hash ^ u64::from(b)).wrapping_mul(0x0100_0000_01B3))
}
