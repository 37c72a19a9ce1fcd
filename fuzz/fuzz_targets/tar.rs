//! A foreign layer tar. Every entry has a path that stays inside; contents have the length that was announced, whether
//! they are read in runs or in one go; reading in small pieces gives the same entries.
//!
//! Input: one byte of choices, the tar or a compressed blob of one.
#![no_main]

use std::io::{BufReader, Read};

use headstart::model::EntryKind;
use headstart::tar::{Reader, Run};
use libfuzzer_sys::fuzz_target;

/// Bytes of one file that are read; holes cost nothing in a tar.
const BYTES: u64 = 1 << 20;

fuzz_target!(|input: &[u8]| {
    let Some((choice, tar)) = input.split_first() else { return };
    let whole = entries(tar, choice & 1 == 0);
    let pieces = entries(BufReader::with_capacity(1 + usize::from(*choice), Trickle(tar)), choice & 1 == 1);
    assert_eq!(whole, pieces);
});

/// A source that gives at most seven bytes at a time.
struct Trickle<'a>(&'a [u8]);

impl Read for Trickle<'_> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let len = buf.len().min(7);
        self.0.read(&mut buf[..len])
    }
}

fn entries(source: impl Read, runs: bool) -> Vec<String> {
    let mut reader = Reader::new(source);
    let mut texts = Vec::new();
    loop {
        let entry = match reader.next_entry() {
            Ok(Some(entry)) => entry,
            Ok(None) => break,
            Err(error) => {
                texts.push(error.to_string());
                assert!(matches!(reader.next_entry(), Ok(None)), "after an error there is nothing");
                break;
            }
        };
        let mut text = format!("{entry:?}");
        if let EntryKind::Regular { size } = entry.kind {
            match body(&mut reader, size, runs) {
                Ok(content) => text += &content,
                Err(()) => {
                    texts.push(text + " cut");
                    break;
                }
            }
        }
        texts.push(text);
    }
    texts
}

/// A digest of the content's beginning. Files that are larger than what is read here are passed over.
fn body(reader: &mut Reader<impl Read>, size: u64, runs: bool) -> Result<String, ()> {
    if size > BYTES {
        return Ok(" large".to_owned());
    }
    let mut content: Vec<u8> = Vec::new();
    let mut buffer = [0; 4096];
    if runs {
        while let Some(run) = reader.next_run() {
            match run {
                Run::Hole(len) => content.resize(content.len() + usize::try_from(len).unwrap(), 0),
                Run::Data(len) => {
                    let end = content.len() as u64 + len;
                    while (content.len() as u64) < end {
                        let room = buffer.len().min(usize::try_from(end - content.len() as u64).unwrap());
                        let read = reader.read_body(&mut buffer[..room]).map_err(drop)?;
                        assert_ne!(read, 0, "a run is as long as it says");
                        content.extend_from_slice(&buffer[..read]);
                    }
                }
            }
        }
    } else {
        loop {
            match reader.read_body(&mut buffer).map_err(drop)? {
                0 => break,
                read => content.extend_from_slice(&buffer[..read]),
            }
        }
    }
    assert_eq!(content.len() as u64, size);
    Ok(format!(" {:?}", headstart::model::Digest::of(headstart::model::Algorithm::Sha256, &content)))
}
