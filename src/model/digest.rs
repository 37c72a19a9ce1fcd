//! Content digests. Each identity is its own type, so that a blob can never be asked for by its diffID.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::Digest as _;

/// A digest algorithm registered by the OCI image specification (`descriptor.md`, *Registered Algorithms*).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Algorithm {
    /// SHA-256, 32 bytes.
    Sha256,
    /// SHA-512, 64 bytes.
    Sha512,
}

impl Algorithm {
    /// The algorithm's name as it stands before the colon of a digest.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }

    /// Length of a digest in bytes.
    pub const fn size(self) -> usize {
        match self {
            Self::Sha256 => 32,
            Self::Sha512 => 64,
        }
    }
}

/// Why a text is not a digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DigestError {
    /// There is no `algorithm:` in front.
    #[error("{0:?} is not a digest: no algorithm before a colon")]
    NoAlgorithm(String),
    /// The algorithm is none of the registered ones.
    #[error("{0:?} is not a digest this program can check: only sha256 and sha512 are known")]
    UnknownAlgorithm(String),
    /// The encoded part is not lower-case hexadecimal of the algorithm's length.
    #[error(
        "{text:?} is not a {algorithm} digest: {expected} lower-case hexadecimal digits are needed after the colon"
    )]
    BadEncoding {
        /// The text as given.
        text: String,
        /// The algorithm's name.
        algorithm: &'static str,
        /// How many digits a digest of it has.
        expected: usize,
    },
    /// Raw bytes of a length that no algorithm has.
    #[error("a digest of {0} bytes belongs to no known algorithm")]
    BadLength(usize),
}

/// An algorithm and the bytes it gave. Text form `algorithm:hex`, as in OCI descriptors.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest {
    algorithm: Algorithm,
    bytes: [u8; 64],
}

impl Digest {
    /// The digest of `data`.
    pub fn of(algorithm: Algorithm, data: &[u8]) -> Self {
        let mut hasher = Hasher::new(algorithm);
        hasher.update(data);
        hasher.finish()
    }

    /// A digest from its raw bytes: 32 of them are SHA-256, 64 are SHA-512.
    ///
    /// # Errors
    /// [`DigestError::BadLength`] for any other length.
    pub fn from_bytes(raw: &[u8]) -> Result<Self, DigestError> {
        let algorithm = match raw.len() {
            32 => Algorithm::Sha256,
            64 => Algorithm::Sha512,
            other => return Err(DigestError::BadLength(other)),
        };
        let mut bytes = [0; 64];
        bytes[..raw.len()].copy_from_slice(raw);
        Ok(Self { algorithm, bytes })
    }

    /// The algorithm.
    pub const fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// The raw bytes, as many as the algorithm gives.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.algorithm.size()]
    }

    /// The encoded part: lower-case hexadecimal.
    pub fn hex(&self) -> String {
        hex::encode(self.as_bytes())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm.name(), self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        let (name, encoded) = text.split_once(':').ok_or_else(|| DigestError::NoAlgorithm(text.to_owned()))?;
        let algorithm = match name {
            "sha256" => Algorithm::Sha256,
            "sha512" => Algorithm::Sha512,
            _ => return Err(DigestError::UnknownAlgorithm(text.to_owned())),
        };
        let bad = || DigestError::BadEncoding {
            text: text.to_owned(),
            algorithm: algorithm.name(),
            expected: algorithm.size() * 2,
        };
        let lower_hex = encoded.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        if encoded.len() != algorithm.size() * 2 || !lower_hex {
            return Err(bad());
        }
        let mut bytes = [0; 64];
        hex::decode_to_slice(encoded, &mut bytes[..algorithm.size()]).map_err(|_| bad())?;
        Ok(Self { algorithm, bytes })
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

macro_rules! digest_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Digest);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.0)
            }
        }

        impl FromStr for $name {
            type Err = DigestError;

            fn from_str(text: &str) -> Result<Self, DigestError> {
                text.parse().map(Self)
            }
        }
    };
}

digest_type! {
    /// Names a blob by the bytes a registry stores: a compressed layer, a config, a manifest.
    BlobDigest
}
digest_type! {
    /// Names a layer by its decompressed bytes.
    DiffId
}
digest_type! {
    /// Names a stack of layers: the OCI image specification's ChainID (`config.md`, *Layer ChainID*).
    ChainId
}
digest_type! {
    /// Names the payload of a chunk index.
    IndexDigest
}
digest_type! {
    /// Checksum of one chunk's bytes as they are stored in the blob.
    ChunkDigest
}

impl ChainId {
    /// Of the layer `diff_id` on top of the stack `below`, or on nothing.
    pub fn on(below: Option<Self>, diff_id: DiffId) -> Self {
        match below {
            None => Self(diff_id.0),
            Some(below) => Self(Digest::of(Algorithm::Sha256, format!("{below} {diff_id}").as_bytes())),
        }
    }

    /// The ChainID of each layer of a stack, lowest layer first.
    pub fn of_stack(diff_ids: &[DiffId]) -> Vec<Self> {
        let mut chain: Vec<Self> = Vec::with_capacity(diff_ids.len());
        for diff_id in diff_ids {
            chain.push(Self::on(chain.last().copied(), *diff_id));
        }
        chain
    }
}

/// A digest in the making.
#[derive(Clone)]
pub struct Hasher(State);

#[derive(Clone)]
enum State {
    Sha256(sha2::Sha256),
    Sha512(sha2::Sha512),
}

impl fmt::Debug for Hasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hasher")
    }
}

impl Hasher {
    /// A hasher that has seen nothing.
    pub fn new(algorithm: Algorithm) -> Self {
        Self(match algorithm {
            Algorithm::Sha256 => State::Sha256(sha2::Sha256::new()),
            Algorithm::Sha512 => State::Sha512(sha2::Sha512::new()),
        })
    }

    /// Takes in the next bytes.
    pub fn update(&mut self, data: &[u8]) {
        match &mut self.0 {
            State::Sha256(state) => state.update(data),
            State::Sha512(state) => state.update(data),
        }
    }

    /// The digest of everything taken in.
    pub fn finish(self) -> Digest {
        let mut bytes = [0; 64];
        let algorithm = match self.0 {
            State::Sha256(state) => {
                bytes[..32].copy_from_slice(&state.finalize());
                Algorithm::Sha256
            }
            State::Sha512(state) => {
                bytes.copy_from_slice(&state.finalize());
                Algorithm::Sha512
            }
        };
        Digest { algorithm, bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY_SHA256: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn digest_of_nothing_is_the_known_one() {
        assert_eq!(Digest::of(Algorithm::Sha256, b"").to_string(), EMPTY_SHA256);
        assert_eq!(EMPTY_SHA256.parse::<Digest>().unwrap(), Digest::of(Algorithm::Sha256, b""));
    }

    #[test]
    fn texts_that_are_no_digest_are_refused() {
        for text in [
            "",
            "e3b0",
            "md5:d41d8cd98f00b204e9800998ecf8427e",
            "sha256:",
            "sha256:E3B0C44298FC1C149AFBF4C8996FB92427AE41E4649B934CA495991B7852B855",
            "sha256:../../etc/passwd",
            "sha512:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        ] {
            assert!(text.parse::<Digest>().is_err(), "{text:?} was taken for a digest");
        }
    }

    #[test]
    fn chain_ids_follow_the_image_specification() {
        let a = DiffId(Digest::of(Algorithm::Sha256, b"a"));
        let b = DiffId(Digest::of(Algorithm::Sha256, b"b"));
        let chain = ChainId::of_stack(&[a, b]);
        assert_eq!(chain[0].0, a.0);
        assert_eq!(chain[1].0, Digest::of(Algorithm::Sha256, format!("{a} {b}").as_bytes()));
    }
}
