//! The OCI distribution client: pulls and pushes manifests and blobs (OCI distribution specification 1.1).
//!
//! [`Client`] is the door. What it guarantees: a manifest or config it returns has the digest that was asked for; a blob
//! range it streams has the right length, unverified; passwords, tokens and signed addresses appear in no error, log line
//! or `Debug`; nothing waits without bound. It knows nothing of layers, stores or files beyond the one it pushes from.
//!
//! | file | what it decides |
//! |---|---|
//! | `hosts` | which servers answer for a registry |
//! | `credentials`, `challenge`, `auth` | who we are, what is asked of us, how it is proved |
//! | `exchange` | one request and one answer, with deadlines |
//! | `endpoint` | one server: trust, headers, redirects |
//! | `retry` | transient or fatal, and how long to wait |
//! | `client`, `blob`, `push` | what is asked of whom, and in which order |

mod auth;
mod blob;
mod challenge;
mod client;
mod credentials;
mod endpoint;
mod error;
mod exchange;
mod hosts;
mod push;
mod retry;
mod secret;

pub use blob::RemoteBlobs;
pub use client::{Client, ClientConfig, Fetched};
pub use credentials::{
    ClusterError, ClusterSecrets, CredentialConfig, CredentialError, Credentials, PullLogin, PulledLogins, Pulling,
};
pub use error::{Attempt, Attempts, RegistryError, TryError};
pub use exchange::MIN_PROGRESS;
#[cfg(feature = "testkit")]
pub use hosts::servers_in;
pub use hosts::{HostsError, faulty_hosts};
pub use push::{BlobContent, Pushed, Upload};
pub use retry::{Patience, is_transient};
pub use secret::{SafeUrl, Secret};
