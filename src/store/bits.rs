//! The two records of which chunks are there, as bytes.
//!
//! `present` is what survives a power cut: one bit a chunk, checksummed, replaced as a whole and only after the data it
//! speaks for. `live` is what all processes of this boot share: one *byte* a chunk, so that each chunk is marked by a
//! `pwrite` of its own byte and no two markers disturb each other; it is worth nothing after a reboot. Between its header and
//! the chunks stands how often chunks were evicted, which tells a reader that what he has just read may have gone meanwhile.
//!
//! Both open with magic, version, incompatible and compatible feature words. What is damaged is absent; what is newer
//! is refused.

use std::fmt;

/// Length of either header.
pub(super) const HEADER: usize = 64;

const PRESENT_MAGIC: [u8; 8] = *b"HSPRESNT";
const LIVE_MAGIC: [u8; 8] = *b"HSLIVE\0\0";
const PRESENT_VERSION: u32 = 1;

/// Version 1 did not count evictions; since it is of this boot only, it is made anew rather than understood.
const LIVE_VERSION: u32 = 2;

/// Where the number of evictions stands in a `live` file, and how long it is.
pub(super) const EVICTIONS: usize = HEADER;
pub(super) const EVICTIONS_LEN: usize = 8;

/// Value of a byte of `live` whose chunk is there.
pub(super) const THERE: u8 = 1;
/// Value of a byte of `live` whose chunk is not there.
pub(super) const NOT_THERE: u8 = 0;
/// Value of a byte of `live` whose chunk is being evicted: it is not to be read and not to be written.
pub(super) const GOING: u8 = 2;

/// Why a record is not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Rejected {
    /// Damaged, cut, of another blob or another boot: as if it were not there.
    Worthless(&'static str),
    /// Written by a newer program.
    Newer(String),
}

impl fmt::Display for Rejected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Worthless(why) => f.write_str(why),
            Self::Newer(needs) => write!(f, "it needs {needs}"),
        }
    }
}

/// Bytes that the bits of `chunks` chunks take.
fn bit_bytes(chunks: u32) -> usize {
    usize::try_from(chunks.div_ceil(8)).expect("an eighth of 32 bits fits the address space")
}

/// Length of a `live` file.
pub(super) fn live_len(chunks: u32) -> usize {
    EVICTIONS + EVICTIONS_LEN + usize::try_from(chunks).expect("32 bits fit the address space")
}

/// Where the byte of `chunk` stands in a `live` file.
pub(super) fn live_offset(chunk: u32) -> usize {
    live_len(chunk)
}

fn header(magic: [u8; 8], version: u32, chunks: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER);
    bytes.extend_from_slice(&magic);
    bytes.extend_from_slice(&version.to_le_bytes());
    bytes.extend_from_slice(&0_u32.to_le_bytes()); // incompatible features
    bytes.extend_from_slice(&0_u32.to_le_bytes()); // compatible features
    bytes.extend_from_slice(&0_u32.to_le_bytes()); // checksum
    bytes.extend_from_slice(&u64::from(chunks).to_le_bytes());
    bytes.resize(HEADER, 0);
    bytes
}

fn seal(bytes: &mut [u8], covered: usize) {
    let sum = crc32c::crc32c(&bytes[..covered]).to_le_bytes();
    bytes[20..24].copy_from_slice(&sum);
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk::<N>().copied()
}

/// Checks everything the two headers have in common; `covered` is how much the checksum covers.
fn check(bytes: &[u8], magic: [u8; 8], newest: u32, chunks: u32, covered: usize) -> Result<(), Rejected> {
    let number = |at| field::<4>(bytes, at).map(u32::from_le_bytes).ok_or(Rejected::Worthless("it is too short"));
    if field::<8>(bytes, 0) != Some(magic) {
        return Err(Rejected::Worthless("it does not begin with its magic"));
    }
    let (version, incompatible, sum) = (number(8)?, number(12)?, number(20)?);
    if version > newest {
        return Err(Rejected::Newer(format!("version {version}")));
    }
    if version < newest {
        return Err(Rejected::Worthless("it has an older form"));
    }
    if incompatible != 0 {
        return Err(Rejected::Newer(format!("features {incompatible:#x}")));
    }
    let mut copy = bytes.get(..covered).ok_or(Rejected::Worthless("it is too short"))?.to_vec();
    copy[20..24].fill(0);
    if crc32c::crc32c(&copy) != sum {
        return Err(Rejected::Worthless("its checksum is wrong"));
    }
    if field::<8>(bytes, 24).map(u64::from_le_bytes) != Some(u64::from(chunks)) {
        return Err(Rejected::Worthless("it speaks of another number of chunks"));
    }
    Ok(())
}

/// A bit a chunk, in memory.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Bits {
    chunks: u32,
    bytes: Vec<u8>,
}

impl Bits {
    /// No chunk is there.
    pub(super) fn none(chunks: u32) -> Self {
        Self { chunks, bytes: vec![0; bit_bytes(chunks)] }
    }

    /// Every chunk is there.
    pub(super) fn all(chunks: u32) -> Self {
        let mut bits = Self::none(chunks);
        for chunk in 0..chunks {
            bits.insert(chunk);
        }
        bits
    }

    pub(super) fn insert(&mut self, chunk: u32) {
        debug_assert!(chunk < self.chunks);
        if let Some(byte) = self.bytes.get_mut(bit_bytes(chunk + 1) - 1) {
            *byte |= 1 << (chunk % 8);
        }
    }

    pub(super) fn remove(&mut self, chunk: u32) {
        debug_assert!(chunk < self.chunks);
        if let Some(byte) = self.bytes.get_mut(bit_bytes(chunk + 1) - 1) {
            *byte &= !(1 << (chunk % 8));
        }
    }

    pub(super) fn contains(&self, chunk: u32) -> bool {
        chunk < self.chunks
            && self.bytes.get(bit_bytes(chunk + 1) - 1).is_some_and(|byte| byte & (1 << (chunk % 8)) != 0)
    }

    pub(super) fn count(&self) -> u32 {
        self.bytes.iter().map(|byte| byte.count_ones()).sum()
    }

    /// The bytes of a `present` file.
    pub(super) fn to_present(&self) -> Vec<u8> {
        let mut bytes = header(PRESENT_MAGIC, PRESENT_VERSION, self.chunks);
        bytes.extend_from_slice(&self.bytes);
        let covered = bytes.len();
        seal(&mut bytes, covered);
        bytes
    }

    /// Reads a `present` file of a blob of `chunks` chunks.
    pub(super) fn from_present(bytes: &[u8], chunks: u32) -> Result<Self, Rejected> {
        check(bytes, PRESENT_MAGIC, PRESENT_VERSION, chunks, bytes.len())?;
        let bits = Self { chunks, bytes: bytes.get(HEADER..).unwrap_or_default().to_vec() };
        if bits.bytes.len() != bit_bytes(chunks) {
            return Err(Rejected::Worthless("its length does not fit the number of chunks"));
        }
        if !chunks.is_multiple_of(8) && bits.bytes.last().is_some_and(|last| last >> (chunks % 8) != 0) {
            return Err(Rejected::Worthless("it has bits behind its last chunk"));
        }
        Ok(bits)
    }

    /// The bytes of a `live` file of boot `boot`.
    pub(super) fn to_live(&self, boot: BootId) -> Vec<u8> {
        let mut bytes = header(LIVE_MAGIC, LIVE_VERSION, self.chunks);
        bytes[32..48].copy_from_slice(&boot.0);
        seal(&mut bytes, HEADER);
        bytes.extend_from_slice(&[0; EVICTIONS_LEN]);
        bytes.extend((0..self.chunks).map(|chunk| if self.contains(chunk) { THERE } else { NOT_THERE }));
        bytes
    }
}

/// Says whether the header (and length) of a `live` file is one of this boot and this blob.
pub(super) fn check_live(bytes: &[u8], len: u64, chunks: u32, boot: BootId) -> Result<(), Rejected> {
    check(bytes, LIVE_MAGIC, LIVE_VERSION, chunks, HEADER)?;
    if len != live_len(chunks) as u64 {
        return Err(Rejected::Worthless("its length does not fit the number of chunks"));
    }
    if field::<16>(bytes, 32) != Some(boot.0) {
        return Err(Rejected::Worthless("it is of another boot"));
    }
    Ok(())
}

/// Names one run of the kernel: what is only in memory is lost between two of them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct BootId([u8; 16]);

impl BootId {
    /// From the text of `/proc/sys/kernel/random/boot_id`.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut bytes = [0; 16];
        hex::decode_to_slice(text.trim().replace('-', ""), &mut bytes).ok()?;
        Some(Self(bytes))
    }

    /// A boot that tests invent.
    #[cfg(any(test, feature = "testkit"))]
    pub const fn invented(number: u8) -> Self {
        Self([number; 16])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some_bits(chunks: u32, step: usize) -> Bits {
        let mut bits = Bits::none(chunks);
        (0..chunks).step_by(step).for_each(|chunk| bits.insert(chunk));
        bits
    }

    #[test]
    fn bits_survive_the_file() {
        for chunks in [0, 1, 7, 8, 9, 64, 1000] {
            for bits in [Bits::none(chunks), Bits::all(chunks), some_bits(chunks, 3)] {
                let back = Bits::from_present(&bits.to_present(), chunks).unwrap();
                assert!(back == bits);
                assert_eq!(back.count() as usize, (0..chunks).filter(|chunk| bits.contains(*chunk)).count());
            }
        }
    }

    #[test]
    fn a_damaged_record_is_worthless_wherever_the_damage_is() {
        let good = some_bits(21, 2).to_present();
        for position in 0..good.len() {
            let mut bad = good.clone();
            bad[position] ^= 0x10;
            assert!(Bits::from_present(&bad, 21).is_err(), "byte {position} changed unseen");
        }
        for length in 0..good.len() {
            assert!(Bits::from_present(&good[..length], 21).is_err(), "cut to {length} bytes unseen");
        }
        assert!(Bits::from_present(&good, 22).is_err());
    }

    #[test]
    fn a_newer_record_is_refused_not_ignored() {
        for (at, value, needs) in [(8, 2_u32, "version 2"), (12, 4, "features 0x4")] {
            let mut newer = Bits::all(5).to_present();
            newer[at..at + 4].copy_from_slice(&value.to_le_bytes());
            assert!(
                matches!(Bits::from_present(&newer, 5), Err(Rejected::Newer(said)) if said == needs),
                "{needs} was not refused"
            );
        }
    }

    #[test]
    fn a_live_record_belongs_to_one_boot_and_one_number_of_chunks() {
        let (boot, other) = (BootId::invented(1), BootId::invented(2));
        let live = some_bits(10, 3).to_live(boot);
        assert_eq!(live.len(), live_len(10));
        assert_eq!((live[live_offset(0)], live[live_offset(1)], live[live_offset(9)]), (THERE, NOT_THERE, THERE));
        let len = live.len() as u64;
        assert_eq!(check_live(&live, len, 10, boot), Ok(()));
        assert_eq!(check_live(&live, len, 10, other), Err(Rejected::Worthless("it is of another boot")));
        assert!(check_live(&live, len, 11, boot).is_err());
        assert!(check_live(&live, len - 1, 10, boot).is_err());
        assert!(check_live(&live[..HEADER - 1], len, 10, boot).is_err());
    }

    #[test]
    fn boot_ids_are_read_as_the_kernel_writes_them() {
        let id = BootId::parse("385f0b8b-71c1-426a-b7b6-1baca5196b5f\n").unwrap();
        assert_eq!(id.0[..3], [0x38, 0x5f, 0x0b]);
        assert_eq!(BootId::parse("385f0b8b"), None);
    }
}
