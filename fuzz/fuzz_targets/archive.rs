//! A foreign file that is said to be a tarred layout or what `docker save` wrote. What it is found to hold lies inside of
//! it: the top document can be read and checked, and each blob that it names has a size that the file has room for.
//!
//! Input: the file.
#![no_main]

use std::cell::RefCell;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;

use headstart::layout::{LayoutError, LayoutReader};
use headstart::oci::{ArchiveImage, Document, LayoutImage};
use libfuzzer_sys::fuzz_target;
use tempfile::NamedTempFile;

thread_local! {
    /// One file for all inputs.
    static FILE: RefCell<NamedTempFile> = RefCell::new(NamedTempFile::new().expect("a temporary file can be made"));
}

fuzz_target!(|input: &[u8]| {
    FILE.with_borrow_mut(|file| {
        fill(file.as_file(), input).expect("the temporary file can be written");
        let size = input.len() as u64;
        for image in [LayoutImage::Only, LayoutImage::Named("latest".to_owned())] {
            check(LayoutReader::archive(file.path(), &image), size);
        }
        for image in [ArchiveImage::Only, ArchiveImage::Index(1)] {
            check(LayoutReader::docker_archive(file.path(), &image), size);
        }
        file.flush().expect("nothing is buffered");
    });
});

fn fill(file: &File, bytes: &[u8]) -> std::io::Result<()> {
    file.set_len(0)?;
    file.write_all_at(bytes, 0)
}

fn check(opened: Result<LayoutReader, LayoutError>, size: u64) {
    let reader = match opened {
        Ok(reader) => reader,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    let top = reader.top().clone();
    let Ok(bytes) = reader.document(&top) else { return };
    assert_eq!(bytes.len() as u64, top.size);
    if let Ok(Document::Manifest(manifest)) = Document::parse(&bytes, None) {
        for named in manifest.layers.iter().chain([&manifest.config]) {
            // What a docker archive holds is described by what is made up for it, which lies in no file.
            if let Ok(found) = reader.blob_size(&named.digest) {
                assert!(found <= size.max(bytes.len() as u64), "{found} bytes in a file of {size}");
            }
        }
    }
}
