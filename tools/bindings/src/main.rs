//! Makes the Rust bindings under `src/grpc/proto` from the protocol files in `tools/bindings/proto`, or says whether they
//! still are what those files give.
//!
//! ```text
//! cargo run              writes the bindings
//! cargo run -- --check   writes nothing; fails if what is there differs
//! ```
//!
//! Needs no protoc. What it writes depends on the protocol files and the locked versions of its dependencies alone.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};

const PROTOCOLS: [&str; 5] = [
    "services/snapshots/v1/snapshots.proto",
    "services/diff/v1/diff.proto",
    "services/content/v1/content.proto",
    "services/version/v1/version.proto",
    "runtime/v1/api.proto",
];

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let check = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => false,
        ["--check"] => true,
        _ => bail!("nothing, or --check"),
    };
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let bindings = here.join("../../src/grpc/proto");
    let fresh = tempfile::tempdir().context("cannot make a directory for what is generated")?;
    generate(&here.join("proto"), fresh.path())?;
    let (made, there) = (generated(fresh.path())?, generated(&bindings)?);
    if check {
        let same = made == there && made.iter().all(|name| read(fresh.path(), name) == read(&bindings, name));
        if !same {
            bail!("{} is not what the protocol files give: run tools/bindings", bindings.display());
        }
        return Ok(());
    }
    for name in there.iter().filter(|name| !made.contains(name)) {
        fs::remove_file(bindings.join(name)).with_context(|| format!("cannot remove {}", name.display()))?;
    }
    for name in made {
        fs::copy(fresh.path().join(&name), bindings.join(&name))
            .with_context(|| format!("cannot write {}", name.display()))?;
    }
    Ok(())
}

fn generate(protocols: &Path, to: &Path) -> anyhow::Result<()> {
    let mut descriptors = protox::compile(PROTOCOLS, [protocols]).context("cannot compile the protocol files")?;
    for file in &mut descriptors.file {
        // Comments of protocol files are no Markdown.
        file.source_code_info = None;
    }
    tonic_prost_build::configure()
        .build_transport(false)
        .out_dir(to)
        .compile_fds(descriptors)
        .context("cannot generate the bindings")
}

/// Names of generated files: they are packages, such as `containerd.types.rs`.
fn generated(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let failed = || format!("cannot list {}", directory.display());
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).with_context(failed)? {
        let name = PathBuf::from(entry.with_context(failed)?.file_name());
        if name.to_string_lossy().matches('.').count() > 1 {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

fn read(directory: &Path, name: &Path) -> Option<Vec<u8>> {
    fs::read(directory.join(name)).ok()
}
