//! Blobs that we write, read by the `zstd` command; streams that it writes, read by us.

use std::io::Write as _;
use std::process::{Command, Stdio};

use headstart::chunked::{BlobAssembler, Compression, SequentialError, SequentialReader, compress_chunk};
use headstart::model::{Algorithm, DiffId, Digest};

/// Runs `zstd` on `input` and gives what it writes.
#[track_caller]
fn zstd(arguments: &[&str], input: &[u8]) -> Vec<u8> {
    let mut child = Command::new("zstd")
        .args(["--quiet", "--stdout"])
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the zstd command is there");
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let writer = std::thread::spawn(move || stdin.write_all(&input));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    assert!(output.status.success(), "zstd {arguments:?}: {}", output.status);
    output.stdout
}

/// Bytes that compress to about half.
fn image(len: usize) -> Vec<u8> {
    (0_u32..).map(|i| (i.wrapping_mul(2_654_435_761) >> 24).to_le_bytes()[0] & 0x0f).take(len).collect()
}

#[test]
fn a_blob_with_an_index_is_a_plain_stream_to_zstd() {
    let image = image(3_000_000);
    for level in [1, 3, 19] {
        let mut assembler = BlobAssembler::new(Vec::new(), Compression::Zstd);
        for chunk in image.chunks(700_001) {
            assembler.append(&compress_chunk(level, chunk), chunk.len() as u64).unwrap();
        }
        let (blob, _) = assembler.finish().unwrap();
        assert!(zstd(&["--decompress"], &blob) == image, "level {level}");
    }
}

#[test]
fn streams_of_zstd_are_read_from_start_to_end() {
    let image = image(9_000_000);
    for arguments in [&["-1"][..], &["-19", "--no-check"], &["-3", "--long=27"], &["-5", "--rsyncable", "-T2"]] {
        let blob = [zstd(arguments, &image), zstd(arguments, b"and another frame")].concat();
        let (found, summary) = SequentialReader::new(Vec::new(), Compression::Zstd, 1 << 30).run(&blob[..]).unwrap();
        let whole = [&image[..], b"and another frame"].concat();
        assert!(found == whole, "{arguments:?}");
        assert_eq!(summary.diff_id, DiffId(Digest::of(Algorithm::Sha256, &whole)));
    }
}

/// Memory is bounded by the window, and the window by what `zstd` itself takes unasked.
#[test]
fn windows_beyond_the_limit_are_refused() {
    let stream = zstd(&["-1", "--ultra", "--long=28", "--zstd=wlog=28"], &image(9_000_000));
    let error = SequentialReader::new(Vec::new(), Compression::Zstd, 1 << 30).run(&stream[..]).unwrap_err();
    assert!(matches!(error, SequentialError::Inflate { offset: 0, .. }), "{error}");
}
